"""Scores of classifiers, and of two baselines."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.labelled_texts import MULTI_LABEL, REGRESSION, SINGLE_LABEL, LabelledTexts, ProblemType, label_targets
from .metrics.calibrated_classification.scores import classification_scores


TF_IDF_STRENGTHS = (1.0, 10.0, 100.0)  # inverse regularization; the validation texts choose one

# The scores that stand beside those of the baselines, and those of each evaluation during training.
MAIN_SCORES = {
    SINGLE_LABEL: ("accuracy", "f1_macro", "loss", "ece"),
    MULTI_LABEL: ("f1_micro", "f1_macro", "subset_accuracy", "loss"),
    REGRESSION: ("mse", "mae", "r2", "pearson", "spearman"),
}
EVALUATED = {
    SINGLE_LABEL: ("loss", "accuracy", "f1_macro"),
    MULTI_LABEL: ("loss", "f1_micro", "f1_macro", "subset_accuracy"),
    REGRESSION: ("mse", "mae", "r2"),
}


@torch.no_grad()
def predict_logits(
    model: nn.Module,
    texts: Sequence[Sequence[int]],
    *,
    num_labels: int,
    batch_size: int,
    pad_token_id: int,
    accelerator: Accelerator,
) -> np.ndarray:
    """The classifier's logits (N, labels) in float64 for the token ids of N texts, split among the processes.

    Each process gets the logits of all texts. Texts of similar lengths share a batch, padded on the right; the
    attention mask says where a text ends. No text is read twice.
    """
    order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
    order = order[accelerator.process_index :: accelerator.num_processes]
    device = accelerator.device
    # MPS has no float64, so there the sums live on the CPU.
    logits = torch.zeros(len(texts), num_labels, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            length = max(len(texts[row]) for row in rows)
            input_ids = [[*texts[row], *[pad_token_id] * (length - len(texts[row]))] for row in rows]
            mask = [[1] * len(texts[row]) + [0] * (length - len(texts[row])) for row in rows]
            output = model(
                input_ids=torch.tensor(input_ids, device=device), attention_mask=torch.tensor(mask, device=device)
            )
            logits[rows] = output.logits.to(logits)
    finally:
        model.train(was_training)
    # The rows of the other processes are zeros here.
    logits = accelerator.reduce(logits, reduction="sum").cpu()
    if not logits.isfinite().all():
        raise FloatingPointError("The model's logits are not finite on some texts.")
    return logits.numpy()


def encode_windows(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, block_size: int, stride: int | None = None
) -> tuple[list[list[int]], list[int], list[int]]:
    """Rows of at most `block_size` token ids, the text that each is from, and the length of each text in tokens.

    A longer text loses its end, or is read in windows that begin `stride` tokens apart. Its last window ends where the
    text does and is as long as the others, so that a few tokens are not heard as much as a whole window. Each window
    begins with the start token, if the tokenizer puts one in front of texts.
    """
    rows, numbers, lengths = [], [], []
    for number, ids in enumerate(tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]):
        windows = [ids[:block_size]]
        if stride is not None and len(ids) > block_size:
            # A text cannot spell control tokens here, so a start token is the tokenizer's.
            start = ids[:1] if ids[0] in tokenizer.all_special_ids else []
            content = ids[len(start) :]
            size = block_size - len(start)
            last = len(content) - size
            firsts = [*range(0, last, min(stride, size)), last]
            windows = [start + content[first : first + size] for first in firsts]
        rows += windows
        numbers += [number] * len(windows)
        lengths.append(len(ids))
    return rows, numbers, lengths


def pool_windows(logits: np.ndarray, text_numbers: Sequence[int]) -> np.ndarray:
    """The mean (N, labels) of the logits (rows, labels) of each text's windows, given which text a row is from.

    Their mean, not a vote, so that a window that is unsure counts less than one that is sure, and so that a number is
    the mean of its windows' numbers.
    """
    numbers = np.asarray(text_numbers)
    sums = np.zeros((numbers.max() + 1, *logits.shape[1:]))
    np.add.at(sums, numbers, logits)
    return sums / np.bincount(numbers)[:, None]


def predict_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    block_size: int,
    stride: int | None = None,
    batch_size: int,
    accelerator: Accelerator,
) -> np.ndarray:
    """The classifier's logits (N, labels) for N texts, of long ones pooled over windows if there is a `stride`."""
    model.config.pad_token_id = tokenizer.pad_token_id  # with it, transformers' own classes find the end of a text
    rows, numbers, _ = encode_windows(texts, tokenizer, block_size=block_size, stride=stride)
    logits = predict_logits(
        model,
        rows,
        num_labels=model.config.num_labels,
        batch_size=batch_size,
        pad_token_id=tokenizer.pad_token_id,
        accelerator=accelerator,
    )
    return pool_windows(logits, numbers)


