import torch
from torch import nn

import hfllm
from hfllm.training.rehearsal import rehearse
from tests.conftest import make_tiny_config


def test_it_counts_what_each_part_of_the_memory_holds():
    """Two linear layers by hand: 4 x 8 and 8 x 2 weights, a batch of 3 rows, AdamW."""
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 2, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), fused=False)
    rows = torch.randn(3, 4)

    def step(index: int) -> None:
        (model[1](model[0](rows).sigmoid())).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    need = rehearse(model, optimizer, step)
    weights = 4 * (4 * 8 + 8 * 2)
    assert need.parameters == need.gradients == weights
    assert need.optimizer_state == 2 * weights + 2 * 4  # mean, variance, and a step count for each matrix
    # The rows, the sigmoid (which its own derivative and the second layer share) and the output.
    assert need.saved_for_backward == 4 * (3 * 4 + 3 * 8 + 3 * 2)
    assert need.peak > need.parameters
    assert need.seconds_per_step > 0


def test_accumulated_parts_do_not_add_up():
    model = hfllm.GPTForCausalLM(make_tiny_config("modern"))
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(3, 64, (8, 16))

    def needed(num_parts: int) -> int:
        def step(index: int) -> None:
            for rows in ids.chunk(num_parts):
                model(rows, labels=rows).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return rehearse(model, optimizer, step, num_steps=1).saved_for_backward

    whole, halves = needed(1), needed(2)
    assert 0.45 * whole < halves < 0.55 * whole


def test_it_takes_the_steps_it_is_asked_for():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    taken = []

    def step(index: int) -> None:
        taken.append(index)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    rehearse(model, optimizer, step, num_steps=2)
    assert taken == [0, 1, 2]
