"""Checkpoints that are whole or do not exist.

    checkpoints/step-00000100/
        model.safetensors       parameters and persistent buffers by name; a tied one once, under its first name
        optimizer.safetensors   "<parameter>.<what>", e.g. "model.norm.weight.exp_avg"
        state.json              the state of the training loop, and the optimizer's plain numbers
        config.json, ...        of transformers' models: config, generation config, code and tokenizer, so that the
                                folder opens by `from_pretrained`, as the model of that step
        manifest.json           size and sha256 of all others, written last

Of a model that FSDP2 shards over several processes, each of these holds and writes its own pieces only (see
`hfllm.runs.sharded`, and `CheckpointSaver`, which writes them in the background):

        model.shard-0001-of-0004.safetensors        instead of model.safetensors
        optimizer.shard-0001-of-0004.safetensors    instead of optimizer.safetensors

A checkpoint is written into `step-00000100.tmp`, flushed to the disk and then renamed: at every moment the folder
either holds it complete or does not hold it. `broken-step-00000100` failed verification and was set aside;
`step-00000100.replaced` is being replaced by a new one of that step. One process or many, DDP, FSDP2, HSDP or
DeepSpeed's ZeRO-2 and ZeRO-3, compiled or not: any of these can resume from any other. Nothing is pickled.
"""

import contextlib
import importlib.metadata
import itertools
import json
import logging
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..runs.files import find_non_finite, flush
from ..runs.finite import check_finite
from ..runs.identity import check_same_run
from ..runs.manifest import find_fault, listed_files, set_aside, write_manifest
from ..runs.processes import on_main_process
from ..runs.sharded import (
    Index,
    PieceReader,
    consolidate,
    is_sharded,
    iterate_tensors,
    num_shards,
    read_index,
    shard_names,
)
from ..runs.sharded import find_fault as find_fault_of_pieces
from . import zero


logger = logging.getLogger(__name__)

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
# Of every checkpoint, if it is whole; those of earlier versions have no config and no tokenizer.
FILES = (MODEL, OPTIMIZER, STATE)
KINDS = ("model", "optimizer")  # of the files of pieces


def save_checkpoint(
    directory: str | Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase | None = None,
    keep: int | None = None,
    best_step: int | None = None,
) -> Path:
    """Write `directory/step-<state["step"]>`, then delete all but the `keep` newest; to be called by every process.

    The checkpoint of `best_step` is never deleted. It is one of the `keep`, but the new checkpoint stays in any case.
    `model` and `optimizer` are those that `accelerator.prepare` returned; `state` is everything else that the loop
    needs to resume, in types that JSON knows. A model of transformers is saved with its config, and with the
    `tokenizer`, so that `from_pretrained` opens the checkpoint.

    Raises:
        OSError: the disk is full, or another error of the system; the older checkpoints stay.
        FloatingPointError: a weight, an average or a number is not finite; nothing is written.
    """
    path = path_of(directory, state)
    check_keep(keep)
    model, optimizer = bare(model, optimizer, accelerator)
    model_state, optimizer_state = _gather(model, optimizer, accelerator)

    def write() -> Path:
        tied = tied_names(model)
        tensors = {name: tensor.contiguous() for name, tensor in model_state.items() if name not in tied}
        optimizer_tensors: dict[str, torch.Tensor] = {}
        optimizer_numbers: dict[str, float] = {}
        for parameter, values in optimizer_state["state"].items():
            for name, value in values.items():
                (optimizer_tensors if torch.is_tensor(value) else optimizer_numbers)[f"{parameter}.{name}"] = value
        saved = {
            "class": class_name(optimizer, accelerator),
            "parameters": list(optimizer_state["state"]),
            "numbers": optimizer_numbers,
            "param_groups": optimizer_state["param_groups"],
        }
        check_finite(itertools.chain(tensors.items(), optimizer_tensors.items()), what=f"The checkpoint {path}")
        content = encode_state(path, state, saved, accelerator)
        num_bytes = sum(tensor.nbytes + 512 for tensor in [*tensors.values(), *optimizer_tensors.values()])
        with errors_explained(path):
            temporary = make_folder(path, num_bytes + len(content))
            save_file(tensors, temporary / MODEL, metadata={"format": "pt"})
            save_file(optimizer_tensors, temporary / OPTIMIZER)
            _write_text(temporary / STATE, content)
            write_description(temporary, model, tokenizer)
            put_in_place(path)
        delete_old(path, keep, best_step)
        return path

    return on_main_process(accelerator, write)


