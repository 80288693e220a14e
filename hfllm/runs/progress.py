"""The output of a run in progress: log.jsonl, samples.txt, trackers and terminal."""

import sys
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm

from .log import append_to_log, format_sample


class RunLog:
    """The log of a run from `step` to `max_steps`; every process has one, the main process writes.

    A record is a line of `log.jsonl`: `step`, and the numbers of either training or an evaluation.
    """

    def __init__(self, output_dir: str | Path, *, accelerator: Accelerator, step: int, max_steps: int):
        self.folder = Path(output_dir)
        self.accelerator = accelerator
        self.progress = tqdm(
            total=max_steps,
            initial=step,
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 30,  # seconds: a log file gets a line now and then
            disable=not accelerator.is_main_process,
        )

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.progress.close()

    def advance(self) -> None:
        """Count a step on the terminal."""
        self.progress.update()

    def write(self, record: dict[str, Any]) -> None:
        """Add a line to `log.jsonl`, send it to the trackers, and print it."""
        try:
            numbers = {name: value for name, value in record.items() if name != "step"}
            self.accelerator.log(numbers, step=record["step"])
        except Exception as error:  # each tracker has errors of its own, and none should end a run
            warnings.warn(
                f"A tracker failed: {error!r}. The run continues, and log.jsonl has everything.", stacklevel=2
            )
        if not self.accelerator.is_main_process:
            return
        append_to_log(self.folder / "log.jsonl", record)
        if "eval_loss" in record:
            tqdm.write(
                f"step {record['step']:,}: validation {record['eval_loss']:.4f} nats per token, "
                f"{record['eval_bits_per_byte']:.4f} bits per byte"
            )
        else:
            speed = record["tokens_per_second"]
            text = f"loss {record['loss']:.3f}" + (f", {speed:,.0f} tokens/s" if speed else "")
            self.progress.set_postfix_str(text, refresh=False)

    def write_sample(self, step: int, text: str) -> None:
        """Print what the model wrote, and add it to `samples.txt`; for the main process."""
        tqdm.write(f"    sample: {text!r}")
        with (self.folder / "samples.txt").open("a", encoding="utf-8") as file:
            file.write(format_sample(step, text))
