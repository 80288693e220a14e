import math

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import hfllm
from hfllm.model.kernels_gpt import RMSNormFunction, RotaryFunction, cross_entropy_of_rows
from tests.conftest import make_tiny_config


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 64, shape)


# The architecture, against transformers' own models with the same weights


def test_the_modern_preset_is_exactly_a_qwen3():
    ours = hfllm.GPTForCausalLM(make_tiny_config("modern", num_key_value_heads=2)).eval()
    qwen3 = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=ours.config.intermediate_size,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=32,
            rms_norm_eps=ours.config.norm_eps,
            tie_word_embeddings=True,
        )
    ).eval()
    qwen3.load_state_dict(ours.state_dict(), strict=True)
    ids = random_ids(3, 20)
    torch.testing.assert_close(ours(ids).logits, qwen3(ids).logits, atol=1e-5, rtol=1e-5)


def test_without_the_query_and_key_norms_it_is_exactly_a_llama():
    ours = hfllm.GPTForCausalLM(make_tiny_config("modern", use_qk_norm=False, tie_word_embeddings=False)).eval()
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=ours.config.intermediate_size,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            rms_norm_eps=ours.config.norm_eps,
        )
    ).eval()
    llama.load_state_dict(ours.state_dict(), strict=True)
    ids = random_ids(3, 20)
    torch.testing.assert_close(ours(ids).logits, llama(ids).logits, atol=1e-5, rtol=1e-5)


def test_the_book_preset_is_exactly_a_gpt2():
    ours = hfllm.GPTForCausalLM(make_tiny_config("book")).eval()
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=1)
    ).eval()
    ids = random_ids(3, 20)
    for name, parameter in ours.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(parameter, std=0.3)
    weights = ours.state_dict()
    with torch.no_grad():
        gpt2.transformer.wte.weight.copy_(weights["model.embed_tokens.weight"])
        gpt2.transformer.wpe.weight.copy_(weights["model.embed_positions.weight"])
        for index, block in enumerate(gpt2.transformer.h):
            layer = f"model.layers.{index}"
            for kind in ("weight", "bias"):
                qkv = torch.cat([weights[f"{layer}.self_attn.{name}_proj.{kind}"] for name in "qkv"])
                # GPT-2 keeps its matrices transposed.
                getattr(block.attn.c_attn, kind).copy_(qkv.t())
                getattr(block.attn.c_proj, kind).copy_(weights[f"{layer}.self_attn.o_proj.{kind}"].t())
                getattr(block.mlp.c_fc, kind).copy_(weights[f"{layer}.mlp.up_proj.{kind}"].t())
                getattr(block.mlp.c_proj, kind).copy_(weights[f"{layer}.mlp.down_proj.{kind}"].t())
                getattr(block.ln_1, kind).copy_(weights[f"{layer}.input_layernorm.{kind}"])
                getattr(block.ln_2, kind).copy_(weights[f"{layer}.post_attention_layernorm.{kind}"])
        for kind in ("weight", "bias"):
            getattr(gpt2.transformer.ln_f, kind).copy_(weights[f"model.norm.{kind}"])
    torch.testing.assert_close(ours(ids).logits, gpt2(ids).logits, atol=1e-5, rtol=1e-5)


def test_one_block_is_the_formula_of_the_chapter():
    """A block written out by hand with torch.nn, on the book's preset."""
    model = hfllm.GPTModel(make_tiny_config("book", num_hidden_layers=1)).eval()
    block = model.layers[0]
    x = torch.randn(2, 6, 32)
    normed = block.input_layernorm(x)
    heads = [
        getattr(block.self_attn, f"{name}_proj")(normed).view(2, 6, 4, 8).transpose(1, 2) for name in ("q", "k", "v")
    ]
    scores = heads[0] @ heads[1].transpose(2, 3) / math.sqrt(8)
    scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    context = (scores.softmax(-1) @ heads[2]).transpose(1, 2).reshape(2, 6, 32)
    after_attention = x + block.self_attn.o_proj(context)
    up = block.mlp.up_proj(block.post_attention_layernorm(after_attention))
    expected = after_attention + block.mlp.down_proj(nn.functional.gelu(up, approximate="tanh"))
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)


