"""Saving the checkpoints of a run; those of a sharded model in pieces and in the background."""

import logging
import tempfile
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from ..runs.finite import check_finite
from ..runs.manifest import describe_file
from ..runs.processes import on_main_process
from ..runs.sharded import Piece, is_sharded, shard_names, write_shard
from .checkpoint import (
    KINDS,
    STATE,
    bare,
    check_keep,
    class_name,
    consolidate_checkpoint,
    delete_old,
    encode_state,
    errors_explained,
    make_folder,
    path_of,
    plain,
    put_in_place,
    reads_pieces,
    save_checkpoint,
    save_model,
    tied_names,
    write_description,
)
from .devices import TIMEOUT


logger = logging.getLogger(__name__)


class CheckpointSaver:
    """Saves the checkpoints of one run into `directory`; all processes call its methods together.

    Under DDP, DeepSpeed and on one process, `save` is `save_checkpoint`. Under FSDP2 and HSDP no process holds the
    whole model: each copies its own pieces, and a thread writes them while training goes on. When all have written
    theirs, the main process lists them with their sha256 in the manifest, and gives the folder its name. At most one
    checkpoint is being written: the next `save` waits for it, and so must the end of the run, by `wait`. Copies of a
    piece (HSDP has one in each group) are written once, and the processes share this work evenly.

    If processes do not see one folder, as on machines without a common disk, the main process gathers and writes whole
    checkpoints.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerBase | None = None,
        keep: int | None = None,
    ):
        check_keep(keep)
        self.directory, self.keep = Path(directory), keep
        self.model, self.optimizer, self.accelerator, self.tokenizer = model, optimizer, accelerator, tokenizer
        self.in_pieces = reads_pieces(accelerator) and _see_one_folder(self.directory, accelerator)
        if reads_pieces(accelerator) and not self.in_pieces and accelerator.is_main_process:
            logger.warning(
                "The processes do not all see %s, so the main one gathers and writes whole checkpoints. With a disk "
                "that all machines share, each process writes its own part.",
                self.directory,
            )
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        self.description: dict[str, bytes] | None = None  # the files beside the weights, the same in all checkpoints
        # The thread's own group: its messages must not come between those of the training.
        self.group = torch.distributed.new_group(backend="gloo", timeout=TIMEOUT) if self.in_pieces else None

    def save(
        self,
        state: dict[str, Any],
        *,
        best_step: int | None = None,
        when_written: Callable[[Path], None] | None = None,
    ) -> None:
        """Save the checkpoint of `state["step"]`; see `save_checkpoint`.

        `when_written` is called with its folder on the main process, as soon as the checkpoint is complete. What is
        wrong with the disk or the numbers may be raised by the next `save` or `wait`.
        """
        if not self.in_pieces:
            parts = {"model": self.model, "optimizer": self.optimizer, "accelerator": self.accelerator}
            others = {"tokenizer": self.tokenizer, "keep": self.keep, "best_step": best_step}
            path = save_checkpoint(self.directory, state=state, **parts, **others)
            if when_written is not None and self.accelerator.is_main_process:
                when_written(path)
            return

        self.wait()
        path = path_of(self.directory, state)
        model, optimizer = bare(self.model, self.optimizer, self.accelerator)
        pieces, content, num_bytes = self._copy(path, model, optimizer, state)

        def prepare() -> None:
            if self.description is None:
                self.description = _describe(model, self.tokenizer)
            with errors_explained(path):
                make_folder(path, num_bytes + len(content))

        on_main_process(self.accelerator, prepare)
        files: dict[str, bytes] = {STATE: content.encode(), **(self.description or {})}

        def finish(written: dict[str, Any]) -> None:
            with errors_explained(path):
                for name, file in files.items():
                    (path.with_suffix(".tmp") / name).parent.mkdir(parents=True, exist_ok=True)
                    (path.with_suffix(".tmp") / name).write_bytes(file)
                put_in_place(path, written)
            delete_old(path, self.keep, best_step)
            if when_written is not None:
                when_written(path)

        # Not a daemon: if the run fails meanwhile, Python still waits for the checkpoint before it ends.
        self.thread = threading.Thread(target=self._write, args=(path, pieces, finish), name="checkpoint")
        self.thread.start()

    def wait(self) -> None:
        """Wait until the last checkpoint is complete; raises what went wrong with it, on every process."""
        if self.thread is None:
            return
        self.thread.join()
        self.thread = None
        if (error := self.error) is not None:
            self.error = None
            raise error

    def save_model(self, directory: str | Path, *, step: int) -> None:
        """Write the model, which is that of the checkpoint of this step, as `save_pretrained` does.

        If that checkpoint is in pieces, they are put together on the disk, and no process holds the model.
        """
        self.wait()
        checkpoint = path_of(self.directory, {"step": step})
        if on_main_process(self.accelerator, lambda: is_sharded(checkpoint)):
            on_main_process(self.accelerator, lambda: consolidate_checkpoint(checkpoint, directory))
        else:
            save_model(directory, model=self.model, accelerator=self.accelerator)

    def _copy(
        self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> tuple[dict[str, dict[str, Piece]], str, int]:
        """This process's pieces in memory of their own, the content of state.json, and the bytes of all processes."""
        tied = tied_names(model)
        tensors = {plain(name): tensor for name, tensor in model.state_dict().items() if plain(name) not in tied}
        names = {id(parameter): plain(name) for name, parameter in model.named_parameters()}
        averages: dict[str, torch.Tensor] = {}
        numbers: dict[str, float] = {}
        groups: list[dict[str, Any]] = []
        with_state: list[str] = []
        for group in optimizer.param_groups:
            groups.append({**group, "params": [names[id(parameter)] for parameter in group["params"]]})
            for parameter in (parameter for parameter in group["params"] if parameter in optimizer.state):
                with_state.append(names[id(parameter)])
                for what, value in optimizer.state[parameter].items():
                    (averages if torch.is_tensor(value) else numbers)[f"{names[id(parameter)]}.{what}"] = value
        saved = {
            "class": class_name(optimizer, self.accelerator),
            "parameters": with_state,
            "numbers": numbers,
            "param_groups": groups,
        }
        content = encode_state(path, state, saved, self.accelerator)
        is_main = self.accelerator.is_main_process
        pieces = {kind: _own_pieces(all_of_it, is_main) for kind, all_of_it in zip(KINDS, (tensors, averages))}
        of_all = [*tensors.values(), *averages.values()]  # numel of a sharded tensor is the whole's
        num_bytes = sum(tensor.numel() * tensor.element_size() + 512 for tensor in of_all)
        return pieces, content, num_bytes

    def _write(self, path: Path, pieces: dict[str, dict[str, Piece]], finish: Callable[[dict[str, Any]], None]) -> None:
        """Write the pieces and wait until the whole checkpoint is there; in the thread of each process.

        Every process gets the same outcome in `error`, so all continue or all stop.
        """
        written: dict[str, Any] | Exception
        try:
            written = self._write_pieces(path, pieces)
        except Exception as error:
            written = _simple(error)
        pieces.clear()
        try:
            index, number = self.accelerator.process_index, self.accelerator.num_processes
            gathered: list[Any] | None = [None] * number if index == 0 else None
            torch.distributed.gather_object(written, gathered, dst=0, group=self.group)
            outcome: list[Exception | None] = [None]
            if gathered is not None:
                outcome = [self._finish(path, gathered, finish)]
            torch.distributed.broadcast_object_list(outcome, src=0, group=self.group)
            self.error = outcome[0]
        except Exception as error:  # another process has ended
            self.error = RuntimeError(f"{path} was not written: another process has ended ({error}).")

    def _write_pieces(self, path: Path, pieces: dict[str, dict[str, Piece]]) -> dict[str, Any]:
        step, files = int(path.name.removeprefix("step-")), {}
        for kind in KINDS:  # all is checked before anything is written
            named = ((name, piece.tensor) for name, piece in pieces[kind].items())
            check_finite(named, what=f"The checkpoint {path}")
        for kind in KINDS:
            name = shard_names(kind, self.accelerator.num_processes)[self.accelerator.process_index]
            write_shard(path.with_suffix(".tmp") / name, pieces[kind], step=step)
            files[name] = describe_file(path.with_suffix(".tmp") / name)
        return files

    def _finish(self, path: Path, gathered: list[Any], finish: Callable[[dict[str, Any]], None]) -> Exception | None:
        """Complete the checkpoint, on the main process; returns the error if any process had one."""
        try:
            with errors_explained(path):
                for written in gathered:
                    if isinstance(written, Exception):
                        raise written
            finish({name: entry for written in gathered for name, entry in written.items()})
        except Exception as error:
            logger.warning("%s The run stops at its next checkpoint.", error)
            return _simple(error)
        return None


