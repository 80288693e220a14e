"""The files of a run's folder, read for its page and its model card."""

import dataclasses
import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import yaml

from ..runs.log import read_log, read_samples
from .environment import ENVIRONMENT_FILE


logger = logging.getLogger(__name__)

TOKENIZER_REPORT_FILE = "tokenizer_report.json"


@dataclasses.dataclass(frozen=True)
class Confusion:
    """A confusion matrix: how often a text with a row's label got a column's label."""

    name: str
    labels: list[str]
    counts: list[list[int]]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's folder. Missing files give empty fields: a run in progress has no metrics yet."""

    name: str
    log: list[dict[str, Any]]
    metrics: dict[str, Any]
    arguments: dict[str, Any]
    environment: dict[str, Any]
    config: dict[str, Any]
    adapter: dict[str, Any]
    adapter_base: dict[str, Any]  # the adapter's record of its base, from `hfllm.adapters.save_adapter`
    tokenizer_report: dict[str, Any]
    samples: list[tuple[int | str, str]]  # what the model wrote, by step or by question

    @property
    def numbers(self) -> dict[str, float | int]:
        """The final numbers that are plain and finite, by name."""
        return {
            name: value
            for name, value in self.metrics.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        }

    @property
    def confusions(self) -> list[Confusion]:
        """The confusion matrices among the final numbers, with the labels as the model names them."""
        found = []
        for name, value in self.metrics.items():
            if not is_confusion(name):
                continue
            counts: Any = value.get("counts", value.get("matrix")) if isinstance(value, dict) else value
            labels: Any = value.get("labels") if isinstance(value, dict) else self.metrics.get("labels")
            if labels is None and (rows := self.metrics.get(f"{name.rpartition('confusion')[0]}per_label")):
                labels = list(rows)
            if labels is None:
                id2label = self.config.get("id2label") or {}
                labels = [id2label[key] for key in sorted(id2label, key=int)]
            if _is_square(counts) and len(labels) == len(counts):
                found.append(Confusion(name, [str(label) for label in labels], counts))
            else:
                logger.warning("%s: %s is not a square table with a label for each row; left out.", self.name, name)
        return found

    @property
    def is_finished(self) -> bool:
        return bool(self.metrics)


def read_run(folder: str | Path) -> Run:
    """Read a run's folder.

    Raises:
        ValueError: if it is not a folder, or holds no file of a run; says which files were looked for.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder. Give the --output_dir of a run, for example out/demo.")
    log_file, samples_file = folder / "log.jsonl", folder / "samples.txt"
    arguments = _read_yaml(folder / "arguments.yaml")
    run = Run(
        name=folder.resolve().name,
        log=read_log(log_file) if log_file.exists() else [],
        metrics=_read_json(folder / "metrics.json"),
        arguments=arguments,
        environment=_read_json(folder / ENVIRONMENT_FILE),
        config=_read_json(folder / "config.json"),
        adapter=_read_json(folder / "adapter_config.json"),
        adapter_base=_read_json(folder / "base_model.json"),
        tokenizer_report=_read_tokenizer_report(folder, arguments),
        samples=read_samples(samples_file) if samples_file.exists() else [],
    )
    if not (run.log or run.metrics or run.config or run.adapter):
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise ValueError(
            f"{folder} is not a run's folder: it has no log.jsonl, metrics.json or config.json; it holds {held}."
        )
    return run


def without_places(run: Run) -> Run:
    """The same run for other readers: every local path is shortened to its last part."""
    return dataclasses.replace(
        run,
        arguments={
            name: shorten_paths(value) for name, value in run.arguments.items() if name not in ("cache_dir", "config")
        },
        metrics={name: shorten_paths(value) for name, value in run.metrics.items()},
        adapter={name: shorten_paths(value) for name, value in run.adapter.items()},
    )


def shorten_paths(value: Any) -> Any:
    """`/home/me/texts/my.txt`, `../my.txt` and `~/my.txt` become `my.txt`, in lists and dicts as well."""
    if isinstance(value, dict):
        return {name: shorten_paths(item) for name, item in value.items()}
    if isinstance(value, list):
        return [shorten_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    return ",".join(_last_name(part) if is_place(part) else part for part in value.split(","))


def is_place(text: str) -> bool:
    """Whether a text is a path on this disk rather than an id of the Hub, a number or a sentence."""
    text = text.strip()
    if "\n" in text or not text:
        return False
    if re.match(r"^(/|~|\.{1,2}[/\\]|[A-Za-z]:[/\\])", text):
        return True
    return ("/" in text or "\\" in text) and Path(text).exists()


def _last_name(path: str) -> str:
    return re.split(r"[/\\]", path.strip().rstrip("/\\"))[-1] or path


def is_hub_id(name: str) -> bool:
    """Whether a name can be a Hub id (`name` or `owner/name`), and is not a local folder or file."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not is_place(name) and not Path(name).exists()


def is_confusion(name: str) -> bool:
    """Whether a number of `metrics.json` is a confusion matrix."""
    return name.endswith(("confusion", "confusion_matrix"))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}. Put a sound one there, or delete it.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not names and values. Repair or delete it.")
    return content


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}. Put a sound one there, or delete it.") from error
    return content if isinstance(content, dict) else {}


def _read_tokenizer_report(folder: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """The report of the run's tokenizer, from the run's folder or the tokenizer's."""
    names = [arguments.get("tokenizer") or "out/tokenizer", arguments.get("model")] if arguments else []
    sha256 = _read_json(folder / "metrics.json").get("tokenizer_sha256")
    for place in (folder, *(Path(str(name)) for name in names if name)):
        report = _read_json(place / TOKENIZER_REPORT_FILE)
        if report and sha256 in (None, report.get("fingerprint")):
            return report
    return {}


def _is_square(counts: Any) -> bool:
    return (
        isinstance(counts, list)
        and len(counts) > 0
        and all(isinstance(row, list) and len(row) == len(counts) for row in counts)
    )
