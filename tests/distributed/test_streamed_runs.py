"""A streamed run reads the same rows in the same order on any number of processes."""

import json

import numpy as np
import pytest

from tests.distributed.launching import command, pretrain, recipe, run
from tests.recipes.conftest import make_sentences


@pytest.fixture
def streamed(small, tmp_path) -> dict[str, object]:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(4):
        texts = make_sentences(60, seed=number)
        (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {**small, "dataset": folder, "streaming": True, "eval_steps": 8, "save_steps": 4, "max_steps": 8}


@pytest.mark.slow
def test_two_processes_stream_what_one_does_and_resume_what_it_began(streamed, tmp_path):
    one = pretrain("cpu.yaml", 1, {**streamed, "output_dir": tmp_path / "one", "per_device_train_batch_size": 8})
    halves = {**streamed, "output_dir": tmp_path / "two", "per_device_train_batch_size": 4}
    two = pretrain("multi_cpu.yaml", 2, halves)
    begun = {**streamed, "output_dir": tmp_path / "changed"}
    pretrain(
        "cpu.yaml", 1, {**begun, "per_device_train_batch_size": 8, "max_steps": 4, "lr_scheduler_type": "constant"}
    )
    changed = pretrain(
        "multi_cpu.yaml", 2, {**begun, "per_device_train_batch_size": 4, "lr_scheduler_type": "constant"}
    )
    straight = pretrain(
        "cpu.yaml",
        1,
        {**streamed, "output_dir": tmp_path / "straight", "per_device_train_batch_size": 8}
        | {"lr_scheduler_type": "constant"},
    )
    assert len(set(one["loss"])) == 8
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(two[name], one[name], rtol=2e-6, err_msg=name)
        np.testing.assert_allclose(changed[name], straight[name], rtol=2e-6, err_msg=name)


@pytest.mark.slow
def test_fewer_shards_than_processes_are_refused(streamed, small, tmp_path):
    options = {**streamed, "dataset": small["dataset"], "output_dir": tmp_path / "out"}
    finished = run([*command("multi_cpu.yaml", 2), *recipe(options)])
    assert finished.returncode != 0
    assert "has 1 shards, and 2 processes are to read it" in finished.stderr + finished.stdout
