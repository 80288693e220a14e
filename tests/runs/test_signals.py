import io
import os
import signal
import subprocess
import sys
import time

import pytest
from accelerate import Accelerator

from hfllm.runs.signals import StopRequest


def test_a_first_signal_is_remembered_and_handlers_come_back(capfd):
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest(Accelerator(cpu=True)) as request:
        assert not request.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.agreed()
        assert "Send the signal again to stop at once" in capfd.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before


def test_where_nothing_is_saved_ctrl_c_ends_the_program():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), StopRequest(Accelerator(cpu=True), at_once=True):
        assert signal.getsignal(signal.SIGTERM) is before
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)


@pytest.mark.fault(10)
def test_a_signal_that_comes_while_something_is_printed_is_remembered(monkeypatch):
    """Python's buffered files refuse a second writer in the middle of a first one."""

    class Terminal(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data) -> int:
            os.kill(os.getpid(), signal.SIGTERM)
            return len(data)

    terminal = io.TextIOWrapper(io.BufferedWriter(Terminal()), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", terminal)
    with StopRequest(Accelerator(cpu=True)) as request:
        print("step 1", flush=True)
        assert request.agreed()


def run_python(code: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    )


STOPPABLE = """
import os, signal, time
from accelerate import Accelerator
from hfllm.runs.signals import StopRequest
with StopRequest(Accelerator(cpu=True)) as request:
    {body}
"""


@pytest.mark.fault(10)
def test_signals_at_once_are_one_request_and_a_later_one_stops_at_once():
    """A terminal's Ctrl-C arrives twice: from the terminal, and from the launcher that got it too."""
    at_once = "[os.kill(os.getpid(), signal.SIGINT) for _ in range(3)]; print('saved', request.agreed(), flush=True)"
    later = "time.sleep(1.1); os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    process = run_python(STOPPABLE.format(body=f"{at_once}; {later}"))
    assert "saved True" in process.communicate(timeout=300)[0]
    assert process.returncode == 128 + signal.SIGINT


@pytest.mark.slow
@pytest.mark.fault(13)
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
@pytest.mark.parametrize("is_launched", [True, False])
def test_a_run_whose_launcher_dies_gets_a_signal_and_one_from_a_shell_does_not(tmp_path, is_launched):
    answer = tmp_path / "answer"
    body = f"print('ready', flush=True); time.sleep(3); open({str(answer)!r}, 'w').write(str(request.agreed()))"
    launcher = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {STOPPABLE.format(body=body)!r}])\n"
        "time.sleep(60)"
    )
    environment = {"ACCELERATE_MIXED_PRECISION": "no"} if is_launched else {}
    process = run_python(launcher, **environment)
    assert process.stdout.readline().strip() == "ready"
    process.kill()
    end = time.monotonic() + 120
    while not answer.exists() or not answer.read_text():
        assert time.monotonic() < end
        time.sleep(0.1)
    assert answer.read_text() == str(is_launched)