def path_of(directory: str | Path, state: dict[str, Any]) -> Path:
    """The folder of a checkpoint with this state."""
    if "step" not in state:
        raise ValueError(f"A checkpoint is named after its step; the state has only the keys {sorted(state)}.")
    return Path(directory) / f"step-{state['step']:08d}"


def check_keep(keep: int | None) -> None:
    """Refuse a number of checkpoints to keep that is none."""
    if keep is not None and keep < 1:
        raise ValueError(f"keep={keep} would delete the checkpoint just written; keep 1 or more, or None for all.")


def encode_state(path: Path, state: dict[str, Any], optimizer: dict[str, Any], accelerator: Accelerator) -> str:
    """The content of state.json; a number in it that is not finite is a FloatingPointError."""
    content = {"state": state, "optimizer": optimizer}
    if accelerator.scaler is not None:
        content["grad_scaler"] = accelerator.scaler.state_dict()
    if name := find_non_finite(content):
        raise FloatingPointError(
            f"The checkpoint {path} was not written: {name} is not a finite number, so training has diverged. "
            "Start again with a lower learning_rate; earlier checkpoints, if there are any, are sound."
        )
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def save_model(directory: str | Path, *, model: PreTrainedModel, accelerator: Accelerator) -> None:
    """Write the model as `save_pretrained` does, whole and in float32, also if it is sharded; for every process."""
    whole = accelerator.unwrap_model(model, keep_torch_compile=False)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        weights = zero.gather_weights(whole, accelerator)
    else:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(whole, options=options)
    if not accelerator.is_main_process:
        return
    tied = tied_names(whole)
    weights = {name: tensor for name, tensor in weights.items() if name not in tied}
    check_finite(weights.items(), what=f"The model {directory}")
    _empty_twin(whole).save_pretrained(directory, state_dict=weights)


def consolidate_checkpoint(path: str | Path, directory: str | Path) -> None:
    """Make a model's folder of a checkpoint in pieces: `model.safetensors`, with config, code and tokenizer beside it.

    It is read and written tensor by tensor, so a model that no memory holds can be put together.
    """
    path, directory = Path(path), Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name in listed_files(path):
        if name != STATE and not num_shards([name]):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path / name, directory / name)
    consolidate(path, "model", directory / MODEL)


def _empty_twin(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same config without weights, whose config and code are saved.

    FSDP2 changes the model's class and DeepSpeed its type, and both would be written into config.json. (FSDP2's class
    makes models of the first one.)
    """
    with torch.device("meta"):
        twin = type(model)(model.config)
    twin.generation_config = model.generation_config
    return twin


def write_description(folder: Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Write beside the weights of a checkpoint what `from_pretrained` needs to open them."""
    if isinstance(model, PreTrainedModel):
        _empty_twin(model).save_pretrained(folder, state_dict={})  # config, generation config and code
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def latest_checkpoint(
    directory: str | Path, *, verify: bool = True, accelerator: Accelerator | None = None
) -> Path | None:
    """The newest sound checkpoint in `directory`, or None; a broken one is set aside with a warning that says why.

    `verify=False` skips the sha256, which reads every byte, and looks at names and sizes only. In a run of several
    processes pass the `accelerator`: the main one looks, and all get its answer.
    """

    folder = Path(directory)

    def look() -> list[Path]:
        _put_back_replaced(folder)
        return _checkpoints(folder)

    checkpoints = on_main_process(accelerator, look)
    for path in reversed(checkpoints):
        if _is_sound(path, verify=verify, accelerator=accelerator):
            return path
    if checkpoints and (accelerator is None or accelerator.is_main_process):
        logger.warning("No sound checkpoint is left in %s.", folder)
    return None


def find_checkpoint(directory: str | Path, *, step: int, accelerator: Accelerator | None = None) -> Path | None:
    """The checkpoint of this step, or None; a broken one is set aside with a warning. For every process."""

    path = Path(directory) / f"step-{step:08d}"

    def look() -> bool:
        _put_back_replaced(path.parent)
        return path.is_dir()

    is_there = on_main_process(accelerator, look)
    return path if is_there and _is_sound(path, verify=True, accelerator=accelerator) else None


