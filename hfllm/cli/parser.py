"""The parser of a recipe's command line, and its `--help`."""

import argparse
import copy
import dataclasses
from collections.abc import Collection
from types import MappingProxyType
from typing import Any

from transformers.hf_argparser import HfArgumentParser

from .options import Location, about_of


METAVARS = {int: "N", float: "X", str: "TEXT"}
METAVARS_OF_PATHS = {Location.READ: "PATH", Location.WRITTEN: "PATH", Location.READ_OR_NAMED: "PATH_OR_NAME"}


class OptionParser(HfArgumentParser):
    """`HfArgumentParser`, whose `--help` shows the docstring as it is written, and each option and default once."""

    def __init__(self, arguments_class: Any, *, description: str | None = None):
        self.sections: dict[str, Any] = {}
        super().__init__(
            arguments_class,
            description=description,
            usage="%(prog)s [--config FILE.yaml] [--OPTION VALUE ...]",  # all options would hide an error below them
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def _parse_dataclass_field(self, parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:  # type: ignore[override]
        about = about_of(field)
        plain = copy.copy(field)  # HfArgumentParser changes its type, and gives all metadata to argparse
        plain.metadata = MappingProxyType({})
        declared = _Declaration()
        HfArgumentParser._parse_dataclass_field(declared, plain)  # type: ignore[arg-type]
        keywords = declared.keywords or {}
        if about.location is not None:
            keywords["metavar"] = METAVARS_OF_PATHS[about.location]
        elif "choices" not in keywords:
            keywords["metavar"] = METAVARS.get(keywords["type"], "BOOL")
        keywords["help"] = argparse.SUPPRESS if about.is_hidden else _help(field).replace("%", "%%")
        if about.section not in self.sections:
            self.sections[about.section] = self.add_argument_group(about.section)
        self.sections[about.section].add_argument(f"--{field.name}", **keywords)


class _Declaration:
    """Collects what HfArgumentParser makes of a field, but only its first spelling: neither `--no_x` nor hyphens."""

    keywords: dict[str, Any] | None = None

    def add_argument(self, *names: str, **keywords: Any) -> None:
        self.keywords = self.keywords or keywords


def _help(field: dataclasses.Field) -> str:
    """The help text, with the default in parentheses."""
    about = about_of(field)
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if default is dataclasses.MISSING:
        return f"{about.help} (required)"
    if isinstance(default, bool):
        default = str(default).lower()
    elif isinstance(default, list):
        default = " ".join(map(str, default))
    elif isinstance(default, str) and "\n" in default:
        default = repr(default)
    shown = about.default_is if default in (None, "") else default
    return about.help if shown is None else f"{about.help} (default: {shown})"


def one_spelling(argv: list[str], names: Collection[str]) -> list[str]:
    """The command line with the options spelled as `--help` has them.

    `HfArgumentParser` also takes `--max-steps` for `--max_steps`, and `--no_packing` for `--packing=false`.
    """
    words = []
    for word in argv:
        option, equals, value = word.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if option.startswith("--") and name in names:
            word = f"--{name}{equals}{value}"
        elif option.startswith("--no") and name.removeprefix("no_") in names and not equals:
            word = f"--{name.removeprefix('no_')}=false"
        words.append(word)
    return words
