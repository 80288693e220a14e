"""Prepared rows on the Hub: pushed as huggingface_hub pushes a folder, and trained on by their id."""

import pytest
from huggingface_hub import HfApi

from hfllm.runs.log import read_log
from tests.recipes.conftest import run_pretrain, small, text_file, tokenizer_folder  # noqa: F401


@pytest.fixture
def pushed(hub, run_pretrain, small, tmp_path):  # noqa: F811
    """Options of a run on rows that are on the Hub alone."""
    names = ("dataset", "tokenizer", "cache_dir", "validation_fraction", "block_size")
    folder = tmp_path / "rows"
    run_pretrain(prepare_only=True, output_dir=folder, **{name: small[name] for name in names})
    api = HfApi()
    api.create_repo("me/rows", repo_type="dataset")
    api.upload_folder(repo_id="me/rows", folder_path=folder, repo_type="dataset")  # as `hf upload` does
    there = hub.files("datasets/me/rows")
    assert {path: there[path] for path in there if path != ".gitattributes"} == {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    folder.rename(tmp_path / "away")
    return {**small, "dataset": "me/rows", "cache_dir": tmp_path / "other-cache", "max_steps": 3, "warmup_steps": 0}


def test_rows_are_pulled_and_trained_on_as_their_text(run_pretrain, small, pushed, tmp_path):  # noqa: F811
    from_hub = run_pretrain(**{**pushed, "output_dir": tmp_path / "hub"})
    steps = {name: pushed[name] for name in ("max_steps", "warmup_steps")}
    from_text = run_pretrain(**{**small, **steps, "output_dir": tmp_path / "text"})
    losses = [[e["loss"] for e in read_log(tmp_path / name / "log.jsonl") if "loss" in e] for name in ("hub", "text")]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    names = ("corpus_sha256", "eval_loss", "eval_bits_per_byte")
    assert [from_hub[name] for name in names] == [from_text[name] for name in names]


def test_rows_that_were_pulled_are_found_without_the_hub(hub, run_pretrain, pushed, monkeypatch):  # noqa: F811
    run_pretrain(**{**pushed, "max_steps": 1})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert run_pretrain(**{**pushed, "max_steps": 2, "lr_scheduler_type": "cosine"})["train_steps"] == 2
    assert hub.requests == []


def test_a_dataset_that_holds_no_rows_is_read_as_text(hub, run_pretrain, small):  # noqa: F811
    with pytest.raises(FileNotFoundError, match="neither a file or folder here nor a dataset that the Hub gives"):
        run_pretrain(**{**small, "dataset": "me/nothing"})
    assert "HEAD /datasets/me/nothing/resolve/main/rows.json" in hub.requests
