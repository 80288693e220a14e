"""Script for a launcher: load, write, train and resume a checkpoint, into folders to compare."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

import hfllm
from hfllm.evaluation.rows import evaluate_rows
from hfllm.runs.lock import run_lock
from hfllm.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from hfllm.training.devices import describe_sharding, start_accelerator
from hfllm.training.optimization import build_adamw, build_muon
from tests.conftest import make_tiny_config


class CountingRows:
    """Five rows, so that of two processes one has three and the other two."""

    num_bytes = 100

    def __len__(self):
        return 5

    def batch(self, indices: np.ndarray, count_once: bool = True) -> dict[str, torch.Tensor]:
        input_ids = torch.from_numpy(indices)[:, None] * 7 + torch.arange(16)
        labels = torch.where(torch.arange(16) < 4 + 2 * torch.from_numpy(indices)[:, None], input_ids + 1, -100)
        return {
            "input_ids": input_ids,
            "position_ids": torch.arange(16).expand(len(indices), -1),
            "shift_labels": labels,
        }


def build(accelerator: Accelerator, name: str, seed: int = 0) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    # 110,080 numbers in each of the large matrices, for ZeRO-3 leaves small ones whole; three cannot share them evenly.
    model = hfllm.GPTForCausalLM(make_tiny_config("modern", intermediate_size=3440, initializer_range=0.1))
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)  # a frozen one among those that are trained
    options = {"learning_rate": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95), "epsilon": 1e-8}
    if name == "muon":
        own = {"adam_learning_rate": 1e-3, "momentum": 0.9, "process_group": torch.distributed.group.WORLD}
        optimizer = build_muon(model, **options, **own)
    else:
        optimizer = build_adamw(model, **options)
    return accelerator.prepare(model, optimizer)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range, accelerator: Accelerator) -> None:
    """Each process takes its share of twelve rows a step."""
    for step in steps:
        rows = torch.randint(64, (12, 16), generator=torch.Generator().manual_seed(step))
        own = rows[accelerator.process_index :: accelerator.num_processes]
        accelerator.backward(model(input_ids=own, labels=own, use_cache=False).loss)
        optimizer.step()
        optimizer.zero_grad()


def main(folder: Path, name: str) -> None:
    accelerator = start_accelerator(per_device_train_batch_size=2)
    outcome: dict[str, object] = {"sharding": describe_sharding(accelerator)}
    own = folder / "several"
    with run_lock(own, accelerator=accelerator):
        model, optimizer = build(accelerator, name, seed=1)
        parts = {"model": model, "optimizer": optimizer, "accelerator": accelerator}
        state = load_checkpoint(latest_checkpoint(folder / "single", accelerator=accelerator), **parts)
        assert state == {"step": 2}
        save_checkpoint(own / "unchanged", state=state, **parts)
        train(model, optimizer, range(2, 4), accelerator)
        path = save_checkpoint(own / "straight", state={"step": 4}, **parts)
        result = evaluate_rows(model, CountingRows(), batch_size=1, accelerator=accelerator)
        outcome |= {"loss": result.loss, "num_tokens": result.num_tokens}
        # A save that fails on the main process fails on all.
        try:
            save_checkpoint(path / "state.json", state={"step": 4}, **parts)
        except Exception as error:
            outcome["error"] = f"{type(error).__name__}: {error}"

        del parts
        model, optimizer = accelerator.free_memory(model, optimizer)
        model, optimizer = build(accelerator, name, seed=2)
        parts = {"model": model, "optimizer": optimizer, "accelerator": accelerator}
        save_checkpoint(own / "fresh", state={"step": 0}, **parts)  # an optimizer that has not taken a step
        load_checkpoint(own / "fresh" / "step-00000000", **parts)
        load_checkpoint(own / "unchanged" / "step-00000002", **parts)
        train(model, optimizer, range(2, 4), accelerator)
        save_checkpoint(own / "resumed", state={"step": 4}, **parts)
    (folder / f"{accelerator.process_index}.json").write_text(json.dumps(outcome))
    del parts
    model, optimizer = accelerator.free_memory(model, optimizer)
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
