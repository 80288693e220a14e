import json

import pytest

import hfllm
from hfllm.model.configuration_gpt import AUTO_MAP


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
        ({"attention_dropout": 1.5}, "attention_dropout=1.5"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type"),
        ({"norm_type": "batch_norm"}, "norm_type"),
    ],
)
def test_sizes_that_cannot_work_are_named(fields, message):
    with pytest.raises(Exception, match=message):
        hfllm.GPTConfig(**fields)


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
