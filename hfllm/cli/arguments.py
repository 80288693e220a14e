"""A recipe's arguments: its dataclass, overridden by a YAML file, overridden by the command line."""

import argparse
import atexit
import dataclasses
import difflib
import errno
import gc
import io
import os
import re
import select
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from .exit_code import noted_exit_code
from .options import Location, about_of
from .parser import OptionParser, one_spelling
from .values import check_text, printable, resolve_path


T = TypeVar("T")

# Errors of the system about a file that was asked for, or about the disk: the user can act on them, so no traceback.
ABOUT_FILES = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP),
}
ABOUT_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


# What `accelerate launch` takes, and recipes do not.
LAUNCHER_OPTIONS = ("mixed_precision", "bf16", "fp16", "num_processes", "num_machines", "config_file")


def parse_arguments(arguments_class: type[T], argv: list[str] | None = None, *, description: str | None = None) -> T:
    """The recipe's arguments from its defaults, `--config file.yaml` and the command line; later wins.

    A YAML file is a command line written down: its keys become `--key=value` before the real arguments, so that one
    parser gives both their types. Paths are resolved (see `resolve_path`). Whatever is wrong (an unknown option, with
    the nearest known one; a value of another type; text that is not UTF-8; an empty path; a missing file) is printed,
    and the program ends with exit code 2.
    """
    parser = OptionParser(arguments_class, description=description)
    fields = dataclasses.fields(arguments_class)  # type: ignore[arg-type]
    known_names = [field.name for field in fields]
    argv = one_spelling(sys.argv[1:] if argv is None else argv, known_names)

    config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    config_file = config_parser.parse_known_args(argv)[0].config
    if config_file is not None:
        argv = [*_read_yaml(parser, _checked(parser, "config", config_file, Location.READ), known_names), *argv]

    try:
        arguments, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:  # of a dataclass that checks its values
        parser.error(str(error))
    if unknown:
        word = next((word for word in unknown if word.startswith("-")), unknown[0])
        name = word.split("=")[0].lstrip("-").replace("-", "_")
        hint = f"{_suggest(name, known_names)} --help lists them all."
        if name in LAUNCHER_OPTIONS:
            hint = f": it is for the launcher, as in `accelerate launch --{name} ... {Path(sys.argv[0]).name} ...`."
            if name in ("bf16", "fp16"):
                hint = f": precision is for the launcher, as in `accelerate launch --mixed_precision {name} ...`."
        parser.error(f"unknown argument {word!r}{hint}")
    for field in fields:
        value, location = getattr(arguments, field.name), about_of(field).location
        if isinstance(value, list):
            setattr(arguments, field.name, [_checked(parser, field.name, each, location) for each in value])
        else:
            setattr(arguments, field.name, _checked(parser, field.name, value, location))
    return arguments


def _checked(parser: argparse.ArgumentParser, name: str, value: Any, location: Location | None) -> Any:
    """A value as the recipe gets it: text that can be written down, and a path that is resolved."""
    if not isinstance(value, str):
        return value
    try:
        check_text(value)
        return value if location is None else resolve_path(value, location)
    except ValueError as error:
        parser.error(f"--{name} '{printable(value)}': {error}")


def check_recipe(arguments: Any) -> None:
    """Refuse an `output_dir` whose `arguments.yaml` another recipe wrote: two runs of two kinds do not share a folder.

    Not even to overwrite it: this recipe would not delete and write again all files of the other one.

    Raises:
        ValueError: names some of the options that the recipe at hand does not have.
    """
    path = Path(arguments.output_dir) / "arguments.yaml"
    own = {field.name for field in dataclasses.fields(arguments)}
    if others := sorted(read_arguments(path).keys() - own):
        raise ValueError(
            f"--output_dir {arguments.output_dir} belongs to another recipe, whose options ({', '.join(others[:4])}) "
            f"are in its {path.name}. Choose another folder, or delete that one."
        )


def read_arguments(path: str | Path) -> dict[str, Any]:
    """What `save_arguments` wrote; nothing if there is no such file.

    Raises:
        ValueError: the file is not a YAML file of options.
    """
    path = Path(path)
    if not path.is_file():
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        values = None
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} cannot be read, so nothing says whose run this is. Repair or delete it, or choose another folder."
        )
    return values


def save_arguments(arguments: Any, path: str | Path) -> None:
    """Write the arguments, as resolved, as a YAML file that `--config` reads back."""
    values = {name: value for name, value in dataclasses.asdict(arguments).items() if name != "config"}
    Path(path).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def run(main: Callable[[T], None], arguments_class: type[T], *, description: str | None = None) -> None:
    """Parse the command line and call `main`; if one of our checks fails, print its message without a traceback.

    Such checks are a ValueError, OSError, RuntimeError or FloatingPointError raised in hfllm or in the recipe itself,
    and the system's errors about a file or a full disk. Anything else keeps its traceback, because it is a bug, here or
    elsewhere. If the reader of a pipe has gone (`| head -1`), the program ends silently. Characters that the terminal
    or file cannot encode are printed with escapes.
    """
    # The garbage collector need not search what the imports created, also not when Python ends: 0.1 s instead of 1.0.
    gc.freeze()
    atexit.register(gc.freeze)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal in ASCII shows a sample's \u00e9, and no error
    with noted_exit_code():
        _run(main, parse_arguments(arguments_class, description=description))


