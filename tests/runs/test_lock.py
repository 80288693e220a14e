import contextlib
import errno
import json
import logging
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from hfllm.runs import lock as lock_module
from hfllm.runs.lock import run_lock


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Hosts that watch each other for a second instead of half a minute."""
    for name, seconds in (("BEAT_SECONDS", 0.05), ("PATIENCE_SECONDS", 1.0), ("SETTLE_SECONDS", 0.2)):
        monkeypatch.setattr(lock_module, name, seconds)


@pytest.fixture
def on_a_network(monkeypatch):
    """A file system that does not show one host the locks of another: here, that has none at all."""

    def acquire(self, *args, **kwargs):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock_module, "_is_local", lambda folder: False)
    monkeypatch.setattr(FileLock, "acquire", acquire)


def names_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


HOLD = (
    "import sys, time; from hfllm.runs.lock import run_lock\n"
    "with run_lock(sys.argv[1], recipe='pretrain'):\n    print('locked', flush=True); time.sleep(60)"
)


@contextlib.contextmanager
def held_by_another_process(folder):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "locked\n"
            yield process
        finally:
            process.kill()


@pytest.mark.fault(8)
def test_a_second_run_in_the_same_folder_is_refused_with_the_holder(tmp_path):
    with run_lock(tmp_path / "run", recipe="pretrain"):
        holder = rf"process {os.getpid()} on {socket.gethostname()} \(pretrain, since 20"
        with (
            pytest.raises(RuntimeError, match=rf"Another run is using .*: {holder}.*choose another output_dir"),
            run_lock(tmp_path / "run"),
        ):
            pass
        with run_lock(tmp_path / "another"):
            pass
        assert names_in(tmp_path / "run") == [".lock", ".lock.json"]
    with run_lock(tmp_path / "run"):
        pass


def test_a_run_that_wrote_nothing_leaves_no_folder_of_its_own(tmp_path):
    with pytest.raises(ZeroDivisionError), run_lock(tmp_path / "new"):
        _ = 1 / 0
    (tmp_path / "there").mkdir()
    with run_lock(tmp_path / "there"):
        pass
    assert names_in(tmp_path) == ["there"]


@pytest.mark.fault(8, 30)
def test_the_lock_of_a_killed_run_ends_with_it(tmp_path, caplog):
    with held_by_another_process(tmp_path) as process:
        with pytest.raises(RuntimeError, match=rf"process {process.pid} on .*pretrain"), run_lock(tmp_path):
            pass
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, but still in the list of processes
        with caplog.at_level(logging.WARNING), run_lock(tmp_path):
            assert json.loads((tmp_path / ".lock.json").read_text())["pid"] == os.getpid()
        assert f"from a run that ended without releasing it: process {process.pid}" in caplog.text
    assert names_in(tmp_path) == []


@pytest.mark.fault(8, 30)
@pytest.mark.skipif(not shutil.which("unshare"), reason="makes namespaces")
def test_a_run_in_another_container_locks_the_folder_until_it_is_killed(tmp_path):
    """Another host name, and the number 1 of a process: what a restarted container has as well."""
    inside = f"hostname another-host && exec {sys.executable} -c {shlex.quote(HOLD)} {tmp_path}"
    command = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "bash", "-c", inside]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        if process.stdout.readline() != "locked\n":
            pytest.skip("making namespaces needs root")
        with pytest.raises(RuntimeError, match="process 1 on another-host"), run_lock(tmp_path):
            pass
        process.kill()
        process.wait()
    deadline = time.monotonic() + 60  # the kernel kills what is in the namespace a moment later
    while True:
        try:
            with run_lock(tmp_path):
                break
        except RuntimeError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


HOLDER = {"pid": os.getpid(), "host": socket.gethostname(), "recipe": "x", "since": "2026-01-01", "token": "theirs"}


@pytest.mark.fault(30)
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(HOLDER),  # the number of this process, as the first one of a container always has it
        json.dumps({**HOLDER, "host": "another-host", "machine": "another"}),
        json.dumps({**HOLDER, "since": "2099-01-01"}),  # a clock that was ahead
        "",  # written on a full disk
        "{",
        "[]",
    ],
    ids=["own pid", "another host", "a stepped clock", "empty", "torn", "another thing"],
)
@pytest.mark.parametrize("name", [".lock", ".lock.json"])
def test_what_a_dead_run_left_on_a_disk_of_this_machine_locks_nobody_out(tmp_path, monkeypatch, name, text):
    monkeypatch.setattr(lock_module, "_is_local", lambda folder: True)
    (tmp_path / name).write_text(text)
    with run_lock(tmp_path), pytest.raises(RuntimeError, match="Another run is using"), run_lock(tmp_path):
        pass
    assert names_in(tmp_path) == []


@pytest.mark.fault(30)
def test_a_run_on_another_host_that_lives_is_seen_by_its_heartbeat(tmp_path, on_a_network):
    with (
        run_lock(tmp_path, recipe="pretrain"),
        pytest.raises(RuntimeError, match=r"Another run is using .*pretrain"),
        run_lock(tmp_path),
    ):
        pass
    assert names_in(tmp_path) == []


@pytest.mark.fault(30)
@pytest.mark.parametrize(
    "text", [json.dumps({**HOLDER, "host": "another-host"}), "", "{"], ids=["another host", "empty", "torn"]
)
@pytest.mark.parametrize("clock", [0, 4_000_000_000], ids=["long ago", "in the future"])
def test_one_that_is_silent_is_taken_over_whatever_the_clocks_say(tmp_path, on_a_network, caplog, text, clock):
    (tmp_path / ".lock.json").write_text(text)
    os.utime(tmp_path / ".lock.json", (clock, clock))
    with caplog.at_level(logging.WARNING), run_lock(tmp_path):
        assert json.loads((tmp_path / ".lock.json").read_text())["pid"] == os.getpid()
    assert "Waiting up to 1 seconds to see whether that run is still alive" in caplog.text
    assert names_in(tmp_path) == []


@pytest.mark.fault(30)
@pytest.mark.parametrize("is_left", [True, False])
def test_of_hosts_that_come_at_once_one_gets_the_folder(tmp_path, on_a_network, is_left):
    if is_left:
        (tmp_path / ".lock.json").write_text(json.dumps({**HOLDER, "host": "another-host"}))
    outcomes, done = [], threading.Barrier(4)

    def run():
        try:
            with run_lock(tmp_path):
                outcomes.append("in")
                done.wait()
        except RuntimeError:
            outcomes.append("refused")
            done.wait()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(outcomes) == ["in", "refused", "refused", "refused"]


@pytest.mark.fault(30)
def test_a_run_that_stood_still_and_was_taken_over_stops_at_once(tmp_path):
    """As a machine that slept: another host has its folder now."""
    code = (
        "import errno, sys, time; from filelock import FileLock; from hfllm.runs import lock\n"
        "def acquire(self): raise OSError(errno.ENOLCK, 'No locks available')\n"
        "FileLock.acquire = acquire; lock.BEAT_SECONDS = 0.05\n"
        "with lock.run_lock(sys.argv[1]):\n    print('locked', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "locked\n"
    text = json.dumps({**HOLDER, "host": "another-host", "token": "new"})
    (tmp_path / ".new").write_text(text)
    (tmp_path / ".new").replace(tmp_path / ".lock.json")
    _, told = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "another-host" in told and "was suspended for too long, and stops" in told
    assert (tmp_path / ".lock.json").read_text() == text


def test_children_of_a_run_do_not_keep_its_lock(tmp_path):
    """Workers that read data are forked, and outlive a run that was killed by a few seconds."""
    code = (
        "import os, sys, time; from hfllm.runs.lock import run_lock\n"
        "with run_lock(sys.argv[1]):\n"
        "    if os.fork() == 0: print('forked', flush=True); time.sleep(30); os._exit(0)\n"
        "    time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "forked\n"
    process.kill()
    process.wait()
    try:
        with run_lock(tmp_path):
            pass
    finally:
        os.killpg(process.pid, 9)
    process.stdout.close()


def test_the_file_system_of_this_machines_memory_is_local():
    if not Path("/dev/shm").is_mount():
        pytest.skip("needs a tmpfs")
    assert lock_module._is_local(Path("/dev/shm"))
    assert not lock_module._is_local(Path("/proc"))


@pytest.mark.fault(7)
def test_an_output_folder_that_cannot_be_used_is_reported_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    message = r"output folder .*file/run cannot be used: .* Choose another"
    with pytest.raises(OSError, match=message), run_lock(tmp_path / "file" / "run"):
        pass


def test_a_lock_outlasts_its_text(tmp_path):
    with run_lock(tmp_path):
        (tmp_path / ".lock.json").unlink()
        with pytest.raises(RuntimeError, match="a process that left no name"), run_lock(tmp_path):
            pass
    assert names_in(tmp_path) == []
