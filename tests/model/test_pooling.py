"""The input of the classifier: the last token, or the mean of all tokens; checked against sums by hand."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, DynamicCache, LlamaConfig, LlamaForSequenceClassification

import hfllm
from tests.conftest import make_tiny_config


@pytest.fixture(params=["modern", "book"])
def classifier(request) -> hfllm.GPTForSequenceClassification:
    return hfllm.GPTForSequenceClassification(make_tiny_config(request.param, classifier_pooling="mean")).eval()


def mean_by_hand(classifier, text: torch.Tensor) -> torch.Tensor:
    """The logits of one unpadded text (1, T)."""
    states = classifier.model(text).last_hidden_state[0]
    return classifier.score(sum(states) / len(states))


def test_the_default_is_the_last_token_as_in_transformers_own_classes():
    config = make_tiny_config("modern")
    assert config.classifier_pooling == "last"
    classifier, text = hfllm.GPTForSequenceClassification(config).eval(), torch.tensor([[5, 9, 4, 7]])
    expected = classifier.score(classifier.model(text).last_hidden_state[:, -1])
    torch.testing.assert_close(classifier(text).logits, expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mean_is_over_the_tokens_of_the_attention_mask(classifier, side):
    # The first text holds and ends with the pad token's own id, which the mask says is text.
    texts = [torch.tensor([[5, 2, 7, 2]]), torch.tensor([[9, 4, 3, 8, 6, 5, 11]])]
    rows, masks = [], []
    for text in texts:
        padding = torch.full((1, 9 - text.shape[1]), 2)
        parts, mask = [text, padding], [torch.ones_like(text), torch.zeros_like(padding)]
        rows.append(torch.cat(parts[::-1] if side == "left" else parts, 1))
        masks.append(torch.cat(mask[::-1] if side == "left" else mask, 1))
    logits = classifier(torch.cat(rows), attention_mask=torch.cat(masks)).logits
    for row, text in zip(logits, texts):
        torch.testing.assert_close(row, mean_by_hand(classifier, text), atol=1e-5, rtol=1e-5)


def test_the_first_and_the_last_states_may_be_pooled_together(classifier):
    text = torch.tensor([[5, 2, 7, 9]])
    mean_of_last = classifier.model(text).last_hidden_state[0].mean(0)
    embeddings = classifier.model.embed_tokens.weight[text[0]]
    normalised = embeddings / (embeddings.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    expected = classifier.score(mean_of_last + normalised.mean(0))
    classifier.config.classifier_pooling = "mean_first_last"
    padded, mask = torch.tensor([[5, 2, 7, 9, 2, 2]]), torch.tensor([[1, 1, 1, 1, 0, 0]])
    torch.testing.assert_close(classifier(padded, attention_mask=mask).logits[0], expected)
    states = classifier.model.embed_tokens(padded)
    torch.testing.assert_close(classifier(inputs_embeds=states, attention_mask=mask).logits[0], expected)


def test_without_a_mask_the_pad_token_says_what_is_padding(classifier):
    text = torch.tensor([[5, 9, 4]])
    padded = torch.tensor([[5, 9, 4, 2, 2], [8, 6, 7, 3, 5]])
    torch.testing.assert_close(classifier(padded).logits[0], mean_by_hand(classifier, text), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_row_of_several_documents_is_scored_by_its_last_one(pooling):
    classifier = hfllm.GPTForSequenceClassification(make_tiny_config("modern", classifier_pooling=pooling)).eval()
    row = torch.tensor([[5, 9, 4, 7, 8, 6]])
    packed = classifier(row, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]])).logits
    torch.testing.assert_close(packed, classifier(row[:, 3:]).logits)


def test_every_token_of_a_text_gets_the_same_share_of_the_gradient(classifier):
    embeddings = torch.randn(1, 5, classifier.config.hidden_size)
    states = classifier.model(inputs_embeds=embeddings).last_hidden_state.detach().requires_grad_()
    pooled = classifier._mean_of_text(states, torch.tensor([[True, True, True, True, False]]), None)
    pooled.sum().backward()
    torch.testing.assert_close(states.grad[0, :, 0], torch.tensor([0.25, 0.25, 0.25, 0.25, 0]))


def test_a_filled_cache_has_no_hidden_states_to_take_a_mean_of(classifier):
    cache = DynamicCache(config=classifier.config)
    classifier(torch.tensor([[5, 9]]), past_key_values=cache, use_cache=True)  # an empty one is filled
    with pytest.raises(ValueError, match="Pass the whole text, without a filled cache"):
        classifier(torch.tensor([[4]]), past_key_values=cache)


def test_another_word_for_the_pooling_is_refused():
    with pytest.raises(ValueError, match="classifier_pooling"):
        make_tiny_config("modern", classifier_pooling="cls")


LOSSES = {
    "single_label_classification": torch.tensor([2, 0, 1]),
    "multi_label_classification": torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1]]),
    "regression": torch.tensor([2.5, -1.0, 40.0]),
}


@pytest.mark.parametrize("problem_type", LOSSES)
def test_the_losses_are_those_of_transformers_own_classifiers(problem_type):
    labels, num_labels = LOSSES[problem_type], 1 if problem_type == "regression" else 3
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    theirs = LlamaForSequenceClassification(
        LlamaConfig(**sizes, intermediate_size=64, num_labels=num_labels, pad_token_id=2, problem_type=problem_type)
    ).eval()
    config = make_tiny_config("modern", num_labels=num_labels, problem_type=problem_type)
    ours = hfllm.GPTForSequenceClassification(config).eval()
    logits = torch.randn(3, num_labels)
    losses = []
    for model in (ours, theirs):
        hidden_size = model.config.hidden_size
        with torch.no_grad():
            model.score = torch.nn.Linear(hidden_size, num_labels)
            model.score.forward = lambda states: logits if states.ndim == 2 else logits[:, None].expand(-1, 5, -1)
            losses.append(model(torch.arange(5, 20).view(3, 5), labels=labels).loss)
    torch.testing.assert_close(losses[0], losses[1])
    by_hand = {
        "single_label_classification": lambda: -logits.log_softmax(-1)[range(3), labels].mean(),
        "multi_label_classification": lambda: (
            -(labels * logits.sigmoid().log() + (1 - labels) * (-logits).sigmoid().log()).mean()
        ),
        "regression": lambda: ((logits[:, 0] - labels) ** 2).mean(),
    }
    torch.testing.assert_close(losses[0], by_hand[problem_type]())


def test_a_head_for_numbers_has_a_bias_and_one_that_was_saved_without_it_says_the_same(tmp_path):
    config = make_tiny_config("modern", num_labels=1, problem_type="regression")
    assert hfllm.GPTForSequenceClassification(config).score.bias.tolist() == [0.0]

    model = hfllm.GPTForSequenceClassification(make_tiny_config("modern", num_labels=1)).eval()
    ids = torch.arange(5, 15)[None]
    before = model(ids, labels=torch.tensor([3.0])).logits
    assert model.config.problem_type == "regression"  # as transformers concludes from the first labels
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(AutoModelForSequenceClassification.from_pretrained(tmp_path)(ids).logits, before)
