"""Run by a launcher: one backward pass of a tiny model, each process on its own rows; what came of it, in a file."""

import json
import math
import sys
from pathlib import Path

import torch

import hfllm
from hfllm.training.devices import clip_gradient, describe_sharding, start_accelerator
from tests.conftest import make_tiny_config


def make_model() -> hfllm.GPTForCausalLM:
    torch.manual_seed(0)
    return hfllm.GPTForCausalLM(make_tiny_config("modern"))


def make_rows() -> torch.Tensor:
    return torch.randint(64, (12, 16), generator=torch.Generator().manual_seed(1))


def main() -> None:
    accelerator = start_accelerator(per_device_train_batch_size=4)
    model = make_model()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    rows = make_rows()[accelerator.process_index :: accelerator.num_processes].to(accelerator.device)
    accelerator.backward(model(input_ids=rows, labels=rows, use_cache=False).loss)
    answer = {
        "process": accelerator.process_index,
        "num_processes": accelerator.num_processes,
        "sharding": describe_sharding(accelerator),
        "device": accelerator.device.type,
        "grad_norm": clip_gradient(accelerator, model, math.inf),
    }
    Path(sys.argv[1], f"{accelerator.process_index}.json").write_text(json.dumps(answer))
    del rows
    model, optimizer = accelerator.free_memory(model, optimizer)
    accelerator.end_training()


if __name__ == "__main__":
    main()
