"""Our modules for `evaluate`: their examples, hand counts, and several processes."""

import doctest
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import yaml
from sklearn.metrics import f1_score

from hfllm.data.conversations import Conversation
from hfllm.evaluation.classification import score_predictions
from hfllm.evaluation.metrics import FOLDER, METRICS, load_metric
from hfllm.evaluation.replies import Reply, exact_match
from hfllm.evaluation.rows import Evaluation


def test_an_unknown_metric_names_those_that_there_are():
    with pytest.raises(ValueError, match="exact_answer"):
        load_metric("bits")


@pytest.mark.parametrize("name", METRICS)
def test_the_examples_of_its_description_and_of_its_card_are_true(name):
    import evaluate

    module = load_metric(name)
    card = (FOLDER / name / "README.md").read_text(encoding="utf-8")
    names = {"evaluate": _OurFolders(evaluate)}
    for text in (module.inputs_description, card.replace(">>> import evaluate\n", "").replace("```", "")):
        test = doctest.DocTestParser().get_doctest(text, names, name, None, 0)
        assert len(test.examples) > 1
        assert doctest.DocTestRunner().run(test).failed == 0
    assert module.citation and module.description.strip().split(".")[0] in card


class _OurFolders:
    """evaluate, whose `load` finds hfllm/evaluation/metrics/x from any folder."""

    def __init__(self, evaluate):
        self.evaluate = evaluate

    def load(self, path):
        return self.evaluate.load(str(FOLDER / path.split("/")[-1]))


@pytest.mark.parametrize("name", METRICS)
def test_its_folder_is_a_space(name):
    _, header, _ = (FOLDER / name / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(header)
    assert card["tags"] == ["evaluate", "metric"] and (FOLDER / name / card["app_file"]).exists()
    assert f"{name}.py" in (FOLDER / name / "app.py").read_text()
    assert "evaluate" in (FOLDER / name / "requirements.txt").read_text().split()


def test_several_processes_get_the_number_of_all_examples(tmp_path):
    nats, counts = [3.0, 5.0, 11.0], [{"num_tokens": n, "num_bytes": 3 * n} for n in (2, 7, 1)]

    def work(index):
        metric = load_metric(
            "bits_per_byte", num_process=2, process_id=index, experiment_id="three", cache_dir=str(tmp_path)
        )
        metric.add_batch(predictions=nats[index::2], references=counts[index::2])
        return metric.compute()

    with ThreadPoolExecutor(2) as pool:
        main, other = pool.map(work, [0, 1])
    assert other is None
    assert main["num_tokens"] == 10 and main["num_bytes"] == 30
    assert main["bits_per_byte"] == pytest.approx(19 / 30 / math.log(2), rel=1e-12)
    assert main["perplexity"] == pytest.approx(math.exp(1.9), rel=1e-12)


def test_classification_counts_by_hand():
    metric = load_metric("calibrated_classification")
    probabilities = [[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.4, 0.5, 0.1], [0.2, 0.7, 0.1]]
    found = metric.compute(predictions=probabilities, references=[0, 1, 0, 1], num_bins=5)
    assert found["confusion_matrix"] == [[1, 1, 0], [0, 2, 0], [0, 0, 0]]
    assert found["accuracy"] == 0.75
    assert found["precision"] == pytest.approx([1, 2 / 3, 0])
    assert found["recall"] == pytest.approx([1 / 2, 1, 0])
    assert found["f1"] == pytest.approx([2 / 3, 4 / 5, 0])
    assert found["f1_macro"] == pytest.approx((2 / 3 + 4 / 5) / 2)  # the third class neither occurs nor is predicted
    # Bins 0.4..0.6 with 0.5 (wrong), 0.6..0.8 with 0.7, 0.6, 0.7 (right).
    assert found["expected_calibration_error"] == pytest.approx((0.5 + 1.0) / 4)
    brier = [0.09 + 0.04 + 0.01, 0.01 + 0.16 + 0.09, 0.36 + 0.25 + 0.01, 0.04 + 0.09 + 0.01]
    assert found["brier_score"] == pytest.approx(sum(brier) / 4)


def test_the_recipes_numbers_are_those_of_the_metrics_and_of_scikit_learn():
    """Of four labels the last neither occurs nor is predicted: it is no part of the macro-averaged F1."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 60)
    logits = generator.normal(size=(60, 4)) + 1.5 * np.eye(4)[labels]
    logits[:, 3] = -20
    scores = score_predictions(logits, labels, ["a", "b", "c", "absent"])
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    metric = load_metric("calibrated_classification").compute(predictions=probabilities.tolist(), references=labels)
    assert (
        scores["f1_macro"] == metric["f1_macro"] == pytest.approx(f1_score(labels, logits.argmax(1), average="macro"))
    )
    assert scores["accuracy"] == metric["accuracy"] and scores["confusion"] == metric["confusion_matrix"]
    assert scores["ece"] == pytest.approx(metric["expected_calibration_error"], abs=1e-12)

    evaluation = Evaluation(loss=1.25, num_tokens=16, num_bytes=50, seconds=1.0)
    counts = [{"num_tokens": 16, "num_bytes": 50}]
    metric = load_metric("bits_per_byte").compute(predictions=[20.0], references=counts)
    assert evaluation.bits_per_byte == pytest.approx(metric["bits_per_byte"], rel=1e-12)
    assert evaluation.perplexity == pytest.approx(metric["perplexity"], rel=1e-12)

    responses, replies = ["42", "True", "None "], ["42", "true", "None"]
    conversations = [Conversation([{"role": "assistant", "content": text}], "") for text in responses]
    found = exact_match(conversations, [Reply(text, True) for text in replies])
    references = [[text] for text in responses]
    metric = load_metric("exact_answer").compute(predictions=replies, references=references)
    assert found["test_exact_match"] == metric["exact_match"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "predictions, references, words",
    [([[0.5, 0.2]], [0], "sum to 1"), ([[0.5, 0.5]], [2], "2 classes")],
)
def test_invalid_probabilities_and_classes_are_refused(predictions, references, words):
    with pytest.raises(ValueError, match=words):
        load_metric("calibrated_classification").compute(predictions=predictions, references=references)


def test_case_counts_unless_ignore_case_is_set():
    metric = load_metric("exact_answer")
    given = {"predictions": ["Yes ", "no"], "references": [["yes"], ["no", "none"]]}
    assert metric.compute(**given)["exact_match"] == 0.5
    assert metric.compute(**given, ignore_case=True)["exact_match"] == 1.0


def test_nothing_measured_is_not_a_number_but_an_error():
    with pytest.raises(ValueError, match="nothing to divide by"):
        load_metric("bits_per_byte").compute(predictions=[0.0], references=[{"num_tokens": 0, "num_bytes": 0}])
