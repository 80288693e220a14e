"""Script for a launcher: a backward pass of a tiny model, each process on its own rows, with its results in files."""

import json
import math
import sys
from pathlib import Path

import torch

import hfllm
from hfllm.training.checkpoint import save_checkpoint
from hfllm.training.devices import clip_gradient, describe_sharding, start_accelerator
from tests.conftest import make_tiny_config


def make_model() -> hfllm.GPTForCausalLM:
    torch.manual_seed(0)
    return hfllm.GPTForCausalLM(make_tiny_config("modern"))


def make_rows() -> torch.Tensor:
    return torch.randint(64, (12, 16), generator=torch.Generator().manual_seed(1))


def main(folder: Path) -> None:
    accelerator = start_accelerator(per_device_train_batch_size=4)
    model = make_model()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    parts = {"model": model, "optimizer": optimizer, "state": {"step": 0}, "accelerator": accelerator}
    rows = make_rows()[accelerator.process_index :: accelerator.num_processes].to(accelerator.device)
    accelerator.backward(model(input_ids=rows, labels=rows, use_cache=False).loss)
    answer = {
        "process": accelerator.process_index,
        "num_processes": accelerator.num_processes,
        "sharding": describe_sharding(accelerator),
        "grad_norm": clip_gradient(accelerator, model, math.inf).item(),
    }
    optimizer.zero_grad()

    # A gradient that is not finite, from one of the processes: the recipe takes it away before the update.
    save_checkpoint(folder / "before", **parts)
    factor = math.inf if accelerator.is_main_process else 1.0
    accelerator.backward(model(input_ids=rows, labels=rows, use_cache=False).loss * factor)
    answer["sees_infinity"] = not math.isfinite(clip_gradient(accelerator, model, math.inf))
    optimizer.zero_grad()
    optimizer.step()
    save_checkpoint(folder / "after", **parts)

    (folder / f"{accelerator.process_index}.json").write_text(json.dumps(answer))
    del rows, parts
    model, optimizer = accelerator.free_memory(model, optimizer)
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
