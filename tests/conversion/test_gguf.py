"""A GGUF file's keys, tensors and tokenizer, judged by transformers' own reader. llama.cpp: test_llama_cpp.py."""

import json
import math
import resource
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import hfllm
from hfllm.conversion.gguf import export_gguf, gguf_obstacles
from hfllm.conversion.gguf_tokenizer import CONTROL, NORMAL, UNUSED, USER_DEFINED, without_generation_tags
from hfllm.conversion.gguf_verification import verify_gguf
from hfllm.tokenization import CHAT_TEMPLATE


gguf = pytest.importorskip("gguf")

SIZES = {
    "vocab_size": 448,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # not hidden_size / num_attention_heads
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # attention patterns that matter
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def qwen3(**overrides) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**{**SIZES, **overrides})).eval()


def llama(**overrides) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **overrides})).eval()
    return with_random_vectors(model)


def gpt2(**overrides) -> GPT2LMHeadModel:
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 96}
    names = ("vocab_size", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")
    config = GPT2Config(**{**sizes, **{name: SIZES[name] for name in names}, **overrides})
    return with_random_vectors(GPT2LMHeadModel(config).eval())


def with_random_vectors(model):
    """Biases that are zero and norms that are one would hide that they were mixed up."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if "norm" in name or "ln_" in name else 0.0, 0.2)
    return model


MODELS = {
    "qwen3, tied": lambda: with_random_vectors(qwen3(tie_word_embeddings=True)),
    "qwen3, a head of its own": lambda: qwen3(tie_word_embeddings=False),
    "llama, grouped heads": llama,
    "llama, tied, no groups": lambda: llama(tie_word_embeddings=True, num_key_value_heads=4, head_dim=16),
    "llama, biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "gpt2": gpt2,
    "gpt2, a head of its own": lambda: gpt2(tie_word_embeddings=False),
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return hfllm.train_bpe([Path(textwrap.__file__).read_text()], 400)


@pytest.fixture(autouse=True)
def no_llama_cpp(monkeypatch):
    monkeypatch.setattr("hfllm.conversion.gguf_verification.find_llama_cpp", lambda node_modules: None)


def read_back(path: Path, model):
    """transformers' reader finds everything but head_dim (qwen3), n_positions (gpt2) and rope scaling in the file."""
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=model.config, dtype=torch.float32
    ).eval()


def keys(path: Path) -> dict:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items() if key[0] != "G"}


def tensors(path: Path) -> dict:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_the_same_model_back(name, tokenizer, tmp_path):
    model = MODELS[name]()
    path = export_gguf(model, tokenizer, tmp_path / "model.gguf")
    found = read_back(path, model)
    input_ids = torch.randint(SIZES["vocab_size"], (2, 40))
    torch.testing.assert_close(found(input_ids).logits, model(input_ids).logits, rtol=1e-5, atol=1e-5)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(found.state_dict()[key], value, rtol=0, atol=0)
    assert ("output.weight" in tensors(path)) != model.config.tie_word_embeddings
    verify_gguf(path, model, tokenizer)


def test_a_llama_needs_nothing_but_the_file(tokenizer, tmp_path):
    model = llama(rope_parameters={"rope_type": "default", "rope_theta": 50_000.0}, rms_norm_eps=3e-5)
    export_gguf(model, tokenizer, tmp_path / "model.gguf")
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    input_ids = torch.randint(SIZES["vocab_size"], (2, 40))
    torch.testing.assert_close(found(input_ids).logits, model(input_ids).logits, rtol=1e-5, atol=1e-5)


