"""PEFT on our models: adapters train, load again, merge and exist side by side, and the tied head stays tied."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from transformers import AutoModelForCausalLM, PreTrainedModel

import hfllm
from tests.interop.conftest import LINEAR_LAYERS


IDS = torch.arange(5, 45).view(2, 20)


def lora(**options) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, **{"target_modules": LINEAR_LAYERS, "task_type": "CAUSAL_LM", **options})


def train(model: PreTrainedModel | PeftModel, steps: int = 5, **batch) -> list[float]:
    """Fit the batch, by default IDS as text; returns the losses and leaves the model in evaluation mode."""
    batch = batch or {"input_ids": IDS, "labels": IDS}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(steps):
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def logits_of(model: PreTrainedModel | PeftModel, **batch) -> torch.Tensor:
    return model(**(batch or {"input_ids": IDS})).logits


def is_tied(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.fixture(params=["modern", "book"])
def base(request, save_gpt) -> str:
    """A folder of either preset."""
    if request.param == "book":
        return save_gpt("book", hidden_size=32)
    return save_gpt("modern", hidden_size=32, num_key_value_heads=2)


def targets_in(model: PreTrainedModel) -> list[str]:
    return [name for name in LINEAR_LAYERS if any(module.endswith(name) for module, _ in model.named_modules())]


def test_an_adapter_trains_loads_again_and_merges_to_the_same_logits(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    untouched = logits_of(model.eval())
    adapted = get_peft_model(model, lora(target_modules=targets_in(model)))
    torch.testing.assert_close(logits_of(adapted.eval()), untouched)
    losses = train(adapted)
    assert losses[-1] < losses[0] - 0.5
    trained = logits_of(adapted)
    assert (trained - untouched).abs().max() > 0.5

    adapted.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base
    num_weights = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert 4 * num_weights < size < 4 * num_weights + 10_000, "the adapter's weights and a header, nothing of the base"

    for reloaded in (
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),  # finds the base by itself, as the next one
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"),
    ):
        torch.testing.assert_close(logits_of(reloaded.eval()), trained)

    merged = adapted.merge_and_unload()
    assert type(merged) is hfllm.GPTForCausalLM and is_tied(merged)
    torch.testing.assert_close(logits_of(merged), trained, atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert is_tied(alone)
    torch.testing.assert_close(logits_of(alone), logits_of(merged))
    assert torch.equal(alone.lm_head.weight, AutoModelForCausalLM.from_pretrained(base).lm_head.weight)


def test_all_linear_takes_every_layer_of_the_blocks_and_neither_head_nor_embedding(base):
    model = AutoModelForCausalLM.from_pretrained(base)
    expected = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"}
    adapted = get_peft_model(model, lora(target_modules="all-linear"))
    assert adapted.peft_config["default"].target_modules == expected
    assert len(expected) == 2 * len(targets_in(model))


def test_several_adapters_stand_on_one_base_and_can_be_switched_off(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    targets = targets_in(model)
    untouched = logits_of(model)
    adapted = get_peft_model(model, lora(target_modules=targets), adapter_name="one")
    train(adapted)
    logits_one = logits_of(adapted)
    adapted.add_adapter("other", lora(target_modules=targets))
    adapted.set_adapter("other")
    torch.testing.assert_close(logits_of(adapted), untouched)
    train(adapted, input_ids=IDS.flip(1), labels=IDS.flip(1))
    logits_other = logits_of(adapted)
    assert (logits_other - logits_one).abs().max() > 0.5

    adapted.set_adapter("one")
    torch.testing.assert_close(logits_of(adapted), logits_one)
    with adapted.disable_adapter():
        torch.testing.assert_close(logits_of(adapted), untouched)
    # One batch, a different adapter for each of its rows.
    mixed = logits_of(adapted, input_ids=IDS, adapter_names=["other", "__base__"])
    torch.testing.assert_close(mixed, torch.stack([logits_other[0], untouched[1]]), atol=1e-5, rtol=1e-5)

    adapted.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "one", "one")
    reloaded.load_adapter(tmp_path / "other", "other")
    reloaded.eval().set_adapter("other")
    torch.testing.assert_close(logits_of(reloaded), logits_other)


def test_a_classifier_keeps_its_score_layer_with_the_adapter(base, tmp_path):
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": torch.tensor([2, 0])}

    def open_base() -> PreTrainedModel:
        torch.manual_seed(torch.initial_seed() + 1)  # the head is new, with other random weights each time
        return hfllm.GPTForSequenceClassification.from_pretrained(base, num_labels=3)

    model = open_base()
    drawn = model.score.weight.clone()
    adapted = get_peft_model(model, lora(target_modules=targets_in(model), task_type="SEQ_CLS"))
    losses = train(adapted, **batch)
    assert losses[-1] < losses[0]
    trained = logits_of(adapted, **batch)
    assert not torch.equal(adapted.base_model.model.score.modules_to_save["default"].weight, drawn)
    adapted.save_pretrained(tmp_path)

    fresh = open_base()
    assert not torch.equal(fresh.score.weight, drawn)
    reloaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    torch.testing.assert_close(logits_of(reloaded, **batch), trained)
    merged = reloaded.merge_and_unload()
    assert type(merged.score) is torch.nn.Linear
    torch.testing.assert_close(logits_of(merged, **batch), trained, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [[7, 8], {"embed_tokens": [7, 8]}], ids=["list", "by_name"])
def test_single_tokens_can_be_trained_and_the_head_follows(tokens, base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    before = model.get_input_embeddings().weight.detach().clone()
    adapted = get_peft_model(model, lora(target_modules=targets_in(model), trainable_token_indices=tokens))
    train(adapted)
    trained = logits_of(adapted)
    adapted.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path).eval()
    torch.testing.assert_close(logits_of(reloaded), trained)

    merged = adapted.merge_and_unload()
    assert is_tied(merged)
    torch.testing.assert_close(logits_of(merged), trained, atol=1e-5, rtol=1e-5)
    changed = (merged.get_input_embeddings().weight != before).any(dim=-1)
    assert changed.nonzero().flatten().tolist() == [7, 8]


def test_a_trained_copy_of_the_tied_embedding_stays_the_head_if_peft_is_told_so(base):
    """Without `ensure_weight_tying` PEFT trains the input side alone, and the merged model is untied."""
    model = AutoModelForCausalLM.from_pretrained(base)
    config = lora(target_modules=targets_in(model), modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    adapted = get_peft_model(model, config)
    train(adapted)
    trained = logits_of(adapted)
    merged = adapted.merge_and_unload()
    assert is_tied(merged) and merged.config.tie_word_embeddings
    torch.testing.assert_close(logits_of(merged), trained, atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_gives_an_adapter_the_same_gradients(base):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(base)
        adapted = get_peft_model(model, lora(target_modules=targets_in(model), init_lora_weights=False)).train()
        if checkpointing:
            adapted.gradient_checkpointing_enable()
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in adapted.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient)


def test_an_adapter_can_be_injected_without_a_wrapper(base):
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    untouched = logits_of(model)
    injected = inject_adapter_in_model(lora(target_modules=targets_in(model)), model)
    assert type(injected) is hfllm.GPTForCausalLM
    torch.testing.assert_close(logits_of(injected), untouched)
    losses = train(injected)
    assert losses[-1] < losses[0] - 0.5
    generated = injected.generate(IDS[:1, :5], max_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 9)


def test_an_adapted_model_generates_what_its_merged_twin_does(base):
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, lora(target_modules=targets_in(model)))
    train(adapted)
    with_adapter = adapted.generate(input_ids=IDS[:, :5], max_new_tokens=10, do_sample=False)
    merged = adapted.merge_and_unload()
    assert torch.equal(merged.generate(IDS[:, :5], max_new_tokens=10, do_sample=False), with_adapter)
