"""Matrices shared among processes: each process owns some, computes on them whole, and returns the results to all.

The processes form a grid of R replicas with S processes each. A replica holds every matrix once, and each of its
processes has a part of the rows, as PyTorch's `Shard(0)` cuts them. DDP is a grid of W x 1, FSDP2 one of 1 x W, HSDP
one of R x S. Of a stack of K matrices each process owns ceil(K / (R * S)), the last ones fewer or none.

Between processes a part is flat, and all parts of a stack travel in slots of one size; what pads a slot is never read.
Waiting is a `yield`, during which `overlap` lets other stacks compute. On GPUs nothing here waits on the host.
"""

import math
from collections.abc import Generator, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard


class Grid(NamedTuple):
    """The processes that share the work on a matrix; without groups, a process that does all of it."""

    replicas: dist.ProcessGroup | None = None  # the processes that hold the same part as this one
    shards: dist.ProcessGroup | None = None  # the processes that hold the parts of one replica

    @property
    def num_processes(self) -> int:
        return _size(self.replicas) * _size(self.shards)


def grid_of(matrix: torch.Tensor, process_group: dist.ProcessGroup | None) -> Grid | None:
    """The grid of a matrix: a DTensor knows its own, any other is the same in all processes of `process_group`.

    None for a DTensor that is not cut by rows alone, as under tensor parallelism.
    """
    if not isinstance(matrix, DTensor):
        return Grid(replicas=_if_several(process_group))
    mesh = matrix.device_mesh
    groups = [(where, mesh.get_group(i)) for i, where in enumerate(matrix.placements) if mesh.size(i) > 1]
    by_placement = dict(groups)
    if len(by_placement) < len(groups) or not by_placement.keys() <= {Replicate(), Shard(0)}:
        return None
    return Grid(replicas=by_placement.get(Replicate()), shards=by_placement.get(Shard(0)))


class SharedStack:
    """A stack of matrices on a grid: which of them this process owns, and their way to the owners and back."""

    def __init__(self, matrices: list[nn.Parameter], grid: Grid, *, dtype: torch.dtype):
        """The matrices travel in `dtype`."""
        self.matrices, self.grid, self.dtype = matrices, grid, dtype
        self.num_replicas, self.num_shards = _size(grid.replicas), _size(grid.shards)
        self.share = math.ceil(len(matrices) / grid.num_processes)
        start = _rank(grid.replicas) * self.num_shards * self.share
        self.of_replica = matrices[start : start + self.num_shards * self.share]  # owned by processes of this replica
        start = _rank(grid.shards) * self.share
        self.owned = self.of_replica[start : start + self.share]
        self.slot = max(self._part_size(matrix) for matrix in matrices)

    def collect(self, parts: list[torch.Tensor]) -> Generator[None, None, list[torch.Tensor]]:
        """The tensors of `owned`, whole, from this process's parts of those of `of_replica`."""
        if self.grid.shards is None:
            return parts
        outgoing = self._slots(self.num_shards * self.share)
        for slot, part in zip(outgoing, parts):
            slot[: part.numel()] = part.flatten()
        incoming = yield from self._exchange(outgoing)
        by_sender = incoming.view(self.num_shards, self.share, self.slot)
        whole = []
        for index, matrix in enumerate(self.owned):
            # Parts are full up to the end of the matrix, so joined they are the matrix, followed by padding.
            padded = by_sender[:, index, : self._part_size(matrix)].flatten()
            whole.append(padded[: matrix.numel()].view(matrix.shape))
        return whole

    def distribute(self, results: list[torch.Tensor]) -> Generator[None, None, list[torch.Tensor]]:
        """This process's parts of the results for all matrices of the stack, from its own `results`, whole."""
        if self.grid.num_processes == 1:
            return results
        slots = self._slots(self.num_shards * self.share)
        by_receiver = slots.view(self.num_shards, self.share, self.slot)
        for index, (matrix, result) in enumerate(zip(self.owned, results, strict=True)):
            padding = self.num_shards * self._part_size(matrix) - matrix.numel()
            padded = nn.functional.pad(result.flatten(), (0, padding))
            by_receiver[:, index, : self._part_size(matrix)] = padded.view(self.num_shards, -1)
        if self.grid.shards is not None:
            slots = yield from self._exchange(slots)
        if self.grid.replicas is not None:
            slots = yield from self._gather(slots)
        local = [local_part(matrix) for matrix in self.matrices]
        return [slot[: part.numel()].view(part.shape) for slot, part in zip(slots, local)]

    def _part_size(self, matrix: torch.Tensor) -> int:
        """The numbers of the largest part of a matrix, which is the first."""
        return math.ceil(matrix.shape[0] / self.num_shards) * matrix.shape[1]

    def _slots(self, number: int) -> torch.Tensor:
        return torch.empty(number, self.slot, dtype=self.dtype, device=self.matrices[0].device)

    def _exchange(self, outgoing: torch.Tensor) -> Generator[None, None, torch.Tensor]:
        """As many slots to each process of the replica as from it, in the order of the processes."""
        incoming = torch.empty_like(outgoing)
        work = dist.all_to_all_single(incoming, outgoing, group=self.grid.shards, async_op=True)
        yield
        work.wait()
        return incoming

    def _gather(self, outgoing: torch.Tensor) -> Generator[None, None, torch.Tensor]:
        """The slots of all replicas, in their order."""
        incoming = self._slots(self.num_replicas * len(outgoing))
        work = dist.all_gather_single(incoming, outgoing, group=self.grid.replicas, async_op=True)
        yield
        work.wait()
        return incoming


def overlap(tasks: Iterable[Iterator[None]]) -> None:
    """Run tasks that yield while they wait for other processes; before one continues, the next begins.

    The newest continues first, so that it computes while the results of the one before it are on their way.
    """
    running: list[Iterator[None]] = []
    coming = iter(tasks)
    while (task := next(coming, None)) is not None or running:
        newest_first = [*([] if task is None else [task]), *running]
        running = [each for each in newest_first if next(each, False) is None]


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor: of a DTensor its shard, of any other the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _if_several(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    return group if _size(group) > 1 else None


def _size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else group.size()


def _rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else group.rank()
