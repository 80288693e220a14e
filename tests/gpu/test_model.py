"""The model on a GPU: packed documents, caches, adapters, and the memory of the loss."""

import importlib.util

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import hfllm
from hfllm.training.devices import choose_attention
from hfllm.training.muon import orthogonalize
from hfllm.training.optimization import build_muon, skip_unless
from tests.conftest import make_tiny_config


pytestmark = pytest.mark.gpu

BACKENDS = ["sdpa", "eager", "flex_attention"]
LENGTHS = [(150, 70, 36), (256,), (1, 255)]  # of the documents in each row


def make_model(preset: str = "modern", backend: str = "sdpa", **fields) -> hfllm.GPTForCausalLM:
    fields = {"hidden_size": 64, "max_position_embeddings": 256, "num_key_value_heads": 2, **fields}
    return hfllm.GPTForCausalLM._from_config(make_tiny_config(preset, **fields), attn_implementation=backend).cuda()


def packed_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and positions (3, 256) of three rows."""
    positions = [torch.cat([torch.arange(length) for length in lengths]) for lengths in LENGTHS]
    return torch.randint(3, 64, (3, 256)).cuda(), torch.stack(positions).cuda()


@pytest.mark.parametrize("training", [False, True], ids=["evaluating", "training"])
@pytest.mark.parametrize("preset", ["modern", "book"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents_see_nothing_of_each_other_in_several_rows(backend, preset, training):
    """Bit for bit nothing; and each gives the logits that it gives alone on the CPU. Training asks no device."""
    model = make_model(preset, backend)
    ids, positions = packed_rows()
    with torch.set_grad_enabled(training):
        before = model(ids, position_ids=positions, use_cache=False).logits
        changed = ids.clone()
        changed[0, 150:220] = (ids[0, 150:220] + 1) % 64
        after = model(changed, position_ids=positions, use_cache=False).logits
    assert torch.equal(before[0, :150], after[0, :150]) and torch.equal(before[0, 220:], after[0, 220:])
    assert torch.equal(before[1:], after[1:]) and not torch.equal(before[0, 150:220], after[0, 150:220])
    on_cpu = make_model(preset).cpu()
    on_cpu.load_state_dict(model.state_dict())
    alone = on_cpu(ids[:1, 150:220].cpu(), use_cache=False).logits
    torch.testing.assert_close(before[:1, 150:220].cpu(), alone, atol=1e-3, rtol=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs the package flash-attn")
def test_flash_attention_keeps_the_documents_of_one_row_apart():
    model = make_model(backend="flash_attention_2").bfloat16()
    ids, positions = packed_rows()
    before = model(ids[:1], position_ids=positions[:1], use_cache=False).logits
    changed = ids.clone()
    changed[0, 150:220] = (ids[0, 150:220] + 1) % 64
    after = model(changed[:1], position_ids=positions[:1], use_cache=False).logits
    assert torch.equal(before[0, :150], after[0, :150]) and torch.equal(before[0, 220:], after[0, 220:])


@pytest.mark.parametrize("skip_logits", [False, True], ids=["all logits", "logits in pieces"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_packed_documents_are_those_of_documents_alone_on_a_cpu(backend, skip_logits):
    model = make_model(backend=backend, hidden_size=128)
    on_cpu = make_model(hidden_size=128).cpu()
    on_cpu.load_state_dict(model.state_dict())
    ids, positions = packed_rows()
    targets = torch.where(positions.roll(-1, 1) > 0, ids.roll(-1, 1), -100)
    batch = {"input_ids": ids, "position_ids": positions, "shift_labels": targets, "labels": targets}
    model(**batch, use_cache=False, num_items_in_batch=100, skip_logits=skip_logits).loss.backward()
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            part = slice(start, start + length)
            start += length
            own, labels = ids[row, part][None].cpu(), targets[row, part][None].cpu()
            loss = on_cpu(input_ids=own, labels=labels, shift_labels=labels, use_cache=False, num_items_in_batch=100)
            loss.loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), on_cpu.parameters()):
        difference = (ours.grad.cpu() - theirs.grad).norm() / theirs.grad.norm()
        assert difference < 1e-3, (name, difference)


@pytest.mark.parametrize("preset", ["modern", "book"])
def test_greedy_text_is_the_same_with_every_cache_and_on_the_cpu(preset):
    """In float32: without a cache, with a dynamic one, with a static one, whose steps transformers compiles."""
    model = make_model(preset).eval()
    ids = torch.randint(3, 64, (2, 12)).cuda()
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    options |= {"attention_mask": torch.ones_like(ids)}
    uncached = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, **options), uncached)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), uncached)
    on_cpu = {**options, "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    assert torch.equal(model.cpu().generate(ids.cpu(), **on_cpu), uncached.cpu())


def test_a_merged_adapter_gives_the_logits_of_the_adapter():
    model = make_model().eval()
    ids = torch.randint(3, 64, (2, 40)).cuda()
    adapter = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    before = adapter(ids).logits
    torch.testing.assert_close(adapter.merge_and_unload()(ids).logits, before, atol=2e-3, rtol=1e-3)


def test_muons_update_in_bfloat16_is_float32s_within_its_rounding():
    """bfloat16 keeps 8 bits of each number; length and direction of the update stay within a percent."""
    matrices = [torch.randn(768, columns).cuda() for columns in (768, 2048, 2048)]
    for one in ([matrices[0]], matrices[1:]):
        for exact, rounded in zip(orthogonalize(one, torch.float32), orthogonalize(one)):
            assert rounded.dtype == torch.bfloat16
            similarity = nn.functional.cosine_similarity(exact.flatten(), rounded.float().flatten(), dim=0)
            assert similarity > 0.999 and abs(rounded.float().norm() / exact.norm() - 1) < 0.01


def test_an_update_that_is_not_finite_changes_neither_weights_nor_state():
    model = make_model()
    rates = {"learning_rate": 0.02, "adam_learning_rate": 0.01, "weight_decay": 0.1, "momentum": 0.85}
    optimizer = build_muon(model, **rates, betas=(0.9, 0.95), epsilon=1e-8)

    def step(scale: float) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) * scale
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        skip_unless(torch.isfinite(norm), optimizer)
        optimizer.step()

    step(1.0)
    values = lambda: [value for state in optimizer.state.values() for value in state.values()]  # noqa: E731
    before = [tensor.clone() for tensor in (*model.parameters(), *values())]
    step(float("inf"))
    assert all(map(torch.equal, before, (*model.parameters(), *values())))
    step(1.0)
    assert not any(map(torch.equal, before, model.parameters()))


def test_the_loss_in_pieces_takes_a_fraction_of_the_memory_of_all_logits():
    """4,096 tokens of 50,304 ids: in float32 all logits together are 786 MiB, and several copies of them are needed."""
    model = make_model(vocab_size=50304, num_hidden_layers=1)
    ids = torch.randint(3, 64, (16, 256)).cuda()
    peaks = []
    for skip_logits in (False, True):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids, labels=ids, use_cache=False, skip_logits=skip_logits).loss
        loss.backward()
        model.zero_grad()
        peaks.append(torch.cuda.max_memory_allocated() / 2**20)
    print(f"peak memory: {peaks[0]:,.0f} MiB with all logits, {peaks[1]:,.0f} MiB in pieces")
    assert peaks[1] < peaks[0]


def test_the_attention_of_packed_rows_is_chosen_by_what_the_model_can():
    model = make_model("book")
    assert choose_attention(model, torch.device("cuda")) == "flex_attention"
    model.config.attention_dropout = 0.1
    assert choose_attention(model, torch.device("cuda")) == "sdpa"
    assert choose_attention(make_model(), torch.device("cpu")) == "sdpa"