def test_the_books_124m_has_gpt2s_number_of_parameters():
    shape = {"vocab_size": 50257, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    with torch.device("meta"):
        tied = hfllm.GPTForCausalLM(hfllm.GPTConfig.from_preset("book", **shape))
        untied = hfllm.GPTForCausalLM(
            hfllm.GPTConfig.from_preset(
                "book", **shape, tie_word_embeddings=False, attention_bias=False, attention_output_bias=True
            )
        )
    assert sum(parameter.numel() for parameter in tied.parameters()) == 124_439_808
    # Chapter 4 counts 163,009,536 with a head of its own and no query, key and value biases.
    assert sum(parameter.numel() for parameter in untied.parameters()) == 163_009_536


def test_soft_capped_logits_stay_within_the_cap():
    ids = random_ids(2, 8)
    model = hfllm.GPTForCausalLM(make_tiny_config("modern")).eval()
    plain = model(ids).logits
    model.config.final_logit_softcapping = 0.5
    torch.testing.assert_close(model(ids).logits, 0.5 * torch.tanh(plain / 0.5))


@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 5, 3, 8)])
def test_the_written_out_norm_has_autograds_values_and_gradients(shape):
    """In float64, against torch.nn.RMSNorm and by finite differences."""
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    norm = nn.RMSNorm(8, eps=1e-6, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    torch.testing.assert_close(RMSNormFunction.apply(x, norm.weight, 1e-6), norm(x))
    assert torch.autograd.gradcheck(lambda x, weight: RMSNormFunction.apply(x, weight, 1e-6), (x, norm.weight))


def test_the_written_out_rotation_has_autograds_values_and_gradients():
    x, angles = torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True), torch.randn(2, 1, 5, 4).double()
    cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
    pairs = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)  # Su et al., eq. 13
    torch.testing.assert_close(RotaryFunction.apply(x, cos, sin), torch.cat([pairs.real, pairs.imag], -1))
    assert torch.autograd.gradcheck(lambda x: RotaryFunction.apply(x, cos, sin), (x,))


def test_gradients_are_those_of_qwen3():
    ours = hfllm.GPTForCausalLM(make_tiny_config("modern"))
    fields = {name: value for name, value in ours.config.to_dict().items() if name in Qwen3Config().to_dict()}
    qwen3 = Qwen3ForCausalLM(Qwen3Config(**{**fields, "model_type": "qwen3"}))
    qwen3.load_state_dict(ours.state_dict())
    ids = random_ids(3, 20)
    for model in (ours, qwen3):
        model(ids, labels=ids).loss.backward()
    expected = dict(qwen3.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-5, rtol=1e-4)


# Initial weights


def test_output_projections_start_smaller_by_the_root_of_twice_the_depth():
    config = hfllm.GPTConfig(hidden_size=256, num_attention_heads=4, num_hidden_layers=8)
    model = hfllm.GPTForCausalLM(config)
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            assert linear.weight.std().item() == pytest.approx(0.02 / 4, rel=0.02)
        for linear in (layer.self_attn.q_proj, layer.mlp.up_proj):
            assert linear.weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_embeddings_may_start_at_a_scale_of_their_own():
    sizes = {"vocab_size": 2000, "hidden_size": 256, "num_attention_heads": 4}
    model = hfllm.GPTForCausalLM(
        hfllm.GPTConfig.from_preset("book", **sizes, embedding_initializer_range=1.0, tie_word_embeddings=False)
    )
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(1.0, rel=0.02)
    assert model.model.embed_positions.weight.std().item() == pytest.approx(1.0, rel=0.02)
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_loading_does_not_initialise_again(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    loaded = hfllm.GPTForCausalLM.from_pretrained(tmp_path)
    for (name, expected), parameter in zip(tiny_model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(expected, parameter), name


def test_rotary_frequencies_survive_loading(tmp_path):
    model = hfllm.GPTForCausalLM(make_tiny_config("modern"))
    model.save_pretrained(tmp_path)
    loaded = hfllm.GPTForCausalLM.from_pretrained(tmp_path)
    expected = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(loaded.model.rotary_emb.inv_freq, expected)


def test_the_loss_of_random_weights_is_the_logarithm_of_the_vocabulary():
    model = hfllm.GPTForCausalLM(hfllm.GPTConfig(vocab_size=1000, hidden_size=64, num_attention_heads=4))
    ids = torch.randint(0, 1000, (4, 64))
    assert model(ids, labels=ids).loss.item() == pytest.approx(math.log(1000), rel=0.01)


# The loss


def test_the_model_shifts_the_labels_once(tiny_model):
    ids = random_ids(2, 10)
    logits = tiny_model(ids).logits
    by_hand = nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 64), ids[:, 1:].reshape(-1))
    torch.testing.assert_close(tiny_model(ids, labels=ids).loss, by_hand)


