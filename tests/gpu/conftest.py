"""Tests on a GPU: `make test-gpu`. Each says what it compares; most compare with the CPU of the same machine."""

import pytest
import torch

from tests.recipes.conftest import run_pretrain, small, text_file, tokenizer_folder  # noqa: F401  (fixtures)


@pytest.fixture(autouse=True)
def _on_a_gpu():
    """Skip without a GPU; products in float32 are whole (no TF32), or CPU and GPU could not be compared."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU that torch can use")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.compiler.reset()
    yield
    torch.cuda.set_sync_debug_mode("default")
