import json
import logging
import os
import socket
import subprocess
import sys

import pytest

from hfllm.runs.lock import run_lock


@pytest.mark.fault(8)
def test_a_second_run_in_the_same_folder_is_refused_and_told_by_whom(tmp_path):
    with run_lock(tmp_path / "run"):
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        message = rf"Another run is using .*: {holder}.* delete .*\.lock"
        with pytest.raises(RuntimeError, match=message), run_lock(tmp_path / "run"):
            pass
        with run_lock(tmp_path / "another"):
            pass
        assert (tmp_path / "run" / ".lock").exists()
    assert not (tmp_path / "run" / ".lock").exists()
    with run_lock(tmp_path / "run"):
        pass


def test_an_error_in_the_run_releases_the_lock(tmp_path):
    with pytest.raises(ZeroDivisionError), run_lock(tmp_path):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(8)
def test_the_lock_of_a_killed_run_is_taken_over(tmp_path, caplog):
    code = (
        "import sys, time; from hfllm.runs.lock import run_lock\n"
        "with run_lock(sys.argv[1]):\n    print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "locked\n"
        with pytest.raises(RuntimeError, match=f"process {run.pid} on"), run_lock(tmp_path):
            pass
        run.kill()
        os.waitid(os.P_PID, run.pid, os.WEXITED | os.WNOWAIT)  # dead, but still in the list of processes
        for _ in range(2):  # as a zombie, and when it is gone
            with caplog.at_level(logging.WARNING), run_lock(tmp_path):
                assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
            assert (
                f"Taking over {tmp_path} from a run that ended without releasing it: process {run.pid}" in caplog.text
            )
            run.wait()
            caplog.clear()
            (tmp_path / ".lock").write_text(json.dumps(lock_of(run.pid)))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def lock_of(pid: int, **fields) -> dict:
    return {"pid": pid, "host": socket.gethostname(), "since": "2026-01-01 00:00:00", "create_time": 0.0, **fields}


def test_another_process_that_got_the_dead_runs_number_does_not_hold_its_lock(tmp_path):
    (tmp_path / ".lock").write_text(json.dumps(lock_of(os.getpid())))  # created in 1970
    with run_lock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["create_time"] > 0


@pytest.mark.parametrize("text", [json.dumps(lock_of(1, host="another-host")), "", "{", "[]"])
def test_a_lock_whose_holder_cannot_be_checked_is_respected(tmp_path, text):
    (tmp_path / ".lock").write_text(text)
    with pytest.raises(RuntimeError, match="if you know that run to be dead, delete"), run_lock(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == text


def test_a_lock_that_someone_else_took_meanwhile_is_left_to_them(tmp_path):
    with run_lock(tmp_path):
        (tmp_path / ".lock").write_text("theirs")
    assert (tmp_path / ".lock").read_text() == "theirs"


@pytest.mark.fault(7)
def test_an_output_folder_that_cannot_be_used_is_said_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    message = r"output folder .*file/run cannot be used: .* Choose another"
    with pytest.raises(OSError, match=message), run_lock(tmp_path / "file" / "run"):
        pass
