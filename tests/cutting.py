"""Checkpoints in pieces, without the processes that would write them."""

from pathlib import Path

from safetensors.torch import load_file

from hfllm.runs.manifest import write_manifest
from hfllm.runs.sharded import Piece, shard_names, write_shard


def cut(checkpoint: Path, number: int, *, step: int | None = None) -> Path:
    """Cut the whole checkpoint of a folder into the pieces of this many processes, by rows, as FSDP2 does."""
    step = int(checkpoint.name.removeprefix("step-")) if step is None else step
    for kind in ("model", "optimizer"):
        tensors = load_file(checkpoint / f"{kind}.safetensors")
        for index, name in enumerate(shard_names(kind, number)):
            pieces = {}
            for key, tensor in tensors.items():
                rows = -(-len(tensor) // number) if tensor.ndim else 0
                part = tensor[index * rows : (index + 1) * rows] if tensor.ndim else tensor
                if part.numel() > 0 and (tensor.ndim or index == 0):
                    offset = (index * rows, *(0 for _ in tensor.shape[1:])) if tensor.ndim else ()
                    pieces[key] = Piece(part.clone(), offset, tuple(tensor.shape))
            write_shard(checkpoint / name, pieces, step=step)
        (checkpoint / f"{kind}.safetensors").unlink()
    write_manifest(checkpoint)
    return checkpoint
