"""The folder a run writes into."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator

from .lock import run_lock


# What a run writes beside its checkpoints, and what --overwrite_output_dir deletes.
FILES = ("log.jsonl", "metrics.json", "curves.png", "model.safetensors", "config.json", "samples.txt", "report.html")


@contextlib.contextmanager
def claim_folder(
    output_dir: str | Path, *, overwrite: bool, accelerator: Accelerator, only_look: bool = False
) -> Iterator[None]:
    """Keep `output_dir` to this run while the block lasts, see `run_lock`; every process enters it.

    `overwrite` deletes what an earlier run left, and nothing else that lies there. `only_look` writes and deletes
    nothing and takes no lock.

    Raises:
        ValueError: the folder holds a model that is not a run's.
    """
    folder = Path(output_dir)
    with contextlib.nullcontext() if only_look else run_lock(folder, accelerator=accelerator):
        if overwrite and not only_look:
            if accelerator.is_main_process:
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
                for name in FILES:
                    (folder / name).unlink(missing_ok=True)
            accelerator.wait_for_everyone()
        elif not overwrite and (folder / "config.json").exists() and not (folder / "arguments.yaml").exists():
            raise ValueError(
                f"{folder} holds a model that no run of this recipe made, and would be overwritten. Choose another "
                "--output_dir, or overwrite it with --overwrite_output_dir."
            )
        yield
