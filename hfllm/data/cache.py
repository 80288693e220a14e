"""Arrow files on disk that are whole or absent, found again by what they were made from."""

import errno
import hashlib
import json
import logging
import os
import platform
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from filelock import FileLock, Timeout


logger = logging.getLogger(__name__)

DATA_FILE = "data.arrow"
ACCOUNT_FILE = "account.json"
REMEDY = "Name another folder with cache_dir or the environment variable HF_DATASETS_CACHE."


def cached_dataset(
    kind: str,
    made_from: dict[str, Any],
    write: Callable[[Path], dict[str, Any]],
    *,
    cache_dir: str | os.PathLike | None = None,
) -> tuple[datasets.Dataset, dict[str, Any]]:
    """The memory-mapped dataset made from `made_from`, and its account; `write` makes them when no whole one is there.

    `write` gets the path of the Arrow stream file to write and returns the account, which is kept as JSON beside it.
    Every text, option and format version that the file depends on belongs into `made_from`: it is the file's address.
    """
    root = Path(cache_dir).expanduser() if cache_dir else Path(datasets.config.HF_DATASETS_CACHE) / "hfllm"
    address = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    folder = root / f"{kind}-{address[:40]}"
    account = _account_if_whole(folder)
    if account is None:
        account = _build(folder, write)
    else:
        logger.info("Found %s, made before.", folder)
    return datasets.Dataset.from_file(str(folder / DATA_FILE)), account


def _account_if_whole(folder: Path) -> dict[str, Any] | None:
    """The account of a cached folder, or None if the folder is absent, truncated or unreadable."""
    try:
        sidecar = json.loads((folder / ACCOUNT_FILE).read_text(encoding="utf-8"))
        if (folder / DATA_FILE).stat().st_size == sidecar["file_bytes"]:
            return sidecar["account"]
    except (FileNotFoundError, NotADirectoryError):
        if not folder.exists():
            return None
    except (ValueError, KeyError, TypeError):  # a sidecar that is not the JSON we wrote
        pass
    logger.warning("%s is not whole: it is made again.", folder)
    return None


def _build(folder: Path, write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Write the folder beside its place, force it to disk, and rename it: whoever sees it sees all of it."""
    # The host is in the name because the lock below may not reach other machines on a shared file system.
    prefix = f".{folder.name}.{platform.node()}."
    temporary = folder.parent / f"{prefix}{uuid.uuid4().hex[:8]}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{folder.name}.lock")
        _acquire(lock, folder)
    except OSError as error:
        message = f"Cannot write to the cache folder ({error.strerror}). {REMEDY}"
        raise OSError(error.errno, message, str(folder.parent)) from error
    try:
        if (account := _account_if_whole(folder)) is not None:  # another process made it while we waited for the lock
            return account
        # We hold the lock, so what this machine began earlier under this name was interrupted and will never be whole.
        for leftover in folder.parent.glob(f"{prefix}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir()
        account = write(temporary / DATA_FILE)
        _seal(temporary, account)
        return _move_into_place(temporary, folder, account)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(folder.parent).free
        message = f"The disk is full ({free:,} bytes are free); nothing was kept. {REMEDY}"
        raise OSError(error.errno, message, str(folder.parent)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        lock.release()


def _acquire(lock: FileLock, folder: Path) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("Another process is making %s: waiting for it.", folder)
        lock.acquire()


def _seal(temporary: Path, account: dict[str, Any]) -> None:
    """Write the sidecar with the size of the data, and force both files and the folder to disk."""
    sidecar = {"file_bytes": (temporary / DATA_FILE).stat().st_size, "account": account}
    (temporary / ACCOUNT_FILE).write_text(json.dumps(sidecar, indent=2), encoding="utf-8")
    for path in (temporary / DATA_FILE, temporary / ACCOUNT_FILE, temporary):
        _fsync(path)


def _move_into_place(temporary: Path, folder: Path, account: dict[str, Any]) -> dict[str, Any]:
    if folder.exists():  # broken, or made meanwhile on a machine that our lock does not reach
        if (made_meanwhile := _account_if_whole(folder)) is not None:
            return made_meanwhile
        shutil.rmtree(folder)
    try:
        temporary.rename(folder)
    except OSError:
        if (made_meanwhile := _account_if_whole(folder)) is not None:
            return made_meanwhile
        raise
    _fsync(folder.parent)
    return account


def _fsync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
