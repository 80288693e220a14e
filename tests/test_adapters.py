"""LoRA: its layers, what is saved with it, its base, and the same logits after loading and merging."""

import json
import subprocess
import sys

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

import hfllm
from hfllm.adapters import (
    add_lora,
    base_fingerprint,
    count_parameters,
    describe_trained,
    load_adapter,
    lora_config,
    lora_targets,
    merge_adapter,
    quantization_for_qlora,
    save_adapter,
    tokenizer_source,
)
from tests.conftest import make_tiny_config


IDS = torch.arange(5, 29).view(2, 12)


@pytest.fixture(params=["modern", "book"])
def folder(request, tmp_path) -> str:
    """A pretrained base of either preset, with a tied head."""
    torch.manual_seed(1)
    hfllm.GPTForCausalLM(make_tiny_config(request.param)).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def base(folder) -> hfllm.GPTForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder)


def train(model: torch.nn.Module, labels: torch.Tensor = IDS, steps: int = 3) -> torch.nn.Module:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(steps):
        model.train()(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def test_lora_sits_on_every_linear_layer_of_the_blocks_and_nowhere_else(base):
    expected = {name for name, m in base.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"}
    adapted = add_lora(base, r=4)
    assert {name.removeprefix("base_model.model.") for name in adapted.targeted_module_names} == expected
    trained = {name.split(".lora_")[0] for name, p in adapted.named_parameters() if p.requires_grad}
    assert {name.removeprefix("base_model.model.") for name in trained} == expected


def test_peft_alone_knows_our_layers_once_this_module_is_imported(base):
    adapted = get_peft_model(base, LoraConfig(r=2))
    assert {name.rpartition(".")[2] for name in adapted.targeted_module_names} == set(lora_targets(base))


def test_importing_hfllm_does_not_import_peft():
    code = "import sys, hfllm; assert not any(name.startswith('peft') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_at_the_books_shape_the_count_is_the_books_but_for_the_head():
    """The book (appendix E) adapts every linear layer of GPT-2 124M with rank 16, its new head among them: 2,666,528.

    We train the head of two labels whole instead: 768 * 2 weights in place of LoRA's (768 + 2) * 16 beside a random
    head that stays unchanged.
    """
    with torch.device("meta"):
        config = hfllm.GPTConfig.from_preset(
            "book", vocab_size=50257, hidden_size=768, num_hidden_layers=12, num_attention_heads=12
        )
        config.num_labels = 2
        model = add_lora(hfllm.GPTForSequenceClassification(config), r=16)
    a_block = 16 * (4 * (768 + 768) + 2 * (768 + 4 * 768))
    head, books_head = 768 * 2, 16 * (768 + 2)
    assert count_parameters(model)[0] == 12 * a_block + head == 2_655_744
    assert 12 * a_block + books_head == 2_666_528


def test_it_says_what_is_trained_and_how_much_of_it(base):
    num_total = sum(p.numel() for p in base.parameters())
    assert describe_trained(base) == f"Trained: {num_total:,} of {num_total:,} parameters (100.0 %): everything."
    adapted = add_lora(base, r=4, target_modules=["q_proj", "v_proj"])
    num = 2 * 2 * 4 * (32 + 32)  # layers, targets, rank, inputs and outputs
    total = num_total + num
    share = f"{100 * num / total:.1f} %"
    assert describe_trained(adapted) == (
        f"Trained: {num:,} of {total:,} parameters ({share}): LoRA of rank 4 on q_proj, v_proj."
    )


def test_an_adapter_loads_again_and_merges_to_the_same_logits(folder, base, tmp_path):
    untouched = logits_of(base)
    adapted = add_lora(base, r=4, alpha=8)
    torch.testing.assert_close(logits_of(adapted), untouched)
    trained = logits_of(train(adapted))
    assert (trained - untouched).abs().max() > 0.1
    save_adapter(adapted, tmp_path / "adapter")

    reloaded = load_adapter(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    torch.testing.assert_close(logits_of(reloaded), trained)
    by_peft_alone = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits_of(by_peft_alone), trained)

    merged = merge_adapter(reloaded)
    assert type(merged) is hfllm.GPTForCausalLM and merged.lm_head.weight is merged.model.embed_tokens.weight
    torch.testing.assert_close(logits_of(merged), trained, atol=1e-5, rtol=1e-5)
    assert not any("lora" in name for name in merged.state_dict())


def test_a_classifiers_head_is_saved_with_the_adapter(folder, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    adapted = add_lora(model, r=4)
    assert "score" not in {name.rpartition(".")[2] for name in adapted.targeted_module_names}
    assert describe_trained(adapted).endswith("; score.")
    train(adapted, labels=torch.tensor([2, 0]))
    save_adapter(adapted, tmp_path / "adapter")
    torch.manual_seed(9)
    fresh = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    reloaded = load_adapter(fresh, tmp_path / "adapter")
    torch.testing.assert_close(logits_of(reloaded), logits_of(adapted))
    torch.testing.assert_close(logits_of(merge_adapter(reloaded)), logits_of(adapted), atol=1e-5, rtol=1e-5)


def test_a_classifiers_pooling_goes_with_its_adapter(folder, tmp_path):
    def open_base(**fields):
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, **fields)

    adapted = train(add_lora(open_base(classifier_pooling="mean"), r=4), labels=torch.tensor([2, 0]))
    save_adapter(adapted, tmp_path / "mean")
    save_adapter(add_lora(open_base(), r=4), tmp_path / "last")
    reloaded = load_adapter(open_base(), tmp_path / "mean")  # the base's own config says "last"
    torch.testing.assert_close(logits_of(reloaded), logits_of(adapted))
    assert merge_adapter(reloaded).config.classifier_pooling == "mean"
    both = load_adapter(open_base(), tmp_path / "mean")
    with pytest.raises(ValueError, match="has classifier_pooling='last', those on the model already have another"):
        load_adapter(both, tmp_path / "last", adapter_name="second")


def test_a_model_without_an_adapter_has_nothing_to_merge(base):
    with pytest.raises(ValueError, match="a model with an adapter on it, not a GPTForCausalLM"):
        merge_adapter(base)


def test_merging_into_bfloat16_rounds_once(folder, tmp_path):
    """Rounding the adapter's part and the sum, as a merge in bfloat16 does, is further away from the float32 merge."""
    adapted = train(add_lora(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), r=4))
    save_adapter(adapted, tmp_path)
    merged = merge_adapter(load_adapter(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), tmp_path))
    assert merged.dtype == torch.bfloat16
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float()
    exact = PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    for name, weight in merged.state_dict().items():
        assert torch.equal(weight, exact.state_dict()[name].to(torch.bfloat16)), name


