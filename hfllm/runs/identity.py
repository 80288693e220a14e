"""The identity of a run, and the comparison of two runs.

An identity is a flat dict of JSON values: the options that make another run, the shape of the model, and hashes of
what the run reads (`hash_rows`, `hash_model`).
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from .files import sha256_of


VOLATILE = ("transformers_version", "architectures", "auto_map", "dtype", "use_cache")
# The files of a model's or an adapter's folder that decide what it computes, beside its config; in a checkpoint there
# are others.
WEIGHTS = ("model*.safetensors", "adapter_model.safetensors", "pytorch_model*.bin", "adapter_model.bin")


def identify(config: PreTrainedConfig, **others: Any) -> dict[str, Any]:
    """The identity of a run: its model's config, as JSON holds it, and `others` that the recipe names."""
    identity = {f"model.{name}": value for name, value in config.to_dict().items()}
    for volatile in VOLATILE:
        identity.pop(f"model.{volatile}", None)
    return as_json({**identity, **others})


def as_json(content: dict[str, Any]) -> dict[str, Any]:
    """The same dict as a JSON file returns it: tuples become lists; paths and non-finite numbers become strings."""
    return json.loads(json.dumps(content, default=str), parse_constant=str)


def find_differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """A sentence for each name whose value differs: `seed was 1 and is 2`. A missing name counts as None."""
    return [
        f"{name} was {_short(saved.get(name))} and is {_short(current.get(name))}"
        for name in saved | current
        if saved.get(name) != current.get(name)
    ]


def check_same_run(
    saved: dict[str, Any], current: dict[str, Any], path: str | Path, *, fork_from: str | Path | None = None
) -> None:
    """Refuse to resume another run, whose weights belong to another schedule or other data.

    `path` is the run's folder or checkpoint; `fork_from` a checkpoint that a new run could start from, by default
    `path` itself. Names that `saved` lacks are not compared, because an earlier version did not note them.
    """
    current = {name: value for name, value in as_json(current).items() if name in saved}
    if not (differences := find_differences(saved, current)):
        return
    listing = "\n".join(f"    {line}" for line in differences)
    raise ValueError(
        f"{path} belongs to another run:\n{listing}\n"
        "Resume it with its own arguments. To train its weights further in another way (learning rate, schedule, text, "
        f"length), start a new run from them: model={fork_from or path} and another output_dir. To begin again from "
        "nothing, set overwrite_output_dir."
    )


def hash_rows(rows: Iterable[Any]) -> str:
    """The sha256 of rows in their order; a row is anything that JSON holds."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, ensure_ascii=False, sort_keys=True, default=str).encode("utf-8", "surrogatepass"))
        digest.update(b"\n")
    return digest.hexdigest()


def hash_model(name: str | Path, *, revision: str | None = None) -> str:
    """The identity of a model's weights: the sha256 of a folder's files, or the `revision` of a Hub id.

    For an adapter, its own weights and those of its base count. The code, the config's volatile entries, the tokenizer,
    the card and pictures do not count.
    """
    folder = Path(name)
    if not folder.is_dir():
        return revision or "unknown"
    digest = hashlib.sha256()
    if (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kept = {key: value for key, value in config.items() if key not in (*VOLATILE, "_name_or_path", "torch_dtype")}
        digest.update(json.dumps(kept, sort_keys=True).encode())
    elif (folder / "adapter_config.json").is_file():
        adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        digest.update(json.dumps(adapter, sort_keys=True).encode())
        digest.update(hash_model(str(adapter.get("base_model_name_or_path"))).encode())
    for path in sorted({path for pattern in WEIGHTS for path in folder.glob(pattern)}):
        digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


def _short(value: Any) -> str:
    text = repr(value)
    if isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef"):
        return f"{value[:16]}..."
    return text if len(text) <= 200 else f"{text[:197]}..."
