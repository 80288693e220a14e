import json

from hfllm.arguments import parse_arguments
from tests.recipes.conftest import load_recipe


def test_it_measures_every_model_and_the_data_path(text_file, tokenizer_folder, tmp_path, capsys):
    recipe = load_recipe("benchmark")
    options = {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "block_size": 16,
        "num_steps": 2,
        "num_key_value_heads": 1,
        "num_prompt_tokens": 4,
        "num_new_tokens": 8,
        "dataset": text_file,
        "tokenizer": tokenizer_folder,
        "output_file": tmp_path / "benchmark.json",
    }
    argv = [f"--{name}={value}" for name, value in options.items()]
    recipe.main(parse_arguments(recipe.BenchmarkArguments, argv))
    results = json.loads((tmp_path / "benchmark.json").read_text())
    printed = capsys.readouterr().out
    assert len(results["training"]) == 5
    for name, numbers in results["training"].items():
        assert name in printed
        assert numbers["tokens_per_second"] > 0 and 0 < numbers["mfu"] < 2
    assert results["training"]["transformers GPT-2"]["speed_against_transformers GPT-2"] == 1
    # 11 tokens (the last of 12 is never read) of 2 heads of 16 channels, keys and values, float32
    assert results["decoding"]["hfllm, modern"]["cache_bytes"] == 11 * 2 * 16 * 2 * 4
    assert results["decoding"]["hfllm, modern, 1 key/value heads"]["cache_bytes"] == 11 * 1 * 16 * 2 * 4
    assert len(results["decoding"]) == 5
    assert results["decoding"]["transformers Llama"]["speed_against_transformers Llama"] == 1
    assert results["data"]["encode_megabytes_per_second_per_core"] > 0
