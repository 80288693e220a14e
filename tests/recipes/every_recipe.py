"""A small command for each recipe that writes a folder, and what its result is."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

import hfllm
from tests.conftest import make_tiny_config


ROOT = Path(__file__).parents[2]
WORDS = ["up", "left", "out", "here", "down", "right", "in", "there", "back", "on", "home", "away"]
HOURS = ["day", "night", "morning", "evening"]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The weights, which stay what they were when their file, from which they are mapped, is damaged."""
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def tokenizer_of(folder: Path) -> dict[str, torch.Tensor]:
    return {"tokenizer.json": torch.frombuffer(bytearray((folder / "tokenizer.json").read_bytes()), dtype=torch.uint8)}


@dataclass
class Command:
    """A recipe with its options, but for `output_dir`."""

    recipe: str
    options: dict[str, object]
    result: Callable[[Path], dict[str, torch.Tensor]] = weights_of

    def argv(self, output_dir: Path | str, **others: object) -> list[str]:
        options = {**self.options, "output_dir": output_dir, **others}
        return [f"--{name}={value}" for name, value in options.items() if value is not None]

    def shell(self, output_dir: Path, **others: object) -> list[str]:
        return [sys.executable, str(ROOT / "recipes" / f"{self.recipe}.py"), *self.argv(output_dir, **others)]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_commands(folder: Path) -> dict[str, Command]:
    """The commands, and in `folder` the texts, the tokenizer and the model that they read."""
    moments = [(word, hour) for word in WORDS for hour in HOURS]
    texts = [{"text": f"we go {word} this {hour}. " * number} for word, hour in moments for number in (1, 3)]
    text = write_rows(folder / "texts.jsonl", texts)
    tokenizer = hfllm.train_bpe([row["text"] for row in texts] + ["Good Yes No, that is forbidden? Should I"], 400)
    tokenizer.save_pretrained(folder / "tokenizer")

    torch.manual_seed(0)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "residual_dropout": 0.1}
    hfllm.GPTForCausalLM(make_tiny_config("modern", **sizes, **ids)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")

    chats = [
        {"instruction": f"Go {word} this {hour}", "output": f"Good {hour}, we go {word}."} for word, hour in moments
    ]
    pairs = [
        {"prompt": f"Should I go {word} at {hour}?", "chosen": f"Yes, go {word}.", "rejected": "No, that is forbidden."}
        for word, hour in moments
    ]
    labels = [{**row, "label": "early" if any(hour in row["text"] for hour in HOURS[:2]) else "late"} for row in texts]
    training = {"model": folder / "base", "logging_steps": 1, "per_device_train_batch_size": 4}
    instruction = {"dataset": write_rows(folder / "chats.jsonl", chats), "num_samples": 1, "max_new_tokens": 4}
    instruction |= {"num_train_epochs": 2, "save_steps": 3, "eval_steps": 20, **training}
    preference = {"dataset": write_rows(folder / "pairs.jsonl", pairs), "num_train_epochs": 2, "save_steps": 3}
    pretraining = {"dataset": text, "tokenizer": folder / "tokenizer", "cache_dir": folder / "cache"}
    pretraining |= {"validation_fraction": 0.2, "block_size": 32, "hidden_size": 32, "num_hidden_layers": 2}
    pretraining |= {"num_attention_heads": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "sample_tokens": 0}
    pretraining |= {"max_steps": 40, "eval_steps": 10, "save_steps": 3, "config_overrides": "residual_dropout=0.1"}
    return {
        "pretrain": Command("pretrain", pretraining),
        "instruction lora": Command("finetune_instruction", {**instruction, "packing": "false"}),
        "instruction full": Command("finetune_instruction", {**instruction, "method": "full", "learning_rate": 0.001}),
        "classification": Command(
            "finetune_classification",
            {"dataset": write_rows(folder / "labels.jsonl", labels), "num_train_epochs": 4, **training},
        ),
        "preference": Command("finetune_preference", {**preference, **training}),
        "tokenizer": Command(
            "train_tokenizer",
            {"dataset": text, "vocab_size": 300, "validation_fraction": 0.2, "cache_dir": folder / "cache"},
            result=tokenizer_of,
        ),
        "export": Command("export", {"model": folder / "base", "to": "qwen3"}),
    }


TRAINING = ("pretrain", "instruction lora", "instruction full", "classification", "preference")
EVERY = (*TRAINING, "tokenizer", "export")