def _is_sound(path: Path, *, verify: bool, accelerator: Accelerator | None) -> bool:
    """Whether a checkpoint can be loaded; a broken one is set aside. For every process.

    Of one in pieces, the processes of a sharded model check the sha256 together, each of some files.
    """

    def look() -> tuple[str | None, int]:
        number = num_shards(listed_files(path))
        return find_checkpoint_fault(path, verify=verify and not (number and reads_pieces(accelerator))), number

    fault, number = on_main_process(accelerator, look)
    if fault is None and verify and number and accelerator is not None and reads_pieces(accelerator):
        check_visible(path, accelerator)
        own = (accelerator.process_index, accelerator.num_processes)
        faults = gather_object([find_fault(path, required=_required_files(path), part=own)])
        fault = next((found for found in faults if found is not None), None)
    if fault is not None:
        on_main_process(accelerator, lambda: _set_aside(path, fault))
    return fault is None


def _required_files(path: Path) -> tuple[str, ...]:
    number = num_shards(listed_files(path))
    return (*(name for kind in KINDS for name in shard_names(kind, number)), STATE) if number else FILES


def find_checkpoint_fault(path: Path, *, verify: bool = True) -> str | None:
    """The first problem of a checkpoint's files, or None; `verify=False` skips the sha256."""
    required = _required_files(path)
    fault = find_fault(path, required=required, verify=False)
    if fault is None and required != FILES:
        fault = find_fault_of_pieces(path, KINDS, step=_step_of(path))
    return find_fault(path, required=required) if fault is None and verify else fault


def reads_pieces(accelerator: Accelerator | None) -> bool:
    """Whether each process holds a part of the model only, and so reads and writes pieces."""
    return accelerator is not None and accelerator.is_fsdp2 and accelerator.num_processes > 1


def check_visible(path: Path, accelerator: Accelerator) -> None:
    """Raise a ValueError on every process if one of them does not see the folder of a checkpoint in pieces."""
    blind = [index for index, is_seen in enumerate(gather_object([path.is_dir()])) if not is_seen]
    if blind:
        raise ValueError(
            f"{path} is in pieces, which each process reads itself, and process {blind[0]} does not see it. Put it on "
            "a disk that all machines share; or put the pieces together on one machine and start another run from "
            "them: python recipes/export.py --to whole."
        )