def _own_pieces(tensors: dict[str, torch.Tensor], is_main_process: bool) -> dict[str, Piece]:
    """The pieces that this process writes, copied: training changes the tensors while they are written.

    Whole tensors, such as the counts of steps, are the main process's. Of copies each goes to the group of processes
    that has the fewest bytes so far.
    """
    pieces = {}
    num_bytes: dict[int, list[int]] = {}  # of each group, by the number of groups
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            if is_main_process:
                pieces[name] = Piece(_copied(tensor), (0,) * tensor.ndim, tuple(tensor.shape))
            continue
        own, number = _copy_of(tensor)
        load = num_bytes.setdefault(number, [0] * number)
        writer = load.index(min(load))
        load[writer] += tensor.numel() * tensor.element_size()
        [chunk] = tensor.__create_chunk_list__()
        if own == writer and tensor.to_local().numel() > 0:
            pieces[name] = Piece(_copied(tensor.to_local()), tuple(chunk.offsets), tuple(tensor.shape))
    return pieces


def _copy_of(tensor: DTensor) -> tuple[int, int]:
    """Which of several copies of its piece this process holds, and how many there are."""
    mesh, own, number = tensor.device_mesh, 0, 1
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            own = own * mesh.size(dimension) + mesh.get_local_rank(dimension)
            number *= mesh.size(dimension)
    return own, number


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _describe(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, bytes]:
    """The files that stand beside the weights of a checkpoint, by their names."""
    with tempfile.TemporaryDirectory() as name:
        write_description(Path(name), model, tokenizer)
        paths = [path for path in Path(name).rglob("*") if path.is_file()]
        return {path.relative_to(name).as_posix(): path.read_bytes() for path in paths}


def _simple(error: Exception) -> Exception:
    """The error in a type that another process can raise too."""
    if isinstance(error, SafetensorError):
        return OSError(str(error))
    return error if type(error) in (OSError, FloatingPointError) else RuntimeError(f"{type(error).__name__}: {error}")


def _see_one_folder(directory: Path, accelerator: Accelerator) -> bool:
    """Whether every process sees what the main one writes into the folder."""
    probe = directory / f".probe-{uuid.uuid4().hex}"

    def write() -> Path:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            probe.touch()
        except OSError as error:
            raise OSError(f"{directory} cannot be used: {error}. Choose another output_dir.") from error
        return probe

    path = on_main_process(accelerator, write)
    is_seen_by_all = all(gather_object([path.exists()]))
    if accelerator.is_main_process:
        probe.unlink()
    return is_seen_by_all
