"""A run's record, `run.json`: which files are the run's own, its identity, and whether it is finished.

    {
      "format_version": 1,
      "recipe": "pretrain",
      "files": ["arguments.yaml", ...],     paths in the folder that the run wrote; checkpoints are known by their names
      "identity": {...},                    see `hfllm.runs.identity`
      "options": {...},                     options that may change from start to start
      "finished": {                         null until model and metrics are there; written last
        "step": 300,
        "sha256": {"model.safetensors": "..."},
        "files": ["config.json", "metrics.json", ...],
        "done": {"page": true, "push": "https://..."}
      }
    }

It is replaced atomically, so that it holds either the old or the new content, whenever the process ends.
"""

import json
from pathlib import Path
from typing import Any

from .files import sha256_of, write_json


RECORD = "run.json"
FORMAT_VERSION = 1


def read_record(folder: str | Path) -> dict[str, Any]:
    """The record of a run's folder; empty if there is none.

    Raises:
        ValueError: it cannot be read, or a newer version of hfllm wrote it.
    """
    path = Path(folder) / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version, _ = int(record["format_version"]), [*record["files"], *record["recipe"]]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}), so nothing says whose files these are. Delete it if the folder holds "
            "nothing that you need, or choose another output_dir."
        ) from error
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} was written by a newer hfllm (format {version}; this one knows {FORMAT_VERSION}). Update hfllm."
        )
    return record


def write_record(folder: str | Path, record: dict[str, Any]) -> None:
    """Replace the record of a run's folder atomically."""
    write_json(Path(folder) / RECORD, record)


def describe_finish(folder: str | Path, *, step: int | None, files: list[str]) -> dict[str, Any]:
    """The entry of a finished run's record about its result: the files, and the sha256 of the weights."""
    sha256 = {name: sha256_of(Path(folder) / name) for name in sorted(files) if _is_weights(name)}
    return {"step": step, "sha256": sha256, "files": sorted(files), "done": {}}


def find_fault(folder: str | Path, finished: dict[str, Any] | None, *, step: int | None) -> str:
    """Why the run of a folder is not finished at `step`, or at any step if that is None; empty if it is."""
    if not finished:
        return "it has not ended"
    if step is not None and finished["step"] != step:
        return f"it ended at step {finished['step']}"
    for name in finished["files"]:
        if not (Path(folder) / name).is_file():
            return f"{name} is missing"
    for name, expected in finished["sha256"].items():
        if sha256_of(Path(folder) / name) != expected:
            return f"{name} has changed since it was written (its sha256 differs)"
    return ""


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".gguf", ".onnx", ".onnx.data", "tokenizer.json"))
