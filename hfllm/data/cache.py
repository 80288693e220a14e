"""Arrow files on disk that are whole or absent, found again by what they were made from, and verified when read.

    rows-4f1c.../
        data.arrow      a schema and record batches, which are mapped into memory
        account.json    what `write` returned; the file's size, a checksum of each record batch and one of all the rest

The checksums are xxh3_64: they find errors of a disk, a cable or a memory, and take a tenth of the time of a sha256.
"""

import errno
import hashlib
import json
import logging
import mmap
import os
import platform
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import xxhash
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
    verify_now: bool = True,
) -> tuple[datasets.Dataset, dict[str, Any]]:
    """The memory-mapped dataset made from `made_from`, and its account; `write` makes them if there is no sound one.

    `write` gets the path of the Arrow stream file to write and returns the account, which is kept as JSON beside it.
    Every text, option and format version that the file depends on belongs in `made_from`: it is the file's address.

    The whole file is verified, and made again if it has changed since it was written. With `verify_now=False`, for
    files that are read at random and perhaps never whole, `batch_verifier` verifies the record batches later.
    """
    root = Path(cache_dir).expanduser() if cache_dir else Path(datasets.config.HF_DATASETS_CACHE) / "hfllm"
    address = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    folder = root / f"{kind}-{address[:40]}"
    return made_once(folder, write, verify_now=verify_now)


def made_once(
    folder: Path, write: Callable[[Path], dict[str, Any]], *, verify_now: bool = True
) -> tuple[datasets.Dataset, dict[str, Any]]:
    """As `cached_dataset`, in a folder of that name."""
    account = _account_if_sound(folder, verify_now, report=True)
    if account is None:
        account = _build(folder, write, verify_now)
    else:
        logger.info("Found %s, made before.", folder)
    return datasets.Dataset.from_file(str(folder / DATA_FILE)), account


def find_made(folder: Path) -> tuple[datasets.Dataset, dict[str, Any]] | None:
    """What `made_once` made in the folder, verified; None if it is not there, or damaged."""
    account = _account_if_sound(folder, verify_batches=True)
    return None if account is None else (datasets.Dataset.from_file(str(folder / DATA_FILE)), account)


def batch_verifier(dataset: datasets.Dataset) -> Callable[[int], None]:
    """A function that verifies one record batch of a dataset of `cached_dataset`, by its number, the first time.

    It raises an OSError if the batch has changed since it was written.
    """
    folder = Path(dataset.cache_files[0]["filename"]).parent
    batches = json.loads((folder / ACCOUNT_FILE).read_text(encoding="utf-8"))["batches"]
    return verifier(
        [(folder / DATA_FILE, batches)],
        f"Cached data in {folder} has changed since it was written",
        "Delete that folder and start the same command again: it is made again, and a run resumes from its newest "
        "checkpoint.",
    )


def verifier(files: list[tuple[Path, list[list[Any]]]], problem: str, remedy: str) -> Callable[[int], None]:
    """A function that verifies a record batch of some files, numbered through all of them, the first time it is read.

    It raises an OSError with `problem` and `remedy` if the batch has not the checksum that `seal_of` noted.
    """
    places = [(_mapped(path), batch) for path, batches in files for batch in batches]
    verified: set[int] = set()

    def verify(number: int) -> None:
        if number in verified:
            return
        if not _is_sound(*places[number]):
            raise OSError(
                f"{problem}: record batch {number:,} of {len(places):,} has another checksum. {remedy} If it happens "
                "again, check disk and memory."
            )
        verified.add(number)

    return verify


def seal_of(path: Path) -> dict[str, Any]:
    """Size and checksums of an Arrow stream file, see the head of this module."""
    content = _mapped(path)
    batches = []
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.MessageReader.open_stream(source)
        for message in reader:
            if message.type == "record batch" and message.body is not None:
                offset = source.tell() - message.body.size
                checksum = xxhash.xxh3_64_hexdigest(content[offset : offset + message.body.size])
                batches.append([offset, message.body.size, checksum])
    return {"file_bytes": path.stat().st_size, "batches": batches, "frame": _checksum_of_frame(content, batches)}


