"""accelerate_configs/slurm.sbatch, as the batch shell runs it, with doubles of srun and scontrol."""

import os
import subprocess
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


@pytest.mark.fault(10)
@pytest.mark.parametrize(
    ("noted", "code", "is_requeued"),
    [
        ("143 143", 1, True),
        ("143 143", 143, True),
        ("0 0", 0, False),
        ("2 143", 1, False),
        ("1 143", 1, False),
        ("", 1, False),
    ],
    ids=["saved", "saved, and the launcher says so", "ended", "a wrong option", "one failed", "all were killed"],
)
def test_a_job_that_was_told_to_stop_and_saved_goes_back_into_the_queue(tmp_path, noted, code, is_requeued):
    doubles = {
        "scontrol": 'if [ "$1" = show ]; then echo node1; else echo "$@" >> scontrol.calls; fi',
        "srun": f'for code in {noted}; do echo $code >> "$HFLLM_EXIT_CODES"; done; exit {code}',
    }
    for name, script in doubles.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_NODEID": "0"}
    environment = {**os.environ, **job, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", ROOT / "accelerate_configs" / "slurm.sbatch", "--output_dir", "out/run"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, timeout=30)
    assert result.returncode == code
    calls = tmp_path / "scontrol.calls"
    assert (calls.exists() and calls.read_text() == "requeue 7\n") == is_requeued
    assert not list(tmp_path.glob(".exit-codes*"))
