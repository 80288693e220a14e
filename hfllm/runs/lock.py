"""The lock that keeps two runs out of one folder."""

import contextlib
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
from accelerate import Accelerator

from .processes import on_main_process


logger = logging.getLogger(__name__)


@contextlib.contextmanager
def run_lock(output_dir: str | Path, *, accelerator: Accelerator | None = None) -> Iterator[None]:
    """Keep `output_dir` to this run while the block lasts: a second run there is refused, and told who holds it.

    The file `.lock` names the main process and its host. One left behind by a run that died on this host is taken over;
    whether a run on another host still lives cannot be seen from here, so its lock is respected.
    """
    path = Path(output_dir) / ".lock"
    text = on_main_process(accelerator, lambda: _take_lock(path))
    try:
        yield
    finally:
        if accelerator is None or accelerator.is_main_process:
            with contextlib.suppress(FileNotFoundError):
                if path.read_text(encoding="utf-8") == text:
                    path.unlink()


def _take_lock(path: Path) -> str:
    """Create the lock file, or raise; returns its text."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"The output folder {path.parent} cannot be used: {error}. Choose another output_dir.") from error
    process = psutil.Process()
    text = json.dumps(
        {
            "pid": process.pid,
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "create_time": process.create_time(),
        }
    )
    while True:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):  # released, or taken over, in this very moment: try again
                _remove_stale_lock(path)
            continue
        except OSError as error:
            raise OSError(f"The output folder {path.parent} cannot be used: {error}. Choose another one.") from error
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        return text


def _remove_stale_lock(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    try:
        holder = json.loads(text)
        name = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
        is_stale = holder["host"] == socket.gethostname() and not _is_alive(holder["pid"], holder["create_time"])
    except (ValueError, KeyError, TypeError):
        name, is_stale = "a process whose lock file cannot be read", False
    if not is_stale:
        raise RuntimeError(
            f"Another run is using {path.parent}: {name}. Choose another output_dir; "
            f"if you know that run to be dead, delete {path} and start again."
        )
    logger.warning("Taking over %s from a run that ended without releasing it: %s.", path.parent, name)
    aside = path.with_name(f".lock-{uuid.uuid4().hex}")
    path.rename(aside)
    if aside.read_text(encoding="utf-8") != text:  # a third run was faster: this is its lock, not the stale one
        aside.rename(path)
    else:
        aside.unlink()


def _is_alive(pid: int, create_time: float) -> bool:
    """Whether the process still runs, and is not another one that got its number (in a container, always the same)."""
    try:
        process = psutil.Process(pid)
        # The system derives the time from its clock, which is now and then set: hence not to the second.
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - create_time) < 60
    except psutil.NoSuchProcess:
        return False
