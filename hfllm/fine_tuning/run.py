"""A run of a fine-tuning recipe: its folder, Trainer's arguments and callbacks, and saving the results."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
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
from ..cli.arguments import save_arguments
from ..cli.options import changeable_of, identity_of, inputs_of
from ..hub import write_page_and_card
from ..report import save_environment
from ..report.page import PAGE_FILE
from ..runs.files import write_json
from ..runs.finite import check_finite
from ..runs.folder import RunFolder, claim_folder
from ..runs.identity import hash_model, hash_rows
from ..runs.log import append_to_log
from ..runs.processes import on_main_process
from ..runs.signals import EXIT_CODE
from ..tokenization import tokenizer_fingerprint
from ..training.devices import keep_freed_memory, leaving_at_once
from .checkpoints import CheckpointedTrainer, train_from_newest


# Files that a run writes besides its results, and after them.
FILES = ("log.jsonl", PAGE_FILE)
# Updates in a row whose gradient was not finite; more are not an accident.
MAX_SKIPPED_IN_A_ROW = 10


@dataclasses.dataclass
class FineTuningRun:
    """The run that `open_run` opened. Every process calls its methods; only the main process writes."""

    args: Any  # the recipe's dataclass of options
    folder: RunFolder
    is_main: bool
    identity: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def output_dir(self) -> Path:
        return self.folder.path

    def is_finished(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Mapping[str, Iterable[Any]]
    ) -> bool:
        """Whether this run is finished already; a missing page or card is written now.

        `model` is the base, as it was opened. `rows` are the rows for training and evaluation, by name ("train",
        "eval", "test"), as JSON values.

        Raises:
            ValueError: the folder holds another run, for example one on other rows; says what differs.
        """
        self.tokenizer = tokenizer
        self.identity = {
            **identity_of(self.args, by_content=True),
            "rows_per_step": self.args.per_device_train_batch_size
            * self.args.gradient_accumulation_steps
            * PartialState().num_processes,
            "base_sha256": hash_model(self.args.model, revision=getattr(model.config, "_commit_hash", None)),
            "tokenizer_sha256": hash_rows([tokenizer_fingerprint(tokenizer), tokenizer.chat_template]),
            **{f"{name}_sha256": hash_rows(each) for name, each in rows.items()},
        }
        if self.folder.is_of_earlier_version:  # it noted only its options
            self.folder.check_same(identity_of(self.args))
        self.folder.check_same(self.identity)
        if not self.folder.is_finished():
            return False
        if not self.folder.is_done("page", file=PAGE_FILE):
            self._present()
        elif self.is_main:
            print(f"The run in {self.output_dir} is finished: nothing to do. overwrite_output_dir starts again.")
        return True

    def begin(
        self, trainer: CheckpointedTrainer, describe_evaluation: Callable[[dict[str, Any]], str] | None = None
    ) -> None:
        """Begin or resume the run, and let `trainer` log into `log.jsonl`; an earlier one is deleted if asked for.

        Call it after all checks, and before anything is measured or trained.
        """
        changes = self.folder.begin(self.identity, options=changeable_of(self.args), files=FILES)
        with self.folder.writing() as partial:
            if self.is_main:
                save_arguments(self.args, partial / "arguments.yaml")
                save_environment(partial, num_processes=trainer.args.world_size)
        if self.is_main:
            for change in changes:
                print(f"{change} from here on.")
        for callback in (PrinterCallback, ProgressCallback):  # both print the numbers that are in log.jsonl
            trainer.remove_callback(callback)
        if sys.stderr.isatty():
            trainer.add_callback(ProgressBar)
        trainer.add_callback(LogFile(self.output_dir / "log.jsonl", describe_evaluation))
        trainer.add_callback(FiniteUpdates())
        trainer.tokenizer_of_checkpoints = self.tokenizer

    def train(self, trainer: CheckpointedTrainer) -> float:
        """Train from the newest sound checkpoint, or from the start; returns the seconds it took.

        On SIGTERM or Ctrl-C it saves after the step, and the process exits with EXIT_CODE.
        """
        start = time.perf_counter()
        if not train_from_newest(trainer):
            with leaving_at_once(trainer.accelerator):
                sys.exit(EXIT_CODE)
        return time.perf_counter() - start

    @contextlib.contextmanager
    def writing(self) -> Iterator[Path]:
        """A folder for the results, see `RunFolder.writing`."""
        with self.folder.writing() as partial:
            yield partial

    def save_model(self, trainer: Trainer, tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedModel:
        """Save the trained model and its tokenizer into the folder of `writing`, and return the model.

        LoRA is merged into the model's weights; the adapter alone is saved in `adapter/`.

        Raises:
            FloatingPointError: a weight is not finite.
        """
        model = trainer.accelerator.unwrap_model(trainer.model)
        check_finite(model.named_parameters(), what="The model")
        is_adapted = hasattr(model, "peft_config")
        if is_adapted:
            if self.is_main:
                save_adapter(model, folder / "adapter")
            model = merge_adapter(model)
        if model.can_generate():
            model.config.use_cache = True  # Trainer sets it to False
        if not is_adapted:
            trainer.save_model(str(folder))  # also gathers the weights of a sharded model
        elif self.is_main:
            model.save_pretrained(folder)
        if self.is_main:
            tokenizer.save_pretrained(folder)
        return model

    def save_metrics(self, metrics: dict[str, Any], folder: Path) -> None:
        """Write `metrics.json` into the folder of `writing`.

        Raises:
            FloatingPointError: a number is not finite.
        """
        if self.is_main:
            write_json(folder / "metrics.json", metrics)

    def finish(self, trainer: Trainer) -> None:
        """Note that the run is finished, with the files of `writing`, and write its page and card."""
        self.folder.finish(step=trainer.state.global_step)
        self._present()

    def _present(self) -> None:
        on_main_process(PartialState(), lambda: write_page_and_card(self.output_dir))
        self.folder.note_done(page=True)


@contextlib.contextmanager
def open_run(args: Any, *, recipe: str) -> Iterator[FineTuningRun]:
    """Open the run of these arguments in `output_dir`, locked against other runs, with all random generators seeded.

    `args` is a recipe's dataclass with `model`, `seed`, `output_dir` and `overwrite_output_dir`.
    """
    processes = PartialState(cpu=not torch.accelerator.is_available())
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # for loading and saving; training has its own
    keep_freed_memory()
    claim = claim_folder(
        args.output_dir,
        recipe=recipe,
        overwrite=args.overwrite_output_dir,
        inputs=inputs_of(args),
        accelerator=processes,
    )
    with claim as folder:
        set_seed(args.seed)
        yield FineTuningRun(args, folder, processes.is_main_process)
    processes.destroy_process_group()


def training_arguments(args: Any, *, kind: type[TrainingArguments] = TrainingArguments, **own: Any) -> Any:
    """Trainer's arguments: the recipe's options that have the same name there, and `own`, which take precedence.

    `kind` is the class of the arguments, such as TRL's `DPOConfig`.
    """
    names = {field.name for field in dataclasses.fields(kind) if field.init}
    # Gradient checkpointing is set up together with LoRA, whose frozen embeddings need a change for it.
    same = {name: value for name, value in vars(args).items() if name in names - {"gradient_checkpointing"}}
    ours = {
        "output_dir": str(Path(args.output_dir) / "checkpoints"),
        "max_steps": args.max_steps or -1,
        "report_to": trackers(getattr(args, "report_to", None)),
        "logging_nan_inf_filter": False,  # otherwise a loss that is not finite is logged as 0
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "use_cpu": not torch.accelerator.is_available(),
    }
    return kind(**(same | ours | own))


def trackers(report_to: list[str] | None) -> list[str] | str:
    """`report_to` for `TrainingArguments`; None and "none" alone mean no tracker.

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
    """Writes Trainer's logs into `log.jsonl`, and prints a line for each evaluation.

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


class FiniteUpdates(TrainerCallback):
    """Skips an update whose gradient is not finite, and stops the run after several in a row."""

    def __init__(self):
        self.num_skipped_in_a_row = 0

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if getattr(optimizer, "scaler", None) is not None:  # float16's loss scale does the same
            return
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not gradients or bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients))):
            self.num_skipped_in_a_row = 0
            return
        optimizer.zero_grad()  # an update without gradients changes nothing
        self.num_skipped_in_a_row += 1
        if self.num_skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"The gradient was not finite {self.num_skipped_in_a_row} times in a row, up to step "
                f"{state.global_step + 1:,}; those updates were skipped. Start again with a lower learning_rate than "
                f"{args.learning_rate}."
            )


class ProgressBar(ProgressCallback):
    """Trainer's progress bar, without the numbers, which `log.jsonl` has."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass
