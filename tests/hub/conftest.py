"""A Hub on the loopback that huggingface_hub uses, and the folder of a small run to push."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers.utils.hub
import yaml
from huggingface_hub import constants, hf_api

import hfllm
from hfllm.report import plot_curves, save_environment
from hfllm.tokenization import tokenizer_fingerprint, train_bpe
from tests.conftest import make_tiny_config
from tests.hub.double import Hub


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    """The double, with `me` logged in. huggingface_hub read its settings at import: they are set in its constants."""
    with Hub() as hub:
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
            "HF_TOKEN_PATH": str(tmp_path / "no-token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        # Two clients are made once and kept, by huggingface_hub for its functions and by transformers.
        monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setenv("HF_TOKEN", hub.token("me"))
        yield hub


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    """Attempts follow each other at once, ours and huggingface_hub's."""
    monkeypatch.setattr("hfllm.hub.push.FIRST_WAIT", 0.0)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


def clean_environment(hub: Hub, folder: Path, **more: str) -> dict[str, str]:
    """The environment of a process of somebody else: their own cache, the double for a Hub, and no token."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
    }
    paths = {"HF_HOME": str(folder / "hf-home"), "HF_MODULES_CACHE": str(folder / "modules")}
    return {**kept, **paths, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(scope="session")
def make_run(tmp_path_factory) -> Callable[..., Path]:
    """Make the folder that a run of recipes/pretrain.py leaves, with an untrained model."""
    tokenizer = train_bpe(["a cat sees a dog", "my bird hears one fish"] * 20, 300)

    def make(*, seed: int = 0, preset: str = "modern", **overrides) -> Path:
        folder = tmp_path_factory.mktemp("run") / "out"
        torch.manual_seed(seed)
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = make_tiny_config(preset, **{"vocab_size": len(tokenizer), **ids, **overrides})
        model = hfllm.GPTForCausalLM(config)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        log = [{"step": step, "loss": 6.0 / step, "learning_rate": 1e-3, "grad_norm": 1.0} for step in (1, 2, 3)]
        log[2] |= {"eval_loss": 2.5, "eval_bits_per_byte": 1.25}
        (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
        metrics = {
            "eval_loss": 2.5,
            "eval_bits_per_byte": 1.25,
            "train_tokens": 1234,
            "train_seconds": 9.5,
            "num_parameters": model.num_parameters(),
            "dataset": "/home/somebody/private/animals.txt",
            "corpus_sha256": "ab" * 32,
            "tokenizer_sha256": tokenizer_fingerprint(tokenizer),
        }
        (folder / "metrics.json").write_text(json.dumps(metrics))
        arguments = {
            "dataset": "/home/somebody/private/animals.txt",
            "output_dir": str(folder),
            "cache_dir": "/home/somebody/cache",
            "learning_rate": 1e-3,
            "sample_prompt": "a cat ",
        }
        (folder / "arguments.yaml").write_text(yaml.safe_dump(arguments))
        (folder / "samples.txt").write_text("--- step 3\na cat <script>alert(1)</script>\n")
        plot_curves(log, folder / "curves.png")
        save_environment(folder)
        checkpoint = folder / "checkpoints" / "step-00000003"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text("{}")
        return folder

    return make


@pytest.fixture(scope="session")
def run_folder(make_run) -> Path:
    return make_run()