def test_the_keys_of_a_qwen3(tokenizer, tmp_path):
    model = qwen3(rms_norm_eps=3e-5, rope_parameters={"rope_type": "default", "rope_theta": 50_000.0})
    found = keys(export_gguf(model, tokenizer, tmp_path / "model.gguf"))
    expected = {
        "general.architecture": "qwen3",
        "general.file_type": 0,
        "qwen3.vocab_size": 448,
        "qwen3.context_length": 64,
        "qwen3.embedding_length": 64,
        "qwen3.feed_forward_length": 96,
        "qwen3.block_count": 2,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 32,
        "qwen3.attention.value_length": 32,
        "qwen3.rope.dimension_count": 32,
        "qwen3.rope.freq_base": 50_000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.eot_token_id": 4,  # <|im_end|>
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }
    assert {key: found[key] for key in expected} == expected
    assert found["qwen3.attention.layer_norm_rms_epsilon"] == pytest.approx(3e-5)
    assert not [key for key in found if "rope.scaling" in key]


def test_the_keys_of_a_gpt2(tokenizer, tmp_path):
    found = keys(export_gguf(gpt2(n_inner=None, layer_norm_epsilon=3e-5), tokenizer, tmp_path / "model.gguf"))
    expected = {
        "general.architecture": "gpt2",
        "gpt2.context_length": 64,
        "gpt2.embedding_length": 64,
        "gpt2.feed_forward_length": 256,  # 4 * n_embd where n_inner is not given
        "gpt2.block_count": 2,
        "gpt2.attention.head_count": 4,
    }
    assert {key: found[key] for key in expected} == expected
    assert found["gpt2.attention.layer_norm_epsilon"] == pytest.approx(3e-5)
    found = keys(export_gguf(gpt2(n_inner=96), tokenizer, tmp_path / "narrow.gguf"))
    assert found["gpt2.feed_forward_length"] == 96


