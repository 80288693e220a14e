"""A dial gives all processes of a run the same sizes."""

import numpy as np
import pytest
import yaml

from hfllm.training.sizing import SIZED
from tests.distributed.launching import command, pretrain, recipe, run


pytestmark = pytest.mark.slow


@pytest.fixture
def unsized(small, tmp_path) -> dict:
    kept = {name: value for name, value in small.items() if name not in (*SIZED, "optimizer")}
    return {**kept, "output_dir": tmp_path / "out"}


def test_two_processes_share_the_rows_that_one_would_have(unsized, tmp_path):
    """32 rows of 32 are the 1,024 tokens of a step."""
    logs, rows = [], []
    for num_processes, config in ((1, "cpu.yaml"), (2, "multi_cpu.yaml")):
        options = {**unsized, "output_dir": tmp_path / str(num_processes), "depth": 1, "max_train_tokens": 4 * 1024}
        logs.append(pretrain(config, num_processes, options))
        arguments = yaml.safe_load((tmp_path / str(num_processes) / "arguments.yaml").read_text())
        rows.append(arguments["per_device_train_batch_size"])
    assert rows == [32, 16]
    assert len(logs[0]["loss"]) == 4
    np.testing.assert_allclose(logs[0]["loss"], logs[1]["loss"], rtol=1e-6)


def test_processes_that_share_a_model_out_agree_on_the_measured_speed(unsized):
    options = {**unsized, "max_train_minutes": 1, "dry_run": True}
    finished = run([*command("fsdp2.yaml", 2), *recipe(options)])
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "Sized by max_train_minutes 1.0" in finished.stdout
    assert "there is time for" in finished.stdout, "a minute at the measured speed is more than the text is good for"
