import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    pipeline,
)

import hfllm
from hfllm.model.modeling_gpt import RMSNormFunction, RotaryFunction
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


# What a token may see


def test_a_later_token_changes_nothing_before_it(tiny_model):
    ids = random_ids(1, 12)
    changed = ids.clone()
    changed[0, 8] = (ids[0, 8] + 1) % 64
    before, after = tiny_model(ids).logits, tiny_model(changed).logits
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.equal(before[:, 8:], after[:, 8:])


MASKS = {
    "no attention mask": {},
    "a mask of ones": {"attention_mask": torch.ones(2, 12, dtype=torch.long)},
    "a cache": {"use_cache": True},
    "a mask of ones and a cache": {"attention_mask": torch.ones(2, 12, dtype=torch.long), "use_cache": True},
}


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("arguments", MASKS.values(), ids=MASKS.keys())
def test_documents_in_a_row_never_see_each_other(tiny_config, backend, arguments):
    model = hfllm.GPTForCausalLM._from_config(tiny_config, attn_implementation=backend).eval()
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3], list(range(12))])
    arguments = {"position_ids": position_ids, "use_cache": False, **arguments}
    ids = random_ids(2, 12)
    changed = ids.clone()
    changed[0, :5] = random_ids(5)
    before, after = model(ids, **arguments).logits, model(changed, **arguments).logits
    assert torch.equal(before[0, 5:], after[0, 5:])
    assert torch.equal(before[1], after[1])
    alone = model(ids[:1, 5:8], use_cache=False).logits
    torch.testing.assert_close(before[:1, 5:8], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_documents_stay_apart_in_a_row_that_ends_in_padding(tiny_config, backend):
    model = hfllm.GPTForCausalLM._from_config(tiny_config, attn_implementation=backend).eval()
    ids = random_ids(2, 10)
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 0, 0], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]])
    attention_mask = torch.tensor([[1] * 7 + [0] * 3, [1] * 10])
    packed = model(ids, position_ids=position_ids, attention_mask=attention_mask).logits
    torch.testing.assert_close(packed[:1, 3:7], model(ids[:1, 3:7]).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed[1:], model(ids[1:]).logits, atol=1e-5, rtol=1e-5)


def test_the_packed_loss_is_the_sum_over_the_documents_alone(tiny_model):
    documents = [random_ids(1, length) for length in (5, 3, 8)]
    row = torch.cat(documents, dim=1)
    position_ids = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
    labels = row.masked_fill(position_ids == 0, -100)
    packed = tiny_model(row, position_ids=position_ids, labels=labels, num_items_in_batch=1).loss
    alone = sum(tiny_model(document, labels=document, num_items_in_batch=1).loss for document in documents)
    torch.testing.assert_close(packed, alone)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_padding_on_either_side_gives_the_unpadded_logits(tiny_config, side, backend):
    model = hfllm.GPTForCausalLM._from_config(tiny_config, attn_implementation=backend).eval()
    text = random_ids(1, 7)
    padding = torch.full((1, 4), 2)
    padded = torch.cat([padding, text] if side == "left" else [text, padding], dim=1)
    real = torch.cat(
        [torch.zeros(1, 4), torch.ones(1, 7)] if side == "left" else [torch.ones(1, 7), torch.zeros(1, 4)], 1
    )
    batch = torch.cat([padded, random_ids(1, 11)])
    attention_mask = torch.cat([real, torch.ones(1, 11)]).long()
    logits = model(batch, attention_mask=attention_mask).logits
    assert torch.isfinite(logits).all()
    kept = logits[:1, 4:] if side == "left" else logits[:1, :7]
    torch.testing.assert_close(kept, model(text).logits, atol=1e-5, rtol=1e-5)


def test_eager_and_sdpa_agree(tiny_config):
    model = hfllm.GPTForCausalLM(tiny_config).eval()
    ids = random_ids(2, 16)
    sdpa = model(ids).logits
    model.set_attn_implementation("eager")
    eager = model(ids, output_attentions=True)
    torch.testing.assert_close(eager.logits, sdpa, atol=1e-5, rtol=1e-5)
    assert [weights.shape for weights in eager.attentions] == [(2, 4, 16, 16)] * 2


