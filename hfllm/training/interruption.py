"""Stopping on a signal at a step's end, on all processes together."""

import os
import signal
from types import FrameType

import torch
from accelerate import Accelerator


# What the shell reports for a process that ended on SIGTERM; a supervisor can tell it from success and from a crash.
EXIT_CODE = 128 + signal.SIGTERM


class StopRequest:
    """Remembers a first SIGTERM or SIGINT (Ctrl-C), for the loop to save and stop; a second one stops at once."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.signal_number: int | None = None

    def __enter__(self) -> "StopRequest":
        self.previous = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            os._exit(128 + number)
        self.signal_number = number
        self.accelerator.print("\nStopping after this step; a checkpoint follows. Once more to stop at once.")

    def agreed(self) -> bool:
        """True on every process as soon as one of them was told to stop. All processes must call it together."""
        if self.accelerator.num_processes == 1:
            return self.signal_number is not None
        told = torch.tensor(int(self.signal_number is not None), device=self.accelerator.device)
        return bool(self.accelerator.reduce(told, reduction="sum") > 0)
