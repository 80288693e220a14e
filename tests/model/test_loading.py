"""Checkpoints that `from_pretrained` refuses with an explanation, and those it must not refuse."""

import json
import logging
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import hfllm
from hfllm.model import configuration_gpt
from tests.conftest import make_tiny_config


@pytest.fixture
def folder(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(folder, *, weights=None, **config):
    """A copy of a checkpoint with other weights (a function from the old dict to the new) and config values."""
    copy = folder.with_name("changed")
    shutil.copytree(folder, copy)
    if weights is not None:
        save_file(weights(load_file(folder / "model.safetensors")), copy / "model.safetensors", {"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**values, **config}))
    return copy


# --- weights that do not fit


@pytest.mark.parametrize("auto_class", [hfllm.GPTForCausalLM, hfllm.GPTModel, AutoModelForCausalLM])
def test_a_checkpoint_that_lacks_a_layer_is_refused(folder, auto_class):
    broken = change(folder, weights=lambda saved: {key: saved[key] for key in saved if "layers.1." not in key})
    with pytest.raises(ValueError, match=r"does not fit: it lacks .*layers\.1\.input_layernorm.* more weights\. Were"):
        auto_class.from_pretrained(broken)


def test_the_travelling_code_refuses_it_too(folder):
    broken = change(folder, weights=lambda saved: {key: saved[key] for key in saved if "layers.1." not in key})
    travelled = get_class_from_dynamic_module("modeling_gpt.GPTForCausalLM", broken)
    assert travelled.from_pretrained(folder)
    with pytest.raises(ValueError, match="does not fit: it lacks"):
        travelled.from_pretrained(broken)


def test_a_checkpoint_with_more_layers_than_its_config_is_cut_as_transformers_does(folder, tiny_model):
    model = hfllm.GPTForCausalLM.from_pretrained(folder, num_hidden_layers=1)
    assert len(model.model.layers) == 1
    expected = tiny_model.model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight, expected)


def test_weights_for_which_the_config_has_no_place_are_refused(tmp_path):
    hfllm.GPTForCausalLM(make_tiny_config("book")).save_pretrained(tmp_path / "model")
    broken = change(tmp_path / "model", attention_bias=False)
    with pytest.raises(ValueError, match=r"the config has no place for .*k_proj\.bias"):
        hfllm.GPTForCausalLM.from_pretrained(broken)


def test_a_weight_of_another_shape_is_named_with_both_shapes(folder):
    def cut(saved):
        return {key: value[:, :16].contiguous() if "o_proj.weight" in key else value for key, value in saved.items()}

    broken = change(folder, weights=cut)
    with pytest.raises(RuntimeError, match=r"o_proj.weight is \(32, 16\) there, \(32, 32\) by the config \(2 such"):
        hfllm.GPTForCausalLM.from_pretrained(broken)
    assert hfllm.GPTForCausalLM.from_pretrained(broken, ignore_mismatched_sizes=True)


def test_asking_for_the_lists_returns_the_model(folder):
    broken = change(folder, weights=lambda saved: {key: saved[key] for key in saved if "layers.1." not in key})
    model, lists = hfllm.GPTForCausalLM.from_pretrained(broken, output_loading_info=True)
    assert isinstance(model, hfllm.GPTForCausalLM)
    assert {key.split(".")[2] for key in lists["missing_keys"]} == {"1"}


def test_an_unmerged_lora_is_recognised(folder, tiny_model):
    config = LoraConfig(r=2, target_modules=["q_proj"])
    peft_model = get_peft_model(tiny_model, config)
    weights = {key.removeprefix("base_model.model."): value.clone() for key, value in peft_model.state_dict().items()}
    del weights["lm_head.weight"]
    broken = change(folder, weights=lambda saved: weights)
    with pytest.raises(ValueError, match="That is LoRA: save the adapter with PEFT, or merge it"):
        hfllm.GPTForCausalLM.from_pretrained(broken)


def test_an_adapters_folder_opens_on_its_base_model(folder, tmp_path):
    base = hfllm.GPTForCausalLM.from_pretrained(folder)
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert any("lora_A" in name for name, _ in opened.named_parameters())


# --- heads


@pytest.mark.parametrize("tied", [True, False])
def test_every_class_takes_the_layers_of_every_other_and_draws_its_own_head(tmp_path, tied):
    classes = (hfllm.GPTModel, hfllm.GPTForCausalLM, hfllm.GPTForSequenceClassification)
    for saved_class in classes:
        saved = saved_class(make_tiny_config("modern", tie_word_embeddings=tied, num_labels=3))
        saved.save_pretrained(tmp_path / saved_class.__name__)
        for loaded_class in classes:
            loaded = loaded_class.from_pretrained(tmp_path / saved_class.__name__)
            torch.testing.assert_close(loaded.base_model.state_dict(), saved.base_model.state_dict())


def test_a_causal_checkpoint_becomes_a_classifier_of_any_number_of_labels(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=5)
    assert model.score.weight.shape == (5, 32)


def test_a_classifier_that_lost_its_head_is_refused(tmp_path):
    hfllm.GPTForSequenceClassification(make_tiny_config("modern")).save_pretrained(tmp_path / "model")
    broken = change(tmp_path / "model", weights=lambda saved: {key: saved[key] for key in saved if "score" not in key})
    with pytest.raises(ValueError, match=r"it lacks score\.weight"):
        hfllm.GPTForSequenceClassification.from_pretrained(broken)


def test_a_tied_checkpoint_is_not_untied_by_drawing_a_head(folder):
    with pytest.raises(ValueError, match=r"it lacks lm_head\.weight\. Saved with tied weights"):
        hfllm.GPTForCausalLM.from_pretrained(folder, tie_word_embeddings=False)

    # What the message says to do instead:
    model = hfllm.GPTForCausalLM.from_pretrained(folder)
    tokens = torch.tensor([[5, 6, 7]])
    expected = model(tokens).logits
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    model.config.tie_word_embeddings = False
    untied = folder.with_name("untied")
    model.save_pretrained(untied)
    again = hfllm.GPTForCausalLM.from_pretrained(untied)
    assert again.lm_head.weight.data_ptr() != again.model.embed_tokens.weight.data_ptr()
    torch.testing.assert_close(again(tokens).logits, expected)


def test_a_resized_model_is_saved_and_opened(folder):
    model = hfllm.GPTForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(70)
    model.save_pretrained(folder.with_name("resized"))
    assert hfllm.GPTForCausalLM.from_pretrained(folder.with_name("resized")).lm_head.weight.shape == (70, 32)
    model.resize_token_embeddings(2)  # less than the pad token's id: transformers warns
    model.save_pretrained(folder.with_name("small"))
    assert hfllm.GPTForCausalLM.from_pretrained(folder.with_name("small")).config.pad_token_id == 2


# --- other architectures


@pytest.mark.parametrize("model_class", [hfllm.GPTForCausalLM, hfllm.GPTModel, hfllm.GPTForSequenceClassification])
def test_a_native_checkpoint_names_the_function_that_opens_it(tmp_path, model_class):
    native = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1))
    native.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a 'gpt2' model, not a 'hfllm_gpt'\. hfllm\.from_native makes it one"):
        model_class.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="A GPT2Config is a 'gpt2' model"):
        model_class(native.config)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is GPT2LMHeadModel


