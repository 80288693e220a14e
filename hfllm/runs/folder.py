"""The folder a run writes into: which run owns it, which files may be deleted, and how results get there.

    with claim_folder(output_dir, recipe="pretrain", overwrite=..., inputs={"model": ...}) as folder:
        ...                                     # open and check everything that the run reads
        changes = folder.begin(identity)        # compare with the run that is there, or delete that one
        if not folder.is_finished(step=...):
            ...
            with folder.writing() as partial:   # results are written beside, and moved in when they are complete
                model.save_pretrained(partial)
            folder.finish(step=...)             # written into the record, last of all

Only `begin` deletes, only with `overwrite`, and only files that the run's record names (see `hfllm.runs.completion`) or
that are in its checkpoints. It follows no symbolic link.
"""

import contextlib
import fnmatch
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator, PartialState

from .completion import FORMAT_VERSION, RECORD, describe_finish, find_fault, read_record, write_record
from .files import flush, named_folder, remove_leftovers
from .identity import as_json, check_same_run, find_differences
from .lock import run_lock
from .manifest import listed_files
from .processes import on_main_process


PARTIAL = ".partial"  # where results are written before they are moved into the folder
CHECKPOINTS = "checkpoints"
ARGUMENTS = "arguments.yaml"
# step-00000100, checkpoint-100, and those that were set aside, deleted in part or not written to their end.
CHECKPOINT_NAME = re.compile(r"((torn|broken|deleting)-)?(step|checkpoint)-\d+(-\d+|\.[\w-]+)?")
WRITING = "writing"  # a folder of checkpoints that are being written
CHECKPOINT_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json"),
    *(
        "base_model.json",
        "state.json",
        "manifest.json",
        "trainer_state.json",
        "training_args.*",
        "optimizer.*",
        "scheduler.*",
    ),
    *("scaler.*", "rng_state*", "random_states.*", "*_gpt.py", "README.md"),
)
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "chat_template.jinja", "tokenizer_report.json"),
)
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
RESULT_FILES = (  # without one of them, a finished run is not finished any more
    *(*WEIGHTS, "config.json", "generation_config.json", "metrics.json", "adapter/adapter_model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json"),
)
EXPORTED_FILES = ("*.gguf", "*.onnx", "*.onnx.data")
# Other files that runs write. Earlier versions kept no record: there, these files are the run's own. In a folder where
# a run begins, no other file may have such a name.
RUN_FILES = (
    *(ARGUMENTS, "environment.json", "log.jsonl", "samples.txt", "metrics.json", "report.html"),
    *("curves.png", "confusion.png", "labels.png", "predictions.png"),
    *("config.json", "generation_config.json", "*_gpt.py", *WEIGHTS, *TOKENIZER_FILES),
    *("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/base_model.json"),
    *("adapter/README.md", *(f"adapter/{name}" for name in TOKENIZER_FILES)),
)