def test_several_adapters_stand_on_one_base(folder, base, tmp_path):
    untouched = logits_of(base)
    model = train(add_lora(base, r=4, adapter_name="one"))
    one = logits_of(model)
    model = add_lora(model, r=2, adapter_name="two")
    torch.testing.assert_close(logits_of(model), untouched)
    two = logits_of(train(model, labels=IDS.flip(1)))
    assert (two - one).abs().max() > 0.1
    for name in ("one", "two"):
        save_adapter(model, tmp_path / f"adapter-{name}", adapter_name=name)
    assert not (tmp_path / "one").exists()
    with pytest.raises(ValueError, match=r"an adapter 'two' already.*\['one', 'two'\]"):
        add_lora(model, adapter_name="two")

    both = load_adapter(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter-one", adapter_name="one")
    both = load_adapter(both, tmp_path / "adapter-two", adapter_name="two")
    torch.testing.assert_close(logits_of(both), two)
    torch.testing.assert_close(logits_of(merge_adapter(both, adapter_name="one")), one, atol=1e-5, rtol=1e-5)


def test_an_adapter_for_another_base_is_refused(folder, base, tmp_path):
    save_adapter(train(add_lora(base, r=4)), tmp_path / "adapter")
    preset = "modern" if base.config.gated_mlp else "book"
    other = hfllm.GPTForCausalLM(make_tiny_config(preset, hidden_size=64))
    with pytest.raises(
        ValueError, match=r"another base: its model\.layers\.0\.\w+\.\w+ has \d+ inputs, this model's has"
    ):
        load_adapter(other, tmp_path / "adapter")
    deeper = hfllm.GPTForCausalLM(make_tiny_config(preset, num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"it adapts model\.layers\.1\..*, which this model does not have"):
        load_adapter(deeper, tmp_path / "adapter")
    same_shape = hfllm.GPTForCausalLM(make_tiny_config(preset))
    with pytest.raises(ValueError, match="the weights that it was trained on are not these"):
        load_adapter(same_shape, tmp_path / "adapter")
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
    with pytest.raises(ValueError, match="open the base by AutoModelForCausalLM"):
        load_adapter(classifier, tmp_path / "adapter")
    with pytest.raises(ValueError, match="not an adapter: it holds a whole model"):
        load_adapter(classifier, folder)
    with pytest.raises(ValueError, match="not an adapter"):
        load_adapter(classifier, tmp_path / "nothing")


def test_an_adapter_with_another_number_of_labels_is_refused(folder, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    save_adapter(add_lora(model, r=2), tmp_path)
    with pytest.raises(ValueError, match=r"its head has 3 labels, this model's 2; open the base with num_labels=3"):
        load_adapter(AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2), tmp_path)


def test_the_fingerprint_is_the_same_with_any_adapter_and_in_any_precision(folder, base):
    expected = base_fingerprint(base)
    assert base_fingerprint(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)) == expected
    assert base_fingerprint(AutoModelForSequenceClassification.from_pretrained(folder)) == expected
    assert base_fingerprint(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)) is None
    adapted = train(add_lora(AutoModelForCausalLM.from_pretrained(folder), r=2, trainable_token_indices=[7]))
    assert base_fingerprint(adapted) == expected
    assert base_fingerprint(merge_adapter(adapted)) != expected