def test_an_architecture_that_cannot_become_ours_says_so(tmp_path):
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a 'bert' model.*AutoModelForCausalLM opens it.*qwen3 checkpoints only"):
        hfllm.GPTForCausalLM.from_pretrained(tmp_path)


def test_a_config_inside_anothers_is_found(tmp_path):
    """transformers opens a part of a composite checkpoint by its model_type."""
    inner = make_tiny_config("modern").to_dict()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": inner}))
    assert hfllm.GPTConfig.from_pretrained(tmp_path).hidden_size == 32


# --- config.json


def test_keys_that_other_tools_wrote_are_kept_and_named(folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    configuration_gpt.logger.warning_once.cache_clear()
    changed = change(folder, some_tools_version="1.2", quantization_config=None, task_specific_params={"a": 1})
    config = AutoConfig.from_pretrained(changed)
    assert config.some_tools_version == "1.2"
    assert [record.getMessage() for record in caplog.records] == [
        "config.json: GPTConfig has no field 'some_tools_version'. It is kept, without effect."
    ]
    config.save_pretrained(changed)
    assert json.loads((changed / "config.json").read_text())["some_tools_version"] == "1.2"
    assert hfllm.GPTForCausalLM.from_pretrained(changed)


# --- dtypes and inputs


def test_float8_is_not_a_dtype_to_load_in(folder):
    with pytest.raises(ValueError, match=r"torch only stores numbers in it.*quantization_config"):
        hfllm.GPTForCausalLM.from_pretrained(folder, dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_other_floats_load_and_write_on_a_cpu(folder, dtype):
    model = hfllm.GPTForCausalLM.from_pretrained(folder, dtype=dtype)
    assert model.dtype == dtype
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, eos_token_id=None).shape == (1, 6)


@pytest.mark.parametrize("ids", [[5, 64, 70], [5, 6, -100]])
def test_a_token_id_beyond_the_vocabulary_is_an_error_in_words(tiny_model, ids):
    with pytest.raises(ValueError, match=r"input_ids \[(64, 70|-100)\] are not among the 64 of the vocabulary"):
        tiny_model(torch.tensor([ids]))


def test_a_negative_position_is_an_error_in_words():
    model = hfllm.GPTForCausalLM(make_tiny_config("book"))
    with pytest.raises(ValueError, match="Position -1 is beyond the 32 learned positions of this model, which count"):
        model(torch.tensor([[5, 6, 7]]), position_ids=torch.tensor([[-1, 0, 1]]))


def test_a_row_may_be_longer_than_the_table_if_its_positions_are_not():
    """Packed documents, and padding, take no positions of their own."""
    model = hfllm.GPTForCausalLM(make_tiny_config("book", max_position_embeddings=4)).eval()
    documents = torch.tensor([[5, 6, 7, 8, 9, 10]])
    packed = model(documents, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=False).logits
    torch.testing.assert_close(packed[:, 3:], model(documents[:, 3:]).logits)
    padded = model(documents, attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1]])).logits
    torch.testing.assert_close(padded[:, 2:], model(documents[:, 2:]).logits)
