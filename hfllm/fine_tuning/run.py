"""What the recipes on transformers' Trainer share: whose folder a run writes into, and its log."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_utils import get_last_checkpoint

from ..cli.arguments import read_arguments
from ..cli.options import identity_of
from ..runs.log import append_to_log


# What a run writes, and what --overwrite_output_dir deletes.
FILES = (
    *("arguments.yaml", "metrics.json", "log.jsonl", "samples.txt", "confusion.png", "report.html"),
    *("config.json", "model.safetensors"),
)
FOLDERS = ("checkpoints", "adapter")


def prepare_folder(args: Any) -> bool:
    """Whether the run of these arguments is finished in its `output_dir`; if not, it may begin or go on there.

    `args` is a recipe's dataclass with `model`, `output_dir` and `overwrite_output_dir`, which deletes what an earlier
    run left. For the main process.

    Raises:
        ValueError: the folder is that of `model`, holds a model that no run made, or a run with other arguments.
    """
    folder = Path(args.output_dir)
    if folder.exists() and Path(args.model).exists() and folder.samefile(args.model):
        raise ValueError(f"--output_dir {folder} is --model itself, which would be overwritten. Choose another.")
    if args.overwrite_output_dir:
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        for name in FOLDERS:
            shutil.rmtree(folder / name, ignore_errors=True)
        return False
    if not (folder / "arguments.yaml").exists():
        if (folder / "config.json").exists():
            raise ValueError(
                f"{folder} holds a model that no run of this recipe made, and would be overwritten. Choose another "
                "--output_dir, or overwrite it with --overwrite_output_dir."
            )
        return False
    left = [*folder.glob("metrics.json"), *folder.glob("config.json"), *folder.glob("checkpoints/checkpoint-*")]
    if not left:  # the run that began here ended before it had anything to go on from
        (folder / "log.jsonl").unlink(missing_ok=True)
        return False
    there = read_arguments(folder / "arguments.yaml")
    changed = [
        f"{name} was {there.get(name)!r} and is {value!r}"
        for name, value in identity_of(args).items()
        if there.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"{folder} holds another run: {'; '.join(changed)}. Choose another --output_dir, or start anew with "
            "--overwrite_output_dir."
        )
    if (folder / "metrics.json").exists():
        print(f"The run in {folder} is finished: nothing to do. --overwrite_output_dir starts it anew.")
        return True
    return False


def newest_checkpoint(output_dir: str | Path) -> str | None:
    """The newest whole checkpoint of transformers' Trainer in a run's folder, or None; for the main process.

    Trainer writes trainer_state.json last. A checkpoint without it was being written when the run was killed or the
    disk full, and Trainer would stop on it for ever: it is set aside, and said.
    """
    checkpoints = Path(output_dir) / "checkpoints"
    while checkpoints.is_dir() and (name := get_last_checkpoint(str(checkpoints))) is not None:
        try:
            json.loads((Path(name) / "trainer_state.json").read_text(encoding="utf-8"))
            return name
        except (OSError, ValueError):
            aside = checkpoints / f"torn-{Path(name).name}"
            shutil.rmtree(aside, ignore_errors=True)
            Path(name).rename(aside)
            print(f"{name} was not written to its end, and is set aside as {aside.name}.", flush=True)
    return None


def trackers(report_to: list[str] | None) -> list[str] | str:
    """`--report_to` for `TrainingArguments`; "none" alone, like nothing, is no tracker.

    Raises:
        ValueError: transformers has no such tracker, or its package is not installed.
    """
    names = [name for name in report_to or [] if name != "none"]
    for name in names:
        if name != "all" and name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"--report_to {name}: it is one of {', '.join(INTEGRATION_TO_CALLBACK)}, all or none.")
        if name != "all" and name not in get_available_reporting_integrations():
            raise ValueError(f"--report_to {name}: its package is not installed here. Install it, or leave it out.")
    return "all" if "all" in names else names or "none"


class LogFile(TrainerCallback):
    """One line of `log.jsonl` for what Trainer logs; of an evaluation also a word on the terminal.

    `describe` makes that word of the line: "validation 1.2345 nats per response token". Trainer's speeds are left out,
    as they count padding.
    """

    def __init__(self, path: str | Path, describe: Callable[[dict[str, Any]], str] | None = None):
        self.path = Path(path)
        self.describe = describe

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        numbers = {name: value for name, value in logs.items() if not name.endswith(("_runtime", "_per_second"))}
        line = {"step": state.global_step, **numbers}
        append_to_log(self.path, line)
        if "eval_loss" in line and self.describe is not None:
            print(f"step {line['step']:,}: {self.describe(line)}", flush=True)
