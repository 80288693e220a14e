import pytest
import torch
from accelerate import Accelerator

import hfllm
from hfllm.model import modeling_gpt
from hfllm.training import requirements
from hfllm.training.footprint import training_memory
from hfllm.training.optimization import build_adamw, build_muon
from hfllm.training.rehearsal import SavedForBackward, rehearse
from hfllm.training.requirements import (
    Activations,
    Pass,
    Plan,
    build_empty,
    count_activations,
    count_on_cards,
    describe_rate,
    describe_requirements,
    missing_memory,
    require,
)
from tests.conftest import make_tiny_config


DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.bfloat16, id="bfloat16")]
CHECKPOINTING = [pytest.param(False, id="kept"), pytest.param(True, id="recomputed")]
NOTHING = Activations(0, 0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_gradients_and_optimizer_state_are_exactly_those_of_a_run(tiny_config, optimizer):
    model = hfllm.GPTForCausalLM(tiny_config)
    rates = {"learning_rate": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.95), "epsilon": 1e-8}
    own = build_muon(model, adam_learning_rate=0.01, momentum=0.85, **rates) if optimizer == "muon" else None
    own = own or build_adamw(model, **rates)
    rows = torch.randint(3, 64, (2, 16))

    def step(index: int) -> None:
        model(rows, labels=rows).loss.backward()
        own.step()
        own.zero_grad()

    measured = rehearse(model, own, step, num_steps=1)
    need = require(build_empty(tiny_config), NOTHING, plan=Plan("", 1), optimizer=optimizer, dtype=torch.float32)
    assert need.weights == measured.parameters
    assert need.gradients == measured.gradients
    assert need.optimizer_state == measured.optimizer_state


def measure(config: hfllm.GPTConfig, one_pass: Pass) -> int:
    """What a real forward pass keeps; each row holds two documents."""
    model = hfllm.GPTForCausalLM(config).train()
    if one_pass.gradient_checkpointing:
        model.activation_checkpointing_enable()
    rows = torch.randint(3, config.vocab_size, (one_pass.num_rows, one_pass.block_size))
    positions = torch.arange(one_pass.block_size) % (one_pass.block_size - 10)
    batch = {"input_ids": rows, "shift_labels": rows, "position_ids": positions.expand_as(rows), "use_cache": False}
    saved = SavedForBackward(model)
    with saved.counting(), torch.autocast("cpu", one_pass.dtype, enabled=one_pass.dtype != torch.float32):
        loss = model(**batch, labels=rows, skip_logits=True).loss
    loss.backward()
    return saved.largest


