import json
import sys

import pytest

from hfllm.cli.arguments import parse_arguments
from tests.recipes.conftest import load_recipe


@pytest.fixture
def run_benchmark(tmp_path):
    """Run the recipe on models of seconds; returns what it wrote into benchmark.json."""
    recipe = load_recipe("benchmark")

    def run(**options) -> dict:
        sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        steps = {"block_size": 16, "num_steps": 2, "num_key_value_heads": 1, "num_prompt_tokens": 4}
        options = {**sizes, **steps, "num_new_tokens": 8, "output_dir": tmp_path / "out", **options}
        argv = []
        for name, value in options.items():
            argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        recipe.main(parse_arguments(recipe.BenchmarkArguments, argv))
        return json.loads((tmp_path / "out" / "benchmark.json").read_text())

    run.recipe = recipe
    return run


def test_it_measures_every_model_and_the_data_path(
    run_benchmark, text_file, tokenizer_folder, tmp_path, capsys, monkeypatch
):
    measured = []

    def training_memory(config, **options) -> int:  # tests/training/test_footprint.py tries the real one
        measured.append((config.model_type, options))
        return 3 * 2**20

    monkeypatch.setattr(run_benchmark.recipe, "training_memory", training_memory)
    results = run_benchmark(dataset=text_file, tokenizer=tokenizer_folder)
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

    assert [kind for kind, _ in measured] == ["gpt2", "gpt2", "llama", "hfllm_gpt", "hfllm_gpt"]
    assert [options["keeps_freed_memory"] for _, options in measured] == [False] * 3 + [True] * 2
    assert results["memory"]["transformers Llama"]["bytes"] == 3 * 2**20
    table = (tmp_path / "out" / "benchmark.md").read_text().splitlines()
    assert table[2].startswith("| model | training, tokens/s | ") and len(table) == 4 + 6
    assert [line.split(" | ")[3] for line in table if "Llama" in line] == ["3"]
    assert (tmp_path / "out" / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_it_measures_how_the_cost_grows_with_the_model_and_the_context(run_benchmark, tmp_path):
    points = run_benchmark(measure="scaling", scaling_depths=[1, 2], scaling_contexts=[8, 32], num_steps=1)["scaling"]
    ours = [point for point in points if point["model"] == "hfllm, modern"]
    assert [(point["axis"], point["context"]) for point in ours] == [
        *[("num_parameters", 16)] * 2,
        *[("context", 8), ("context", 32)],
    ]
    # A block of 64 and one of 32: attention, an MLP of about 8/3 of the width, norms; the tied embedding.
    assert ours[0]["num_parameters"] == 300 * 64 + 4 * 64 * 64 + 3 * 64 * 192 + 3 * 64 + 2 * 64
    assert len({point["num_parameters"] for point in ours}) == 3
    for point in points:
        assert point["training_seconds_per_token"] > 0 and point["decoding_seconds_per_token"] > 0
    assert {point["model"] for point in points} == {
        *("hfllm, modern", "transformers Llama", "transformers GPT-2, no dropout")
    }
    assert (tmp_path / "out" / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_time_to_quality_runs_the_commands_that_a_user_would(run_benchmark, tmp_path, monkeypatch, capsys):
    commands = []

    def run_timed(command: list[str]) -> float:
        commands.append(command)
        folder = command[command.index("--output_dir") + 1]
        bits = 3.5 if "baseline" in folder else 2.5
        run_benchmark.recipe.Path(folder).mkdir()
        (run_benchmark.recipe.Path(folder) / "metrics.json").write_text(json.dumps({"eval_bits_per_byte": bits}))
        return 30.0 if "baseline" in folder else 5.0

    monkeypatch.setattr(run_benchmark.recipe, "run_timed", run_timed)
    argv = ["--measure", "time_to_quality", "--dataset", "text.txt", "--output_dir", str(tmp_path / "out")]
    run_benchmark.recipe.main(parse_arguments(run_benchmark.recipe.BenchmarkArguments, argv))
    results = json.loads((tmp_path / "out" / "benchmark.json").read_text())["time_to_quality"]
    assert results["eval_bits_per_byte"] == {"ours": 2.5, "baseline": 3.5}
    assert "hfllm: 10.0 s" in (told := capsys.readouterr().out) and "3.0 times as long" in told
    scripts = [next(word for word in command if word.endswith(".py")).split("/")[-1] for command in commands]
    assert scripts == ["train_tokenizer.py", "pretrain.py", "baseline.py"]
    assert all(command[command.index("--dataset") + 1] == "text.txt" for command in commands)


def test_a_command_that_fails_stops_the_benchmark_with_its_last_words(run_benchmark):
    run_timed = run_benchmark.recipe.run_timed
    assert run_timed([sys.executable, "-c", "pass"]) > 0
    with pytest.raises(RuntimeError, match="ended with 3:\nno such thing"):
        run_timed([sys.executable, "-c", "import sys; print('no such thing', file=sys.stderr); sys.exit(3)"])


def test_the_baseline_learns_characters_and_scores_what_is_held_back(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (tmp_path / "text.txt").write_text("abcdefgh" * 500)
    recipe = load_recipe("baseline")
    argv = ["--dataset", str(tmp_path / "text.txt"), "--max_steps", "30", "--output_dir", str(tmp_path / "out")]
    recipe.main(parse_arguments(recipe.BaselineArguments, argv))
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["eval_bits_per_byte"] < 2.5  # of the three bits that eight equally likely letters have
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_bits_per_byte"] * 0.6931472, rel=1e-6)
