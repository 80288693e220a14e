"""Scores of classifiers and regressions against other libraries', and long texts that are read in windows."""

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from accelerate import Accelerator

import hfllm
from hfllm.evaluation.classification import (
    describe_scores,
    encode_windows,
    logistic_regression,
    logistic_regressions,
    pool_windows,
    predict_texts,
    ridge_regression,
    score_beside_baselines,
    score_label_sets,
    score_numbers,
    score_predictions,
)
from hfllm.evaluation.kinds import find_kind, problem_type_of
from hfllm.report.confusion import plot_confusion, plot_labels, plot_numbers
from hfllm.tokenization import load_classifier_tokenizer
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
    assert scores["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(labels, said))
    assert scores["f1_macro"] == pytest.approx(sklearn.metrics.f1_score(labels, said, average="macro"))
    assert scores["loss"] == pytest.approx(
        sklearn.metrics.log_loss(labels, torch.tensor(logits).double().softmax(1), labels=range(4))
    )
    assert scores["confusion"] == sklearn.metrics.confusion_matrix(labels, said, labels=range(4)).tolist()
    expected = sklearn.metrics.precision_recall_fscore_support(labels, said, labels=range(4), zero_division=0)
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


def test_the_picture_of_a_confusion_is_drawn(scored, tmp_path):
    path = plot_confusion(scored[2], NAMES, tmp_path / "confusion.png", title="a run")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_the_logistic_regression_learns_words_and_knows_labels_by_their_ids():
    train = ["win a prize now", "see you at home", "free prize", "call me later"] * 5
    logits, strength = logistic_regression(
        (train, [2, 0, 2, 0] * 5), (train[:4], [2, 0, 2, 0]), ["prize", "home"], num_labels=3
    )
    assert logits.shape == (2, 3) and logits.argmax(1).tolist() == [2, 0]
    assert np.exp(logits).sum(1) == pytest.approx([1, 1]) and strength in (1, 10, 100)


def test_the_numbers_are_beside_cheap_baselines_and_a_worse_model_is_reported():
    texts = {
        "train": (["red fish", "red bird", "blue fish", "blue bird", "red cat"], [1, 1, 0, 0, 1]),
        "eval": (["red", "blue"], [1, 0]),
        "test": (["blue dog", "red dog", "blue cow", "blue owl"], [0, 1, 0, 0]),
    }
    right, wrong = np.array([[4.0, 0], [0, 4], [4, 0], [4, 0]]), np.array([[0.0, 4], [0, 4], [0, 4], [4, 0]])
    for logits, accuracy in ((right, 1.0), (wrong, 0.5)):
        metrics = score_beside_baselines({"eval": right[:2], "test": logits}, texts, ["blue", "red"])
        assert metrics["test_accuracy"] == accuracy and metrics["test_texts"] == 4
        assert metrics["test_majority_accuracy"] == 0.25  # red is commonest in training
        assert metrics["test_logistic_regression_accuracy"] == 1.0 and metrics["eval_accuracy"] == 0.0
        described = describe_scores(metrics)
        assert "Test, 4 texts" in described and "always the commonest label     25.00%" in described
        assert ("is right on 2 texts more than this model" in described) == (accuracy < 1)


@pytest.fixture(scope="module")
def answers():
    generator = np.random.default_rng(0)
    targets = (generator.random((200, 4)) < [0.6, 0.2, 0.1, 0.0]).astype(float)
    logits = generator.normal(size=(200, 4)) + 3 * targets - 1
    logits[:, 3] = -5
    return logits, targets


def test_scores_of_several_labels_are_scikit_learns_and_torchs(answers):
    logits, targets = answers
    scores, said = score_label_sets(logits, targets, NAMES), logits > 0
    assert scores["f1_micro"] == pytest.approx(sklearn.metrics.f1_score(targets, said, average="micro"))
    assert scores["f1_macro"] == pytest.approx(sklearn.metrics.f1_score(targets[:, :3], said[:, :3], average="macro"))
    assert scores["subset_accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(targets, said))
    loss = torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor(logits), torch.tensor(targets))
    assert scores["loss"] == pytest.approx(loss.item())
    assert scores["per_label"]["b"]["recall"] == pytest.approx(sklearn.metrics.recall_score(targets[:, 1], said[:, 1]))
    assert scores["per_label"]["never"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "texts": 0}


def test_scores_of_numbers_are_scipys_and_scikit_learns():
    generator = np.random.default_rng(0)
    true = generator.normal(100, 20, 50).round()
    said = true + generator.normal(0, 15, 50)
    scores = score_numbers(said, true)
    assert scores["mse"] == pytest.approx(sklearn.metrics.mean_squared_error(true, said))
    assert scores["mae"] == pytest.approx(sklearn.metrics.mean_absolute_error(true, said))
    assert scores["r2"] == pytest.approx(sklearn.metrics.r2_score(true, said))
    assert scores["pearson"] == pytest.approx(scipy.stats.pearsonr(said, true).statistic)
    assert scores["spearman"] == pytest.approx(scipy.stats.spearmanr(said, true).statistic)
    same = score_numbers(np.full(50, 3.0), true)
    assert same["pearson"] is None and same["spearman"] is None and same["r2"] < 0
    assert score_numbers(true[:1], true[:1]) | {"mse": 0.0} == {**dict.fromkeys(scores, None), "mse": 0.0, "mae": 0.0}


def test_several_labels_stand_beside_the_best_answer_that_is_always_the_same():
    train = ["red fish", "red bird", "blue fish", "blue bird", "red fish now"] * 4
    targets = np.array([["red" in text, "fish" in text, False] for text in train], dtype=float)
    test = (["red fish", "blue cow"], np.array([[1.0, 1, 0], [0, 0, 0]]))
    parts = {"train": (train, targets), "eval": (train[:4], targets[:4]), "test": test}
    logits = {"eval": 2 * targets[:4] - 1, "test": np.array([[1.0, -1, -1], [-1, -1, -1]])}
    metrics = score_beside_baselines(logits, parts, ["red", "fish", "none"], problem_type="multi_label_classification")
    # Always "red" and "fish": of 4 labels said 2 are right, and none is missed. The commonest set is both, too.
    assert metrics["test_majority_f1_micro"] == pytest.approx(2 * 2 / (4 + 2))
    assert metrics["test_majority_subset_accuracy"] == 0.5 and metrics["test_subset_accuracy"] == 0.5
    assert metrics["test_f1_micro"] == pytest.approx(2 * 1 / (1 + 2)) and metrics["eval_f1_micro"] == 1.0
    ahead = metrics["test_logistic_regression_f1_micro"] - metrics["test_f1_micro"]
    described = describe_scores(metrics, problem_type="multi_label_classification")
    assert ahead > 0 and f"micro-F1 that is {ahead:.3f} higher than this model's" in described
    assert "always the same labels" in described
    logits, _ = logistic_regressions(parts["train"], parts["eval"], ["red fish", "blue bird"])
    assert (logits[0] > 0).tolist() == [True, True, False] and (logits[0, :2] > logits[1, :2] + 0.5).all()


def test_numbers_stand_beside_the_mean_and_a_ridge_regression():
    train = (["a", "a a", "b", "b a"] * 5, np.array([1.0, 1.0, 3.0, 3.0] * 5))
    parts = {"train": train, "eval": (train[0][:4], train[1][:4]), "test": (["a", "b"], np.array([1.0, 3.0]))}
    logits = {"eval": train[1][:4, None], "test": np.array([[0.0], [4.0]])}
    metrics = score_beside_baselines(logits, parts, ["stars"], problem_type="regression")
    assert (metrics["test_mse"], metrics["test_mae"], metrics["test_mean_mae"], metrics["eval_mse"]) == (1, 1, 1, 0)
    assert metrics["test_ridge_mse"] < 1 and "test_loss" not in metrics
    assert "The ridge regression has a mean squared error of" in describe_scores(metrics, problem_type="regression")
    numbers, strength = ridge_regression(parts["train"], parts["eval"], ["a", "b"])
    assert numbers.shape == (2, 1) and numbers[1] - numbers[0] > 1 and strength in (1, 10, 100)


def test_the_pictures_are_drawn(answers, tmp_path):
    path = plot_labels(score_label_sets(*answers, ["$a$", "b", "c", "d"]), tmp_path / "labels.png", title="a run")
    other = plot_numbers(np.arange(9.0), np.arange(9.0) + 1, tmp_path / "predictions.png", name="$x", title="a run")
    for each in (path, other):
        assert each.read_bytes().startswith(b"\x89PNG") and each.stat().st_size > 10_000


class Letters:
    """A tokenizer whose tokens are digits; with `start`, it puts 9 in front of every text."""

    all_special_ids = [9]

    def __init__(self, start=()):
        self.start = list(start)

    def __call__(self, texts, **options):
        return {"input_ids": [self.start + [int(letter) for letter in text] for text in texts]}


def test_a_long_text_is_read_in_windows_of_which_the_last_is_as_long_as_the_others():
    rows, numbers, lengths = encode_windows(["12", "1234567"], Letters(), block_size=4, stride=2)
    assert rows == [[1, 2], [1, 2, 3, 4], [3, 4, 5, 6], [4, 5, 6, 7]]
    assert (numbers, lengths) == ([0, 1, 1, 1], [2, 7])
    assert encode_windows(["12345678"], Letters(), block_size=4, stride=4)[0] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert encode_windows(["1234"], Letters(), block_size=4, stride=4)[0] == [[1, 2, 3, 4]]
    assert encode_windows(["1234567"], Letters(), block_size=4)[0] == [[1, 2, 3, 4]]
    # A start token begins each window, and no token is left out between two.
    started = encode_windows(["1234567"], Letters(start=[9]), block_size=4, stride=4)[0]
    assert started == [[9, 1, 2, 3], [9, 4, 5, 6], [9, 5, 6, 7]]


def test_the_windows_of_a_text_are_pooled_by_the_mean_of_their_logits():
    logits = np.array([[1.0, 0], [2, 2], [4, 0], [0, 9]])
    assert pool_windows(logits, [0, 1, 1, 2]).tolist() == [[1, 0], [3, 1], [0, 9]]
    assert pool_windows(logits[[3, 1, 0, 2]], [2, 1, 0, 1]).tolist() == [[1, 0], [3, 1], [0, 9]]


def test_a_texts_logits_are_the_mean_over_its_windows(tmp_path):
    hfllm.train_bpe(["the cat sees a dog"] * 20, 300).save_pretrained(tmp_path)
    tokenizer = load_classifier_tokenizer(tmp_path)
    config = make_tiny_config("modern", vocab_size=300, num_labels=3, initializer_range=0.3)
    model = hfllm.GPTForSequenceClassification(config).eval()
    texts = ["a cat", "the cat sees a dog " * 6]
    found = predict_texts(
        model, tokenizer, texts, block_size=8, stride=3, batch_size=2, accelerator=Accelerator(cpu=True)
    )
    start, *ids = tokenizer(texts[1])["input_ids"]
    assert start == tokenizer.bos_token_id
    windows = torch.tensor([[start, *ids[first : first + 7]] for first in [*range(0, len(ids) - 7, 3), len(ids) - 7]])
    with torch.no_grad():
        expected = model(windows).logits.mean(0)
    assert found[1] == pytest.approx(expected.numpy(), abs=1e-5)


def test_a_config_that_does_not_tell_is_read_as_transformers_do_and_unlike_models_are_not_compared():
    def config(**fields):
        return make_tiny_config("modern", architectures=["GPTForSequenceClassification"], **fields)

    one, several, number = config(num_labels=3), config(problem_type="multi_label_classification"), config(num_labels=1)
    assert [problem_type_of(each) for each in (one, several, number)] == [
        "single_label_classification",
        "multi_label_classification",
        "regression",
    ]
    assert find_kind({"a": several}) == find_kind({"a": number}) == "classifier"
    with pytest.raises(ValueError, match="a has single_label_classification, b has regression"):
        find_kind({"a": one, "b": number})
    with pytest.raises(ValueError, match="model a says 2 numbers of each text"):
        find_kind({"a": config(num_labels=2, problem_type="regression")})