def score_labelled_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: LabelledTexts, **options: Any
) -> dict[str, Any]:
    """The `test_...` scores that recipes/finetune_classification.py writes, of these texts and the model's labels.

    The further options are those of `predict_texts`.
    """
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    logits = predict_texts(model, tokenizer, data.texts, **options)
    scores = score_answers(logits, label_targets(data, names), names, problem_type=data.problem_type)
    return {f"test_{name}": value for name, value in scores.items()} | {"test_texts": len(data)}


def score_answers(
    logits: np.ndarray, targets: np.ndarray, names: Sequence[str], *, problem_type: ProblemType
) -> dict[str, Any]:
    """The scores of logits (N, outputs) for `label_targets`, by what the model learned."""
    if problem_type == REGRESSION:
        return score_numbers(logits[:, 0], targets)
    score = score_label_sets if problem_type == MULTI_LABEL else score_predictions
    return score(logits, targets, names)


def score_label_sets(logits: np.ndarray, targets: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """The scores of logits (N, labels) for several labels at once, 0.0 and 1.0 (N, labels).

    A label is said where its probability, the logit's sigmoid, is above one half. `f1_micro` counts all labels of all
    texts together, `f1_macro` is the mean over the labels that occur or are said, `subset_accuracy` the share of texts
    whose labels are all right, and `loss` the binary cross-entropy, the mean over texts and labels in nats. `per_label`
    has each label's precision, recall, F1 and number of texts.
    """
    from sklearn.metrics import precision_recall_fscore_support

    logits, is_there, is_said = logits.astype(np.float64), targets > 0.5, logits > 0
    *columns, num_true = precision_recall_fscore_support(is_there, is_said, average=None, zero_division=0)
    micro = precision_recall_fscore_support(is_there, is_said, average="micro", zero_division=0)
    occurs = is_there.any(axis=0) | is_said.any(axis=0)
    losses = np.logaddexp(0, logits) - targets * logits
    return {
        "f1_micro": float(micro[2]),
        "f1_macro": float(columns[2][occurs].mean()) if occurs.any() else 0.0,
        "subset_accuracy": float((is_there == is_said).all(axis=1).mean()),
        "loss": float(losses.mean()),
        "per_label": {
            name: {
                **{score: float(values[index]) for score, values in zip(("precision", "recall", "f1"), columns)},
                "texts": int(num_true[index]),
            }
            for index, name in enumerate(names)
        },
    }


def score_numbers(predicted: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """The scores of predicted numbers (N,) for the true ones (N,).

    `mse` and `mae` are the mean squared and the mean absolute error, `r2` the share of the variance that is explained
    (0: as good as the mean of the true numbers), `pearson` and `spearman` the correlation of the numbers and of their
    ranks. Where one of the last three is not defined, as of numbers that are all the same, it is None.
    """
    from scipy.stats import rankdata

    predicted = predicted.astype(np.float64)
    error = predicted - targets
    mse, variance = float((error**2).mean()), float(targets.var())
    return {
        "mse": mse,
        "mae": float(np.abs(error).mean()),
        "r2": 1 - mse / variance if variance > 0 else None,
        "pearson": _correlation(predicted, targets),
        "spearman": _correlation(rankdata(predicted), rankdata(targets)),
    }


def _correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return float(np.corrcoef(one, other)[0, 1])


def score_predictions(logits: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """The scores of logits (N, labels) for the labels (N,), with the numbers of `metrics/calibrated_classification`.

    `accuracy`, `f1_macro` (over the labels that occur or are predicted), `loss` (nats per text), `ece` (the expected
    calibration error), `majority_accuracy` (of always predicting the most frequent label), `per_label`, `confusion`
    (rows are the true labels), and `reliability` (a bin's confidence, accuracy and number of texts).
    """
    logits = logits.astype(np.float64)
    log_probabilities = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    scores = classification_scores(np.exp(log_probabilities), labels)
    num_true = np.bincount(labels, minlength=len(names))
    return {
        "accuracy": scores["accuracy"],
        "f1_macro": scores["f1_macro"],
        "loss": float(-log_probabilities[np.arange(len(labels)), labels].mean()),
        "ece": scores["expected_calibration_error"],
        "majority_accuracy": float(num_true.max() / len(labels)),
        "per_label": {
            name: {
                "precision": scores["precision"][index],
                "recall": scores["recall"][index],
                "f1": scores["f1"][index],
                "texts": int(num_true[index]),
            }
            for index, name in enumerate(names)
        },
        "confusion": scores["confusion_matrix"],
        "reliability": [
            {"confidence": row["confidence"], "accuracy": row["accuracy"], "texts": row["rows"]}
            for row in scores["reliability"]
        ],
    }


Texts = tuple[Sequence[str], Sequence[Any]]  # and their labels' ids, or their `label_targets`


def logistic_regression(
    train: Texts, validation: Texts, test: Sequence[str], *, num_labels: int
) -> tuple[np.ndarray, float]:
    """Log-probabilities (N, labels) of the test texts by scikit-learn's logistic regression, and its strength C.

    Its features are words and pairs of words, by TF-IDF with sublinear counts. Of three strengths, it takes the best on
    the validation texts, just as the neural model's epoch is chosen.
    """
    from sklearn.linear_model import LogisticRegression

    features, held_out, tested = _tf_idf(train[0], validation[0], test)
    models = [LogisticRegression(C=strength, max_iter=1000).fit(features, train[1]) for strength in TF_IDF_STRENGTHS]
    best = _choose([model.score(held_out, validation[1]) for model in models] if len(validation[0]) else [])
    log_probabilities = np.full((len(test), num_labels), -1e4)
    log_probabilities[:, models[best].classes_] = models[best].predict_log_proba(tested)
    return log_probabilities, TF_IDF_STRENGTHS[best]


def logistic_regressions(train: Texts, validation: Texts, test: Sequence[str]) -> tuple[np.ndarray, float]:
    """Logits (N, labels) of the test texts by a `logistic_regression` for each of several labels, and the strength C.

    The strength is that with the best micro-averaged F1 on the validation texts.
    """
    from sklearn.linear_model import LogisticRegression

    features, held_out, tested = _tf_idf(train[0], validation[0], test)
    targets = np.array(train[1])

    def fit(strength: float, rows: list[Any]) -> list[np.ndarray]:
        logits = [np.empty((row.shape[0], targets.shape[1])) for row in rows]
        for label, column in enumerate(targets.T):
            is_constant: bool = np.ptp(column) == 0  # all texts have the label, or none has
            model = None if is_constant else LogisticRegression(C=strength, max_iter=1000).fit(features, column)
            for row, part in zip(rows, logits):
                part[:, label] = 1e4 * (2 * column[0] - 1) if model is None else model.decision_function(row)
        return logits

    fitted = [fit(strength, [held_out, tested]) for strength in TF_IDF_STRENGTHS]
    names = list(map(str, range(targets.shape[1])))
    scores = [score_label_sets(logits[0], np.array(validation[1]), names)["f1_micro"] for logits in fitted]
    best = _choose(scores)
    return fitted[best][1], TF_IDF_STRENGTHS[best]


def ridge_regression(train: Texts, validation: Texts, test: Sequence[str]) -> tuple[np.ndarray, float]:
    """Numbers (N, 1) of the test texts by scikit-learn's ridge regression on TF-IDF, and its strength, 1 / alpha."""
    from sklearn.linear_model import Ridge

    features, held_out, tested = _tf_idf(train[0], validation[0], test)
    models = [Ridge(alpha=1 / strength).fit(features, train[1]) for strength in TF_IDF_STRENGTHS]
    best = _choose([-float(np.square(model.predict(held_out) - validation[1]).mean()) for model in models])
    return models[best].predict(tested)[:, None], TF_IDF_STRENGTHS[best]


def _tf_idf(*parts: Sequence[str]) -> list[Any]:
    """The features of each part's texts, as the first part knows words and pairs of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b|[^\w\s]")
    features = vectorizer.fit_transform(parts[0])
    return [features, *(vectorizer.transform(part) if len(part) else features[:0] for part in parts[1:])]


def _choose(scores: Sequence[float]) -> int:
    """The strength with the best score; without validation texts, the middle one."""
    return int(np.argmax(scores)) if len(scores) else 1


def score_beside_baselines(
    logits: Mapping[str, np.ndarray],
    parts: Mapping[str, Texts],
    names: Sequence[str],
    *,
    problem_type: ProblemType = "single_label_classification",
) -> dict[str, Any]:
    """The numbers of metrics.json: `eval_...` and `test_...` of the logits of these parts, and of two baselines.

    The baselines are a regression on the TF-IDF of the same parts, `test_logistic_regression_...` or `test_ridge_...`,
    and what can be said without looking at the text, learned from the part `train`: `test_majority_...`, the most
    frequent label, or of several at once the labels that give the best micro-averaged F1, and the most frequent set of
    labels for the subset accuracy; `test_mean_...`, the mean of the numbers.
    """
    scores = {
        part: score_answers(logits[part], np.array(parts[part][1]), names, problem_type=problem_type)
        for part in ("eval", "test")
    }
    metrics = {f"eval_{name}": scores["eval"][name] for name in EVALUATED[problem_type]}
    metrics |= {f"test_{name}": value for name, value in scores["test"].items()}
    labels = np.array(parts["test"][1])
    metrics["test_texts"] = len(labels)
    baseline = {SINGLE_LABEL: "logistic_regression", MULTI_LABEL: "logistic_regression", REGRESSION: "ridge"}
    prefix = f"test_{baseline[problem_type]}"
    beside = (parts["train"], parts["eval"], parts["test"][0])
    if problem_type == SINGLE_LABEL:
        majority = np.bincount(parts["train"][1]).argmax()
        metrics["test_majority_accuracy"] = float((labels == majority).mean())
        baseline_logits, strength = logistic_regression(*beside, num_labels=len(names))
    elif problem_type == MULTI_LABEL:
        metrics |= {f"test_majority_{name}": value for name, value in _always_the_same(parts, names).items()}
        baseline_logits, strength = logistic_regressions(*beside)
    else:
        mean = score_numbers(np.full(len(labels), np.mean(parts["train"][1])), labels)
        metrics |= {f"test_mean_{name}": mean[name] for name in ("mse", "mae")}
        baseline_logits, strength = ridge_regression(*beside)
    of_baseline = score_answers(baseline_logits, labels, names, problem_type=problem_type)
    metrics |= {f"{prefix}_{name}": of_baseline[name] for name in MAIN_SCORES[problem_type]}
    return metrics | {f"{prefix}_strength": strength}


def _always_the_same(parts: Mapping[str, Texts], names: Sequence[str]) -> dict[str, float]:
    """The scores on the test texts of the best answer that is the same for every text."""
    train, test = (np.array(parts[part][1]) for part in ("train", "test"))
    shares = train.mean(axis=0)
    # Micro-averaged F1 of saying the n most frequent labels: 2 * hits / (labels said + labels there).
    by_share = np.argsort(-shares, kind="stable")
    f1 = 2 * shares[by_share].cumsum() / (np.arange(1, len(shares) + 1) + shares.sum())
    best = np.zeros(len(shares))
    best[by_share[: f1.argmax() + 1]] = 1
    scores = score_label_sets(np.tile(2 * best - 1, (len(test), 1)), test, names)
    sets, counts = np.unique(train, axis=0, return_counts=True)
    is_commonest = (test == sets[counts.argmax()]).all(axis=1)
    return {
        "f1_micro": scores["f1_micro"],
        "f1_macro": scores["f1_macro"],
        "subset_accuracy": float(is_commonest.mean()),
    }


def describe_scores(metrics: Mapping[str, Any], *, problem_type: ProblemType = "single_label_classification") -> str:
    """Small tables of what `score_beside_baselines` found, and a sentence if the regression on TF-IDF is better."""
    lines = [f"Test, {metrics['test_texts']:,} texts that were not trained on:"]
    if problem_type == REGRESSION:
        return "\n".join([*lines, *_describe_numbers(metrics)])
    labels = metrics["test_per_label"]
    if problem_type == SINGLE_LABEL:
        columns = {"accuracy": "{:.2%}", "f1_macro": "{:.3f}", "loss": "{:.3f}", "ece": "{:.3f}"}
        constant = "always the commonest label"
    else:
        columns = {"f1_micro": "{:.3f}", "f1_macro": "{:.3f}", "subset_accuracy": "{:.2%}", "loss": "{:.3f}"}
        constant = "always the same labels"
    rows = {"this model": "test", "logistic regression, TF-IDF": "test_logistic_regression", constant: "test_majority"}
    width = max(map(len, (*labels, *rows)))
    lines += _table(metrics, rows, columns, width)
    lines += ["", f"{'':{width}}  precision  recall     F1  texts"]
    for name, row in labels.items():
        lines.append(
            f"{name:{width}}  {row['precision']:9.2%}  {row['recall']:6.1%}  {row['f1']:.3f}  {row['texts']:5,}"
        )
    if problem_type == MULTI_LABEL:
        ahead = metrics["test_logistic_regression_f1_micro"] - metrics["test_f1_micro"]
        what = f"has a micro-F1 that is {ahead:.3f} higher than this model's" if ahead > 0 else ""
    else:
        behind = metrics["test_logistic_regression_accuracy"] - metrics["test_accuracy"]
        num_fewer = round(behind * metrics["test_texts"])
        what = f"is right on {num_fewer:,} texts more than this model" if num_fewer > 0 else ""
    return "\n".join([*lines, *_advise("logistic", what)])


HEADINGS = {
    "accuracy": "accuracy",
    "f1_micro": "micro-F1",
    "f1_macro": "macro-F1",
    "subset_accuracy": "all right",
    "loss": "loss",
    "ece": "ECE",
    "mse": "MSE",
    "mae": "MAE",
    "r2": "R2",
    "pearson": "Pearson",
    "spearman": "Spearman",
}


def _table(metrics: Mapping[str, Any], rows: Mapping[str, str], columns: Mapping[str, str], width: int) -> list[str]:
    """The scores named by the columns of each row, which is a prefix of their names; where there is none, a gap."""
    cells = [[HEADINGS[name] for name in columns]]
    for prefix in rows.values():
        numbers = [metrics.get(f"{prefix}_{name}") for name in columns]
        cells.append(["" if n is None else form.format(n) for n, form in zip(numbers, columns.values())])
    widths = [max(map(len, column)) for column in zip(*cells)]
    return [
        f"{name:{width}}  {'  '.join(f'{cell:>{w}}' for cell, w in zip(line, widths))}".rstrip()
        for name, line in zip(("", *rows), cells)
    ]


def _describe_numbers(metrics: Mapping[str, Any]) -> list[str]:
    rows = {"this model": "test", "ridge regression, TF-IDF": "test_ridge", "always the mean": "test_mean"}
    columns = {"mse": "{:.4g}", "mae": "{:.4g}", "r2": "{:.3f}", "pearson": "{:.3f}", "spearman": "{:.3f}"}
    is_beaten = metrics["test_ridge_mse"] < metrics["test_mse"]
    what = f"has a mean squared error of {metrics['test_ridge_mse'] / metrics['test_mse']:.0%} of this model's"
    return [*_table(metrics, rows, columns, max(map(len, rows))), *_advise("ridge", what if is_beaten else "")]


def _advise(regression: str, what: str) -> list[str]:
    """What to do where a regression on TF-IDF is better, and how far it is."""
    if not what:
        return []
    return [
        "",
        f"The {regression} regression {what}, at almost no cost: use it, or give the model more pretraining, more "
        "labelled texts, another method or learning_rate.",
    ]