def test_llama_3_scaling_is_a_tensor_of_divisors(tokenizer, tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    model = llama(rope_parameters=rope)
    path = export_gguf(model, tokenizer, tmp_path / "model.gguf")
    divisors = torch.tensor(tensors(path)["rope_freqs.weight"].data)
    # Llama 3.1's rule: short waves stay, long ones are stretched by the factor, those between are interpolated.
    expected = []
    for pair in range(16):
        frequency = 10_000.0 ** (-2 * pair / 32)
        wavelength = 2 * math.pi / frequency
        smooth = (32 / wavelength - 1) / (4 - 1)
        expected.append(1 / (min(max(smooth, 0), 1) * (1 - 1 / 8) + 1 / 8))
    torch.testing.assert_close(divisors, torch.tensor(expected), rtol=1e-5, atol=0)
    assert divisors[0] == 1 and divisors[-1] == 8 and len(divisors.unique()) > 2
    assert "llama.rope.scaling.type" not in keys(path)
    verify_gguf(path, model, tokenizer)


@pytest.mark.parametrize("make", [qwen3, llama])
def test_linear_and_yarn_scaling_are_keys(make, tokenizer, tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
    found = keys(export_gguf(make(rope_parameters=rope), tokenizer, tmp_path / "linear.gguf"))
    name = found["general.architecture"]
    assert (found[f"{name}.rope.scaling.type"], found[f"{name}.rope.scaling.factor"]) == ("linear", 4.0)

    rope = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    found = keys(export_gguf(make(rope_parameters=rope), tokenizer, tmp_path / "yarn.gguf"))
    assert (found[f"{name}.rope.scaling.type"], found[f"{name}.rope.scaling.factor"]) == ("yarn", 4.0)
    assert found[f"{name}.rope.scaling.original_context_length"] == 16
    assert found[f"{name}.rope.scaling.attn_factor"] == 1.0
    # The paper's factor of 4 is 0.1 * ln 4 + 1 = 1.1386; llama.cpp multiplies that.
    rope["attention_factor"] = 2.0
    found = keys(export_gguf(make(rope_parameters=rope), tokenizer, tmp_path / "factor.gguf"))
    assert found[f"{name}.rope.scaling.attn_factor"] == pytest.approx(2.0 / 1.13863, rel=1e-5)


@pytest.mark.parametrize("name", ["qwen3, tied", "llama, biases", "gpt2"])
@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_only_matrices_are_rounded(name, dtype, tokenizer, tmp_path):
    model = MODELS[name]()
    path = export_gguf(model, tokenizer, tmp_path / "model.gguf", dtype=dtype)
    for tensor in tensors(path).values():
        is_vector = len(tensor.shape) == 1 or tensor.name == "position_embd.weight"
        assert tensor.tensor_type.name == ("F32" if is_vector else dtype.upper()), tensor.name
    found = read_back(path, model)
    for key, value in model.state_dict().items():
        difference = (found.state_dict()[key] - value).abs().max() / value.abs().max()
        # Half a unit in the last place of 11, 8 and (127 steps) nearly 8 bits.
        assert difference <= {"f16": 2**-11, "bf16": 2**-8, "q8_0": 0.51 / 127}[dtype] * 1.001, key
    report = verify_gguf(path, model, tokenizer)
    assert report.dtype == dtype and 0 < report.logits.largest_difference < 1
    assert report.llama_cpp is None and "npm install" in str(report)


def test_q8_0_falls_back_to_f16_aloud_where_rows_do_not_fit(tokenizer, tmp_path, caplog):
    model = llama(intermediate_size=80)
    path = export_gguf(model, tokenizer, tmp_path / "model.gguf", dtype="q8_0")
    types = {name: tensor.tensor_type.name for name, tensor in tensors(path).items()}
    assert types["blk.0.ffn_down.weight"] == "F16" and types["blk.0.ffn_up.weight"] == "Q8_0"
    assert "2 matrices have rows whose length is not a multiple of 32" in caplog.text
    verify_gguf(path, model, tokenizer)


def test_a_bfloat16_model_is_compared_in_float32(tokenizer, tmp_path):
    """`.to(torch.bfloat16)` also rounds the rotary frequencies, which are in no file."""
    model = qwen3().to(torch.bfloat16)
    path = export_gguf(model, tokenizer, tmp_path / "model.gguf", dtype="bf16")
    assert verify_gguf(path, model, tokenizer).logits.largest_difference < 1e-4  # nothing was rounded
    assert model.dtype == torch.bfloat16


# The tokenizer


def test_tokens_have_their_texts_and_types(tokenizer, tmp_path):
    found = keys(export_gguf(qwen3(), tokenizer, tmp_path / "model.gguf"))
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(set(tokens)) == len(types) == 448  # one for each row
    assert tokens[:5] == ["<|startoftext|>", "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    assert tokens[:400] == tokenizer.convert_ids_to_tokens(range(400))
    assert types == [CONTROL] * 5 + [NORMAL] * 395 + [UNUSED] * 48
    left, right = found["tokenizer.ggml.merges"][0].split(" ")
    assert tokens[5 + 256] == left + right and len(found["tokenizer.ggml.merges"]) == 400 - 5 - 256


def test_added_tokens_that_are_not_special_are_user_defined(tmp_path):
    tokenizer = hfllm.train_bpe(["some text, some text"], 264)
    tokenizer.add_tokens(["<tool call>"])
    found = keys(export_gguf(qwen3(), tokenizer, tmp_path / "model.gguf"))
    index = tokenizer.convert_tokens_to_ids("<tool call>")
    assert found["tokenizer.ggml.tokens"][index] == "<tool call>"
    assert found["tokenizer.ggml.token_type"][index] == USER_DEFINED


HARD_TEXTS = [
    "Hello,  world!\r\n\r\n\tIt's 1234.50",
    "cafe\u0301 na\u00efve \u4e2d\u6587 \U0001f469\u200d\U0001f467 \u00a0\u2003x",
    "<|im_start|>user\nhi<|im_end|> <|endoftext|>",
]


def test_transformers_reads_the_same_tokenizer_back(tokenizer, tmp_path):
    export_gguf(qwen3(), tokenizer, tmp_path / "model.gguf")
    found = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in HARD_TEXTS:
        assert found(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (found.bos_token, found.eos_token, found.pad_token) == ("<|startoftext|>", "<|endoftext|>", "<|pad|>")


def changed(tokenizer, **changes) -> PreTrainedTokenizerFast:
    """The tokenizer with parts of its tokenizer.json replaced."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"].update(changes.pop("model", {}))
    state.update(changes)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<|startoftext|>", eos_token="<|endoftext|>"
    )


def split_by(pattern: str) -> dict:
    steps = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    backend = Tokenizer.from_str('{"model": {"type": "BPE", "vocab": {}, "merges": []}}')
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return json.loads(backend.to_str())["pre_tokenizer"]


LLAMA3_SPLIT = (  # as in Llama 3's tokenizer.json
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def test_the_way_text_is_split_is_recognized(tokenizer, tmp_path):
    def name_of(tokenizer) -> str:
        return keys(export_gguf(qwen3(), tokenizer, tmp_path / "model.gguf"))["tokenizer.ggml.pre"]

    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    assert name_of(tokenizer) == "qwen2"
    assert name_of(changed(tokenizer, pre_tokenizer=byte_level)) == "gpt-2"
    llama3 = changed(tokenizer, pre_tokenizer=split_by(LLAMA3_SPLIT), model={"ignore_merges": True})
    assert name_of(llama3) == "llama-bpe"
    assert name_of(changed(tokenizer, pre_tokenizer=split_by(LLAMA3_SPLIT))) == "smaug-bpe"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"pre_tokenizer": split_by(r"\w+|\W+")}, [r"\\w+|\\W+", "GPT-2's, Qwen2's", "train_bpe"]),
        ({"model": {"ignore_merges": True}}, ["ignore_merges=True"]),
        ({"pre_tokenizer": {"type": "Whitespace"}}, ["Whitespace", "Known are"]),
        ({"pre_tokenizer": None}, ["nothing"]),
        ({"normalizer": {"type": "Lowercase"}}, ["Lowercase", "no normalizer"]),
        ({"model": {"byte_fallback": True}}, ["SentencePiece-like", "convert_hf_to_gguf.py"]),
        ({"model": {"dropout": 0.1}}, ["dropout=0.1"]),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused_in_words(changes, words, tokenizer, tmp_path):
    with pytest.raises(ValueError) as error:
        export_gguf(qwen3(), changed(tokenizer, **changes), tmp_path / "model.gguf")
    assert all(word in str(error.value) for word in words), error.value
    assert list(tmp_path.iterdir()) == []


def test_a_normalizer_to_nfc_is_let_through_aloud(tokenizer, tmp_path, caplog):
    model, with_nfc = qwen3(), changed(tokenizer, normalizer={"type": "NFC"})
    path = export_gguf(model, with_nfc, tmp_path / "model.gguf")
    assert "decomposed accents" in caplog.text
    verify_gguf(path, model, with_nfc)


def test_tokens_that_swallow_spaces_and_ids_without_rows_are_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"ids up to 399.* only 300 rows"):
        export_gguf(qwen3(vocab_size=300), tokenizer, tmp_path / "model.gguf")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"][3]["rstrip"] = True
    with pytest.raises(ValueError, match=r"'<\|im_start\|>' includes whitespace"):
        export_gguf(qwen3(), changed(tokenizer, added_tokens=state["added_tokens"]), tmp_path / "model.gguf")


def test_a_post_processor_that_adds_something_else_is_refused(tokenizer, tmp_path):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="$A <|pad|>", special_tokens=[("<|pad|>", 2)])
    odd = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|startoftext|>", eos_token="<|endoftext|>")
    with pytest.raises(ValueError, match=r"'<\|pad\|>'.*nothing else"):
        export_gguf(qwen3(), odd, tmp_path / "model.gguf")
    backend.post_processor = TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", 0), ("<|endoftext|>", 1)]
    )
    both = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|startoftext|>", eos_token="<|endoftext|>")
    model = qwen3()
    path = export_gguf(model, both, tmp_path / "model.gguf")
    assert keys(path)["tokenizer.ggml.add_eos_token"] is True


def test_the_turns_end_is_the_one_that_generation_stops_at(tokenizer, tmp_path, caplog):
    model = qwen3()
    model.generation_config.eos_token_id = [1, 3]
    found = keys(export_gguf(model, tokenizer, tmp_path / "model.gguf"))
    assert (found["tokenizer.ggml.eos_token_id"], found["tokenizer.ggml.eot_token_id"]) == (1, 3)
    assert caplog.text == ""
    model.generation_config.eos_token_id = [1, 3, 4]
    export_gguf(model, tokenizer, tmp_path / "model.gguf")
    assert "<|im_end|>" in caplog.text


def test_no_eos_anywhere_is_refused(tokenizer, tmp_path):
    model = qwen3(eos_token_id=None)
    model.generation_config.eos_token_id = None
    without = PreTrainedTokenizerFast(tokenizer_object=changed(tokenizer, post_processor=None).backend_tokenizer)
    with pytest.raises(ValueError, match="names an eos token"):
        export_gguf(model, without, tmp_path / "model.gguf")


def test_the_chat_template_renders_the_same_without_generation_tags(tokenizer, tmp_path):
    path = export_gguf(qwen3(), tokenizer, tmp_path / "model.gguf")
    template = keys(path)["tokenizer.chat_template"]
    assert "generation" in CHAT_TEMPLATE and "endgeneration" not in template
    messages = [{"role": role, "content": f" {role} says\n"} for role in ("system", "user", "assistant", "user")]
    for add_generation_prompt in (False, True):
        ours, theirs = (
            tokenizer.apply_chat_template(
                messages, chat_template=text, add_generation_prompt=add_generation_prompt, tokenize=False
            )
            for text in (CHAT_TEMPLATE, template)
        )
        assert ours == theirs and "<|im_start|>assistant\nassistant says<|im_end|>" in ours


@pytest.mark.parametrize("left, right", [("{%", "%}"), ("{%-", "-%}"), ("{% ", " -%}"), ("{%+", "%}")])
def test_whitespace_control_of_generation_tags_is_kept(left, right, tokenizer):
    template = f"a \n {left} generation {right} \n b \n {left} endgeneration {right} \n c"
    changed_template = without_generation_tags(template)
    assert "generation" not in changed_template
    ours, theirs = (
        tokenizer.apply_chat_template([{"role": "user", "content": ""}], chat_template=text, tokenize=False)
        for text in (template, changed_template)
    )
    assert ours == theirs


# What cannot be exported


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: LlamaForSequenceClassification(LlamaConfig(**SIZES)), "LlamaForSequenceClassification"),
        (lambda: hfllm.GPTForCausalLM(hfllm.GPTConfig(vocab_size=448)), r"hfllm\.to_native\(model\)"),
        (lambda: gpt2(activation_function="gelu"), "activation_function='gelu'.*gelu_new"),
        (lambda: gpt2(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
        (lambda: gpt2(scale_attn_weights=False), "scale_attn_weights"),
        (lambda: llama(hidden_act="gelu"), "hidden_act='gelu'.*silu"),
        (lambda: qwen3(attention_bias=True), "attention_bias=True"),
        (lambda: qwen3(use_sliding_window=True, sliding_window=8, max_window_layers=1), "use_sliding_window"),
        (lambda: llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "dynamic"),
        (lambda: llama(rope_parameters=YARN | {"beta_fast": 16}), "YaRN with {'beta_fast': 16}"),
        (lambda: qwen3(rope_parameters=LLAMA3), "rope_type='llama3'.*default, linear, yarn"),
    ],
)
def test_a_model_that_llama_cpp_does_not_know_is_refused_by_the_field(make, words, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=words):
        export_gguf(make(), tokenizer, tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def test_all_obstacles_are_named_at_once():
    assert len(gguf_obstacles(llama(hidden_act="gelu", rope_parameters=YARN | {"beta_fast": 16}))) == 2


def test_values_that_a_type_cannot_hold_are_refused(tokenizer, tmp_path):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = 1e6
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_up\.weight has the weight 1e\+06.*Use dtype='bf16'"):
        export_gguf(model, tokenizer, tmp_path / "model.gguf", dtype="f16")
    for dtype in ("bf16", "q8_0"):
        verify_gguf(export_gguf(model, tokenizer, tmp_path / f"{dtype}.gguf", dtype=dtype), model, tokenizer)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = math.nan
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_up\.weight holds a NaN"):
        export_gguf(model, tokenizer, tmp_path / "nan.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bf16.gguf", "q8_0.gguf"]


def test_wrong_arguments_are_named(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="dtype='q4_0' is not one of f32, f16, bf16, q8_0"):
        export_gguf(qwen3(), tokenizer, tmp_path / "model.gguf", dtype="q4_0")
    with pytest.raises(ValueError, match=r"does not end in \.gguf"):
        export_gguf(qwen3(), tokenizer, tmp_path)


def test_a_full_disk_leaves_nothing_and_an_older_file_as_it_was(tokenizer, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"older")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"nothing is left of it. It needs 0\.\d MiB"):
            export_gguf(qwen3(), tokenizer, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"] and path.read_bytes() == b"older"
    export_gguf(qwen3(), tokenizer, path)
    assert keys(path)["general.name"] == "model"


# Verification says no


def test_verification_notices_other_weights(tokenizer, tmp_path):
    model = llama()
    path = export_gguf(model, tokenizer, tmp_path / "model.gguf")
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[0, 0] += 1e-3
    with pytest.raises(RuntimeError, match=r"blk\.0\.attn_k\.weight read back .* differs"):
        verify_gguf(path, model, tokenizer)


def test_verification_notices_rows_in_transformers_order(tokenizer, tmp_path, monkeypatch):
    """The mistake that only the rotary positions show: a llama's q and k left as they are."""
    model = llama()
    monkeypatch.setattr("hfllm.conversion.gguf._interleave_halves", lambda weight, num_heads: weight)
    path = export_gguf(model, tokenizer, tmp_path / "model.gguf")
    with pytest.raises(RuntimeError, match=r"blk\.0\.attn_q\.weight"):
        verify_gguf(path, model, tokenizer)


def test_verification_notices_another_shape_tokenizer_or_template(tokenizer, tmp_path):
    model = llama()
    path = export_gguf(model, tokenizer, tmp_path / "model.gguf")
    model.config.rms_norm_eps = 1e-3
    with pytest.raises(RuntimeError, match="rms_norm_eps"):
        verify_gguf(path, model, tokenizer)
    model.config.rms_norm_eps = 1e-6
    other = hfllm.train_bpe(["another text, another tokenizer"], 270)
    with pytest.raises(RuntimeError, match=r"encodes .Hello"):
        verify_gguf(path, model, other)
    tokenizer = changed(tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(RuntimeError, match="chat template"):
        verify_gguf(path, model, tokenizer)


def test_verification_notices_a_wrong_scaling_tensor(tokenizer, tmp_path, monkeypatch):
    model = llama(rope_parameters=LLAMA3)
    with monkeypatch.context() as patch:
        patch.setattr("hfllm.conversion.gguf._llama3_frequency_divisors", lambda config: torch.ones(16))
        path = export_gguf(model, tokenizer, tmp_path / "model.gguf")
    assert np.all(tensors(path)["rope_freqs.weight"].data == 1)
    with pytest.raises(RuntimeError, match=r"rope_freqs\.weight"):
        verify_gguf(path, model, tokenizer)