def _run(main: Callable[[T], None], arguments: T) -> None:
    try:
        main(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be printed goes there
        sys.exit(128 + 13)  # as a shell says of a program that SIGPIPE ended
    except KeyboardInterrupt:
        print(
            "\nInterrupted. The same command starts again, and resumes a run that saved a checkpoint.", file=sys.stderr
        )
        sys.exit(128 + 2)
    except Exception as error:
        if (said := _describe_error(error)) is None:
            raise
        print(f"\nerror: {with_dashes(said, vars(arguments))}", file=sys.stderr)
        sys.exit(2)


def with_dashes(message: str, names: Iterable[str]) -> str:
    """A message of the library, which speaks of parameters, with the options as the command line spells them.

    `block_size=512` becomes `--block_size 512`. Alone, a name becomes `--block_size` if it has an underscore or is in
    backticks: `stride` in backticks is the option, without them an ordinary word. In quotes, paths and dotted names it
    stays.
    """
    names = sorted(names, key=len, reverse=True)
    any_name = "|".join(names)
    underscored = "|".join(name for name in names if "_" in name) or "(?!)"
    pattern = (
        rf"`(?P<quoted>{any_name})(?:=(?P<value>[^`]*))?`"
        rf"|(?<![\w./'\"`-])(?:(?P<assigned>{any_name})=(?=[^\s=])|(?P<alone>{underscored})(?![\w('\"`/=-]|\.\w))"
    )

    def spell(match: re.Match[str]) -> str:
        if match["assigned"]:
            return f"--{match['assigned']} "
        return f"--{match['quoted'] or match['alone']}{'' if match['value'] is None else ' ' + match['value']}"

    return re.sub(pattern, spell, message)


def _reader_is_gone() -> bool:
    """Whether the pipe that broke is standard output, and not another pipe of the program."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _describe_error(error: Exception) -> str | None:
    """The message of an error that the user can act on; None if it is a bug."""
    in_rust = re.search(r"\(os error (\d+)\)", str(error))  # as tokenizers and safetensors say it
    code = error.errno if isinstance(error, OSError) else int(in_rust[1]) if in_rust else None
    if code in ABOUT_THE_DISK:
        name = getattr(error, "filename", None)
        where = "" if name is None else f"{name}: "
        return f"{where}{os.strerror(code)}. Free disk space, and start the same command again."
    if code in ABOUT_FILES and isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    module = traceback.tb_frame.f_globals.get("__name__", "") if traceback is not None else ""
    is_check = isinstance(error, (ValueError, OSError, RuntimeError, FloatingPointError))
    return str(error) if is_check and (module == "__main__" or module.split(".")[0] == "hfllm") else None


def _read_yaml(parser: argparse.ArgumentParser, path: str, known_names: list[str]) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8")
        values, node = yaml.safe_load(text) or {}, yaml.compose(text)
    except OSError as error:
        parser.error(f"--config {path}: {error.strerror}. Give the path of a YAML file of this recipe's options.")
    except UnicodeDecodeError as error:
        parser.error(
            f"--config {path} is not UTF-8: byte {error.start + 1:,} is wrong. Convert it, for example with iconv."
        )
    except yaml.YAMLError as error:
        parser.error(f"--config {path} is not YAML: {error}")
    if not isinstance(values, dict):
        parser.error(f"--config {path} must hold `option: value` lines, but holds a {type(values).__name__}.")

    argv = []
    assert isinstance(node, yaml.MappingNode | None)
    names = [key.value.replace("-", "_") for key, _ in node.value] if node is not None else []
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:  # YAML would take the last one
        parser.error(f"--config {path} has {', '.join(map(repr, twice))} more than once. Leave one of them.")
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known_names or name == "config":
            parser.error(f"unknown option {key!r} in {path}{_suggest(name, known_names)} --help lists them all.")
        if isinstance(value, dict):
            parser.error(f"option {key!r} in {path} is a mapping; give a single value or a list.")
        if isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        elif value is not None:
            argv.append(f"--{name}={value}")
    return argv


def _suggest(name: str, known_names: list[str]) -> str:
    matches = difflib.get_close_matches(name.replace("-", "_"), known_names, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else "."


def parse_overrides(pairs: list[str], known_names: Iterable[str]) -> dict[str, Any]:
    """`["mlp_bias=false", "norm_eps=1e-5"]` -> `{"mlp_bias": False, "norm_eps": 1e-05}`; checks the names."""
    overrides = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or name not in known_names:
            raise ValueError(f"{pair!r} is not `field=value` of a known field{_suggest(name, list(known_names))}")
        overrides[name] = yaml.load(value, Loader=_NumberLoader)
    return overrides


class _NumberLoader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-5 for a string, because it lacks a dot."""


_NumberLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
