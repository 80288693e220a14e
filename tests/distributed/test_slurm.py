"""accelerate_configs/slurm.sbatch on a real Slurm: a job that is stopped or loses a node resumes, and no other."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.launching import CONFIGS, pretrain
from tests.distributed.slurm_cluster import Cluster, needs_slurm, wait_for


pytestmark = [pytest.mark.slow, needs_slurm]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def submit(cluster: Cluster, options: dict[str, object]) -> int:
    """The real file; the command line says what this machine does not have."""
    job = cluster.submit(
        *("--gpus-per-node=1", "--cpus-per-task=1", CONFIGS / "slurm.sbatch"),
        *(f"--{name}={value}" for name, value in options.items()),
    )
    assert cluster.job(job)["Requeue"] == "1"
    return job


def wait_for_state(cluster: Cluster, job: int, *, state: str, restarts: int) -> None:
    def is_reached() -> bool:
        told = cluster.job(job)
        return told["JobState"] == state and int(told["Restarts"]) == restarts

    wait_for(is_reached, lambda: f"{state} after {restarts} restarts: {cluster.job(job)}\n{log_of(cluster, job)}")


def log_of(cluster: Cluster, job: int) -> str:
    path = cluster.folder / f"hfllm-{job}.log"
    return path.read_text(errors="replace") if path.exists() else ""


def wait_for_steps(cluster: Cluster, job: int, log: Path, count: int) -> None:
    def are_logged() -> bool:
        return log.exists() and log.read_text().count('"loss"') >= count

    wait_for(are_logged, lambda: f"{count} steps: {cluster.job(job)}\n{log_of(cluster, job)}")


def start_again_now(cluster: Cluster, job: int) -> None:
    """A job that was requeued waits two minutes for its old processes to end; ours have ended."""
    cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now")


def set_state(cluster: Cluster, node: str, state: str) -> None:
    cluster.call("scontrol", "update", f"NodeName={node}", f"State={state}", "Reason=test")


@pytest.mark.fault(10, 13, 30)
def test_a_job_that_is_told_to_stop_and_then_loses_a_node_ends_with_the_same_weights(cluster, small, tmp_path):
    _, second, third = cluster.nodes
    steps = {"max_steps": 60, "eval_steps": 60, "save_steps": 5, "per_device_train_batch_size": 4}
    options = {**small, **steps}
    pretrain("multi_cpu.yaml", 2, {**options, "output_dir": tmp_path / "straight"}, "--mixed_precision", "bf16")

    log = tmp_path / "run" / "log.jsonl"
    job = submit(cluster, {**options, "output_dir": tmp_path / "run"})
    wait_for_steps(cluster, job, log, 7)
    assert cluster.job(job)["NodeList"] == "127.0.0.[1-2]"

    # Its time is up in less than five minutes, so Slurm sends the signal within half a minute. Until the launchers have
    # it, the workers stand still.
    workers = cluster.workers()
    assert len(workers) == 2
    for worker in workers:
        worker.suspend()
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=4")
    wait_for(lambda: "got signal: 15" in log_of(cluster, job) or "SIGTERM" in log_of(cluster, job), "SIGTERM")
    set_state(cluster, second, "drain")
    for worker in workers:
        worker.resume()
    wait_for_state(cluster, job, state="PENDING", restarts=1)
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    assert "Stopped at step " in log_of(cluster, job)
    start_again_now(cluster, job)

    # On another node it resumes; that node dies.
    [stopped_at] = sorted(int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").iterdir())[-1:]
    wait_for_steps(cluster, job, log, stopped_at + 7)
    assert cluster.job(job)["NodeList"] == "127.0.0.[1,3]"
    assert f"Resuming from step {stopped_at}" in log_of(cluster, job)
    cluster.kill_node(third)
    set_state(cluster, second, "resume")
    wait_for_state(cluster, job, state="PENDING", restarts=2)
    start_again_now(cluster, job)

    wait_for_state(cluster, job, state="COMPLETED", restarts=2)
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "run"))
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert not list(cluster.folder.glob(".exit-codes*"))


@pytest.mark.fault(10)
def test_a_job_with_a_wrong_option_ends_and_is_not_requeued(cluster, small, tmp_path):
    job = submit(cluster, {**small, "output_dir": tmp_path, "max_stepz": 3})
    wait_for_state(cluster, job, state="FAILED", restarts=0)
    assert "did you mean 'max_steps'" in log_of(cluster, job)
