"""Two processes classify as one does: the same steps, every text scored once, one process that writes."""

import json
import random
from pathlib import Path

import pytest
import torch

import hfllm
from tests.conftest import make_tiny_config
from tests.distributed.launching import columns, command, run
from tests.recipes.conftest import make_sentences


@pytest.fixture
def options(tmp_path: Path) -> dict[str, object]:
    sentences = make_sentences(140, seed=5)
    hfllm.train_bpe(sentences, 300).save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    config = make_tiny_config("modern", vocab_size=300, max_position_embeddings=48)
    hfllm.GPTForCausalLM(config).save_pretrained(tmp_path / "base")
    draw = random.Random(1)
    lines = [f"spam\t{s} one fish" if draw.random() < 0.4 else f"ham\t{s} a dog" for s in sentences]
    (tmp_path / "messages.tsv").write_text("\n".join(lines) + "\n")
    return {
        "model": tmp_path / "base",
        "dataset": tmp_path / "messages.tsv",
        "num_train_epochs": 2,
        "lora_r": 4,
        "block_size": 32,
        "logging_steps": 1,
    }


@pytest.mark.slow
def test_two_processes_have_the_steps_and_the_scores_of_one(options, tmp_path):
    logs, numbers = [], []
    for num_processes, config in ((1, "cpu.yaml"), (2, "multi_cpu.yaml")):
        out = tmp_path / f"out{num_processes}"
        options |= {"output_dir": out, "per_device_train_batch_size": 8 // num_processes}
        words = [*command(config, num_processes), "recipes/finetune_classification.py"]
        finished = run([*words, *(f"--{name}={value}" for name, value in options.items())])
        assert finished.returncode == 0, finished.stdout + finished.stderr
        assert finished.stdout.count("Texts: 98 to train on") == 1  # 98 are no multiple of 8, nor 14 and 28 of 2 x 32
        logs.append(columns(out))
        numbers.append(json.loads((out / "metrics.json").read_text()))
    one, two = logs
    for name in ("loss", "grad_norm", "eval_loss", "eval_accuracy"):
        assert two[name] == pytest.approx(one[name], rel=2e-3, abs=1e-4), name
    for name in ("test_loss", "test_accuracy", "eval_loss", "train_steps", "train_tokens"):
        assert numbers[1][name] == pytest.approx(numbers[0][name], rel=1e-3), name
    assert numbers[1]["best_checkpoint"] == numbers[0]["best_checkpoint"]
    assert sum(map(sum, numbers[1]["test_confusion"])) == numbers[1]["test_texts"] == 28


@pytest.mark.slow
def test_a_launch_that_cuts_the_model_is_refused(options, tmp_path):
    words = [*command("fsdp2.yaml", 1), "recipes/finetune_classification.py", f"--output_dir={tmp_path / 'out'}"]
    finished = run([*words, *(f"--{name}={value}" for name, value in options.items())])
    assert finished.returncode != 0 and "Use accelerate_configs/ddp.yaml or multi_cpu.yaml" in finished.stderr
    assert not (tmp_path / "out").exists()