@contextlib.contextmanager
def claim_folder(
    output_dir: str | Path,
    *,
    recipe: str,
    overwrite: bool = False,
    inputs: Mapping[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    accelerator: Accelerator | PartialState | None = None,
    only_look: bool = False,
) -> Iterator["RunFolder"]:
    """Reserve `output_dir` for this run while the block lasts, see `run_lock`; every process enters it.

    Only the lock is written here, and nothing is deleted. `inputs` are the paths and ids that the run reads, by the
    names of their parameters; each part of a list separated by commas is checked. Files in `cache_dir` may be there
    before a run begins. With `only_look`, no lock is taken.

    Raises:
        ValueError: the folder is another recipe's, holds files that no run made, or something that the run reads.
    """
    path = named_folder(output_dir)
    lock = contextlib.nullcontext() if only_look else run_lock(path, recipe=recipe, accelerator=accelerator)
    with lock:
        if not only_look:
            on_main_process(accelerator, lambda: remove_leftovers(path))
        reads: dict[str, Any] = {"inputs": inputs or {}, "cache_dir": cache_dir}
        record = on_main_process(accelerator, lambda: _open(path, recipe, overwrite=overwrite, **reads))
        yield RunFolder(path, recipe=recipe, overwrite=overwrite, record=record, accelerator=accelerator)


class RunFolder:
    """A claimed folder. Every process calls the same methods; the main one writes, and all get its result or error."""

    def __init__(
        self,
        path: Path,
        *,
        recipe: str,
        overwrite: bool,
        record: dict[str, Any],
        accelerator: Accelerator | PartialState | None,
    ):
        self.path, self.recipe, self.overwrite, self.record = path, recipe, overwrite, record
        self.accelerator = accelerator
        self.moved: list[str] = []  # what the last `writing` moved into the folder

    @property
    def is_of_earlier_version(self) -> bool:
        """Whether the run that is here was made by a version that kept no record, and noted only its options."""
        return bool(self.record.get("is_old"))

    @property
    def finished_step(self) -> int | None:
        """The step at which the run that is here was finished, if it was."""
        return (self.record.get("finished") or {}).get("step")

    def check_same(self, identity: Mapping[str, Any]) -> None:
        """Refuse another run than the one that is here, unless that is to be overwritten; see `check_same_run`.

        A run that ended before its first checkpoint has nothing to resume, so any other run may replace it.
        """
        saved = self.record.get("identity")
        if saved is not None and not self.overwrite and self._has_something():
            current = as_json(dict(identity))
            if self.record.get("is_old"):  # it noted all of its options, and nothing else
                saved = {name: value for name, value in saved.items() if name in current}
            check_same_run(saved, current, self.path, fork_from=None if self.record["finished"] else _newest(self.path))

    def make_way(self) -> None:
        """With `overwrite`, delete the run that is here, once; call it after everything else was checked.

        Raises:
            ValueError: a folder of the run's is a symbolic link.
        """
        if not self.overwrite and not (self.record.get("identity") and not self._has_something()):
            return

        def delete() -> dict[str, Any]:
            files = _own_files(self.path, self.record)
            write_record(self.path, {**self._new_record(), "files": sorted(files)})  # no run is finished any more
            _delete(self.path, files)
            for checkpoint in _checkpoints(self.path):
                if not any(checkpoint.iterdir()):
                    checkpoint.rmdir()
                    continue
                # It holds files that are not the run's, and must not be taken for a broken checkpoint.
                checkpoint.rename(checkpoint.with_name(f"kept-{checkpoint.name}"))
            write_record(self.path, self._new_record())
            return self._new_record()

        self.record = on_main_process(self.accelerator, delete)
        self.overwrite = False

    def begin(
        self,
        identity: Mapping[str, Any],
        *,
        options: Mapping[str, Any] | None = None,
        files: Iterable[str] = (),
    ) -> list[str]:
        """Begin a run, or resume the one that is here; returns the options that changed since its last start, in words.

        `options` may change from start to start, `identity` may not. `files` are those that the run writes while it
        trains; the files of `writing` need not be named.

        Raises:
            ValueError: the folder holds another run; says what differs.
        """
        self.check_same(identity)
        self.make_way()
        options = as_json(dict(options or {}))
        before = {name: value for name, value in (self.record.get("options") or {}).items() if name in options}
        changes = find_differences(before, {name: value for name, value in options.items() if name in before})

        def note() -> dict[str, Any]:
            own = {*self.record.get("files", []), *files}
            record = {**self._new_record(), **self.record, "identity": as_json(dict(identity)), "options": options}
            record |= {"files": sorted(own)}
            record.pop("is_old", None)
            write_record(self.path, record)
            return record

        self.record = on_main_process(self.accelerator, note)
        return changes

    @contextlib.contextmanager
    def writing(self) -> Iterator[Path]:
        """A folder to write results into; its files are moved into the run's folder at the end of the block.

        They are flushed to the disk first and `config.json` is moved last, so that a reader finds a whole model or
        none. After an error none is moved. Weights of another form (other shards) that the run wrote before are
        deleted.
        """
        partial = self.path / PARTIAL

        def clear() -> None:
            if partial.is_symlink():
                partial.unlink()
            shutil.rmtree(partial, ignore_errors=True)

        def make() -> None:
            clear()
            partial.mkdir(parents=True)

        on_main_process(self.accelerator, make)
        try:
            yield partial
            self.record, self.moved = on_main_process(self.accelerator, lambda: self._move_in(partial))
        finally:
            if self.accelerator is None or self.accelerator.is_main_process:
                clear()

    def reopen(self) -> None:
        """Note that the run is no longer finished, before it is trained further."""
        self._change(finished=None)

    def finish(self, *, step: int | None = None, files: Iterable[str] | None = None) -> None:
        """Note that the run is finished at `step` and that `files` are its result; the last thing that is written.

        By default these are the files that open the model (RESULT_FILES) and `metrics.json`, as `writing` moved them
        in. Without one of them the run is not finished. Steps that may fail without harm to the result (the page, a
        push) are noted by `note_done`.
        """

        def describe() -> dict[str, Any]:
            names = files
            if names is None:
                own = [name for name in self.record["files"] if _matches([name], RESULT_FILES)]
                names = [name for name in own if (self.path / name).exists()]
            return describe_finish(self.path, step=step, files=list(names))

        self._change(finished=on_main_process(self.accelerator, describe))

    def is_finished(self, *, step: int | None = None) -> bool:
        """Whether the run ended at `step` and its result is still as it was written, by the weights' sha256."""
        return not self.find_fault(step=step)

    def find_fault(self, *, step: int | None = None) -> str:
        """Why the run is not finished, or its result not as it was written; empty if it is."""
        if self.overwrite:
            return "it is to be overwritten"
        return on_main_process(self.accelerator, lambda: find_fault(self.path, self.record.get("finished"), step=step))

    def note_done(self, **what: Any) -> None:
        """Note further steps that are done after a run has finished, e.g. `page=True`, `push="https://..."`."""
        finished = self.record["finished"]
        self._change(finished={**finished, "done": {**finished["done"], **what}})

    def is_done(self, what: str, *, file: str | None = None) -> bool:
        """Whether `note_done` has noted this step since the run was finished, and the `file` it made still exists."""
        if file is not None and not on_main_process(self.accelerator, (self.path / file).exists):
            return False
        return bool(((self.record.get("finished") or {}).get("done") or {}).get(what))

    def _has_something(self) -> bool:
        """Whether the run that is here has a result or a checkpoint, even a broken one."""
        if self.record.get("finished"):
            return True
        return on_main_process(
            self.accelerator, lambda: (self.path / "config.json").exists() or bool(_checkpoints(self.path))
        )

    def _new_record(self) -> dict[str, Any]:
        empty: dict[str, Any] = {"identity": None, "options": None, "finished": None}
        return {"format_version": FORMAT_VERSION, "recipe": self.recipe, "files": [], **empty}

    def _change(self, **entries: Any) -> None:
        def change() -> dict[str, Any]:
            record = {**self.record, **entries}
            write_record(self.path, record)
            return record

        self.record = on_main_process(self.accelerator, change)

    def _move_in(self, partial: Path) -> tuple[dict[str, Any], list[str]]:
        names = sorted(path.relative_to(partial).as_posix() for path in partial.rglob("*") if not path.is_dir())
        for name in names:
            _refuse_links(self.path, name)
            flush(partial / name)
        before = set(self.record.get("files", []))
        record = {**self._new_record(), **self.record, "files": sorted(before | set(names))}
        write_record(self.path, record)
        for name in sorted(names, key=lambda name: (Path(name).name == "config.json", name)):
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).replace(self.path / name)
        flush(self.path)
        if _matches(names, WEIGHTS):
            stale = [name for name in before - set(names) if _matches([name], WEIGHTS)]
            _delete(self.path, stale)
            record = {**record, "files": [name for name in record["files"] if name not in stale]}
            write_record(self.path, record)
        return record, names


