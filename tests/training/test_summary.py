"""What is told of a run before it starts."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType

from hfllm.training import summary


@pytest.mark.parametrize(
    ("mixed_precision", "has_instructions", "is_told"),
    [("no", True, True), ("no", False, False), ("bf16", True, False)],
)
def test_a_cpu_with_bfloat16_that_is_not_used_is_pointed_out(
    tiny_model, monkeypatch, mixed_precision, has_instructions, is_told
):
    monkeypatch.setattr(summary, "multiplies_bfloat16", lambda device: has_instructions)
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        mixed_precision=mixed_precision,
        num_processes=1,
        distributed_type=DistributedType.NO,
    )
    sizes = {"max_steps": 10, "rows_per_step": 4, "block_size": 32, "num_rows": 80}
    text = summary.describe_run(tiny_model, accelerator=accelerator, **sizes)
    assert "10 steps of 128 tokens (4 rows of 32), 0.50 passes over 80 rows" in text
    assert ("--mixed_precision bf16" in text) == is_told
