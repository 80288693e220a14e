"""Which tokens a token attends to, on every attention backend that runs here: alone, packed with others, and padded."""

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

import hfllm
from hfllm.model import modeling_gpt
from tests.conftest import make_tiny_config


# On a CPU flex_attention has no backward pass, and is compiled for every shape: 10 to 20 s each.
BACKENDS = ["sdpa", "eager", pytest.param("flex_attention", marks=pytest.mark.slow)]


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 64, shape)


def make_model(config: hfllm.GPTConfig, backend: str) -> hfllm.GPTForCausalLM:
    torch.compiler.reset()
    return hfllm.GPTForCausalLM._from_config(config, attn_implementation=backend).eval()


def position_ids_of(*lengths: int) -> torch.Tensor:
    """Positions (1, T) of a row in which documents of these lengths follow each other."""
    return torch.cat([torch.arange(length) for length in lengths])[None]


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arguments", MASKS.values(), ids=MASKS.keys())
@torch.no_grad()
def test_documents_in_a_row_never_see_each_other(tiny_config, backend, arguments):
    model = make_model(tiny_config, backend)
    position_ids = torch.cat([position_ids_of(5, 3, 4), position_ids_of(12)])
    arguments = {"position_ids": position_ids, "use_cache": False, **arguments}
    ids = random_ids(2, 12)
    before = model(ids, **arguments).logits
    for start, end in ((0, 5), (5, 8), (8, 12)):
        changed = ids.clone()
        changed[0, start:end] = (ids[0, start:end] + 1) % 64
        after = model(changed, **arguments).logits
        assert torch.equal(before[0, :start], after[0, :start])
        assert torch.equal(before[0, end:], after[0, end:])
        assert torch.equal(before[1], after[1])
    alone = model(ids[:1, 5:8], use_cache=False).logits
    torch.testing.assert_close(before[:1, 5:8], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("preset", ["modern", "book"])
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_documents_of_more_tokens_than_a_kernels_block_never_see_each_other(preset, backend):
    """flex_attention works in blocks of 128 tokens; those of torch's kernel for a CPU hold 32 to 512."""
    model = make_model(make_tiny_config(preset, max_position_embeddings=700, num_key_value_heads=2), backend)
    lengths = (150, 70, 480)
    ids = random_ids(1, sum(lengths))
    changed = ids.clone()
    changed[0, 150:220] = random_ids(70)
    before, after = (model(row, position_ids=position_ids_of(*lengths)).logits for row in (ids, changed))
    assert torch.equal(before[0, :150], after[0, :150])
    assert torch.equal(before[0, 220:], after[0, 220:])
    torch.testing.assert_close(before[:, 220:], model(ids[:, 220:]).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_documents_stay_apart_in_a_row_with_padding(tiny_config, side, backend):
    model = make_model(tiny_config, backend)
    # Padding on the left may be counted, too: then the positions continue from it into the first document.
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3] if side == "left" else [0, 1, 2, 0, 1, 2, 3, 0, 0, 0]])
    attention_mask = torch.tensor([[0] * 3 + [1] * 7] if side == "left" else [[1] * 7 + [0] * 3])
    arguments = {
        "position_ids": torch.cat([position_ids, position_ids_of(10)]),
        "attention_mask": torch.cat([attention_mask, torch.ones(1, 10, dtype=torch.long)]),
    }
    padding = slice(0, 3) if side == "left" else slice(7, 10)
    first = slice(3, 6) if side == "left" else slice(0, 3)
    second = slice(first.stop, first.stop + 4)
    ids = random_ids(2, 10)
    before = model(ids, **arguments).logits
    for part, untouched in ((padding, (first, second)), (first, (second,)), (second, (first,))):
        changed = ids.clone()
        changed[0, part] = (ids[0, part] + 1) % 64
        after = model(changed, **arguments).logits
        for document in untouched:
            assert torch.equal(before[0, document], after[0, document])
    torch.testing.assert_close(before[:1, second], model(ids[:1, second]).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(before[1:], model(ids[1:]).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_what_one_document_learns_moves_nothing_in_another(tiny_config, backend):
    model = make_model(tiny_config, backend)
    embeddings = model.get_input_embeddings()(random_ids(1, 12)).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, position_ids=position_ids_of(5, 3, 4)).logits
    logits[0, 5:8].logsumexp(-1).sum().backward()
    is_moved = embeddings.grad[0].abs().sum(-1) > 0
    assert is_moved.tolist() == [False] * 5 + [True] * 3 + [False] * 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_mask", [False, True], ids=["no mask", "a mask of ones"])
@torch.no_grad()
def test_the_packed_loss_is_the_sum_over_the_documents_alone(tiny_config, backend, with_mask):
    model = make_model(tiny_config, backend)
    lengths = (5, 3, 7)  # torch's compiled flex_attention is wrong for 8 on some CPUs (docs/limits.md)
    documents = [random_ids(1, length) for length in lengths]
    row, position_ids = torch.cat(documents, dim=1), position_ids_of(*lengths)
    labels = row.masked_fill(position_ids == 0, -100)
    mask = {"attention_mask": torch.ones_like(row)} if with_mask else {}
    packed = model(row, position_ids=position_ids, labels=labels, num_items_in_batch=1, **mask).loss
    alone = sum(model(document, labels=document, num_items_in_batch=1).loss for document in documents)
    torch.testing.assert_close(packed, alone)


def test_a_mask_of_four_dimensions_is_taken_as_it_is(tiny_model):
    ids, position_ids = random_ids(1, 8), position_ids_of(5, 3)
    allowed = torch.block_diag(torch.ones(5, 5), torch.ones(3, 3)).tril().bool()[None, None]
    by_mask = tiny_model(ids, attention_mask=allowed, position_ids=position_ids).logits
    torch.testing.assert_close(by_mask, tiny_model(ids, position_ids=position_ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["static", "not empty"])
def test_packed_documents_and_a_cache_that_cannot_hold_them_are_an_error(tiny_model, kind):
    cache = StaticCache(tiny_model.config, max_cache_len=12) if kind == "static" else DynamicCache()
    if kind == "not empty":
        tiny_model(random_ids(1, 2), past_key_values=cache)
    tiny_model(random_ids(1, 4), past_key_values=cache, position_ids=torch.tensor([[2, 3, 4, 5]]))
    with pytest.raises(ValueError, match=f"a cache that is {kind} the documents would see each other"):
        tiny_model(random_ids(1, 4), past_key_values=cache, position_ids=torch.tensor([[6, 7, 0, 1]]))


@pytest.mark.parametrize(("rows", "padding"), [(2, 0), (1, 2)])
def test_flash_attention_refuses_the_packed_rows_that_it_would_mix(tiny_model, rows, padding):
    """Its kernel takes document bounds from the positions of a single row without padding, and ignores other masks."""
    tiny_model.config._attn_implementation_internal = "flash_attention_2"  # as if it were installed: it is not reached
    attention_mask = torch.ones(rows, 8, dtype=torch.long)
    attention_mask[:, 8 - padding :] = 0
    with pytest.raises(ValueError, match="keeps packed documents apart only in a single row"):
        tiny_model(random_ids(rows, 8), attention_mask=attention_mask, position_ids=position_ids_of(3, 5))


@pytest.mark.parametrize("backend", ["flash_attention_2", "flash_attention_3"])
def test_a_backend_that_is_not_installed_is_an_error_when_it_is_asked_for(tiny_model, tmp_path, backend):
    tiny_model.save_pretrained(tmp_path)
    with pytest.raises(ImportError, match="doesn't seem to be installed"):
        hfllm.GPTForCausalLM.from_pretrained(tmp_path, attn_implementation=backend)
    with pytest.raises(ImportError, match="doesn't seem to be installed"):
        tiny_model.set_attn_implementation(backend)


def test_a_backend_that_does_not_exist_is_an_error_that_names_the_others(tiny_config):
    with pytest.raises(ValueError, match=r'attn_implementation="spda".*is not supported.*eager.*sdpa'):
        hfllm.GPTForCausalLM._from_config(tiny_config, attn_implementation="spda")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_padding_on_either_side_gives_the_unpadded_logits(tiny_config, side, backend):
    model = make_model(tiny_config, backend)
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


@pytest.mark.parametrize("backend", ["eager", pytest.param("flex_attention", marks=pytest.mark.slow)])
@torch.no_grad()
def test_every_backend_gives_the_logits_of_sdpa(tiny_config, backend):
    model = make_model(tiny_config, "sdpa")
    ids = random_ids(2, 16)
    sdpa = model(ids).logits
    model.set_attn_implementation(backend)
    torch.testing.assert_close(model(ids).logits, sdpa, atol=1e-5, rtol=1e-5)


def test_attention_weights_are_probabilities_over_what_a_token_may_see(tiny_config):
    model = make_model(tiny_config, "eager")
    attention_mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    output = model(random_ids(2, 6), attention_mask=attention_mask, output_attentions=True)
    assert len(output.attentions) == tiny_config.num_hidden_layers
    may_see = torch.ones(6, 6).tril() * attention_mask[:, None]  # (B, T, T)
    for weights in output.attentions:
        assert weights.shape == (2, 4, 6, 6)
        rows = attention_mask.bool()  # what a padding token looks at means nothing
        weights = weights.transpose(1, 2)[rows]  # (B, H, T, T) -> (tokens, H, T)
        torch.testing.assert_close(weights.sum(-1), torch.ones(10, 4))
        assert ((weights > 0) == may_see[rows][:, None].bool()).all()


def test_hidden_states_go_from_the_embeddings_to_the_last_norm(tiny_model):
    blocks = []
    for layer in tiny_model.model.layers:
        layer.register_forward_hook(lambda block, args, result: blocks.append(result))
    ids = random_ids(2, 6)
    output = tiny_model.model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == tiny_model.config.num_hidden_layers + 1
    embeddings = tiny_model.get_input_embeddings()(ids)
    if tiny_model.config.position_embedding_type == "learned":
        embeddings = embeddings + tiny_model.model.embed_positions.weight[:6]
    assert torch.equal(output.hidden_states[0], embeddings)
    assert torch.equal(output.hidden_states[1], blocks[0])
    assert torch.equal(output.hidden_states[-1], tiny_model.model.norm(blocks[1]))
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


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


# In bfloat16 on a CPU


@pytest.mark.parametrize("kind", ["causal", "packed", "padded"])
def test_short_rows_in_bfloat16_get_float32s_loss_and_gradients_up_to_rounding(kind, monkeypatch):
    model = hfllm.GPTForCausalLM(make_tiny_config("modern", num_key_value_heads=2))
    assert model.config._attn_implementation == "sdpa"
    ids = torch.randint(3, 64, (2, 24))
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    if kind == "packed":
        inputs["position_ids"] = (torch.arange(24) % 10).expand(2, -1).contiguous()
    if kind == "padded":
        inputs["attention_mask"] = torch.ones(2, 24, dtype=torch.long)
        inputs["attention_mask"][0, :5] = 0
        inputs["labels"] = ids.clone()
        inputs["labels"][0, :6] = -100  # the last one is what a token of padding would predict
    calls = []
    original = modeling_gpt.whole_scores_attention

    def counted(*arguments, **options):
        calls.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(modeling_gpt, "whole_scores_attention", counted)
    results = []
    for is_rounded in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_rounded):
            loss = model(**inputs).loss
        loss.backward()
        results.append((loss.item(), [parameter.grad.clone() for parameter in model.parameters()]))
    assert len(calls) == model.config.num_hidden_layers  # in float32 never
    (exact_loss, exact), (rounded_loss, rounded) = results
    assert rounded_loss == pytest.approx(exact_loss, rel=2e-3)
    for expected, found in zip(exact, rounded):
        assert nn.functional.cosine_similarity(expected.flatten(), found.flatten(), dim=0) > 0.99
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(**inputs)
    assert len(calls) == model.config.num_hidden_layers  # nor without gradients, nor in the rows of a generation


def test_the_norm_of_what_autocast_put_out_has_the_formulas_values_and_gradients():
    norm = modeling_gpt.GPTRMSNorm(16, eps=1e-6)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    states, grad = torch.randn(2, 5, 16, dtype=torch.bfloat16, requires_grad=True), torch.randn(2, 5, 16)
    found = norm(states)
    assert found.dtype == torch.float32
    found.backward(grad)

    x = states.detach().double().requires_grad_()
    weight = norm.weight.detach().double().requires_grad_()
    expected = weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected.backward(grad.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.weight.grad.double(), weight.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states.grad, x.grad.bfloat16(), rtol=1e-2, atol=1e-3)  # the last rounding apart


@pytest.mark.parametrize("preset", ["modern", "book"])
def test_autocast_rounds_what_several_products_take_once(preset):
    model = hfllm.GPTForCausalLM(make_tiny_config(preset))
    taken: dict[str, torch.Tensor] = {}
    layer = model.model.layers[0]
    for module, names in ((layer.self_attn, ("q_proj", "k_proj", "v_proj")), (layer.mlp, ("gate_proj", "up_proj"))):
        for name in names:
            if hasattr(module, name):
                getattr(module, name).register_forward_pre_hook(
                    lambda _, inputs, name=name: taken.__setitem__(name, inputs[0])
                )
    ids = torch.randint(3, 64, (2, 24))
    with torch.autocast("cpu", torch.bfloat16):
        model(ids, use_cache=False)
    assert taken["q_proj"].dtype == torch.bfloat16 and taken["q_proj"] is taken["k_proj"] is taken["v_proj"]
    if preset == "modern":
        assert taken["gate_proj"].dtype == torch.bfloat16 and taken["gate_proj"] is taken["up_proj"]
    model(ids, use_cache=False)
    assert taken["q_proj"].dtype == torch.float32