def _open(
    path: Path, recipe: str, *, overwrite: bool, inputs: Mapping[str, Any], cache_dir: str | Path | None
) -> dict[str, Any]:
    """The record of the run that is in the folder, empty if a new run may begin there."""
    record = read_record(path) or _record_of_earlier_version(path, recipe)
    if record and record["recipe"] != recipe:
        raise ValueError(
            f"output_dir {path} belongs to a run of another recipe, {record['recipe']}. Choose another folder, or "
            "delete that one."
        )
    if overwrite or not record:
        _check_inputs(path, inputs)
    if not record:
        _check_foreign(path, overwrite=overwrite, cache_dir=cache_dir)
    if overwrite:
        for name in _own_files(path, record):
            _refuse_links(path, name)
        if (path / CHECKPOINTS).is_symlink():
            _refuse_link(path / CHECKPOINTS)
    return record


def _record_of_earlier_version(path: Path, recipe: str) -> dict[str, Any]:
    """A record for a run of a version without records: its options are in arguments.yaml, its files by known names."""
    try:
        options = yaml.safe_load((path / ARGUMENTS).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, yaml.YAMLError):
        options = None
    if not isinstance(options, dict):
        raise ValueError(
            f"{path / ARGUMENTS} cannot be read, so nothing says whose run this is. Delete it if the folder holds "
            "nothing that you need, or choose another output_dir."
        )
    names = [name for name in _visible_files(path) if _matches([name], RUN_FILES)]
    finished = None
    if {"metrics.json", "config.json"} <= set(names):
        try:
            metrics = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
            result = {"sha256": {}, "files": ["config.json", "metrics.json"], "done": {"page": True}}
            finished = {"step": metrics["train_steps"], **result}
        except (ValueError, KeyError, TypeError):
            pass  # it was killed while it wrote them
    return {
        "format_version": FORMAT_VERSION,
        "recipe": recipe,
        "files": sorted(names),
        "identity": as_json(options),
        "options": as_json(options),
        "finished": finished,
        "is_old": True,
    }


