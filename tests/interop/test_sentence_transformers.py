"""sentence-transformers on our folder: an embedding is the pooling of our hidden states."""

import pytest
import torch

import hfllm


pytestmark = pytest.mark.slow

sentence_transformers = pytest.importorskip("sentence_transformers")

TEXTS = ["hello", "a much longer sentence, which makes the others be padded", "def f(x):\n    return x"]


# What sentence-transformers knows a model to take. Left to itself it finds that our tokenizer has a chat template, and
# then encodes every plain text as a message of the user; this restricts it to the text as it is.
PLAIN_TEXT = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}


@torch.no_grad()
def hidden_states(folder: str, tokenizer, text: str, *, as_message: bool) -> torch.Tensor:
    """The last layer's output (T, C) for one text alone."""
    if as_message:
        messages = [{"role": "user", "content": text}]
        inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(text, return_tensors="pt")
    return hfllm.GPTModel.from_pretrained(folder).eval()(**inputs).last_hidden_state[0]


def make_encoder(folder: str, pooling_mode: str, **options):
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    transformer = Transformer(folder, **options)
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode=pooling_mode)
    return sentence_transformers.SentenceTransformer(modules=[transformer, pooling], device="cpu")


POOLED = {
    "mean": lambda states: states.mean(0),
    "max": lambda states: states.max(0).values,
    "lasttoken": lambda states: states[-1],
}


@pytest.mark.parametrize("preset", ["modern", "book"])
@pytest.mark.parametrize("pooling_mode", list(POOLED))
def test_embeddings_pool_the_hidden_states_of_a_text_and_not_of_its_padding(pooling_mode, preset, save_gpt, tokenizer):
    folder = save_gpt(preset)
    encoder = make_encoder(folder, pooling_mode, modality_config=PLAIN_TEXT, module_output_name="token_embeddings")
    found = encoder.encode(TEXTS, convert_to_tensor=True)
    expected = [POOLED[pooling_mode](hidden_states(folder, tokenizer, text, as_message=False)) for text in TEXTS]
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_left_to_itself_it_encodes_each_text_as_a_message_of_the_user(folder, tokenizer):
    """A fact about sentence-transformers that surprises: `hello` becomes a whole turn of a chat, as the model's author
    is taken to mean it. Our template is what it uses."""
    found = make_encoder(folder, "mean").encode(TEXTS, convert_to_tensor=True)
    expected = [hidden_states(folder, tokenizer, text, as_message=True).mean(0) for text in TEXTS]
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_an_encoder_is_trained_saved_and_opened_again(folder, tmp_path):
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    encoder = sentence_transformers.SentenceTransformer(folder, device="cpu")
    before = encoder.encode(TEXTS, convert_to_tensor=True)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    objective = MultipleNegativesRankingLoss(encoder)
    losses = []
    for _ in range(10):
        pairs = [encoder.preprocess(TEXTS), encoder.preprocess([text.upper() for text in TEXTS])]
        loss = objective(pairs, None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2, losses
    after = encoder.encode(TEXTS, convert_to_tensor=True)
    assert (after - before).abs().max() > 0.01

    encoder.save_pretrained(str(tmp_path))
    opened = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    torch.testing.assert_close(opened.encode(TEXTS, convert_to_tensor=True), after)
