"""Script for a launcher: steps of Muon, each process with the same rows, with their results in files."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import hfllm
from hfllm.training import muon
from hfllm.training.devices import start_accelerator
from tests.conftest import make_tiny_config
from tests.recipes.conftest import load_recipe


# The matrices of a block: two of 36 x 36, two of 18 x 36, two of 50 x 36 and one of 36 x 50. Four processes divide 36
# rows evenly, and neither 18 (5, 5, 5, 3) nor 50 (13, 13, 13, 11). One block has fewer matrices of a shape than four.
SIZES = {"hidden_size": 36, "intermediate_size": 50, "num_attention_heads": 2, "num_key_value_heads": 1}
# The number of blocks, and the numbers in which matrices are made orthogonal and travel.
VARIANTS = {"one block": (1, None), "three blocks": (3, None), "three in bfloat16": (3, torch.bfloat16)}


def build(variant: str, accelerator: Accelerator) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model with Muon as the recipe builds it. AdamW's rate is 0: its kernel rounds by the size of a tensor."""
    num_blocks, dtype = VARIANTS[variant]
    torch.manual_seed(0)
    model = hfllm.GPTForCausalLM(make_tiny_config("modern", **SIZES, num_hidden_layers=num_blocks))
    adam = {"adam_learning_rate": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-8}
    args = {"optimizer": "muon", "learning_rate": 0.02, "weight_decay": 0.1, "muon_momentum": 0.9, **adam}
    optimizer = load_recipe("pretrain").build_optimizer(SimpleNamespace(**args), model, accelerator)
    optimizer.dtype = dtype
    return accelerator.prepare(model, optimizer)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator, *, steps: int) -> None:
    """In the second step one matrix has no gradient. The mean of two or four equal gradients is that gradient."""
    for step in range(steps):
        rows = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(step))
        accelerator.backward(model(input_ids=rows, labels=rows, use_cache=False).loss)
        if step == 1:
            accelerator.unwrap_model(model).model.layers[0].mlp.up_proj.weight.grad = None
        optimizer.step()
        optimizer.zero_grad()


def gather(model: torch.nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> dict:
    """Weights and momenta by name, whole, on the main process; elsewhere nothing."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, state = get_state_dict(accelerator.unwrap_model(model), optimizer, options=options)
    momenta = {
        f"{name}.momentum_buffer": values["momentum_buffer"]
        for name, values in state.get("state", {}).items()
        if "momentum_buffer" in values
    }
    return {name: tensor.clone() for name, tensor in (weights | momenta).items()}


def count_orthogonalized(num_matrices: list[int]) -> None:
    """Have each call of `orthogonalize` note the number of its matrices."""
    original = muon.orthogonalize

    def counting(matrices, dtype=None):
        num_matrices.append(len(matrices))
        return original(matrices, dtype)

    muon.orthogonalize = counting


def columns_step() -> torch.Tensor:
    """Two matrices that are sharded by columns, which the work cannot be shared for, after a step."""
    draw = torch.Generator().manual_seed(0)
    whole = [torch.randn(12, 7, generator=draw) for _ in range(4)]
    if torch.distributed.is_initialized():
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        whole = [distribute_tensor(tensor, mesh, [Shard(1)]) for tensor in whole]
    parameters = [torch.nn.Parameter(tensor) for tensor in whole[:2]]
    for parameter, gradient in zip(parameters, whole[2:]):
        parameter.grad = gradient
    muon.Muon([{"params": parameters, "orthogonal": True}]).step()
    own = [parameter.detach() for parameter in parameters]
    return torch.stack([tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in own])


def lonely_step(accelerator: Accelerator) -> list[bool]:
    """Whether each of two matrices stays finite if the main process, which owns the first, has no gradient for it."""
    parameters = [torch.nn.Parameter(torch.ones(3, 3)) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.eye(3)
    if accelerator.is_main_process:
        parameters[0].grad = None
    group = torch.distributed.group.WORLD
    muon.Muon([{"params": parameters, "orthogonal": True}], process_group=group).step()
    return [math.isfinite(parameter.sum().item()) for parameter in parameters]


def main(folder: Path) -> None:
    accelerator = start_accelerator()
    answer = {"num_processes": accelerator.num_processes, "lonely": lonely_step(accelerator)}
    columns = columns_step()
    num_matrices: list[int] = []
    count_orthogonalized(num_matrices)
    for name in VARIANTS:
        model, optimizer = build(name, accelerator)
        train(model, optimizer, accelerator, steps=1)
        answer[f"orthogonalized of {name}"] = sum(num_matrices)
        train(model, optimizer, accelerator, steps=3)
        values = gather(model, optimizer, accelerator)
        if accelerator.is_main_process:
            torch.save(values, folder / f"{name}.pt")
            torch.save(columns, folder / "columns.pt")
        model, optimizer = accelerator.free_memory(model, optimizer)
        num_matrices.clear()
    (folder / f"{accelerator.process_index}.json").write_text(json.dumps(answer))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