def load_checkpoint(
    path: str | Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    identity: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Restore model and optimizer, to the last bit, and return the loop's state; for every process.

    `identity` is compared with `state["identity"]` before anything is loaded, see `check_same_run`. Only the main
    process reads the files, so they need not be visible to the others; except pieces that the processes of a sharded
    model read, each its own part. The files' sha256 is not checked here but in `latest_checkpoint`.
    """
    path = Path(path)
    model, optimizer = bare(model, optimizer, accelerator)
    optimizer.zero_grad(set_to_none=True)  # torch initializes the state of an optimizer only without gradients
    own_tensors = model.state_dict()  # under FSDP2, this also has the parameters sharded again after an evaluation
    names = {id(parameter): plain(name) for name, parameter in model.named_parameters()}
    is_zero = accelerator.distributed_type == DistributedType.DEEPSPEED
    # Filled by the main process, from where torch sends each process its part.
    tensors: dict[str, torch.Tensor] = {}
    optimizer_state: dict[str, Any] = {}

    def read() -> tuple[dict[str, Any], dict[str, Index] | None]:
        if fault := find_checkpoint_fault(path, verify=False):
            raise ValueError(f"The checkpoint {path} is broken: {fault}. Resume from another one.")
        content = json.loads((path / STATE).read_text(encoding="utf-8"))
        if identity is not None:
            check_same_run(content["state"].get("identity", {}), identity, path)
        saved = content["optimizer"]
        index = {kind: read_index(path, kind) for kind in KINDS} if is_sharded(path) else None
        if index is None:
            tensors.update(load_file(path / MODEL))
        elif not reads_pieces(accelerator):
            tensors.update(iterate_tensors(path, "model"))
        else:
            tensors.update((name, stored.meta) for name, stored in index["model"].items())
        _check_model(path, model, tensors, in_float32=is_zero)
        if is_zero:
            groups = zero.group_names(model, optimizer)
        else:
            groups = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
        _check_optimizer(path, class_name(optimizer, accelerator), groups, saved)
        if index is not None and reads_pieces(accelerator):
            return content, index

        for name, first_name in tied_names(model).items():
            tensors[name] = tensors[first_name]
        optimizer_state["state"] = {name: {} for name in saved["parameters"]}
        averages = load_file(path / OPTIMIZER) if index is None else dict(iterate_tensors(path, "optimizer"))
        for name, value in (averages | saved["numbers"]).items():
            parameter, _, what = name.rpartition(".")
            # load_file maps the file into memory; the clone is the optimizer's own, aligned, and outlives the file.
            optimizer_state["state"][parameter][what] = value.clone() if torch.is_tensor(value) else value
        optimizer_state["param_groups"] = saved["param_groups"]
        return content, None

    content, index = on_main_process(accelerator, read)
    if is_zero:
        zero.load_weights(model, tensors, accelerator)
        zero.load_optimizer(model, optimizer, optimizer_state, accelerator)
        _restore_tuples(optimizer)
        return content["state"]
    if index is not None:
        check_visible(path, accelerator)
        _load_pieces(path, index, own_tensors, optimizer, content["optimizer"], names)
    else:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=accelerator.num_processes > 1)
        set_model_state_dict(model, tensors, options=options)
        options.strict = False  # a parameter that had no gradient yet has no state to restore ...
        set_optimizer_state_dict(model, optimizer, optimizer_state, options=options)
    _restore_tuples(optimizer)
    for parameter in list(optimizer.state):
        if names[id(parameter)] not in content["optimizer"]["parameters"]:
            del optimizer.state[parameter]  # ... and does not keep the zeros of torch's initialization
    if accelerator.scaler is not None:
        if "grad_scaler" in content:
            accelerator.scaler.load_state_dict(content["grad_scaler"])
        else:
            logger.warning("%s was written without float16: the loss scale starts again.", path)
    return content["state"]


@torch.no_grad()
def _load_pieces(
    path: Path,
    index: dict[str, Index],
    own_tensors: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    saved: dict[str, Any],
    names: dict[int, str],
) -> None:
    """Read this process's part of each tensor; `names` are those of the parameters, by their ids."""

    def read(reader: PieceReader, name: str, like: torch.Tensor) -> torch.Tensor:
        """The part of a tensor that this process holds of `like`, or all of it if that is not cut."""
        if not isinstance(like, DTensor):
            return reader.read(name)
        [chunk] = like.__create_chunk_list__()
        return reader.read(name, chunk.offsets, chunk.sizes)

    with PieceReader(path, index["model"]) as reader:
        for name, tensor in own_tensors.items():
            if plain(name) in index["model"]:  # further names of tied tensors are not
                local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                local.copy_(read(reader, plain(name), tensor))

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = {names[id(parameter)]: number for number, parameter in enumerate(parameters)}
    state: dict[int, dict[str, Any]] = {numbers[name]: {} for name in saved["parameters"]}
    with PieceReader(path, index["optimizer"]) as reader:
        for key, stored in index["optimizer"].items():
            name, _, what = key.rpartition(".")
            parameter = parameters[numbers[name]]
            is_cut = isinstance(parameter, DTensor) and stored.shape == parameter.shape
            value = read(reader, key, parameter if is_cut else torch.empty(0)).to(parameter.device)
            if is_cut:
                value = DTensor.from_local(
                    *(value, parameter.device_mesh, parameter.placements),
                    run_check=False,
                    shape=parameter.shape,
                    stride=parameter.stride(),
                )
            state[numbers[name]][what] = value
    for key, value in saved["numbers"].items():
        name, _, what = key.rpartition(".")
        state[numbers[name]][what] = value
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in saved["param_groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def find_state(
    output_dir: str | Path,
    *,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    identity: dict[str, Any],
) -> dict[str, Any]:
    """The state of the newest sound checkpoint, loaded into model and optimizer; or the state at a run's beginning.

    Raises:
        ValueError: there are checkpoints, but broken ones only, or of another run (see `check_same_run`).
    """
    directory = Path(output_dir) / "checkpoints"
    checkpoint = latest_checkpoint(directory, accelerator=accelerator)
    if checkpoint is not None:
        state = load_checkpoint(
            checkpoint, model=model, optimizer=optimizer, accelerator=accelerator, identity=identity
        )
        accelerator.print(f"Resuming from step {state['step']:,}, saved in {checkpoint}.")
        return state
    # Earlier versions set them aside under other names. What a run left when it was killed in its first save is none.
    if [*directory.glob("broken-step-*"), *directory.glob("step-*.broken*")]:
        raise ValueError(
            f"No sound checkpoint is left in {directory}, only broken ones. Put a sound one there, or start again with "
            "overwrite_output_dir."
        )
    counts = {"step": 0, "train_tokens": 0, "seconds": 0.0, "save_seconds": 0.0, "skipped_updates": 0}
    return {**counts, "identity": identity}


def describe_start(output_dir: str | Path) -> str:
    """Where the run in this folder would resume; "" if it would begin."""
    checkpoints = _checkpoints(Path(output_dir) / "checkpoints")
    return f"\n{output_dir} holds a run, which would resume from {checkpoints[-1].name}.\n" if checkpoints else ""


def _gather(model: nn.Module, optimizer: Any, accelerator: Accelerator) -> tuple[dict[str, Any], dict[str, Any]]:
    """The whole state of model and optimizer, on the main process."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return zero.gather_weights(model, accelerator), zero.gather_optimizer(model, optimizer, accelerator)
    is_fresh = not optimizer.state
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)  # gathered by all, held by the main process
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    if is_fresh:  # torch then takes a step of length zero, which the optimizer would count
        optimizer.state.clear()
        optimizer_state["state"] = {}
    return model_state, optimizer_state


def class_name(optimizer: Any, accelerator: Accelerator) -> str:
    is_zero = accelerator.distributed_type == DistributedType.DEEPSPEED
    return type(optimizer.optimizer if is_zero else optimizer).__name__


def _restore_tuples(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:  # JSON has no tuples, such as the betas
        group |= {name: tuple(value) for name, value in group.items() if isinstance(value, list) and name != "params"}


def bare(
    model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Model and optimizer without accelerate's wrappers; under FSDP2 the parameters stay sharded."""
    kind = accelerator.distributed_type
    is_fsdp1 = kind == DistributedType.FSDP and not accelerator.is_fsdp2
    if is_fsdp1 or kind == DistributedType.MEGATRON_LM:
        raise ValueError(
            f"Checkpoints are written under DDP, FSDP2 and DeepSpeed, not under {'FSDP1' if is_fsdp1 else kind.value}. "
            "FSDP2 shards as ZeRO-3 does: set distributed_type: FSDP and fsdp_version: 2 in the accelerate file."
        )
    return accelerator.unwrap_model(model, keep_torch_compile=False), getattr(optimizer, "optimizer", optimizer)


def plain(name: str) -> str:
    # What torch.compile and FSDP's activation checkpointing put before the names of a layer.
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def tied_names(model: nn.Module) -> dict[str, str]:
    """Each further name of a tied tensor, and its first one."""
    first_names: dict[int, str] = {}
    tied = {}
    for name, tensor in itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    ):
        first_name = first_names.setdefault(id(tensor), plain(name))
        if first_name != plain(name):
            tied[plain(name)] = first_name
    return tied