def _check_inputs(path: Path, inputs: Mapping[str, Any]) -> None:
    """Refuse a folder that holds an input of the run, which would be overwritten."""
    folder = path.resolve()
    for parameter, value in inputs.items():
        for text in value if isinstance(value, list | tuple) else [value]:
            if not text:
                continue
            for part in {str(text), *str(text).split(",")}:
                place = Path(part.strip()).expanduser()
                if not part.strip() or not place.exists():
                    continue
                if place.resolve() == folder:
                    raise ValueError(
                        f"output_dir {path} is {parameter} itself, which would be overwritten. Choose another "
                        "output_dir."
                    )
                if folder in place.resolve().parents or folder in place.absolute().parents:
                    raise ValueError(
                        f"{parameter} {part.strip()} is in output_dir {path}, whose files would be overwritten. "
                        "Choose another output_dir."
                    )


def _check_foreign(path: Path, *, overwrite: bool, cache_dir: str | Path | None) -> None:
    """Refuse a folder with files that no run made; to overwrite in it, only if a run writes none of their names.

    A run that was killed while it prepared its text has left nothing but its cache, perhaps in a folder within.
    """
    files = _visible_files(path)
    cache = Path(cache_dir or path).expanduser().resolve()
    if path.resolve() in cache.parents:
        below = f"{cache.relative_to(path.resolve()).as_posix()}/"
        files = [name for name in files if not name.startswith(below)]
    if overwrite:
        files = [name for name in files if _matches([name], (*RUN_FILES, *EXPORTED_FILES))]
    if not files:
        return
    listing = ", ".join(files[:5]) + (f" and {len(files) - 5:,} more" if len(files) > 5 else "")
    model = " It is a model that no run of this recipe made." if {"config.json"} & set(files) else ""
    way = "" if overwrite else "overwrite_output_dir deletes the files of an earlier run only. "
    raise ValueError(
        f"output_dir {path} holds files that no run made, and a run could overwrite them: {listing}.{model} {way}"
        "Choose another output_dir, or delete them yourself."
    )


def _visible_files(path: Path) -> list[str]:
    """The paths in a folder of all files that are not hidden; a link to a folder counts as one."""
    if not path.is_dir():
        return []
    found = []
    for child in sorted(path.iterdir()):
        if child.name.startswith(".") or child.name == "lost+found":
            continue
        if child.is_symlink() or not child.is_dir():
            found.append(child.name)
        else:
            found += [f"{child.name}/{name}" for name in _visible_files(child)]
    return found


def _own_files(path: Path, record: Mapping[str, Any]) -> set[str]:
    """The paths in a run's folder that are the run's own: what its record names, and the files of its checkpoints."""
    names = set(record.get("files", [])) - {RECORD, "README.md"}  # the card has a part that its reader may have written
    for checkpoint in _checkpoints(path) if record else []:
        place = checkpoint.relative_to(path).as_posix()
        files = _visible_files(checkpoint)
        listed = listed_files(checkpoint)
        known = (*CHECKPOINT_FILES, *TOKENIZER_FILES)
        names |= {f"{place}/{name}" for name in files if name in listed or _matches([name], known)}
    return names


def _newest(path: Path) -> Path | None:
    """The checkpoint with the highest step, by its name."""
    folders = [child for child in _checkpoints(path) if re.fullmatch(r"(step|checkpoint)-\d+", child.name)]
    return max(folders, key=lambda child: int(child.name.split("-")[1]), default=None)


def _checkpoints(path: Path) -> list[Path]:
    """The folders of a run that are checkpoints, or were set aside; no link is followed."""
    folders = [path / CHECKPOINTS, path / CHECKPOINTS / WRITING]
    return [
        child
        for folder in folders
        if folder.is_dir() and not (path / CHECKPOINTS).is_symlink() and not folder.is_symlink()
        for child in folder.iterdir()
        if CHECKPOINT_NAME.fullmatch(child.name) and child.is_dir() and not child.is_symlink()
    ]


def _delete(path: Path, names: Iterable[str]) -> None:
    """Delete files of a folder, and the folders in it that become empty."""
    folders = set()
    for name in names:
        _refuse_links(path, name)
        (path / name).unlink(missing_ok=True)
        folders |= {parent for parent in (path / name).parents if path in parent.parents}
    for folder in sorted(folders, reverse=True):
        with contextlib.suppress(OSError):  # it holds something else
            folder.rmdir()


def _refuse_links(path: Path, name: str) -> None:
    """Refuse a path that leads out of the folder through a symbolic link; a file that is itself a link is safe."""
    for parent in reversed((path / name).parents):
        if path in parent.parents and parent.is_symlink():
            _refuse_link(parent)


def _refuse_link(link: Path) -> None:
    raise ValueError(
        f"{link} is a symbolic link to {link.resolve()}, and nothing is deleted or replaced through a link. Delete the "
        "link, or choose another output_dir."
    )


def _matches(names: Iterable[str], patterns: Iterable[str]) -> bool:
    return any(
        name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)
        for name in names
        for pattern in patterns
    )
