"""A model's folder on the disk, as everybody's programs read it: whole or absent."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextmanager
def new_folder(output_dir: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into that becomes `output_dir` at the end of the `with` block; after an error nothing is left.

    It stands beside `output_dir`, under a name that begins with a dot, until it is renamed. `overwrite` lets it take
    the place of an earlier export: a folder of files alone, with a model among them.

    Raises:
        ValueError: if `output_dir` holds something that may not be replaced.
        OSError: if the disk is full or read-only; says what was to be written where.
    """
    target = Path(output_dir).expanduser().resolve()
    _check_replaceable(target, overwrite=overwrite)
    partial, replaced = (target.with_name(f".{target.name}.{state}") for state in ("partial", "replaced"))
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        partial.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        if isinstance(error, (OSError, SafetensorError)):
            raise OSError(f"{target} could not be written, and nothing of it is left: {error}") from error
        raise


def _check_replaceable(target: Path, *, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file. Give a folder that is not there yet.")
    if os.path.ismount(target):
        raise ValueError(
            f"{target} is where a disk is mounted, and cannot be replaced as a whole. Give a folder in it."
        )
    names = sorted(child.name for child in target.iterdir())
    if not names:
        return
    listing = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    if not overwrite:
        raise ValueError(
            f"{target} is not empty; it holds {listing}. Choose another output_dir, or replace an earlier export "
            "with overwrite_output_dir."
        )
    is_model = any(name == "config.json" or name.endswith((".gguf", ".onnx")) for name in names)
    if not is_model or any(child.is_dir() for child in target.iterdir()):
        raise ValueError(
            f"{target} is no earlier export, which is a model's files and no folders, so it is not overwritten; it "
            f"holds {listing}. Choose another output_dir, or delete it yourself."
        )


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write model, generation config, tokenizer and chat template so that transformers 4 reads them as 5 does.

    Programs that serve models are slow to move on, and transformers 4 runs a model with another `rope_theta`, or with a
    rope scaling, as if it had none, without a word: it does not know `rope_parameters`. So both names are written
    (checked with 4.57 and 5.23).
    """
    folder = Path(folder)
    model.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):  # which are written for their owner's eyes only
        shutil.copymode(folder / "config.json", weights)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if (rope := config.get("rope_parameters")) and "auto_map" not in config:
        config["rope_theta"] = rope["rope_theta"]
        if rope["rope_type"] != "default":
            config["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
        _write_json(folder / "config.json", config)
    save_tokenizer(tokenizer, folder)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write tokenizer and chat template under the names that transformers 4 knows, which 5 reads too.

    4 stops at the class's new name, and at special tokens in a list under their new name.
    """
    folder = Path(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    for name in ("is_local", "local_files_only"):  # how it was loaded here, which is nobody else's business
        config.pop(name, None)
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
