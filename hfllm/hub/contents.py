"""The files of a run's folder that are pushed to the Hub, without anything about this machine."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from transformers.dynamic_module_utils import get_relative_import_files

from ..model import configuration_gpt
from ..report import read_run, without_places
from ..report.page import PAGE_FILE, render_run
from ..report.run import is_hub_id, shorten_paths
from ..runs.sharded import is_sharded
from .card import CARD_FILE, PICTURES, make_card
from .errors import PushError


Files = dict[str, Path | bytes]  # path in the repository -> local path, or content

WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
# Sent as they are.
PLAIN_FILES = (
    *("generation_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "chat_template.jinja", "tokenizer_report.json", "environment.json", *PICTURES),
)
# Sent without their entries about this machine.
CONFIG_FILES = ("config.json", "adapter_config.json", "tokenizer_config.json", "base_model.json", "metrics.json")
HOW_IT_WAS_LOADED = ("_name_or_path", "name_or_path", "is_local", "local_files_only")
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{24,}")
LARGEST_TEXT = 20_000_000  # bytes of a file that is searched for tokens


def gather_files(folder: str | Path, *, repo_id: str | None = None, base_model: str | None = None) -> Files:
    """The files of a model's folder to be pushed, with the card and the page written for others to read.

    `base_model` is the id of an adapter's base.

    Raises:
        PushError: the folder is not a model's, or the adapter's base is a path.
    """
    folder = Path(folder).expanduser()
    kind = check_model_folder(folder)
    files: Files = {path.name: path for pattern in WEIGHTS for path in sorted(folder.glob(pattern))}
    if kind == "adapter":
        files = {name: path for name, path in files.items() if name.startswith("adapter_")}
    files |= {name: folder / name for name in PLAIN_FILES if (folder / name).exists()}
    for name in CONFIG_FILES:
        if (folder / name).exists() and not (kind == "adapter" and name == "config.json"):
            content = _read(folder / name)
            # A label or a token may look like a path, so in the configs only entries that are paths by name are left
            # out.
            files[name] = _as_json(shorten_paths(content) if name == "metrics.json" else _public(content))
    if kind == "adapter":
        files |= _adapter_files(folder, base_model)
    else:
        files |= _code_files(folder)

    run = read_run(folder)
    if repo_id is not None:
        run = dataclasses.replace(run, name=repo_id.split("/")[-1])
    files[CARD_FILE] = make_card(
        run, repo_id=repo_id, base_model=base_model, pictures=[name for name in PICTURES if name in files]
    ).encode()
    if run.log or run.metrics:
        files[PAGE_FILE] = render_run(without_places(run)).encode()
    return files


def check_model_folder(folder: Path) -> str:
    """`"adapter"` or `"model"`; anything else is an error that says what is missing."""
    if not folder.is_dir():
        raise PushError(f"{folder} is not a folder. Give a model's, for example the --output_dir of a run.")
    held = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
    if (folder / "adapter_config.json").exists():
        if not (folder / "adapter_model.safetensors").exists():
            raise PushError(f"{folder} has an adapter_config.json but no adapter_model.safetensors; it holds {held}.")
        return "adapter"
    if not (folder / "config.json").exists():
        under_way = (
            " The run is not over: its model is written at the end." if (folder / "checkpoints").exists() else ""
        )
        raise PushError(f"{folder} is not a model's folder: it has no config.json; it holds {held}.{under_way}")
    if is_sharded(folder):
        raise PushError(
            f"{folder} is a checkpoint in pieces, one for each process of a sharded run. Make it whole, and push that "
            f"folder: python recipes/export.py --model {folder} --to whole --output_dir out/whole"
        )
    if not any(folder.glob("model*.safetensors")):
        raise PushError(f"{folder} has a config.json but no model.safetensors, so no weights; it holds {held}.")
    if "model_type" not in _read(folder / "config.json"):
        raise PushError(f"{folder / 'config.json'} has no model_type, so it is not known which model it is.")
    return "model"


def check_for_tokens(files: Files) -> None:
    """Raise a PushError if a text to be sent holds a token of the Hub, without printing the token."""
    token = get_token()
    for name, source in files.items():
        if name.endswith((".safetensors", ".png")):
            continue
        content = source if isinstance(source, bytes) else source.read_bytes()
        text = content[:LARGEST_TEXT].decode("utf-8", errors="replace")
        if TOKEN.search(text) or (token and token in text):
            raise PushError(f"{name} holds what looks like a token of the Hub, and is not sent. Remove it there first.")


def _adapter_files(folder: Path, base_model: str | None) -> Files:
    """The adapter's config with a base that others can open."""
    config = _read(folder / "adapter_config.json")
    base = base_model or config.get("base_model_name_or_path")
    if not base or not is_hub_id(str(base)) or "/" not in str(base):
        raise PushError(
            f"The adapter's base is {base!r}, which is only on this machine. Push the base first, then give its id as "
            "--base_model (me/my-gpt); or push base and adapter as one model with --merge."
        )
    files: Files = {"adapter_config.json": _as_json(_public({**config, "base_model_name_or_path": base}))}
    if (folder / "base_model.json").exists():
        known_by = {**_read(folder / "base_model.json"), "base_model_name_or_path": base}
        files["base_model.json"] = _as_json(known_by)
    return files


def _code_files(folder: Path) -> Files:
    """For our own model, its code files, and a config whose `auto_map` names all its classes."""
    config = _public(_read(folder / "config.json"))
    if config["model_type"] != configuration_gpt.GPTConfig.model_type:
        return {"config.json": _as_json(config)}
    files: Files = {"config.json": _as_json({**config, "auto_map": dict(configuration_gpt.AUTO_MAP)})}
    try:
        code = find_code_files(folder)
    except FileNotFoundError:  # a folder without its code, or with a part of it
        code = find_code_files(Path(str(configuration_gpt.__file__)).parent)
    return files | {path.name: path for path in code}


def find_code_files(folder: Path) -> list[Path]:
    """The files of the classes in `auto_map`, and the files that they import, as `save_pretrained` copies them.

    Raises:
        FileNotFoundError: one of them is not in the folder.
    """
    modules = sorted({place.split(".")[0] for place in configuration_gpt.AUTO_MAP.values()})
    paths = [folder / f"{module}.py" for module in modules]
    imported = {Path(name) for path in paths for name in get_relative_import_files(path)}
    return sorted({*paths, *imported})


def _public(content: dict[str, Any]) -> dict[str, Any]:
    """A config without the entries about how it was loaded here."""
    is_left_out = {name for name in content if name in HOW_IT_WAS_LOADED or name.endswith("_file")}
    return {name: value for name, value in content.items() if name not in is_left_out}


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PushError(f"{path} is not JSON: {error}.") from error


def _as_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
