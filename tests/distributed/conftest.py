import json
import socket
from pathlib import Path

import pytest

from hfllm.tokenization import train_bpe
from tests.recipes.conftest import make_sentences


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """A text of documents of different lengths, its tokenizer, and the rows made of them by the first run."""
    folder = tmp_path_factory.mktemp("shared")
    sentences = make_sentences(100)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences))
    train_bpe(sentences, 300).save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def small(shared_folder) -> dict[str, object]:
    """Options of a run of four steps."""
    return {
        "dataset": shared_folder / "text.jsonl",
        "tokenizer": shared_folder / "tokenizer",
        "cache_dir": shared_folder / "cache",
        "validation_fraction": 0.2,
        "block_size": 32,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_steps": 4,
        "optimizer": "adamw",  # DeepSpeed has no other
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "eval_steps": 4,
        "save_steps": 4,
        "sample_tokens": 0,
    }


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
