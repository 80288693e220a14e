"""The description of a run before it starts, and its numbers at the end."""

from pathlib import Path
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
    monkeypatch.setattr(summary, "multiplies_fast", lambda device, dtype: has_instructions)
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


@pytest.mark.parametrize(
    ("mixed_precision", "dtype", "has_products", "speed", "share"),
    [
        ("no", torch.float32, True, 100.0, 0.25),  # 100 tokens/s x 10 FLOP / (2 devices x 2,000 FLOP/s)
        ("bf16", torch.bfloat16, True, 100.0, 0.25),
        ("no", torch.float32, True, 500.0, None),  # more than the peak: the peak was measured in a bad moment
        ("fp16", torch.float16, False, 100.0, None),
        ("no", torch.float32, True, None, None),  # too few steps for a speed
    ],
)
def test_the_share_of_the_peak_is_given_only_where_it_means_something(
    monkeypatch, mixed_precision, dtype, has_products, speed, share
):
    measured = []

    def peak_flops(device, dtype):
        measured.append(dtype)
        return 2000.0

    monkeypatch.setattr(summary, "peak_flops", peak_flops)
    monkeypatch.setattr(summary, "multiplies_fast", lambda device, dtype: has_products)
    accelerator = SimpleNamespace(device=torch.device("cpu"), mixed_precision=mixed_precision, num_processes=2)
    evaluation = {"loss": 2.0, "num_tokens": 10, "num_bytes": 40, "seconds": 1.0}
    state = {"step": 3, "train_tokens": 300, "seconds": 3.0, "save_seconds": 0.5, "skipped_updates": 0}
    sizes = {"num_parameters": 7, "flops_per_token": 10, "tokens_per_second": speed}
    metrics = summary.final_metrics({**state, "evaluation": evaluation}, accelerator=accelerator, **sizes)
    assert measured == ([dtype] if has_products else [])
    assert metrics["mfu"] == share and metrics["peak_flops_per_device"] == (2000.0 if has_products else None)
    text = summary.describe_result(Path("out"), metrics, prompt="The ")
    assert ("25% of the machine's peak" in text) == ("peak" in text) == (share is not None)
    assert ("tokens/s" in text) == (speed is not None)