def test_prefilling_in_chunks_equals_one_pass(tiny_model):
    ids = random_ids(2, 15)
    whole = tiny_model(ids).logits
    cache, chunks = None, []
    for chunk in ids.split([6, 5, 1, 3], dim=1):
        output = tiny_model(chunk, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        chunks.append(output.logits)
    torch.testing.assert_close(torch.cat(chunks, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_a_position_beyond_the_table_is_an_error_in_words():
    model = hfllm.GPTForCausalLM(make_tiny_config("book"))
    with pytest.raises(ValueError, match="Position 32 is beyond the 32 learned positions"):
        model(random_ids(1, 33))
    with pytest.raises(ValueError, match="Position 32 is beyond"):
        model(random_ids(1, 1), position_ids=torch.tensor([[32]]))


def test_dropout_is_off_in_evaluation(tiny_config):
    tiny_config.attention_dropout = tiny_config.embedding_dropout = tiny_config.residual_dropout = 0.5
    model = hfllm.GPTForCausalLM(tiny_config)
    ids = random_ids(2, 16)
    assert not torch.equal(model(ids).logits, model(ids).logits)
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)


# Generating


def greedy_by_hand(model, ids: torch.Tensor, steps: int) -> torch.Tensor:
    for _ in range(steps):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def test_generating_with_a_cache_gives_the_tokens_of_generating_without(tiny_model):
    ids = random_ids(3, 5)
    expected = greedy_by_hand(tiny_model, ids, 12)
    for use_cache in (True, False):
        tokens = tiny_model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=use_cache, eos_token_id=None)
        assert torch.equal(tokens, expected)


def test_a_left_padded_batch_generates_what_each_prompt_does_alone(tiny_model):
    prompts = [random_ids(1, 3), random_ids(1, 7)]
    alone = [greedy_by_hand(tiny_model, prompt, 8)[:, prompt.shape[1] :] for prompt in prompts]
    batch = torch.cat([torch.cat([torch.full((1, 4), 2), prompts[0]], dim=1), prompts[1]])
    mask = torch.tensor([[0] * 4 + [1] * 3, [1] * 7])
    tokens = tiny_model.generate(batch, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(tokens[:, 7:], torch.cat(alone))


def test_rows_of_a_batch_stop_each_at_their_own_end_token(tiny_model):
    ids = random_ids(4, 5)
    free = tiny_model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None)[:, 5:]
    stop = int(free[0, 2])
    stopped = tiny_model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=stop, pad_token_id=2)[:, 5:]
    for row in range(4):
        ends = (free[row] == stop).nonzero()
        length = int(ends[0]) + 1 if len(ends) else 10
        assert torch.equal(stopped[row, :length], free[row, :length])
        assert (stopped[row, length:] == 2).all()


# Citizenship


def test_tied_weights_are_one_tensor_after_loading(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).to(torch.bfloat16)
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()


def test_untied_weights_stay_two_tensors_after_loading(tmp_path):
    model = hfllm.GPTForCausalLM(make_tiny_config("modern", tie_word_embeddings=False))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_auto_classes_open_every_head_without_a_flag(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is hfllm.GPTForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path)) is hfllm.GPTModel
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert type(classifier) is hfllm.GPTForSequenceClassification


def test_a_reader_without_hfllm_opens_the_folder_with_trust_remote_code(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    ids = random_ids(1, 9)
    torch.save(tiny_model(ids).logits, tmp_path / "expected.pt")
    program = f"""
import sys, torch
sys.modules["hfllm"] = None  # importing it is an error, as if it were not installed
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
torch.set_num_threads(1)
folder = {str(tmp_path / "model")!r}
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
expected = torch.load({str(tmp_path / "expected.pt")!r})
assert torch.equal(model(torch.tensor({ids.tolist()})).logits, expected)
assert AutoModel.from_pretrained(folder, trust_remote_code=True).config.model_type == "hfllm_gpt"
AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True, num_labels=2)
model.save_pretrained({str(tmp_path / "again")!r})
AutoModelForCausalLM.from_pretrained({str(tmp_path / "again")!r}, trust_remote_code=True)
"""
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr


def test_importing_prints_nothing():
    finished = subprocess.run([sys.executable, "-c", "import hfllm"], capture_output=True, text=True, check=True)
    assert finished.stdout + finished.stderr == ""


def test_the_forward_takes_the_keywords_that_trainer_counts_on():
    from inspect import Parameter, signature

    parameters = signature(hfllm.GPTForCausalLM.forward).parameters.values()
    assert any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_classifier_pools_the_last_token_of_the_attention_mask(tiny_config, side):
    classifier = hfllm.GPTForSequenceClassification(tiny_config).eval()
    # The text ends in the pad token's own id: looking for the id, not at the mask, would pool the token before.
    text = torch.tensor([[5, 6, 7, 2]])
    padding = torch.full((1, 3), 2)
    batch = torch.cat([padding, text] if side == "left" else [text, padding], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] if side == "left" else [[1, 1, 1, 1, 0, 0, 0]])
    expected = classifier.score(classifier.model(text).last_hidden_state[:, -1])
    torch.testing.assert_close(classifier(batch, attention_mask=mask).logits, expected, atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients(tiny_config):
    model = hfllm.GPTForCausalLM(tiny_config)
    ids = random_ids(2, 16)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_a_pipeline_continues_a_prompt(tiny_model, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{index}": index for index in range(64)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w2", eos_token="w1")
    tiny_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generate = pipeline("text-generation", str(tmp_path))
    [answer] = generate("w5 w6", max_new_tokens=3, do_sample=False)
    assert answer["generated_text"].startswith("w5 w6")


@pytest.mark.slow
def test_the_model_compiles_as_one_graph(tiny_config):
    model = hfllm.GPTForCausalLM(tiny_config).eval()
    ids = random_ids(2, 16)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(
        compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits, atol=1e-5, rtol=1e-5
    )
