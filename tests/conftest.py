"""Settings of all tests: no network, and no GPU unless a test is marked `gpu`."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import signal
from pathlib import Path

import pytest
import torch

import hfllm
from tests.faults import (  # noqa: F401  (the table of faults)
    pytest_runtest_logreport,
    pytest_runtest_makereport,
    pytest_terminal_summary,
)


# The book's texts and GPT-2's vocabulary, where the machine has them; tests that need them say so.
BOOK_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def book_data() -> Path:
    if not (BOOK_DATA / "the-verdict.txt").exists():
        pytest.skip(f"needs the book's data in {BOOK_DATA}")
    return BOOK_DATA


# A worker of pytest-xdist ignores Ctrl-C, and so would every process that a test starts in it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# These models are so small that a second thread costs more than it brings.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_seed_for_every_test():
    torch.manual_seed(0)


@pytest.fixture(params=["modern", "book"])
def tiny_config(request) -> hfllm.GPTConfig:
    """Both presets, small enough to read and to run in milliseconds; no dropout."""
    return make_tiny_config(request.param)


@pytest.fixture
def tiny_model(tiny_config) -> hfllm.GPTForCausalLM:
    return hfllm.GPTForCausalLM(tiny_config).eval()


def make_tiny_config(preset: str, **overrides) -> hfllm.GPTConfig:
    fields = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        # Weights of this size make attention patterns that matter: at 0.02 everything is nearly uniform.
        "initializer_range": 0.3,
        "embedding_dropout": 0.0,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    return hfllm.GPTConfig.from_preset(preset, **{**fields, **overrides})
