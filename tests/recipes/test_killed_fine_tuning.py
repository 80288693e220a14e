"""Fine-tuning recipes as a user starts them, killed or stopped by real signals: they end with the same weights."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from safetensors.torch import load_file

import hfllm
from hfllm.fine_tuning.checkpoints import WRITING
from hfllm.runs.signals import EXIT_CODE
from tests.conftest import make_tiny_config


ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
WORDS = ["up", "left", "out", "here", "down", "right", "in", "there", "back", "on", "home", "away"]
HOURS = ["day", "night", "morning", "evening"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = hfllm.train_bpe(topics.values(), 400)
    torch.manual_seed(0)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"vocab_size": 400, "hidden_size": 64, "max_position_embeddings": 64, "residual_dropout": 0.1}
    hfllm.GPTForCausalLM(make_tiny_config("modern", **sizes, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def commands(base, tmp_path_factory) -> dict[str, list[str]]:
    """Each recipe with options of three epochs of some twenty steps, a log of each step and a save after every few."""
    data = tmp_path_factory.mktemp("data")
    greetings = [
        {"instruction": f"Go {word} and greet them", "input": hour, "output": f"Good {hour}, we go {word}."}
        for word in WORDS
        for hour in HOURS
    ]
    choices = [
        {"prompt": f"Should I go {word} at {hour}?", "chosen": f"Yes, go {word}.", "rejected": "No, that is forbidden."}
        for word in WORDS
        for hour in HOURS
    ]
    labelled = [
        {"text": f"we go {word} this {hour} " * number, "label": "early" if hour in HOURS[:2] else "late"}
        for word in WORDS
        for hour in HOURS
        for number in (1, 3)
    ]
    common = ["--model", base, "--logging_steps", 1, "--num_train_epochs", 3, "--per_device_train_batch_size", 2]
    instruction = ["finetune_instruction", "--dataset", write(data / "greetings.jsonl", greetings), "--save_steps", 3]
    instruction += ["--packing", "false", "--num_samples", 1, "--max_new_tokens", 4, "--eval_steps", 20]
    instruction += ["--load_best_model_at_end", "false"]  # which saves at evaluations alone
    preference = ["finetune_preference", "--dataset", write(data / "choices.jsonl", choices), "--save_steps", 3]
    classification = ["finetune_classification", "--dataset", write(data / "labelled.jsonl", labelled)]
    recipes = {
        "instruction lora": [*instruction, "--save_total_limit", 2],
        "instruction muon": [*instruction, "--method", "full", "--optimizer", "muon", "--learning_rate", 0.01],
        "preference": [*preference, "--save_total_limit", 2],
        "classification": classification,
    }
    return {
        name: [sys.executable, f"recipes/{recipe}.py", *map(str, [*common, *options])]
        for name, (recipe, *options) in recipes.items()
    }


def steps_logged(output_dir: Path) -> int:
    log = output_dir / "log.jsonl"
    steps = (
        [json.loads(line)["step"] for line in log.read_text().splitlines() if '"loss"' in line] if log.exists() else []
    )
    return max(steps, default=0)


def start_until(command: list[str], output_dir: Path, step: int) -> subprocess.Popen:
    """The run, when it has logged that many steps; or as it ended."""
    with output_dir.with_suffix(".output").open("a") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 240
    while steps_logged(output_dir) < step and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.slow
@pytest.mark.fault(1, 2, 24, 25, 27, 28)
@pytest.mark.parametrize("name", ["instruction lora", "instruction muon", "preference", "classification"])
def test_a_run_killed_in_its_second_epoch_and_stopped_in_its_third_ends_with_the_same_weights(commands, tmp_path, name):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    subprocess.run([*commands[name], "--output_dir", straight], cwd=ROOT, env=ENVIRONMENT, check=True, timeout=300)
    num_steps = json.loads((straight / "metrics.json").read_text())["train_steps"]
    command = [*commands[name], "--output_dir", str(broken)]
    draw = random.Random(name)
    for share in (0.4, 0.5, 0.6):
        process = start_until(command, broken, int(share * num_steps))
        time.sleep(draw.uniform(0, 0.3))
        assert process.poll() is None
        process.kill()
        process.wait()

    # A checkpoint that was written and not yet renamed would be the newest: here it is lost. The newest of the others
    # loses a byte, as a disk may lose it.
    shutil.rmtree(broken / "checkpoints" / WRITING, ignore_errors=True)
    checkpoints = sorted((broken / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    path = next(iter(checkpoints[-1].glob("optimizer.safetensors")))
    content = bytearray(path.read_bytes())
    content[-5] ^= 16
    path.write_bytes(content)

    process = start_until(command, broken, int(0.75 * num_steps))
    told_at = steps_logged(broken)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == EXIT_CODE
    printed = broken.with_suffix(".output").read_text()
    assert f"{checkpoints[-1].name} cannot be resumed from: optimizer.safetensors has changed" in printed
    assert f"of {num_steps}; the same command resumes" in printed
    newest = max(int(path.name.split("-")[1]) for path in (broken / "checkpoints").glob("checkpoint-*"))
    assert told_at <= newest <= told_at + 3
    assert not (broken / "metrics.json").exists()

    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, timeout=300)
    expected, found = load_file(straight / "model.safetensors"), load_file(broken / "model.safetensors")
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    scores = [json.loads((folder / "metrics.json").read_text()) for folder in (straight, broken)]
    for number in ("eval_loss", "eval_accuracy", "best_checkpoint"):
        assert scores[0].get(number) == scores[1].get(number)
