"""Script for a launcher: steps of our model, sharded by transformers in both directions; see test_both_ways.py."""

import json
import sys
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig, load_optimizer_distributed, save_optimizer_distributed
from transformers.distributed.utils import gather_full_state_dict

import hfllm  # noqa: F401  (registers the model)


MAX_NORM = 1.0


def rows_of(step: int) -> dict[str, torch.Tensor]:
    """Four packed rows of two documents each, with unequal numbers of targets."""
    draw = torch.Generator().manual_seed(step)
    input_ids = torch.randint(64, (4, 16), generator=draw)
    position_ids = torch.cat([torch.arange(6), torch.arange(10)]).expand(4, -1)
    is_target = torch.arange(16) < torch.tensor([[3], [9], [15], [6]])
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "shift_labels": torch.where(is_target, input_ids.roll(-1, 1), -100),
    }


def build_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, foreach=False)


def take_step(model, optimizer, step: int, *, group: int = 0, num_groups: int = 1) -> tuple[float, float]:
    """A step on this group's share of the rows: its part of the loss, and the norm of the whole gradient."""
    rows = rows_of(step)
    num_targets = int((rows["shift_labels"] != -100).sum())
    own = {name: tensor[group::num_groups] for name, tensor in rows.items()}
    # FSDP takes the mean over the groups, so each divides by a count that is smaller by their number.
    labels = own["shift_labels"]
    loss = model(**own, labels=labels, use_cache=False, num_items_in_batch=num_targets / num_groups).loss
    loss.backward()
    meshes = defaultdict(list)  # norms are sharded in one direction only, matrices in two; torch adds up within a mesh
    for parameter in model.parameters():
        meshes[getattr(parameter, "device_mesh", None)].append(parameter)
    norms = [get_total_norm([parameter.grad for parameter in group], foreach=False) for group in meshes.values()]
    norm = torch.linalg.vector_norm(torch.stack([norm.full_tensor() if is_cut(norm) else norm for norm in norms]))
    for parameters in meshes.values():
        clip_grads_with_norm_(parameters, MAX_NORM, norm, foreach=False)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach()) / num_groups, float(norm)


def is_cut(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, DTensor)


def main(source: Path, target: Path, fsdp_size: int, tp_size: int, first: int, end: int) -> None:
    config = DistributedConfig(fsdp_size=fsdp_size, tp_size=tp_size)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, distributed_config=config)
    model.train()
    optimizer = build_optimizer(model)
    if first > 0:
        load_optimizer_distributed(model, optimizer, str(source / "optimizer"))
    rank = dist.get_rank()
    losses, norms = [], []
    for step in range(first, end):
        # Processes that share a layer's heads read the same rows.
        loss, norm = take_step(model, optimizer, step, group=rank // tp_size, num_groups=fsdp_size)
        total = torch.tensor(loss, dtype=torch.float64)
        dist.all_reduce(total)
        losses.append(float(total) / tp_size)
        norms.append(norm)
    if fsdp_size > 1 and tp_size > 1:  # cut in one direction only, transformers 5.23 cannot write tied weights so
        model.save_pretrained(target, distributed_checkpoint=True)
        save_optimizer_distributed(model, optimizer, str(target / "optimizer"))
    weights = gather_full_state_dict(model)
    meshes = {str(parameter.device_mesh.mesh_dim_names) for parameter in model.parameters() if is_cut(parameter)}
    if rank == 0:
        torch.save(weights, target / "weights.pt")
        answer = {"losses": losses, "norms": norms, "meshes": sorted(meshes)}
        (target / "answer.json").write_text(json.dumps(answer))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
