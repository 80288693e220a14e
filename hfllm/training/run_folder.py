"""The folder a run writes into: whose it is, and where the run in it stands."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedConfig

from .checkpoint import latest_checkpoint, load_checkpoint
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


def find_state(
    output_dir: str | Path,
    *,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    identity: dict[str, Any],
) -> dict[str, Any]:
    """The state of the newest sound checkpoint, loaded into model and optimizer; or that of a run's beginning.

    Raises:
        ValueError: there are checkpoints, but broken ones only, or of another run (see `check_same_run`).
    """
    directory = Path(output_dir) / "checkpoints"
    checkpoint = latest_checkpoint(directory, accelerator=accelerator)
    if checkpoint is not None:
        state = load_checkpoint(
            checkpoint, model=model, optimizer=optimizer, accelerator=accelerator, identity=identity
        )
        accelerator.print(f"Going on from step {state['step']:,}, saved in {checkpoint}.")
        return state
    if list(directory.glob("step-*")):
        raise ValueError(
            f"No sound checkpoint is left in {directory}, only broken ones. Put a sound one there, or start anew with "
            "--overwrite_output_dir."
        )
    counts = {"step": 0, "train_tokens": 0, "seconds": 0.0, "save_seconds": 0.0, "skipped_updates": 0}
    return {**counts, "identity": identity}


def describe_start(output_dir: str | Path) -> str:
    """Where the run in this folder would go on; "" if it would begin."""
    checkpoints = sorted(path.name for path in (Path(output_dir) / "checkpoints").glob("step-*"))
    return f"\n{output_dir} holds a run, which would go on from {checkpoints[-1]}.\n" if checkpoints else ""


def identify(config: PreTrainedConfig, **others: Any) -> dict[str, Any]:
    """What makes a run this run and no other, as JSON holds it: the model's config and what else the recipe names."""
    identity = {f"model.{name}": value for name, value in config.to_dict().items()}
    for volatile in ("transformers_version", "architectures", "auto_map", "dtype", "use_cache"):
        identity.pop(f"model.{volatile}", None)
    return {**json.loads(json.dumps(identity)), **others}
