"""A run of one of the fine-tuning recipes: its folder, transformers' Trainer in it, and what it leaves there."""

import contextlib
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.utils import logging as transformers_logging

from ..adapters import merge_adapter, save_adapter
from ..cli.arguments import read_arguments, save_arguments
from ..cli.options import identity_of
from ..hub import write_page_and_card
from ..report import save_environment
from ..runs.lock import run_lock
from ..runs.log import append_to_log
from ..runs.signals import EXIT_CODE
from ..training.devices import keep_freed_memory, leaving_at_once
from .checkpoints import CheckpointedTrainer, train_from_newest


# What a run writes, and what overwrite_output_dir deletes.
FILES = (
    *("arguments.yaml", "metrics.json", "log.jsonl", "samples.txt", "confusion.png", "report.html"),
    *("config.json", "model.safetensors"),
)
FOLDERS = ("checkpoints", "adapter")


@dataclasses.dataclass(frozen=True)
class FineTuningRun:
    """The run that `open_run` opened. Every process calls its methods; only the main process writes."""

    args: Any  # the recipe's dataclass of options
    output_dir: Path
    is_main: bool
    is_finished: bool

    def begin(self, trainer: Trainer, describe_evaluation: Callable[[dict[str, Any]], str] | None = None) -> None:
        """Record the run's arguments and environment, and let `trainer` log into `log.jsonl`.

        To be called once everything that can be wrong has been checked, and before anything is measured or trained.
        """
        if self.is_main:
            save_arguments(self.args, self.output_dir / "arguments.yaml")
            save_environment(self.output_dir, num_processes=trainer.args.world_size)
        for callback in (PrinterCallback, ProgressCallback):  # both print the numbers that are in log.jsonl
            trainer.remove_callback(callback)
        if sys.stderr.isatty():
            trainer.add_callback(ProgressBar)
        trainer.add_callback(LogFile(self.output_dir / "log.jsonl", describe_evaluation))

    def train(self, trainer: CheckpointedTrainer) -> float:
        """Train from the newest sound checkpoint, or from the start; returns the seconds it took.

        If the run is told to stop (SIGTERM, Ctrl-C), it saves after the step, and the process exits with EXIT_CODE.
        """
        start = time.perf_counter()
        if not train_from_newest(trainer):
            with leaving_at_once(trainer.accelerator):
                sys.exit(EXIT_CODE)
        return time.perf_counter() - start

    def save_model(self, trainer: Trainer, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """Save the trained model and its tokenizer, and return the model.

        LoRA is merged into the model's weights; the adapter alone is saved in `adapter/`.
        """
        model = trainer.accelerator.unwrap_model(trainer.model)
        is_adapted = hasattr(model, "peft_config")
        if is_adapted:
            if self.is_main:
                save_adapter(model, self.output_dir / "adapter")
            model = merge_adapter(model)
        if model.can_generate():
            model.config.use_cache = True  # Trainer sets it to False
        if not is_adapted:
            trainer.save_model(str(self.output_dir))  # also gathers the weights of a sharded model
        elif self.is_main:
            model.save_pretrained(self.output_dir)
        if self.is_main:
            tokenizer.save_pretrained(self.output_dir)
        return model

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write `metrics.json`, which marks the run as finished, then the run's page and model card."""
        if self.is_main:
            text = json.dumps(metrics, indent=2) + "\n"
            (self.output_dir / "metrics.json").write_text(text, encoding="utf-8")
            write_page_and_card(self.output_dir)


@contextlib.contextmanager
def open_run(args: Any) -> Iterator[FineTuningRun]:
    """Open the run of these arguments in `output_dir`, locked against other runs, with all random generators seeded.

    `args` is a recipe's dataclass with `model`, `seed`, `output_dir` and `overwrite_output_dir`. If the folder holds
    the finished run already, `is_finished` is true, and the recipe has nothing to do.
    """
    is_main = PartialState(cpu=not torch.accelerator.is_available()).is_main_process
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # of loading and saving; training has its own
    keep_freed_memory()
    output_dir = Path(args.output_dir)
    with run_lock(output_dir) if is_main else contextlib.nullcontext():
        [is_finished] = broadcast_object_list([is_main and prepare_folder(args)])  # decided by the main process
        set_seed(args.seed)
        yield FineTuningRun(args, output_dir, is_main, is_finished)
    PartialState().destroy_process_group()


def training_arguments(args: Any, *, kind: type[TrainingArguments] = TrainingArguments, **own: Any) -> Any:
    """Trainer's arguments: the recipe's options that have the same name there, and `own`, which win.

    `kind` is the class of the arguments, such as TRL's `DPOConfig`.
    """
    names = {field.name for field in dataclasses.fields(kind) if field.init}
    # Gradient checkpointing is set up where LoRA is, which needs it to work with frozen embeddings.
    same = {name: value for name, value in vars(args).items() if name in names - {"gradient_checkpointing"}}
    ours = {
        "output_dir": str(Path(args.output_dir) / "checkpoints"),
        "max_steps": args.max_steps or -1,
        "report_to": trackers(getattr(args, "report_to", None)),
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "use_cpu": not torch.accelerator.is_available(),
    }
    return kind(**(same | ours | own))


def prepare_folder(args: Any) -> bool:
    """Whether the run of these arguments is finished in its `output_dir`; if not, it may begin or resume there.

    `args` is a recipe's dataclass with `model`, `output_dir` and `overwrite_output_dir`, which deletes what an earlier
    run left. For the main process.

    Raises:
        ValueError: the folder is that of `model`, holds a model that no run made, or a run with other arguments.
    """
    folder = Path(args.output_dir)
    if folder.exists() and Path(args.model).exists() and folder.samefile(args.model):
        raise ValueError(f"output_dir {folder} is the folder of model, which would be overwritten. Choose another one.")
    if args.overwrite_output_dir:
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        for name in FOLDERS:
            shutil.rmtree(folder / name, ignore_errors=True)
        return False
    if not (folder / "arguments.yaml").exists():
        if (folder / "config.json").exists():
            raise ValueError(
                f"{folder} holds a model that no run of this recipe made, and it would be overwritten. Choose another "
                "output_dir, or overwrite it with overwrite_output_dir."
            )
        return False
    left = [*folder.glob("metrics.json"), *folder.glob("config.json"), *folder.glob("checkpoints/checkpoint-*")]
    if not left:  # the earlier run ended before its first checkpoint
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
            f"{folder} holds another run: {'; '.join(changed)}. Choose another output_dir, or start again with "
            "overwrite_output_dir."
        )
    if (folder / "metrics.json").exists():
        print(f"The run in {folder} is finished: nothing to do. overwrite_output_dir starts it again.")
        return True
    return False


def trackers(report_to: list[str] | None) -> list[str] | str:
    """`report_to` for `TrainingArguments`; "none" alone, like nothing, is no tracker.

    Raises:
        ValueError: transformers has no such tracker, or its package is not installed.
    """
    names = [name for name in report_to or [] if name != "none"]
    for name in names:
        if name != "all" and name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"report_to {name}: choose from {', '.join(INTEGRATION_TO_CALLBACK)}, all or none.")
        if name != "all" and name not in get_available_reporting_integrations():
            raise ValueError(f"report_to {name}: its package is not installed. Install it, or leave it out.")
    return "all" if "all" in names else names or "none"


class LogFile(TrainerCallback):
    """Writes what Trainer logs into `log.jsonl`, a line each, and prints a line for each evaluation.

    `describe` turns the numbers of an evaluation into that line: "validation 1.2345 nats per response token".
    Trainer's speeds are left out, because they count padding.
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


class ProgressBar(ProgressCallback):
    """Trainer's progress bar, without the numbers, which `log.jsonl` has."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass
