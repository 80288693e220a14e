"""Scores against scikit-learn's, and what each method trains."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss, precision_recall_fscore_support
from transformers import GPT2Config, GPT2ForSequenceClassification

import hfllm
from hfllm.report.confusion import plot_confusion
from hfllm.training.classification import freeze_all_but, logistic_regression, score_predictions
from tests.conftest import make_tiny_config


NAMES = ["a", "b", "c", "never"]


@pytest.fixture(scope="module")
def scored():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 200)
    logits = generator.normal(size=(200, 4)).astype(np.float32) + 1.5 * np.eye(4)[labels]
    logits[:, 3] = -20  # a label that is neither there nor said
    return logits, labels, score_predictions(logits, labels, NAMES)


def test_scores_are_scikit_learns(scored):
    logits, labels, scores = scored
    said = logits.argmax(1)
    assert scores["accuracy"] == pytest.approx(accuracy_score(labels, said))
    assert scores["f1_macro"] == pytest.approx(f1_score(labels, said, average="macro"))
    assert scores["loss"] == pytest.approx(log_loss(labels, torch.tensor(logits).double().softmax(1), labels=range(4)))
    assert scores["confusion"] == confusion_matrix(labels, said, labels=range(4)).tolist()
    expected = precision_recall_fscore_support(labels, said, labels=range(4), zero_division=0)
    for index, name in enumerate(NAMES):
        row = scores["per_label"][name]
        assert [row["precision"], row["recall"], row["f1"], row["texts"]] == pytest.approx([e[index] for e in expected])


def test_the_calibration_error_is_the_distance_of_confidence_and_accuracy():
    """Ten texts at a confidence of 0.9 of which 6 are right, ten at 0.6 of which 6 are right: (0.3 + 0.0) / 2."""
    sure, unsure = np.log([0.9, 0.1]), np.log([0.601, 0.399])
    logits = np.array([sure] * 10 + [unsure] * 10)
    labels = np.array(([0] * 6 + [1] * 4) * 2)
    scores = score_predictions(logits, labels, ["x", "y"])
    assert scores["ece"] == pytest.approx((0.3 + 0.001) / 2)
    assert [row["texts"] for row in scores["reliability"]] == [10, 10]
    assert scores["majority_accuracy"] == 0.6


def test_the_picture_is_drawn(scored, tmp_path):
    path = plot_confusion(scored[2], NAMES, tmp_path / "confusion.png", title="a run")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_the_logistic_regression_learns_words_and_knows_labels_by_their_ids():
    train = ["win a prize now", "see you at home", "free prize", "call me later"] * 5
    logits, strength = logistic_regression(
        (train, [2, 0, 2, 0] * 5), (train[:4], [2, 0, 2, 0]), ["prize", "home"], num_labels=3
    )
    assert logits.shape == (2, 3) and logits.argmax(1).tolist() == [2, 0]
    assert np.exp(logits).sum(1) == pytest.approx([1, 1]) and strength in (1, 10, 100)


def trained_names(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_each_method_trains_what_it_says(tiny_config):
    model = hfllm.GPTForSequenceClassification(tiny_config)
    every = trained_names(model)
    freeze_all_but(model, "head")
    assert trained_names(model) == {"score.weight"}
    freeze_all_but(model, "last_block")
    last = {name for name in every if name.startswith(("model.layers.1.", "model.norm."))}
    assert trained_names(model) == last | {"score.weight"} and len(last) > 5
    freeze_all_but(model, "full")
    assert trained_names(model) == every
    with pytest.raises(ValueError, match="method='most'"):
        freeze_all_but(model, "most")


def test_the_last_block_of_gpt2s_own_class_is_found_too():
    model = GPT2ForSequenceClassification(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32))
    freeze_all_but(model, "last_block")
    assert {name.rpartition(".")[0].split(".")[1] for name in trained_names(model) - {"score.weight"}} == {"h", "ln_f"}
    assert not any(name.startswith("transformer.h.0.") for name in trained_names(model))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_and_of_any_length_changes_nothing_even_where_pad_is_eos(side):
    """The attention mask finds the last token; by its id, an eos that is text would be taken for padding."""
    config = make_tiny_config("modern", pad_token_id=1, num_labels=3)
    model = hfllm.GPTForSequenceClassification(config).eval()
    text = torch.tensor([[5, 9, 1, 7, 1]])  # ends with eos, which is the pad token as well
    alone = model(input_ids=text, attention_mask=torch.ones_like(text)).logits
    for length in (1, 20):
        padding = torch.ones(1, length, dtype=torch.long)
        parts, mask = ([padding, text], [0 * padding, 0 * text + 1])
        if side == "right":
            parts, mask = parts[::-1], mask[::-1]
        padded = model(input_ids=torch.cat(parts, 1), attention_mask=torch.cat(mask, 1)).logits
        torch.testing.assert_close(padded, alone)


def test_a_new_head_is_drawn_as_other_weights_are_and_without_a_bias(tmp_path):
    hfllm.GPTForCausalLM(make_tiny_config("book", initializer_range=0.02)).save_pretrained(tmp_path)
    model = hfllm.GPTForSequenceClassification.from_pretrained(tmp_path, num_labels=40)
    assert model.score.bias is None and model.score.weight.dtype == torch.float32
    assert model.score.weight.std().item() == pytest.approx(0.02, rel=0.15)
