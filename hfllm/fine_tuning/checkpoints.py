"""Checkpoints of transformers' Trainer that are whole or do not exist, and exact resuming from them.

    checkpoints/checkpoint-100/
        model.safetensors, config.json      or adapter_model.safetensors with LoRA: as Trainer writes them
        base_model.json                     with LoRA, what its base is known by, and a classifier's labels
        tokenizer.json, ...                 so that the folder opens by itself
        optimizer.safetensors, .json        "<number of the parameter>.<what>", and the optimizer's plain numbers
        scheduler.json, scaler.json         the learning rate's schedule; the loss scale, with float16
        random_states.safetensors           of Python, numpy and torch, for each process
        trainer_state.json                  Trainer's own
        manifest.json                       size and sha256 of all the above, written last

A checkpoint is written elsewhere, flushed to the disk and then renamed: at every moment the folder either holds it
complete or does not hold it. `broken-checkpoint-100` failed verification and was set aside. Nothing is pickled, except
torch's own files of a sharded model (FSDP, DeepSpeed), which are read only after their sha256 was checked.
"""

import contextlib
import json
import logging
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput

from ..runs.files import flush
from ..runs.finite import check_finite
from ..runs.manifest import find_fault, set_aside, write_manifest
from ..runs.processes import on_main_process
from ..runs.signals import StopRequest
from .order import RowOrder, set_epoch


logger = logging.getLogger(__name__)

OPTIMIZER, OPTIMIZER_NUMBERS = "optimizer.safetensors", "optimizer.json"
SCHEDULER, SCALER, RANDOM_STATES = "scheduler.json", "scaler.json", "random_states.safetensors"
STATE = "trainer_state.json"
WRITING = "writing"  # the folder beside the checkpoints in which one is written
DELETING = "deleting-"  # prefix of a checkpoint's name while it is deleted
SPARE_BYTES = 1 << 20  # for the files of a checkpoint that are not tensors


