"""A recipe's arguments: its dataclass, overridden by a YAML file, overridden by the command line."""

import argparse
import atexit
import dataclasses
import difflib
import gc
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers.hf_argparser import HfArgumentParser


T = TypeVar("T")


def parse_arguments(arguments_class: type[T], argv: list[str] | None = None, *, description: str | None = None) -> T:
    """The recipe's arguments from its defaults, `--config file.yaml` and the command line; later wins.

    A YAML file is a command line written down: its keys become `--key=value` before the real arguments, so that one
    parser gives both their types. Whatever is wrong (an unknown option, with the nearest known one; a value of another
    type; a missing file) is printed, and the program ends with exit code 2.
    """
    parser = HfArgumentParser(
        arguments_class,  # type: ignore[arg-type]
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    argv = sys.argv[1:] if argv is None else argv
    known_names = [field.name for field in dataclasses.fields(arguments_class)]  # type: ignore[arg-type]

    config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    config_file = config_parser.parse_known_args(argv)[0].config
    if config_file is not None:
        argv = [*_read_yaml(parser, config_file, known_names), *argv]

    arguments, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        option = next((word for word in unknown if word.startswith("-")), unknown[0])
        name = option.split("=")[0].lstrip("-")
        parser.error(f"unknown argument {option!r}{_suggest(name, known_names)}. --help lists them all.")
    return arguments


def save_arguments(arguments: Any, path: str | Path) -> None:
    """Write the arguments, as resolved, as a YAML file that `--config` reads back."""
    values = {name: value for name, value in dataclasses.asdict(arguments).items() if name != "config"}
    Path(path).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def run(main: Callable[[T], None], arguments_class: type[T], *, description: str | None = None) -> None:
    """Parse the command line and call `main`; a check of ours that fails is printed as one message, not as a traceback.

    Only a ValueError, OSError or RuntimeError raised in hfllm or in the recipe itself is such a check. Anything else
    keeps its traceback, for it is a bug, here or elsewhere.
    """
    if not gc.isenabled():
        # The recipe turned the collector off before it imported. What imports leave, half a million objects, is no
        # garbage and need not be looked through again. At its end Python would: 1.0 s instead of 0.1.
        gc.freeze()
        atexit.register(gc.freeze)
        gc.enable()
    arguments = parse_arguments(arguments_class, description=description)
    try:
        main(arguments)
    except (ValueError, OSError, RuntimeError) as error:
        traceback = error.__traceback__
        while traceback is not None and traceback.tb_next is not None:
            traceback = traceback.tb_next
        module = traceback.tb_frame.f_globals.get("__name__", "") if traceback is not None else ""
        if module != "__main__" and module.split(".")[0] != "hfllm":
            raise
        print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(2)


def _read_yaml(parser: argparse.ArgumentParser, path: str, known_names: list[str]) -> list[str]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        parser.error(f"--config {path}: {error.strerror}. Give the path of a YAML file of this recipe's options.")
    except yaml.YAMLError as error:
        parser.error(f"--config {path} is not YAML: {error}")
    if not isinstance(values, dict):
        parser.error(f"--config {path} must hold `option: value` lines, but holds a {type(values).__name__}.")

    argv = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known_names or name == "config":
            parser.error(f"unknown option {key!r} in {path}{_suggest(name, known_names)}. --help lists them all.")
        if isinstance(value, dict):
            parser.error(f"option {key!r} in {path} is a mapping; give a single value or a list.")
        if isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        elif value is not None:
            argv.append(f"--{name}={value}")
    return argv


def _suggest(name: str, known_names: list[str]) -> str:
    matches = difflib.get_close_matches(name.replace("-", "_"), known_names, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def parse_overrides(pairs: list[str], known_names: Iterable[str]) -> dict[str, Any]:
    """`["mlp_bias=false", "norm_eps=1e-5"]` -> `{"mlp_bias": False, "norm_eps": 1e-05}`; checks the names."""
    overrides = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or name not in known_names:
            raise ValueError(f"{pair!r} is not `field=value` of a known field{_suggest(name, list(known_names))}.")
        overrides[name] = yaml.load(value, Loader=_NumberLoader)
    return overrides


class _NumberLoader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-5 for a string, because it lacks a dot."""


_NumberLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
