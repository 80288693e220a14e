"""Stop on a signal at the end of a step, on all processes together."""

import contextlib
import ctypes
import os
import platform
import signal
import time
from types import FrameType

import torch
from accelerate import Accelerator


# What the shell reports for a process that ended on SIGTERM; a supervisor can tell it from success and from a crash.
EXIT_CODE = 128 + signal.SIGTERM


# A terminal's Ctrl-C reaches launcher and workers, and the launcher hands it on to the workers: that is one request.
SECONDS_OF_ONE_REQUEST = 1.0

# Variables that `accelerate launch` and torchrun set for the processes that they start.
LAUNCHERS = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}


class StopRequest:
    """Remembers a first SIGTERM or SIGINT (Ctrl-C), for the loop to save and stop; a second one stops at once.

    A run that saves nothing ends `at_once`, at the first one. If the launcher dies, its workers get a SIGTERM too,
    instead of training on without it (Linux).
    """

    def __init__(self, accelerator: Accelerator, *, at_once: bool = False):
        self.accelerator = accelerator
        self.numbers = () if at_once else (signal.SIGTERM, signal.SIGINT)
        self.signal_number: int | None = None
        self.time = 0.0

    def __enter__(self) -> "StopRequest":
        if LAUNCHERS & os.environ.keys():  # the parent is a launcher, and not a login shell
            signal_at_parents_death(signal.SIGTERM)
        self.previous = {number: signal.signal(number, self._remember) for number in self.numbers}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            if time.monotonic() - self.time > SECONDS_OF_ONE_REQUEST:
                os._exit(128 + number)
            return
        self.signal_number, self.time = number, time.monotonic()
        if self.accelerator.is_main_process:
            # Not `print`, which raises an error when the signal comes in the middle of another one.
            text = "\nStopping after this step; a checkpoint follows. Send the signal again to stop at once.\n"
            with contextlib.suppress(OSError):
                os.write(1, text.encode())

    def agreed(self) -> bool:
        """True on every process as soon as one of them got a signal. All processes must call it together."""
        if self.accelerator.num_processes == 1:
            return self.signal_number is not None
        told = torch.tensor(int(self.signal_number is not None), device=self.accelerator.device)
        return bool(self.accelerator.reduce(told, reduction="sum") > 0)


def signal_at_parents_death(number: int) -> None:
    """Have the kernel send this process a signal when the one that started it dies; does nothing but on Linux."""
    if platform.system() == "Linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG in prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, number)