@contextlib.contextmanager
def errors_explained(path: Path) -> Iterator[None]:
    """What an error of the system means for the checkpoint that is being written; its folder is removed."""
    try:
        yield
    except FloatingPointError:
        shutil.rmtree(path.with_suffix(".tmp"), ignore_errors=True)
        raise
    except (OSError, SafetensorError) as error:
        shutil.rmtree(path.with_suffix(".tmp"), ignore_errors=True)
        raise OSError(
            f"{path} could not be written: {error}. The older checkpoints are untouched. Free disk space (or keep "
            "fewer of them), or remove the cause; then start again, and the run resumes."
        ) from error


def make_folder(path: Path, num_bytes: int) -> Path:
    """The folder in which a checkpoint of this size is written, empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _put_back_replaced(path.parent)
    for leftover in [*path.parent.glob("step-*.tmp"), *path.parent.glob("step-*.replaced")]:
        shutil.rmtree(leftover, ignore_errors=True)  # of a run that was killed while it saved
    num_bytes += 64 * 1024  # config and code
    if num_bytes > (free := shutil.disk_usage(path.parent).free):
        raise OSError(f"it needs {num_bytes / 2**20:,.1f} MiB, and its disk has {free / 2**20:,.1f} MiB left")
    temporary = path.with_suffix(".tmp")
    temporary.mkdir()
    return temporary


def put_in_place(path: Path, written: dict[str, Any] | None = None) -> None:
    """Write the manifest of a folder that `make_folder` made, and give it its name; `written` is `write_manifest`'s."""
    temporary, replaced = path.with_suffix(".tmp"), path.with_suffix(".replaced")
    write_manifest(temporary, written=written, versions=_versions())
    if path.exists():
        path.rename(replaced)
    temporary.rename(path)
    flush(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _put_back_replaced(directory: Path) -> None:
    """Undo the first of the two renames that replace a checkpoint, if the run was killed before the second."""
    for replaced in directory.glob("step-*.replaced"):
        if not replaced.with_suffix("").exists():
            replaced.rename(replaced.with_suffix(""))


def delete_old(path: Path, keep: int | None, best_step: int | None) -> None:
    if keep is None:
        return
    checkpoints = _checkpoints(path.parent)
    older = [other for other in checkpoints if other != path and _step_of(other) != best_step]
    for other in older[: max(0, len(checkpoints) - keep)]:
        try:
            # Renamed first: if this process is killed here, an incomplete folder is not taken for a checkpoint.
            shutil.rmtree(other.rename(other.with_suffix(".tmp")))
        except OSError as error:
            logger.warning("The old checkpoint %s could not be deleted: %s.", other, error)


def _checkpoints(directory: Path) -> list[Path]:
    """The folders that claim to be checkpoints, oldest step first."""
    paths = [path for path in directory.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
    return sorted(paths, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _set_aside(path: Path, fault: str) -> None:
    try:
        logger.warning("The checkpoint %s is broken and now called %s: %s.", path, set_aside(path).name, fault)
    except OSError as error:
        logger.warning("The checkpoint %s is broken: %s. (It could not be renamed: %s.)", path, fault, error)


def _check_model(path: Path, model: nn.Module, tensors: dict[str, torch.Tensor], *, in_float32: bool) -> None:
    tied = tied_names(model)
    wanted = {plain(name): _kind(tensor) for name, tensor in model.state_dict().items() if plain(name) not in tied}
    for name, parameter in model.named_parameters() if in_float32 else []:  # as ZeRO keeps them, in any precision
        wanted[name] = _kind(torch.empty(zero.shape_of(parameter), dtype=torch.float32, device="meta"))
    faults = []
    for name in wanted | tensors:
        if name not in tensors:
            faults.append(f"{name} is missing from the checkpoint")
        elif name not in wanted:
            faults.append(f"{name} is not in the model")
        elif (saved := _kind(tensors[name])) != wanted[name]:
            faults.append(f"{name} is {saved} in the checkpoint and {wanted[name]} in the model")
    if faults:
        more = f" ({len(faults) - 1:,} more tensors differ)" if len(faults) > 1 else ""
        raise ValueError(
            f"{path} does not fit the model: {faults[0]}{more}. "
            "Resume with the arguments of the run that wrote it, or give this run another output_dir."
        )


def _kind(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _check_optimizer(path: Path, name: str, groups: list[list[str]], saved: dict[str, Any]) -> None:
    advice = "Resume with the arguments of the run that wrote it, or give this run another output_dir."
    if saved["class"] != name:
        raise ValueError(f"{path} holds the state of {saved['class']}, and the optimizer is {name}. {advice}")
    own_group = {parameter: index for index, group in enumerate(groups) for parameter in group}
    saved_group = {name: index for index, group in enumerate(saved["param_groups"]) for name in group["params"]}
    if own_group != saved_group:
        differ = [name for name in own_group | saved_group if own_group.get(name) != saved_group.get(name)]
        raise ValueError(
            f"{path} does not fit the optimizer: {differ[0]} is in parameter group {saved_group.get(differ[0])} there "
            f"and {own_group.get(differ[0])} here, counted from 0 ({len(differ):,} parameters differ). {advice}"
        )


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("hfllm", "torch", "transformers", "accelerate", "safetensors"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # a checkout on the path is not installed
            versions[name] = importlib.metadata.version(name)
    return versions