def is_as_sealed(path: Path, seal: dict[str, Any], *, verify_batches: bool) -> bool:
    """Whether a file has the size and the checksums of its seal; the batches are read only with `verify_batches`."""
    if path.stat().st_size != seal["file_bytes"]:
        return False
    content = _mapped(path)
    is_sound = seal["frame"] == _checksum_of_frame(content, seal["batches"])
    return is_sound and (not verify_batches or all(_is_sound(content, batch) for batch in seal["batches"]))


def _account_if_sound(folder: Path, verify_batches: bool, *, report: bool = False) -> dict[str, Any] | None:
    """The account of a cached folder, or None if the folder is absent, damaged, or of an earlier version.

    `report` warns of a folder that is there and will be made again.
    """
    try:
        sidecar = json.loads((folder / ACCOUNT_FILE).read_text(encoding="utf-8"))
        is_earlier = "batches" not in sidecar and {"file_bytes", "account"} <= sidecar.keys()
        is_sound = not is_earlier and sidecar["checksum"] == checksum_of_json(sidecar)
        if is_sound and is_as_sealed(folder / DATA_FILE, sidecar, verify_batches=verify_batches):
            return sidecar["account"]
    except (FileNotFoundError, NotADirectoryError):
        if not folder.exists():
            return None
        is_earlier = False
    except (ValueError, KeyError, TypeError, AttributeError):  # a sidecar that is not the JSON we wrote
        is_earlier = False
    if report:
        what = "was made by an earlier version" if is_earlier else "is not whole, or has changed since it was written"
        logger.warning("%s %s: it is made again.", folder, what)
    return None


def _is_sound(content: memoryview, batch: list[Any]) -> bool:
    offset, num_bytes, checksum = batch
    return xxhash.xxh3_64_hexdigest(content[offset : offset + num_bytes]) == checksum


def _checksum_of_frame(content: memoryview, batches: list[list[Any]]) -> str:
    """A checksum of all but the batches' data: the schema, and where in the file each column begins and ends."""
    digest = xxhash.xxh3_64()
    start = 0
    for offset, num_bytes, _ in batches:
        digest.update(content[start:offset])
        start = offset + num_bytes
    digest.update(content[start:])
    return digest.hexdigest()


def checksum_of_json(content: dict[str, Any]) -> str:
    """A checksum of all entries but `checksum`."""
    rest = {name: value for name, value in content.items() if name != "checksum"}
    return xxhash.xxh3_64_hexdigest(json.dumps(rest, sort_keys=True).encode())


def _mapped(path: Path) -> memoryview:
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _build(folder: Path, write: Callable[[Path], dict[str, Any]], verify_batches: bool) -> dict[str, Any]:
    """Write the folder beside its final place, force it to disk, and rename it: nobody sees a part of it."""
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
        if (
            account := _account_if_sound(folder, verify_batches)
        ) is not None:  # another process made it while we waited for the lock
            return account
        # We hold the lock, so an unfinished folder of this machine under this name is left from an interruption.
        for leftover in folder.parent.glob(f"{prefix}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir()
        account = write(temporary / DATA_FILE)
        _seal(temporary, account)
        return _move_into_place(temporary, folder, account, verify_batches)
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
    """Write the sidecar with size and checksums of the data, and force both files and the folder to disk."""
    sidecar: dict[str, Any] = {"account": account, **seal_of(temporary / DATA_FILE)}
    sidecar["checksum"] = checksum_of_json(json.loads(json.dumps(sidecar)))
    (temporary / ACCOUNT_FILE).write_text(json.dumps(sidecar, indent=2), encoding="utf-8")
    for path in (temporary / DATA_FILE, temporary / ACCOUNT_FILE, temporary):
        fsync(path)


def _move_into_place(temporary: Path, folder: Path, account: dict[str, Any], verify_batches: bool) -> dict[str, Any]:
    if folder.exists():  # broken, or made meanwhile on a machine that our lock does not reach
        if (made_meanwhile := _account_if_sound(folder, verify_batches)) is not None:
            return made_meanwhile
        shutil.rmtree(folder)
    try:
        temporary.rename(folder)
    except OSError:
        if (made_meanwhile := _account_if_sound(folder, verify_batches)) is not None:
            return made_meanwhile
        raise
    fsync(folder.parent)
    return account


def fsync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
