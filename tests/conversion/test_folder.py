import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Qwen3ForCausalLM

import hfllm
from hfllm.conversion import to_native
from hfllm.conversion.folder import save_model
from tests.conftest import make_tiny_config
from tests.conversion.test_native import LLAMA_3_SCALING, llama, qwen3


@pytest.fixture(scope="module")
def tokenizer():
    return hfllm.train_bpe(["the cat sees a dog. a dog hears the cat\n"] * 20, 300)


def test_a_saved_folder_opens_with_the_auto_classes_and_holds_no_code(tokenizer, tmp_path):
    model = to_native(hfllm.GPTForCausalLM(make_tiny_config("modern", vocab_size=300)))
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    save_model(model, tokenizer, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is Qwen3ForCausalLM
    assert loaded.generation_config.temperature == 0.5
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template
    assert not list(tmp_path.glob("*.py"))
    assert "auto_map" not in (tmp_path / "config.json").read_text()


def test_programs_on_transformers_4_find_the_names_they_know(tokenizer, tmp_path):
    """What 4.57 reads: it fails on the class `TokenizersBackend` and a list of `extra_special_tokens`, and takes a rope
    scaling only from `rope_scaling`, its base only from `rope_theta`."""
    model = LlamaForCausalLM(llama(rope_parameters=LLAMA_3_SCALING)).eval()
    loaded_once = tmp_path / "tokenizer"
    tokenizer.save_pretrained(loaded_once)
    save_model(model, AutoTokenizer.from_pretrained(loaded_once), tmp_path)
    tokenizer_config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert tokenizer_config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer_config["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]
    assert not {"extra_special_tokens", "is_local", "local_files_only"} & tokenizer_config.keys()

    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == 500000.0
    assert config["rope_scaling"] == {key: value for key, value in LLAMA_3_SCALING.items() if key != "rope_theta"}
    # ... and today's transformers reads the same model.
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.rope_parameters == LLAMA_3_SCALING
    ids = torch.arange(40)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_without_a_scaling_only_the_base_is_repeated(tokenizer, tmp_path):
    save_model(Qwen3ForCausalLM(qwen3()), tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == 10000.0 and "rope_scaling" not in config


def test_all_files_have_the_same_permissions(tokenizer, tmp_path):
    """safetensors keeps its files to their owner, but a server often runs as somebody else."""
    save_model(Qwen3ForCausalLM(qwen3()), tokenizer, tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
