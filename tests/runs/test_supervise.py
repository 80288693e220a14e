"""accelerate_configs/supervise.sh, with scripts of a line as launcher and worker."""

import os
import random
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest


ROOT = Path(__file__).parents[2]
SUPERVISE = ROOT / "accelerate_configs" / "supervise.sh"


def supervise(*command: str, **options) -> subprocess.Popen:
    environment = {**os.environ, "WAIT_SECONDS": "0", **options.pop("env", {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([SUPERVISE, *command], env=environment, **pipes, **options)


@pytest.mark.parametrize(
    ("command", "code", "told"),
    [
        ("exit 0", 0, ""),
        ("echo no such option >&2; exit 2", 2, ""),
        ('echo 2 >> "$HFLLM_EXIT_CODES"; exit 1', 2, ""),
        ("exit 7", 7, "giving up"),
        ('n=$(cat n 2>/dev/null || echo 0); echo $((n + 1)) > n; [ "$n" -ge 2 ]', 0, "starting it again"),
    ],
    ids=["ends well", "a wrong option", "a wrong option behind a launcher", "fails each time", "fails twice"],
)
def test_the_supervisor_starts_again_what_a_new_start_may_mend(tmp_path, command, code, told):
    process = supervise("bash", "-c", command, cwd=tmp_path)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == code
    assert told in printed
    assert bool(told) == ("supervise:" in printed)


# A launcher that would leave its worker behind if it were told to stop itself, and turns every exit code into 1.
WORKER = (
    "trap 'echo saved; echo 143 >> \"$HFLLM_EXIT_CODES\"; exit 143' TERM; echo ready; while true; do sleep 0.05; done"
)
LAUNCHER = f"bash -c {shlex.quote(WORKER)} & wait $!; [ $? -eq 0 ] || exit 1"


@pytest.mark.fault(10)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_supervisor_passes_a_signal_to_the_worker_and_starts_nothing_again(number):
    process = supervise("bash", "-c", LAUNCHER)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    printed, told = process.communicate(timeout=60)
    assert printed == "saved\n"
    assert process.returncode == 143
    assert f"stopped by {signal.Signals(number).name} (exit code 143)" in told


def test_the_supervisor_needs_neither_pkill_nor_ps(tmp_path):
    for name in ("bash", "sleep", "mktemp", "grep", "rm"):
        for folder in os.environ["PATH"].split(os.pathsep):
            if (Path(folder) / name).exists():
                (tmp_path / name).symlink_to(Path(folder) / name)
                break
    process = supervise("bash", "-c", LAUNCHER, env={"PATH": str(tmp_path)})
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    printed, _ = process.communicate(timeout=60)
    assert printed == "saved\n" and process.returncode == 143


def terminate_after(seconds: float) -> tuple[int, str, str]:
    """SIGTERM to a supervisor that began so long ago: its exit code, and what it and its run printed."""
    process = supervise("bash", "-c", LAUNCHER, env={"MARK": f"{os.getpid()} {seconds}"})
    time.sleep(seconds)
    process.terminate()
    printed, told = process.communicate(timeout=60)  # it ends only when nobody holds its output any more
    return process.returncode, printed, told


def check_no_signal_is_lost(num_signals: int) -> None:
    draw = random.Random(0)
    delays = [draw.uniform(0, 0.15) for _ in range(num_signals)]
    with ThreadPoolExecutor(4) as pool:
        ends = list(pool.map(terminate_after, delays))
    for code, printed, told in ends:
        assert code in (143, -signal.SIGTERM), (code, printed, told)  # the latter before the supervisor's first line
        assert printed in ("", "ready\n", "ready\nsaved\n") and "starting it again" not in told
    assert len({printed for _, printed, _ in ends}) > 1 or num_signals < 50
    marks = {f"{os.getpid()} {delay}" for delay in delays}
    left = [
        process for process in psutil.process_iter(["environ"]) if (process.info["environ"] or {}).get("MARK") in marks
    ]
    assert left == []


@pytest.mark.fault(10)
def test_no_sigterm_is_lost_whenever_it_comes():
    check_no_signal_is_lost(8)


@pytest.mark.slow
@pytest.mark.fault(10)
def test_no_sigterm_of_two_hundred_is_lost():
    check_no_signal_is_lost(200)


@pytest.mark.fault(10)
def test_a_signal_between_two_starts_starts_nothing_again():
    process = supervise("bash", "-c", "echo started; exit 7", env={"WAIT_SECONDS": "60", "MAX_QUICK_FAILURES": "9"})
    assert process.stdout.readline() == "started\n"
    assert "starting it again in 60 s" in process.stderr.readline()
    process.terminate()
    printed, told = process.communicate(timeout=30)
    assert printed == "" and "stopped by SIGTERM" in told
    assert process.returncode == 143


@pytest.mark.slow
def test_a_wrong_option_behind_accelerate_launch_is_not_tried_again():
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml"]
    process = supervise(*launch, "recipes/pretrain.py", "--max_stepz", "3", cwd=ROOT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "did you mean 'max_steps'" in told and "supervise:" not in told
