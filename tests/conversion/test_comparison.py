import copy

import numpy as np
import pytest
import torch
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

import hfllm
from hfllm.conversion import compare_logits
from hfllm.conversion.comparison import HARD_TEXTS, greedy_tokens, random_prompts, tokenizer_differences
from tests.conftest import make_tiny_config


def constant(logits):
    """A function of input_ids that always returns these logits."""
    return lambda input_ids, **inputs: torch.tensor(logits)


IDS = torch.tensor([[1, 2]])


def test_difference_and_agreement_are_those_of_a_hand_count():
    reference = constant([[[1.0, 4.0, -6.0], [2.0, 0.0, 1.0]]])
    candidate = constant([[[1.5, 4.0, -6.0], [2.0, 3.0, 1.0]]])  # 0.5 and 3 apart; the second argmax is another
    comparison = compare_logits(reference, candidate, IDS)
    assert comparison.largest_difference == 3.0
    assert comparison.largest_logit == 6.0
    assert comparison.agreement == 0.5
    assert comparison.num_positions == 2
    text = "largest |difference| 3.00e+00 of logits up to 6.0, the same likeliest token at 50.00% of 2 positions"
    assert str(comparison) == text


def test_several_batches_count_together():
    def zeros(ids):
        return torch.zeros(*ids.shape, 3)

    def off_by_the_length(ids):
        return torch.zeros(*ids.shape, 3) + ids.shape[1]

    comparison = compare_logits(zeros, off_by_the_length, random_prompts(5, [1, 4, 2], num_rows=2))
    assert comparison.largest_difference == 4.0
    assert comparison.num_positions == 2 * (1 + 4 + 2)


def test_what_is_not_a_number_is_an_infinite_difference_whichever_side_has_it():
    number, infinite, none = constant([[[1.0]]]), constant([[[torch.inf]]]), constant([[[torch.nan]]])
    one = torch.tensor([[1]])
    for reference, candidate in ((number, none), (none, number), (none, none), (number, infinite), (infinite, number)):
        comparison = compare_logits(reference, candidate, one)
        assert comparison.largest_difference == torch.inf
        assert comparison.largest_logit in (0.0, 1.0)  # else a tolerance in proportion to it would allow anything
    assert compare_logits(infinite, infinite, one).largest_difference == 0.0


def test_padding_is_handed_over_and_not_compared():
    masks = []

    def reference(input_ids, attention_mask):
        masks.append(attention_mask)
        return torch.tensor([[[9.0], [1.0]]])

    mask = torch.tensor([[0, 1]])
    comparison = compare_logits(reference, constant([[[0.0], [1.0]]]), IDS, attention_mask=mask)
    assert (comparison.largest_difference, comparison.num_positions) == (0.0, 1)
    assert torch.equal(masks[0], mask)
    with pytest.raises(ValueError, match="attention_mask must have the shapes"):
        compare_logits(reference, reference, IDS, attention_mask=mask[:, :1])


def test_models_arrays_and_outputs_are_all_taken(tiny_model):
    def as_array(input_ids) -> np.ndarray:
        return tiny_model(input_ids).logits.detach().numpy()

    for candidate in (tiny_model, as_array, lambda ids: tiny_model(ids), lambda ids: tiny_model(ids).logits):
        assert compare_logits(tiny_model, candidate, IDS).largest_difference == 0.0


def test_a_model_in_training_is_compared_without_dropout_and_continues_training():
    config = make_tiny_config("book", embedding_dropout=0.5, residual_dropout=0.5)
    model = hfllm.GPTForCausalLM(config).train()
    assert compare_logits(model, copy.deepcopy(model).eval(), IDS).largest_difference == 0.0
    assert model.training and model.model.embedding_dropout.training


def test_other_shapes_and_nothing_at_all_are_errors():
    with pytest.raises(ValueError, match=r"\(1, 2\) the reference has logits \(1, 2, 1\), the candidate \(1, 1, 2\)"):
        compare_logits(constant([[[1.0], [2.0]]]), constant([[[1.0, 2.0]]]), IDS)
    with pytest.raises(ValueError, match="nothing to compare"):
        compare_logits(constant([[[1.0]]]), constant([[[1.0]]]), [])


def test_random_prompts_are_the_same_again_and_have_the_lengths_asked_for():
    prompts = random_prompts(7, [1, 5], num_rows=3)
    assert [tuple(prompt.shape) for prompt in prompts] == [(3, 1), (3, 5)]
    assert all(torch.equal(one, other) for one, other in zip(prompts, random_prompts(7, [1, 5], num_rows=3)))
    assert random_prompts(7, [500])[0].unique().tolist() == list(range(7))


def test_greedy_tokens_are_those_of_generate(tiny_model):
    prompt = torch.tensor([[3, 4, 5], [6, 7, 8]])
    tiny_model.generation_config.eos_token_id = None
    expected = tiny_model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=8,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens, margins = greedy_tokens(tiny_model, prompt, 8)
    assert tokens.tolist() == expected.sequences[:, 3:].tolist()
    best = torch.stack(expected.logits, dim=1).topk(2).values
    torch.testing.assert_close(margins, best[..., 0] - best[..., 1])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return hfllm.train_bpe(["the cat sees a dog. a dog hears the cat\n"] * 20, 300)


def test_a_tokenizer_does_not_differ_from_itself(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_differences(tokenizer, PreTrainedTokenizerFast.from_pretrained(tmp_path)) == []


def normalized(tokenizer):
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()  # as Qwen2Tokenizer does


def without_bos(tokenizer):
    tokenizer.backend_tokenizer.post_processor = None


def without_pad(tokenizer):
    tokenizer.pad_token = None


def without_template(tokenizer):
    tokenizer.chat_template = None


def with_one_more(tokenizer):
    tokenizer.add_tokens(["<new>"])


def with_spaces_in_front(tokenizer):
    tokenizer.backend_tokenizer.pre_tokenizer[1].add_prefix_space = True


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (normalized, "ids of 'Caf"),
        (without_bos, "ids of 'Every effort moves you'"),
        (without_pad, "pad_token_id: 2 became None"),
        (without_template, "chat template"),
        (with_one_more, "number of ids: 279 became 280"),
        (with_spaces_in_front, "ids of 'Every effort moves you'"),
    ],
)
def test_each_way_to_lose_a_tokenizer_is_found(tokenizer, change, words):
    changed = copy.deepcopy(tokenizer)
    change(changed)
    assert any(difference.startswith(words) for difference in tokenizer_differences(tokenizer, changed))


def test_the_hard_texts_are_what_they_look_like():
    """Editors like to compose accents; here they must stay as written."""
    accents = HARD_TEXTS[1]
    assert "\u00e9" in accents and "e\u0301" in accents
    assert any("\r\n" in text for text in HARD_TEXTS)
