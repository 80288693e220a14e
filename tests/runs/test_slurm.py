"""accelerate_configs/slurm.sbatch, as the batch shell runs it, with doubles of Slurm's commands."""

import os
import subprocess
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


@pytest.mark.fault(10)
@pytest.mark.parametrize(
    ("noted", "code", "told_after", "state", "is_requeued"),
    [
        ("143 143", 1, None, "RUNNING", True),
        ("143 143", 143, None, "RUNNING", True),
        ("143 143", 1, 10, "RUNNING", True),
        ("", 1, 4000, "RUNNING", True),
        ("", 1, 10, "RUNNING", False),
        ("143 143", 1, 4000, "COMPLETING", False),
        ("0 0", 0, None, "RUNNING", False),
        ("0 0", 0, 4000, "RUNNING", False),
        ("2 143", 1, None, "RUNNING", False),
        ("2 2", 1, 4000, "RUNNING", False),
        ("1 143", 1, None, "RUNNING", False),
        ("", 1, None, "RUNNING", False),
    ],
    ids=[
        *("saved", "saved, and the launcher says so", "told and saved", "told while it prepared its text"),
        *("told at its start, as its time is too short", "cancelled", "ended", "told and ended"),
        *("a wrong option", "told, a wrong option", "one failed", "all were killed"),
    ],
)
def test_a_job_that_was_told_to_stop_and_saved_goes_back_into_the_queue(
    tmp_path, noted, code, told_after, state, is_requeued
):
    """`told_after`: the seconds since the job's start when the batch shell gets SIGTERM, or None."""
    tell = "" if told_after is None else "kill -TERM $PPID; while [ ! -e scancel.calls ]; do sleep 0.1; done; "
    doubles = {
        "scancel": 'echo "$@" >> scancel.calls',
        "squeue": f"echo {state}",
        "scontrol": 'if [ "$1" = show ]; then echo node1; else echo "$@" >> scontrol.calls; fi',
        "srun": f'{tell}for code in {noted}; do echo $code >> "$HFLLM_EXIT_CODES"; done; exit {code}',
    }
    for name, script in doubles.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_NODEID": "0"}
    job |= {"SLURM_GPUS_ON_NODE": "8", "SECONDS": str(told_after or 0)}  # bash counts on from there
    environment = {**os.environ, **job, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", ROOT / "accelerate_configs" / "slurm.sbatch", "--output_dir", "out/run"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, timeout=30)
    assert result.returncode == code
    calls = tmp_path / "scontrol.calls"
    told = tmp_path / "scancel.calls"
    assert (told.read_text() if told.exists() else None) == (None if told_after is None else "--signal=TERM 7\n")
    assert (calls.exists() and calls.read_text() == "requeue 7\n") == is_requeued
    assert not list(tmp_path.glob(".exit-codes*"))