@pytest.mark.parametrize(
    "opened, given, written",
    [
        ("openai-community/gpt2", None, "openai-community/gpt2"),
        ("/home/me/.cache/hub/models--openai-community--gpt2/snapshots/607a30d", None, "openai-community/gpt2"),
        ("/home/me/out/demo", "me/demo", "me/demo"),
        ("out/demo", None, "out/demo"),
    ],
)
def test_the_base_is_written_by_the_name_that_others_can_open(opened, given, written, tmp_path):
    base = hfllm.GPTForCausalLM(make_tiny_config("book"))
    base.name_or_path = opened
    save_adapter(add_lora(base, r=2), tmp_path, base_model_id=given)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == written


def test_an_adapter_is_a_few_bytes_a_weight(base, tmp_path):
    adapted = add_lora(base, r=4)
    save_adapter(adapted, tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert 0 < size - 4 * count_parameters(adapted)[0] < 10_000


def test_gpt2s_own_transposed_layers_are_adapted_too(recwarn, tmp_path):
    native = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32))
    native.save_pretrained(tmp_path / "base")
    assert lora_targets(native) == ["c_attn", "c_proj", "c_fc"]
    adapted = train(add_lora(native, r=4))
    assert not [w for w in recwarn if "fan_in_fan_out" in str(w.message)]
    save_adapter(adapted, tmp_path / "adapter")
    reloaded = load_adapter(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logits_of(reloaded), logits_of(adapted))
    torch.testing.assert_close(logits_of(merge_adapter(reloaded)), logits_of(adapted), atol=1e-5, rtol=1e-5)


def test_tokens_that_are_new_to_the_base_can_be_trained_and_the_tied_head_follows(base):
    before = base.get_input_embeddings().weight.detach().clone()
    adapted = train(add_lora(base, r=2, trainable_token_indices=[7, 8]))
    assert "some tokens of model.embed_tokens" in describe_trained(adapted)
    trained = logits_of(adapted)
    merged = merge_adapter(adapted)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    torch.testing.assert_close(logits_of(merged), trained, atol=1e-5, rtol=1e-5)
    changed = (merged.get_input_embeddings().weight != before).any(dim=-1)
    assert changed.nonzero().flatten().tolist() == [7, 8]


@pytest.mark.filterwarnings("ignore:.*tie")
def test_a_merge_that_unties_the_head_saves_it(base, tmp_path):
    """Ours never trains the embedding as a whole; other people's adapters may."""
    config = LoraConfig(r=2, task_type="CAUSAL_LM", modules_to_save=["embed_tokens"])
    adapted = train(get_peft_model(base, config))
    trained = logits_of(adapted)
    merge_adapter(adapted).save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not reloaded.config.tie_word_embeddings
    torch.testing.assert_close(logits_of(reloaded), trained, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target_modules": ["embed_tokens"]}, "'model.embed_tokens' is the token embedding or the head"),
        ({"target_modules": ["lm_head"]}, "'lm_head' is the token embedding or the head"),
        ({"target_modules": ["c_attn"]}, r"no layer 'c_attn'. Those of its blocks are \['q_proj', 'k_proj'"),
        ({"r": 0}, "r=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_options_that_cannot_work_say_so(base, options, message):
    with pytest.raises(ValueError, match=message):
        lora_config(base, **options)


def test_gradient_checkpointing_gives_the_same_gradients_with_frozen_embeddings(folder):
    gradients = []
    for checkpointing in (False, True):
        model = AutoModelForCausalLM.from_pretrained(folder)
        adapted = add_lora(model, r=4, gradient_checkpointing=checkpointing).train()
        assert model.is_gradient_checkpointing == checkpointing
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.1)
            if "lora_A" in name:
                torch.nn.init.constant_(parameter, 0.2)
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in adapted.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient)


def test_qlora_without_bitsandbytes_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        quantization_for_qlora()
    with pytest.raises(ValueError, match="bits=3"):
        quantization_for_qlora(bits=3)


def test_a_folder_that_does_not_exist_is_refused_as_an_adapter(base, folder, tmp_path):
    for open_it in (lambda name: tokenizer_source(folder, name), lambda name: load_adapter(base, name)):
        with pytest.raises(ValueError, match="chat/adapter' is not an adapter"):
            open_it(str(tmp_path / "chat" / "adapter"))
