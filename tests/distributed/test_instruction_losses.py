"""Two processes fine-tune as one does: the loss is divided by the learned tokens of both."""

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

import hfllm
from tests.conftest import make_tiny_config
from tests.distributed.launching import columns, command, run


@pytest.mark.slow
def test_two_processes_have_the_loss_of_one(tmp_path: Path):
    tokenizer = hfllm.train_bpe(topics.values(), 400)
    torch.manual_seed(0)
    hfllm.GPTForCausalLM(make_tiny_config("modern", vocab_size=400, max_position_embeddings=64)).save_pretrained(
        tmp_path / "base"
    )
    tokenizer.save_pretrained(tmp_path / "base")
    words = " ".join(topics.values()).split()
    rows = [
        {"prompt": f"Say {number}", "response": " ".join(words[number : number + 1 + number % 12])}
        for number in range(60)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    logs = []
    for num_processes, config in ((1, "cpu.yaml"), (2, "ddp.yaml")):
        options = {
            "model": tmp_path / "base",
            "dataset": tmp_path / "rows.json",
            "output_dir": tmp_path / f"out{num_processes}",
            "per_device_train_batch_size": 4 // num_processes,
            "max_steps": 3,
            "logging_steps": 1,
            "num_samples": 1,
            "max_new_tokens": 4,
        }
        arguments = [f"--{name}={value}" for name, value in options.items()]
        finished = run([*command(config, num_processes), "recipes/finetune_instruction.py", *arguments])
        assert finished.returncode == 0, finished.stdout + finished.stderr
        logs.append(columns(options["output_dir"]))
    assert logs[1]["loss"] == pytest.approx(logs[0]["loss"], abs=1e-4)
    assert logs[1]["grad_norm"] == pytest.approx(logs[0]["grad_norm"], rel=1e-3)
    numbers = [json.loads((tmp_path / f"out{n}" / "metrics.json").read_text())["test_loss"] for n in (1, 2)]
    assert numbers[1] == pytest.approx(numbers[0], abs=1e-4)
