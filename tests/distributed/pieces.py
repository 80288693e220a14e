"""Script for a launcher: a sharded model saves, is killed, resumes; what it held goes into folders to compare."""

import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

import hfllm
from hfllm.runs.sharded import write_shard
from hfllm.training import saving
from hfllm.training.checkpoint import find_state, save_checkpoint
from hfllm.training.devices import describe_sharding, start_accelerator
from hfllm.training.optimization import build_muon
from hfllm.training.saving import CheckpointSaver
from tests.conftest import make_tiny_config


def build(accelerator: Accelerator, seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model with tied and with frozen weights, and rows that four processes cannot share evenly."""
    torch.manual_seed(seed)
    config = make_tiny_config("modern", intermediate_size=30, initializer_range=0.1, tie_word_embeddings=True)
    model = hfllm.GPTForCausalLM(config)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    rates = {"learning_rate": 0.02, "adam_learning_rate": 0.01, "weight_decay": 0.1, "momentum": 0.85}
    optimizer = build_muon(model, **rates, betas=(0.9, 0.95), epsilon=1e-8)
    return accelerator.prepare(model, optimizer)


def train(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range, accelerator: Accelerator
) -> list[float]:
    """Each process takes its share of four rows a step; returns the losses of all rows."""
    losses = []
    for step in steps:
        rows = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(step))
        own = rows[accelerator.process_index :: accelerator.num_processes]
        loss = model(input_ids=own, labels=own, use_cache=False).loss
        accelerator.backward(loss)
        losses.append(accelerator.reduce(loss.detach(), reduction="mean").item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def main(folder: Path, name: str) -> None:
    accelerator = start_accelerator(per_device_train_batch_size=1)
    model, optimizer = build(accelerator, seed=0 if name == "straight" else 1)
    parts = {"model": model, "optimizer": optimizer, "accelerator": accelerator}
    state = find_state(folder, **parts, identity={})
    outcome: dict[str, object] = {"sharding": describe_sharding(accelerator), "resumed": state["step"]}
    saver = CheckpointSaver(folder / "checkpoints", **parts, keep=2)

    if name == "straight":
        saver.save(state)  # an optimizer that has not taken a step
        outcome["losses"] = train(model, optimizer, range(2), accelerator)
        saver.save(state | {"step": 2})  # the checkpoint that the others resume from; training goes on meanwhile
        save_checkpoint(folder / "whole", state=state | {"step": 2}, **parts)
        outcome["losses"] += train(model, optimizer, range(2, 4), accelerator)
        saver.wait()
        outcome["errors"] = fail(saver, model, state, accelerator)
    elif name == "killed":
        if accelerator.process_index == 1:
            saving.write_shard = killed_in_the_middle
        train(model, optimizer, range(2, 3), accelerator)
        saver.save(state | {"step": 3})
        saver.wait()
    else:
        save_checkpoint(folder / name, state=state, **parts)
        outcome["without_a_common_folder"] = save_blind(folder / name / "blind", state, parts)
        outcome["losses"] = train(model, optimizer, range(2, 4), accelerator)
        (folder / name / "out").mkdir(parents=True, exist_ok=True)
        saver.save_model(folder / name / "out", step=2)
    (folder / f"{name}-{accelerator.process_index}.json").write_text(json.dumps(outcome))
    del parts, saver
    model, optimizer = accelerator.free_memory(model, optimizer)
    accelerator.end_training()


def save_blind(folder: Path, state: dict[str, object], parts: dict) -> list[str]:
    """The weights' files of a checkpoint whose folder the last process does not see, as on another machine."""
    accelerator = parts["accelerator"]
    sees = Path.exists
    if accelerator.process_index == accelerator.num_processes - 1:
        Path.exists = lambda path: not path.name.startswith(".probe") and sees(path)
    saver = CheckpointSaver(folder, **parts)
    Path.exists = sees
    saver.save(state)
    saver.wait()
    return sorted(path.name for path in folder.rglob("*.safetensors"))


def fail(
    saver: CheckpointSaver, model: torch.nn.Module, state: dict[str, object], accelerator: Accelerator
) -> list[str]:
    """What each process is told of three saves: of one without room, of a full disk, and of a NaN in one process."""
    errors = []
    is_last = accelerator.process_index == accelerator.num_processes - 1

    def note() -> None:
        try:
            saver.save(state | {"step": 3})
            saver.wait()
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")

    disk_usage = shutil.disk_usage
    shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1, 1, 0)
    note()
    shutil.disk_usage = disk_usage
    saving.write_shard = full_disk if is_last else write_shard
    note()
    saving.write_shard = write_shard
    if is_last:
        weight = model.model.layers[1].self_attn.q_proj.weight.to_local()
        weight.detach()[-1, -1] = float("nan")
    note()
    return errors


def full_disk(path: Path, *args, **kwargs) -> None:
    path.write_bytes(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


def killed_in_the_middle(path: Path, *args, **kwargs) -> None:
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
