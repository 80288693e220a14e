"""A model's folder on the disk, as other programs read it."""

import json
import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write model, generation config, tokenizer and chat template so that transformers 4 reads them as 5 does.

    Many serving programs still use transformers 4, which does not know `rope_parameters` and silently ignores another
    `rope_theta` or a rope scaling in it. So both names are written (checked with 4.57 and 5.23).
    """
    folder = Path(folder)
    model.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):  # which only their owner could read otherwise
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

    transformers 4 fails at the class's new name, and at special tokens in a list under their new name.
    """
    folder = Path(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    for name in ("is_local", "local_files_only"):  # how it was loaded here, which does not belong in a shared file
        config.pop(name, None)
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