def test_shifted_labels_are_taken_as_they_are(tiny_model):
    ids = random_ids(2, 11)
    loss = tiny_model(ids[:, :-1], shift_labels=ids[:, 1:]).loss
    by_hand = nn.functional.cross_entropy(tiny_model(ids[:, :-1]).logits.reshape(-1, 64), ids[:, 1:].reshape(-1))
    torch.testing.assert_close(loss, by_hand)


def test_the_loss_is_a_sum_divided_by_the_number_it_is_given(tiny_model):
    ids = random_ids(4, 12)
    labels = ids.masked_fill(torch.rand(4, 12) < 0.5, -100)
    num_targets = int((labels[:, 1:] != -100).sum())
    whole = tiny_model(ids, labels=labels).loss
    parts = sum(
        tiny_model(ids[rows], labels=labels[rows], num_items_in_batch=num_targets).loss
        for rows in (slice(0, 1), slice(1, 4))
    )
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_all_logits_the_loss_and_every_gradient_are_the_same(tied, dtype):
    """600 rows of logits: more than are made at a time, and the last piece is smaller."""
    model = hfllm.GPTForCausalLM(make_tiny_config("modern", tie_word_embeddings=tied, vocab_size=301))
    ids, targets = torch.randint(301, (20, 30)), torch.randint(301, (20, 30))
    targets[torch.rand(20, 30) < 0.2] = -100
    results = []
    for skip_logits in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            output = model(ids, shift_labels=targets, num_items_in_batch=77, skip_logits=skip_logits, use_cache=False)
        output.loss.backward()
        results.append([output.loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
        assert (output.logits is None) == skip_logits
    tolerance = 1e-5 if dtype == torch.float32 else 0.02  # of the largest number in each
    for expected, found in zip(*results, strict=True):
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_without_all_logits_labels_are_shifted_and_averaged_as_with_them(tiny_model):
    ids = random_ids(3, 12)
    labels = ids.masked_fill(torch.rand(3, 12) < 0.3, -100)
    with torch.no_grad():
        without = tiny_model(ids, labels=labels, skip_logits=True).loss
    torch.testing.assert_close(without, tiny_model(ids, labels=labels).loss)
    with pytest.raises(ValueError, match="returns the loss alone, which needs labels"):
        tiny_model(ids, skip_logits=True)


def test_a_frozen_head_gets_no_gradient_and_one_with_an_adapter_keeps_its_logits(tiny_config):
    model = hfllm.GPTForCausalLM(make_tiny_config("modern", tie_word_embeddings=False))
    model.lm_head.requires_grad_(False)
    ids = random_ids(2, 10)
    model(ids, labels=ids, skip_logits=True).loss.backward()
    assert model.lm_head.weight.grad is None and model.model.embed_tokens.weight.grad is not None
    model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    hooked = model(ids, labels=ids, skip_logits=True)
    torch.testing.assert_close(hooked.loss, model(ids, labels=ids).loss)
    assert hooked.logits is not None


def test_a_repeated_sequence_is_learned_to_almost_no_loss(tiny_config):
    model = hfllm.GPTForCausalLM(tiny_config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = random_ids(1, 16)
    for _ in range(150):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05


@pytest.mark.slow  # compiles for ten seconds
def test_the_compiled_loss_of_a_piece_and_its_gradient_are_torchs_own():
    logits, target = torch.randn(12, 50, requires_grad=True), torch.randint(50, (12, 1))
    target[3] = -100
    expected = nn.functional.cross_entropy(logits, target[:, 0], reduction="sum")
    expected.backward()
    for function in (cross_entropy_of_rows, torch.compile(cross_entropy_of_rows)):
        nats, gradient = function(logits.detach(), target, True)
        torch.testing.assert_close(nats, expected.detach())
        torch.testing.assert_close(gradient, logits.grad)
        assert function(logits.detach(), target, False)[1] is None