@pytest.mark.parametrize("gradient_checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("preset", ["modern", "book"])
def test_activations_are_those_of_a_real_pass(preset, dtype, gradient_checkpointing, monkeypatch):
    """To a tenth of a percent by the code for accelerators; a CPU's routines keep up to a quarter less."""
    config = make_tiny_config(preset, num_hidden_layers=3, hidden_size=64)
    one_pass = Pass(4, 32, dtype, gradient_checkpointing)
    expected = count_activations(config, one_pass).kept
    assert 0.75 * expected < measure(config, one_pass) < 1.1 * expected
    for name in ("has_fast_norm", "has_fast_rotation", "prefers_whole_scores"):
        monkeypatch.setattr(modeling_gpt, name, lambda *args: False)
    assert expected == pytest.approx(measure(config, one_pass), rel=0.001)


def test_a_dropout_on_attention_keeps_scores_on_a_cpu_only():
    config = make_tiny_config("book", attention_dropout=0.1)
    one_pass = Pass(2, 32, torch.float32, False)
    on_cpu, on_card = count_activations(config, one_pass).kept, count_on_cards(config, one_pass)[False].kept
    scores = 2 * 4 * 32 * 32  # rows x heads x tokens x tokens, for each block as float32 and as dropout's mask
    assert on_cpu - on_card > config.num_hidden_layers * scores * (4 + 1)
    assert config.attention_dropout == 0.1


def test_what_is_computed_again_is_there_once():
    config = make_tiny_config("modern", num_hidden_layers=8)
    kept, recomputed = (count_activations(config, Pass(4, 32, torch.float32, value)) for value in (False, True))
    of_a_block = (kept.kept - count_activations(make_tiny_config("modern"), Pass(4, 32, torch.float32, False)).kept) / 6
    assert recomputed.kept < kept.kept / 4
    assert of_a_block < recomputed.temporary < 2 * of_a_block + kept.temporary


def test_parts_of_several_devices_by_hand(tiny_config):
    """The first device has the largest part: of FSDP2 whole rows, of ZeRO-3 numbers."""
    config = make_tiny_config("modern", num_hidden_layers=1, vocab_size=65)
    model = build_empty(config)
    whole = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert whole["model.embed_tokens.weight"] == 65 * 32

    def parts(sharding: str, dtype: torch.dtype = torch.float32) -> requirements.Requirements:
        return require(model, NOTHING, plan=Plan(sharding, 8), optimizer="adamw", dtype=dtype)

    total = sum(whole.values())
    assert parts("DDP").weights == parts("DDP").gradients == 4 * total
    assert parts("DDP").temporary == 4 * total  # its buckets hold the gradients again
    # 65 rows on 8 devices are 9 on the first; all else divides by 8.
    numbers = (total - 65 * 32) // 8 + 9 * 32
    assert parts("FSDP2").weights == parts("FSDP2").gradients == 4 * numbers
    assert parts("FSDP2").optimizer_state == 8 * numbers + 4 * len(whole)
    # 65 x 32 numbers divide by 8 as well; ZeRO-3 has the weights in bfloat16 too, and the gradients in that alone.
    assert parts("ZeRO-3", torch.bfloat16).weights == (4 + 2) * total // 8
    assert parts("ZeRO-3", torch.bfloat16).gradients == 2 * total // 8


def test_a_large_model_is_described_without_its_weights():
    config = hfllm.GPTConfig.from_preset(
        "modern", vocab_size=50304, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32
    )
    model = build_empty(config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    need = require(model, Activations(2**30, 0), plan=Plan("", 1), optimizer="adamw", dtype=torch.bfloat16)
    num_parameters = 50304 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 10944 + 2 * 4096 + 2 * 128) + 4096
    assert need.weights == 4 * num_parameters
    assert need.total == pytest.approx(16 * num_parameters + 2**30, rel=1e-6)


def test_the_table_says_which_cards_have_the_memory():
    model = build_empty(make_tiny_config("modern"))
    activations = {False: Activations(int(79e9), 0), True: Activations(int(23e9), 0)}
    table = describe_requirements(model, activations, Pass(8, 1024, torch.bfloat16, True))
    rows = {line[:20].strip(): line.split()[-3:] for line in table.splitlines()[2:]}
    assert rows["one device, Muon"] == ["no", "yes", "yes"]
    assert rows["ZeRO-3 x 8, AdamW"] == ["yes", "yes", "yes"]
    assert rows["FSDP2 x 8, AdamW"] == ["yes", "yes", "yes"]
    assert "ZeRO-3 x 8, Muon" not in rows
    assert "8 rows of 1,024 tokens" in table and "bfloat16, with gradient checkpointing" in table


def test_hours_follow_from_the_rate():
    told = describe_rate(3_600_000_000, 8_000_000, flops_per_second=1e12, source="1 TFLOP/s")
    assert "2.88e+16 floating-point operations" in told
    assert "At 1 TFLOP/s, one device takes 8.0 hours and 8 take 1.0" in told


def test_a_run_fits_here_if_the_memory_is_free(monkeypatch):
    model, one_pass = build_empty(make_tiny_config("modern")), Pass(4, 32, torch.float32, False)
    activations = {False: Activations(10**6, 1000)}
    given = {"optimizer": "muon", "accelerator": Accelerator(cpu=True)}
    need = require(model, activations[False], plan=Plan("", 1), optimizer="muon", dtype=torch.float32)
    needed = int(1.5 * need.total)
    monkeypatch.setattr(requirements, "_free_memory", lambda: needed)
    assert missing_memory(model, activations, one_pass, **given) is None
    monkeypatch.setattr(requirements, "_free_memory", lambda: needed - 1)
    assert missing_memory(model, activations, one_pass, **given) == (needed, needed - 1)


@pytest.mark.slow
def test_a_process_on_a_cpu_takes_no_more_than_a_dry_run_asks_for():
    """Resident memory of AdamW steps in a process of its own, beyond its imports."""
    sizes = {"vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = hfllm.GPTConfig.from_preset("modern", max_position_embeddings=512, **sizes)
    activations = count_activations(config, Pass(8, 512, torch.float32, False))
    own = {"plan": Plan("", 1), "optimizer": "adamw", "dtype": torch.float32}
    need = require(build_empty(config), activations, **own)
    measured = training_memory(config, num_rows=8, block_size=512)
    assert 0.75 * need.total < measured < requirements.HOST_FACTOR * need.total
