import json

import pytest
from transformers import AutoConfig

import hfllm
from hfllm.model.configuration_gpt import AUTO_MAP, OTHER_NAMES


def test_the_defaults_are_the_modern_preset():
    assert hfllm.GPTConfig().to_dict() == hfllm.GPTConfig.from_preset("modern").to_dict()


def test_a_gated_mlp_has_as_many_weights_as_a_plain_one():
    gated = hfllm.GPTConfig.from_preset("modern", hidden_size=384).intermediate_size
    plain = hfllm.GPTConfig.from_preset("book", hidden_size=384).intermediate_size
    assert (gated, plain) == (1024, 1536)
    assert 3 * gated == 2 * plain


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 100, "num_attention_heads": 3}, "hidden_size=100 is not a multiple of num_attention_heads=3"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "not a multiple of num_key_value_heads=4"),
        ({"hidden_size": 30, "num_attention_heads": 6}, "head_dim=5 is odd"),
        ({"head_dim": 0}, "head_dim=0: it must be at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads=0: it must be at least 1"),
        ({"num_key_value_heads": -1}, "num_key_value_heads=-1: it must be at least 1"),
        ({"attention_dropout": 1.5}, r"attention_dropout=1.5: a dropout is a probability in \[0, 1\)"),
        ({"residual_dropout": float("nan")}, "residual_dropout=nan"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"norm_eps": 0}, "norm_eps=0: it keeps a norm from dividing by 0"),
        ({"norm_eps": float("nan")}, "norm_eps=nan"),
        ({"initializer_range": -0.02}, "initializer_range=-0.02: a standard deviation is not negative"),
        ({"embedding_initializer_range": -1}, "embedding_initializer_range=-1"),
        ({"final_logit_softcapping": 0}, "final_logit_softcapping=0: the cap is above 0; None is no cap"),
        (
            {"hidden_act": "siluu"},
            "hidden_act='siluu' is not an activation of transformers; did you mean 'silu'.*gelu_new",
        ),
        ({"hidden_act": "swiglu"}, "SwiGLU is 'silu'"),
        ({"eos_token_id": 8192}, "eos_token_id=8192 is not among the 8192 ids of the vocabulary"),
        ({"eos_token_id": [1, -2]}, "eos_token_id=-2 is not among the 8192"),
        ({"pad_token_id": 9000}, "pad_token_id=9000 is not among"),
        ({"dtype": "bf16"}, "dtype='bf16' is not a dtype of weights; give 'float32', 'bfloat16'"),
        ({"torch_dtype": "int8"}, "dtype='int8' is not a dtype of weights"),
        ({"rope_parameters": {"rope_type": "ntk"}}, r"no rope_type 'ntk'; there are \['default', 'dynamic', 'linear'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "the rope_type 'linear' needs factor as well"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "needs factor and low_freq_factor and high_freq_factor"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta=0 must be above 0"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0 must be above 0"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "factor=-2 must be above 0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "would turn a part of each head; a GPT turns the whole"),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 32}},
            "short_factor has 1 numbers, but head_dim=64 has 32 pairs",
        ),
        (
            {"position_embedding_type": "learned", "rope_parameters": {"rope_theta": 1e4}},
            "is for rotary positions, but",
        ),
        ({"position_embedding_type": "learned", "rope_theta": 1e4}, "rope_theta=10000.0 is for rotary positions, but"),
        (
            {"sliding_window": 128},
            "sliding_window=128 is not supported: all layers of a GPT are alike and attend to the whole text",
        ),
        ({"layer_types": ["full_attention"] * 6}, "layer_types=.* is not supported: all layers of a GPT are alike"),
    ],
)
def test_values_that_cannot_work_are_named_with_the_reason(fields, message):
    with pytest.raises(ValueError, match=message):
        hfllm.GPTConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"position_embedding_type": "alibi"},
            "'position_embedding_type' expected one of .*'learned'.* got alibi",
        ),
        ({"norm_type": "batch_norm"}, "Field 'norm_type' expected one of"),
        ({"hidden_size": "384"}, "Field 'hidden_size' expected int, got str"),
        ({"hiden_size": 384}, "did you mean 'hidden_size'"),
    ],
)
def test_a_preset_refuses_what_its_overrides_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        hfllm.GPTConfig.from_preset("modern", **fields)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hiden_size", r"no field 'hiden_size'; did you mean 'hidden_size'\? help\(GPTConfig\) lists the fields"),
        ("max_positions_embeddings", "did you mean 'max_position_embeddings'"),
        ("num_layers", "here it is called num_hidden_layers"),
        ("num_label", "did you mean 'num_labels'"),
        ("emb_dim", "no field 'emb_dim'; here it is called hidden_size"),
        ("drop_rate", "here it is called embedding_dropout, attention_dropout and residual_dropout"),
        ("n_positions", "here it is called max_position_embeddings"),
        ("temperature", "an option of generation, and belongs in model.generation_config"),
        ("zzz", "no field 'zzz'. help"),
    ],
)
def test_an_unknown_field_names_the_nearest_one(name, message):
    with pytest.raises(ValueError, match=message):
        hfllm.GPTConfig(**{name: 1})


def test_every_word_of_the_books_dictionary_is_explained():
    """GPT_CONFIG_124M of chapter 4."""
    for name in ("context_length", "emb_dim", "n_heads", "n_layers", "drop_rate", "qkv_bias"):
        for field in OTHER_NAMES[name].replace(" and ", ", ").split(", "):
            assert hasattr(hfllm.GPTConfig(), field)


def test_transformers_own_keywords_are_not_unknown_fields(tmp_path):
    config = hfllm.GPTConfig(
        num_labels=3,
        dtype="bfloat16",
        attn_implementation="eager",
        output_attentions=True,
        output_hidden_states=True,
        problem_type="regression",
        name_or_path="somewhere",
        architectures=["GPTForCausalLM"],
        quantization_config={"quant_method": "torchao"},
        rope_theta=500_000.0,
        rope_scaling={"rope_type": "linear", "factor": 2.0},
        chunk_size_feed_forward=5,
        pad_token_id=-1,  # "none" in older configs
    )
    assert config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 500_000.0}
    again = hfllm.GPTConfig(**config.to_dict())
    assert again.to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()


def test_the_callers_rope_parameters_stay_as_they_are():
    given = {"rope_theta": 5e5}
    hfllm.GPTConfig(rope_parameters=given)
    assert given == {"rope_theta": 5e5}


def test_a_value_changed_later_is_checked_when_the_config_is_saved(tmp_path):
    config = hfllm.GPTConfig()
    config.norm_eps = -1.0
    with pytest.raises(Exception, match=r"norm_eps=-1\.0: it keeps"):
        config.save_pretrained(tmp_path)


def test_an_odd_head_is_fine_with_learned_positions():
    assert hfllm.GPTConfig.from_preset("book", hidden_size=30, num_attention_heads=6).head_dim == 5


def test_an_int_will_do_where_a_float_is_meant():
    assert hfllm.GPTConfig(attention_dropout=0, norm_eps=1).attention_dropout == 0


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'modrn'; there are \['book', 'modern'\]"):
        hfllm.GPTConfig.from_preset("modrn")


def test_a_saved_config_names_every_auto_class(tmp_path):
    hfllm.GPTConfig().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_a_config_survives_saving_and_loading(tmp_path, tiny_config):
    tiny_config.save_pretrained(tmp_path)
    loaded = hfllm.GPTConfig.from_pretrained(tmp_path)
    assert loaded.to_diff_dict() == tiny_config.to_diff_dict()
