"""What makes a run this run and no other, and the comparison of two."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig


def identify(config: PreTrainedConfig, **others: Any) -> dict[str, Any]:
    """What makes a run this run and no other, as JSON holds it: the model's config and what else the recipe names."""
    identity = {f"model.{name}": value for name, value in config.to_dict().items()}
    for volatile in ("transformers_version", "architectures", "auto_map", "dtype", "use_cache"):
        identity.pop(f"model.{volatile}", None)
    return {**json.loads(json.dumps(identity)), **others}


def check_same_run(saved: dict[str, Any], current: dict[str, Any], path: str | Path) -> None:
    """Refuse to go on from a checkpoint of another run: its weights under another schedule or data are neither's.

    Both are flat dicts of what makes a run that run: its model, its data, its seed and its schedule.
    """
    differences = [
        f"    {name}: {saved.get(name)!r} in the checkpoint, {current.get(name)!r} now"
        for name in saved | current
        if saved.get(name) != current.get(name)
    ]
    if differences:
        raise ValueError(
            f"{path} belongs to another run:\n" + "\n".join(differences) + "\n"
            "Resume with the run's own arguments, give another --output_dir, or start anew with --overwrite_output_dir."
        )