class CheckpointedTrainer(Trainer):
    """transformers' Trainer with whole checkpoints, exact resumption, and a checkpoint when a signal stops it.

    `was_stopped` says after `train` whether SIGTERM or Ctrl-C ended it; the newest checkpoint then has all its steps,
    and the process must exit with `hfllm.runs.signals.EXIT_CODE`. See `train_from_newest`.

    The order of rows is a function of the seed and the epoch, also if they are grouped by length, where Trainer would
    use the random state of the process.
    """

    was_stopped = False
    # Saved with each checkpoint, so that it opens by itself. As its `processing_class`, Trainer would also overwrite
    # the tokens at which the model stops by the tokenizer's.
    tokenizer_of_checkpoints: PreTrainedTokenizerBase | None = None
    control: Any

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self.was_stopped = False
        with StopRequest(self.accelerator) as request:
            stopping = _StopWhenAsked(self, request)
            self.add_callback(stopping)
            try:
                output = super().train(*args, **kwargs)
            finally:
                self.remove_callback(stopping)
            # The signal came after the last step, when everything is saved.
            self.was_stopped = self.was_stopped or request.agreed()
        return output

    # The order of rows

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return RowOrder(
            dataset.lengths,
            batch_size=self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size,
            by_length=True,
            seed=self.args.seed,
            drop_last=False,
        )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self._is_at_end():  # resumed after its last step, where Trainer would take one more
            self.control.should_training_stop = True
            return
        set_epoch(kwargs["train_dataloader"], kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    def _is_at_end(self) -> bool:
        return self.state.global_step >= self.state.max_steps or any(
            callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
            if isinstance(callback, EarlyStoppingCallback)
        )

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        if not self.was_stopped:
            return super()._finalize_training(*args, **kwargs)
        # The run is not at its end: do not load the best weights or delete other checkpoints.
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self.is_in_train = False
        return TrainOutput(self.state.global_step, float("nan"), {})

    # Writing a checkpoint

    def _get_output_dir(self, trial: Any = None) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / WRITING) if self._is_writing else folder

    _is_writing = False

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        folder = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        on_main_process(self.accelerator, lambda: self._prepare_writing(folder))
        self._is_writing = True
        try:
            with _disk_errors_explained(folder / name, folder / WRITING):
                super()._save_checkpoint(model, trial)
        finally:
            self._is_writing = False
        self.accelerator.wait_for_everyone()

        def finish() -> None:
            with _disk_errors_explained(folder / name, folder / WRITING):
                write_manifest(folder / WRITING / name)
                if (folder / name).exists():  # saved twice in a step; the new one is whole, see `newest_checkpoint`
                    _set_for_deletion(folder / name)
                (folder / WRITING / name).rename(folder / name)
                (folder / WRITING).rmdir()
                flush(folder)
                shutil.rmtree(folder / f"{DELETING}{name}", ignore_errors=True)
            _delete_old(
                folder, keep=self.args.save_total_limit, kept=[name, f"checkpoint-{self.state.best_global_step}"]
            )

        on_main_process(self.accelerator, finish)

    def _prepare_writing(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in [folder / WRITING, *folder.glob(f"{DELETING}*")]:  # of a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        if self._is_sharded:
            return  # the size of the whole checkpoint is not known here
        state = self.optimizer.state_dict()["state"]
        tensors = [value for values in state.values() for value in values.values() if torch.is_tensor(value)]
        is_adapter = hasattr(self.model, "peft_config")
        tensors += [weight for weight in self.model.parameters() if weight.requires_grad or not is_adapter]
        name = f"The checkpoint at step {self.state.global_step:,}"
        check_finite(((f"tensor {index}", tensor) for index, tensor in enumerate(tensors)), what=name)
        needed = sum(tensor.nbytes for tensor in tensors) + SPARE_BYTES
        if needed > (free := shutil.disk_usage(folder).free):
            raise OSError(
                f"The checkpoint at step {self.state.global_step:,} needs {needed / 2**20:,.1f} MiB, and the disk of "
                f"{folder} has {free / 2**20:,.1f} MiB left. The older checkpoints are untouched. Free disk space, and "
                "start the same command again."
            )

    @property
    def _is_sharded(self) -> bool:
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle
            if hasattr(self.model, "peft_config") and not self._is_sharded:  # whose weights no process has
                from ..adapters import describe_base  # PEFT takes time to import

                describe_base(self.model, folder)
            if self.tokenizer_of_checkpoints is not None:
                self.tokenizer_of_checkpoints.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder = Path(output_dir)
        if best := self.state.best_global_step:  # where it will be once this folder is renamed
            path = folder.parent.parent / f"checkpoint-{best}"
            if path.is_dir() or path.name == folder.name:
                self.state.best_model_checkpoint = str(path)
        if self._is_sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if not self.args.should_save:
            return
        state = self.optimizer.state_dict()
        tensors: dict[str, torch.Tensor] = {}
        numbers: dict[str, Any] = {}
        for index, values in state["state"].items():
            for name, value in values.items():
                if torch.is_tensor(value):
                    tensors[f"{index}.{name}"] = value.detach().cpu().contiguous()
                else:
                    numbers[f"{index}.{name}"] = value
        content = {"class": self._optimizer_class, "param_groups": state["param_groups"], "numbers": numbers}
        save_file(tensors, folder / OPTIMIZER)
        _write_json(folder / OPTIMIZER_NUMBERS, content)
        _write_json(folder / SCHEDULER, self.lr_scheduler.state_dict())

    @property
    def _optimizer_class(self) -> str:
        return type(getattr(self.optimizer, "optimizer", self.optimizer)).__name__

    def _save_scaler(self, output_dir: str) -> None:
        if self.accelerator.scaler is not None and self.args.should_save:
            _write_json(Path(output_dir) / SCALER, self.accelerator.scaler.state_dict())

    def _save_rng_state(self, output_dir: str) -> None:
        states = gather_object([{name: tensor.numpy() for name, tensor in random_states().items()}])
        if self.args.should_save:
            tensors = {
                f"{process}.{name}": torch.from_numpy(array)
                for process, arrays in enumerate(states)
                for name, array in arrays.items()
            }
            save_file(tensors, Path(output_dir) / RANDOM_STATES)

    # Reading one

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._init_training_state(*args, **kwargs)
        if best := self.state.best_global_step:  # the run's folder may have moved since
            self.state.best_model_checkpoint = str(Path(self.args.output_dir) / f"checkpoint-{best}")
        return result

    def _load_callback_state(self) -> None:
        # Trainer does this only on request, and early stopping would count from zero again.
        for callback in self.callback_handler.callbacks:
            saved = self.state.stateful_callbacks.get(type(callback).__name__)
            if isinstance(callback, ExportableState) and isinstance(saved, dict):
                for name, value in saved["attributes"].items():
                    setattr(callback, name, value)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self._is_sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        content = _read_json(folder / OPTIMIZER_NUMBERS)
        if content["class"] != self._optimizer_class:
            raise ValueError(
                f"{folder} holds the state of {content['class']}, and the optimizer is {self._optimizer_class}. "
                "Resume with the arguments of the run that wrote it, or choose another output_dir."
            )
        # load_file maps the file into memory; the clone is the optimizer's own, and outlives the file.
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / OPTIMIZER).items()}
        state: dict[int, dict[str, Any]] = {}
        for key, value in (tensors | content["numbers"]).items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = value
        groups = [_with_tuples(group) for group in content["param_groups"]]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.lr_scheduler.load_state_dict(_read_json(folder / SCHEDULER))

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.accelerator.scaler is None:
            return
        if (path := Path(checkpoint) / SCALER).exists():
            self.accelerator.scaler.load_state_dict(_read_json(path))
        else:
            logger.warning("%s was written without float16: the loss scale starts at its first value.", checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        saved = load_file(Path(checkpoint) / RANDOM_STATES)
        num_processes = len({name.partition(".")[0] for name in saved})
        if num_processes != self.args.world_size and self.args.process_index == 0:
            logger.warning(
                "%s was written by %d processes, and there are %d now: dropout is drawn differently.",
                *(checkpoint, num_processes, self.args.world_size),
            )
        own = f"{self.args.process_index}."
        states = {name.removeprefix(own): state for name, state in saved.items() if name.startswith(own)}
        if states:
            set_random_states(states)

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        if fault := on_main_process(self.accelerator, lambda: find_fault(best)):
            raise ValueError(
                f"{best}, whose model was the best, is broken: {fault}. Start the same command again: it resumes from "
                "the checkpoint before it."
            )
        super()._load_best_model()


def train_from_newest(trainer: CheckpointedTrainer) -> bool:
    """Train from the newest sound checkpoint, or from the beginning; False if a signal stopped the run.

    All processes must call it. After False, the process must exit with `hfllm.runs.signals.EXIT_CODE`.
    """
    newest = on_main_process(trainer.accelerator, lambda: newest_checkpoint(trainer.args.output_dir))
    if newest is not None:
        trainer.accelerator.print(f"Resuming from {newest}.")
    trainer.train(resume_from_checkpoint=newest)
    if trainer.was_stopped:
        step, last = trainer.state.global_step, trainer.state.max_steps
        trainer.accelerator.print(f"Stopped at step {step:,} of {last:,}; the same command resumes from here.")
    return not trainer.was_stopped


def newest_checkpoint(checkpoints: str | Path) -> str | None:
    """The newest checkpoint that is sound, and whose best checkpoint is sound too; None if there is none.

    Broken ones are set aside with a message. For the main process.
    """
    for path in (Path(checkpoints) / WRITING).glob("checkpoint-*"):
        if find_fault(path) is None and not (Path(checkpoints) / path.name).exists():
            path.rename(Path(checkpoints) / path.name)  # only this rename was missing when the run was killed
    for path in reversed(list_checkpoints(checkpoints)):
        fault = find_fault(path)
        if fault is None:
            best = _read_json(path / STATE).get("best_global_step")
            best_path = path.with_name(f"checkpoint-{best}")
            if not best or best_path == path:
                return str(path)
            best_fault = find_fault(best_path) if best_path.is_dir() else "it is missing"
            if best_fault is None:
                return str(path)
            fault = f"the best model until then was that of {best_path.name}, and {best_fault}"
        aside = set_aside(path)
        print(f"{path} cannot be resumed from: {fault}. It is set aside as {aside.name}.", flush=True)
    return None


def list_checkpoints(checkpoints: str | Path) -> list[Path]:
    """The folders named like checkpoints, fewest steps first."""
    paths = [path for path in Path(checkpoints).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(paths, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def random_states() -> dict[str, torch.Tensor]:
    """The states of all random generators of this process, as tensors."""
    version, numbers, gauss = random.getstate()
    assert version == 3
    numpy_state: Any = np.random.get_state()
    kind, keys, position, has_gauss, cached_gauss = numpy_state
    assert kind == "MT19937"
    states = {
        "python": torch.tensor(numbers, dtype=torch.int64),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy.position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy.gauss": torch.tensor([cached_gauss], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.accelerator.is_available():
        device = torch.get_device_module(torch.accelerator.current_accelerator())
        states["accelerator"] = device.get_rng_state().cpu()
    return states


def set_random_states(states: dict[str, torch.Tensor]) -> None:
    """Restore the result of `random_states`."""
    gauss = states["python.gauss"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss = states["numpy.position"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, states["numpy.gauss"].item()))
    torch.set_rng_state(states["torch"].clone())
    if "accelerator" in states and torch.accelerator.is_available():
        torch.get_device_module(torch.accelerator.current_accelerator()).set_rng_state(states["accelerator"].clone())


class _StopWhenAsked(TrainerCallback):
    """Has Trainer save and end after the step in which a signal came."""

    def __init__(self, trainer: CheckpointedTrainer, request: StopRequest):
        self.trainer, self.request = trainer, request
        self.step_saved: int | None = None

    def on_step_end(self, args, state, control, **kwargs):
        if not self.request.agreed():
            return
        self.trainer.was_stopped = True
        control.should_training_stop = True
        if not self._is_at_end_of_epoch(state):
            control.should_save = True
        # else `on_epoch_end` saves, after the evaluation that belongs to the epoch and is not repeated by a resume

    def on_epoch_end(self, args, state, control, **kwargs):
        if not self.trainer.was_stopped:
            return
        if not self._is_at_end_of_epoch(state):  # Trainer comes here too when it stops within an epoch
            control.should_save = control.should_evaluate = control.should_log = False
        elif control.should_evaluate or self.step_saved != state.global_step:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        self.step_saved = state.global_step

    def _is_at_end_of_epoch(self, state: Any) -> bool:
        return state.epoch == int(state.epoch) or state.global_step >= state.max_steps


@contextlib.contextmanager
def _disk_errors_explained(path: Path, temporary: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(
            f"{path} could not be written: {error}. The older checkpoints are untouched. Free disk space (or keep "
            "fewer of them), or remove the cause; then start the same command again."
        ) from error


def _delete_old(folder: Path, *, keep: int | None, kept: list[str]) -> None:
    """Delete the checkpoints of the fewest steps, until `keep` are left; never those named in `kept`."""
    if keep is None:
        return
    paths = list_checkpoints(folder)
    older = [path for path in paths if path.name not in kept]
    for path in older[: max(0, len(paths) - keep)]:
        try:
            shutil.rmtree(_set_for_deletion(path))
        except OSError as error:
            logger.warning("The old checkpoint %s could not be deleted: %s.", path, error)


def _set_for_deletion(path: Path) -> Path:
    """Rename a checkpoint, so that if a kill interrupts its deletion, the rest is not taken for a checkpoint."""
    aside = path.with_name(f"{DELETING}{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)


def _with_tuples(group: dict[str, Any]) -> dict[str, Any]:
    """Restore tuples such as the betas, which JSON does not have."""
    return {
        name: tuple(value) if isinstance(value, list) and name != "params" else value for name, value in group.items()
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
