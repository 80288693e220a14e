import psutil
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from hfllm.training.throughput import (
    ThroughputMeter,
    data_sheet_flops,
    flops_per_token,
    multiplies_fast,
    peak_flops,
    peak_memory_bytes,
)


def tiny_llama(**overrides) -> LlamaForCausalLM:
    fields = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "attn_implementation": "eager",
    }
    return LlamaForCausalLM(LlamaConfig(**{**fields, **overrides}))


@pytest.mark.parametrize("tied", [True, False])
def test_flops_by_hand(tied):
    # Per layer 4 * 64 * 64 for attention and 3 * 64 * 128 for the MLP; the head 64 * 96, tied or not.
    weights = 3 * (4 * 64 * 64 + 3 * 64 * 128) + 64 * 96
    by_hand = 6 * weights + 12 * 3 * 64 * 32
    assert flops_per_token(tiny_llama(tie_word_embeddings=tied), block_size=32) == by_hand


def test_a_head_size_of_its_own_counts():
    # Queries and outputs 4 heads of 32, keys and values 2 heads of 32.
    model = tiny_llama(head_dim=32, num_key_value_heads=2)
    weights = 3 * (2 * 64 * 128 + 2 * 64 * 64 + 3 * 64 * 128) + 64 * 96
    assert flops_per_token(model, block_size=32) == 6 * weights + 12 * 3 * 4 * 32 * 32


def test_flops_agree_with_those_torch_counts():
    model = tiny_llama(tie_word_embeddings=True)
    input_ids = torch.randint(96, (2, 32))
    with FlopCounterMode(display=False) as counter:
        model(input_ids, labels=input_ids, use_cache=False).loss.backward()
    assert counter.get_total_flops() / input_ids.numel() == pytest.approx(
        flops_per_token(model, block_size=32), rel=0.02
    )


def test_flops_of_our_presets_agree_with_those_torch_counts(tiny_model):
    tiny_model.set_attn_implementation("eager")
    input_ids = torch.randint(64, (2, 32))
    with FlopCounterMode(display=False) as counter:
        tiny_model(input_ids, labels=input_ids, use_cache=False).loss.backward()
    assert counter.get_total_flops() / input_ids.numel() == pytest.approx(
        flops_per_token(tiny_model, block_size=32), rel=0.02
    )


def test_peak_flops_is_plausible_and_measured_once():
    first = peak_flops("cpu", torch.float32)
    assert 1e8 < first < 1e15
    assert peak_flops("cpu", torch.float32) == first


def test_a_cpu_multiplies_a_half_fast_if_it_has_one_of_the_instructions_for_it(monkeypatch):
    for capabilities, bfloat16, float16 in (
        ({"avx2": True}, False, False),
        ({"avx512_bf16": True, "amx_bf16": False}, True, False),
        ({"avx512_bf16": False, "amx_bf16": True, "amx_fp16": False}, True, False),
        ({"avx512_fp16": True}, False, True),
        ({}, False, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert multiplies_fast("cpu", torch.bfloat16) == bfloat16
        assert multiplies_fast("cpu", torch.float16) == float16
        assert multiplies_fast("cpu", torch.float32)
    assert multiplies_fast("cuda", torch.bfloat16) and multiplies_fast("cuda", torch.float16)


def test_peak_memory_is_at_least_what_is_held_now_and_no_more_than_the_machine_has():
    block = torch.ones(100 * 2**20, dtype=torch.uint8)
    assert len(block) < 0.9 * psutil.Process().memory_info().rss < peak_memory_bytes("cpu")
    assert peak_memory_bytes("cpu") < psutil.virtual_memory().total


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_warm_up_and_pauses_are_not_counted():
    clock = Clock()
    meter = ThroughputMeter(clock=clock)
    assert meter.read() is None
    clock.now += 60  # the first step compiles
    meter.step(1000)
    assert meter.read() is None and meter.overall() is None

    clock.now += 2
    meter.step(1000)
    with meter.paused():
        clock.now += 30
    clock.now += 2
    meter.step(1000)
    assert meter.read() == 2000 / 4
    assert meter.read() is None  # nothing since

    clock.now += 1
    meter.step(1000)
    assert meter.read() == 1000
    assert meter.overall() == 3000 / 5


def test_a_pause_during_warm_up_changes_nothing():
    clock = Clock()
    meter = ThroughputMeter(num_warmup_steps=2, clock=clock)
    meter.step(10)
    with meter.paused():
        clock.now += 5
    meter.step(10)
    clock.now += 1
    meter.step(10)
    assert meter.read() == meter.overall() == 10


def test_without_warm_up_the_first_step_counts():
    clock = Clock()
    meter = ThroughputMeter(num_warmup_steps=0, clock=clock)
    clock.now += 2
    meter.step(10)
    assert meter.read() == 5


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A1000", None),
    ],
)
def test_the_data_sheets_peak_is_that_of_the_very_card(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert data_sheet_flops("cuda", torch.bfloat16) == peak
    assert data_sheet_flops("cuda", torch.float32) is None and data_sheet_flops("cpu", torch.bfloat16) is None
