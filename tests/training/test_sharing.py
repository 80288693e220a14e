"""How processes share a stack of matrices. Their exchange is tested in tests/distributed/test_muon_steps.py."""

from collections import Counter

import pytest
import torch
from torch import nn

from hfllm.training import muon
from hfllm.training.sharing import Grid, SharedStack, overlap


class Group:
    """A process group for those who ask only for its size and for this process's place."""

    def __init__(self, size: int, rank: int):
        self.size, self.rank = (lambda: size), (lambda: rank)


def grids(num_replicas: int, num_shards: int) -> list[Grid]:
    """The grid as each of its processes sees it."""
    return [
        Grid(
            replicas=Group(num_replicas, replica) if num_replicas > 1 else None,
            shards=Group(num_shards, shard) if num_shards > 1 else None,
        )
        for replica in range(num_replicas)
        for shard in range(num_shards)
    ]


@pytest.mark.parametrize("num_matrices", [1, 3, 8, 9])
@pytest.mark.parametrize(("num_replicas", "num_shards"), [(1, 1), (4, 1), (1, 4), (2, 2), (3, 2)])
def test_every_matrix_has_one_owner_and_none_owns_more_than_its_share(num_matrices, num_replicas, num_shards):
    matrices = [nn.Parameter(torch.ones(5, 3)) for _ in range(num_matrices)]
    owned = [SharedStack(matrices, grid, dtype=torch.float32).owned for grid in grids(num_replicas, num_shards)]
    assert Counter(id(matrix) for each in owned for matrix in each) == Counter(map(id, matrices))
    assert max(map(len, owned)) == -(-num_matrices // (num_replicas * num_shards))


def test_a_slot_holds_the_largest_part_of_a_matrix_and_of_its_transpose():
    matrices = [nn.Parameter(torch.ones(10, 3)), nn.Parameter(torch.ones(3, 10))]
    sizes = [SharedStack(matrices, grids(1, n)[0], dtype=torch.float32).slot for n in (1, 2, 4)]
    assert sizes == [30, 20, 10]  # 2 of 3 rows of 10 are more than 5 of 10 rows of 3; with four, 1 x 10 and 3 x 3


def test_what_came_later_computes_while_the_one_before_is_on_its_way():
    events = []

    def task(name: str, num_waits: int):
        for number in range(num_waits + 1):
            events.append(f"{name}{number}")
            if number < num_waits:
                yield

    overlap(task(name, 2) for name in "abc")
    # Each first sends (0); the newest computes and sends back (1) before an older one takes what came for it (2).
    assert events == ["a0", "b0", "a1", "c0", "b1", "a2", "c1", "b2", "c2"]
    events.clear()
    overlap(task(name, 0) for name in "abc")
    assert events == ["a0", "b0", "c0"]


def test_stacks_are_bounded_and_divide_evenly_among_the_processes_except_for_the_last(monkeypatch):
    monkeypatch.setattr(muon, "STACK_NUMBERS", 5 * 6)
    parameters = [nn.Parameter(torch.ones(2, 3)) for _ in range(11)]

    def sizes(group: Group | None) -> list[int]:
        return [len(stack) for _, stack in muon._stacks(parameters, group)]

    assert sizes(None) == []  # alone, nothing is done for matrices without gradients
    assert sizes(Group(2, 0)) == [4, 4, 3]
    assert sizes(Group(8, 0)) == [8, 3]  # at least one matrix for each
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    assert sizes(None) == sizes(Group(1, 0)) == [5, 5, 1]


def test_with_one_process_nothing_is_copied():
    matrices = [nn.Parameter(torch.ones(2, 3))]
    shared = SharedStack(matrices, Grid(), dtype=torch.float32)
    for way in (shared.collect, shared.distribute):
        parts = [torch.ones(2, 3)]
        with pytest.raises(StopIteration) as ended:
            next(way(parts))
        assert ended.value.value is parts
