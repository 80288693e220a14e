"""The lock that keeps two runs out of one folder.

    .lock       locked by the kernel, so that the lock ends with its process, in whatever way that ends
    .lock.json  who holds it, for people; on network file systems also a heartbeat, for other hosts

A network file system may not show one host the locks of another. There, the holder touches `.lock.json` every few
seconds, and a run on another host watches it for longer than that before it takes the folder over. It looks for changes
of the file, not at its age, so that clocks of two hosts are never compared.
"""

import contextlib
import errno
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from filelock import FileLock, Timeout

from .files import write_text
from .processes import on_main_process


logger = logging.getLogger(__name__)

LOCK, HOLDER = ".lock", ".lock.json"
BEAT_SECONDS = 5.0  # between two touches of .lock.json
PATIENCE_SECONDS = 30.0  # without a touch before a folder is taken over from another host
SETTLE_SECONDS = 2.0  # for two hosts that take over at the same time to see which one was last
# File systems of one machine's disks and memory, where its kernel knows of every lock.
LOCAL_FILE_SYSTEMS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "tmpfs", "overlay"}
NO_KERNEL_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


@contextlib.contextmanager
def run_lock(
    output_dir: str | Path, *, recipe: str = "a run", accelerator: Accelerator | PartialState | None = None
) -> Iterator[None]:
    """Lock `output_dir` for this run while the block lasts; the folder is created if it does not exist.

    A second run there is refused with an error that names the holder. Every process enters it; the main one locks.

    Raises:
        RuntimeError: another run is using the folder.
        OSError: the folder cannot be written.
    """
    held = None

    def take() -> None:
        nonlocal held
        held = _Lock(Path(output_dir), recipe)

    on_main_process(accelerator, take)
    try:
        yield
    finally:
        if held is not None:
            held.release()


class _Lock:
    """A lock that is held from its creation until `release`."""

    def __init__(self, folder: Path, recipe: str):
        self.folder, self.path = folder, folder / HOLDER
        self.is_new_folder = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.kernel_lock = FileLock(folder / LOCK, timeout=0, thread_local=False, fallback_to_soft=False)
            is_locked = self._lock_by_kernel()
        except OSError as error:
            raise OSError(f"The output folder {folder} cannot be used: {error}. Choose another output_dir.") from error
        # Where kernel locks are not enough, a heartbeat informs other hosts.
        self.needs_heartbeat = not (is_locked and _is_local(folder))
        self.text = json.dumps(
            {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "recipe": recipe,
                "since": time.strftime("%Y-%m-%d %H:%M:%S"),
                "machine": _machine(),
                "token": uuid.uuid4().hex,
            }
        )
        self.stopped = threading.Event()
        try:
            self._name_holder(is_locked)
        except BaseException:
            self._release_kernel_lock()
            raise
        self.thread = threading.Thread(target=self._beat, daemon=True)
        if self.needs_heartbeat:
            self.thread.start()

    def _lock_by_kernel(self) -> bool:
        """Whether this file system has kernel locks; raises if another process holds this one."""
        try:
            self.kernel_lock.acquire()
        except Timeout as error:
            raise RuntimeError(_refusal(self.folder, _read(self.path))) from error
        except OSError as error:
            if error.errno in NO_KERNEL_LOCKS:
                return False
            raise
        return True

    def _name_holder(self, is_locked: bool) -> None:
        """Write `.lock.json`, after the process that wrote an existing one is known to have ended."""
        left = _read(self.path)
        if left is not None:
            is_of_this_kernel = is_locked and _holder(left).get("machine") == _machine()
            if self.needs_heartbeat and not is_of_this_kernel:
                self._watch(left)
            logger.warning("Taking over %s from a run that ended without releasing it: %s.", self.folder, _name(left))
        try:
            self._write(is_first=left is None and self.needs_heartbeat)
        except FileExistsError as error:
            raise RuntimeError(_refusal(self.folder, _read(self.path))) from error
        except OSError as error:
            raise OSError(f"The output folder {self.folder} cannot be used: {error}.") from error
        if left is not None and self.needs_heartbeat:
            time.sleep(SETTLE_SECONDS)
            if not self._is_ours():
                raise RuntimeError(_refusal(self.folder, _read(self.path)))

    def _watch(self, left: tuple[int, str]) -> None:
        """Return when the holder's file has not changed for `PATIENCE_SECONDS`; raise if it did."""
        logger.warning(
            "%s was last used by %s. Waiting up to %.0f seconds to see whether that run is still alive.",
            self.folder,
            _name(left),
            PATIENCE_SECONDS,
        )
        end = time.monotonic() + PATIENCE_SECONDS
        while (rest := end - time.monotonic()) > 0:
            time.sleep(min(rest, 1.0))
            now = _read(self.path)
            if now is not None and now != left:
                raise RuntimeError(_refusal(self.folder, now))
            if now is None:  # released
                return

    def _write(self, *, is_first: bool) -> None:
        """Write the holder's file; with `is_first` only if no other host did."""
        if is_first:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(self.text)
            return
        write_text(self.path, self.text)

    def _is_ours(self) -> bool:
        now = _read(self.path)
        return now is not None and now[1] == self.text

    def _beat(self) -> None:
        while not self.stopped.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # the network may come back
                now = _read(self.path)
                if now is None:
                    if not self.stopped.is_set():
                        self._write(is_first=False)
                elif _holder(now).get("token") is None or now[1] == self.text:
                    os.utime(self.path)
                elif not self.stopped.is_set():
                    # This process was suspended for longer than the other one waits.
                    print(
                        f"\nerror: {_refusal(self.folder, now)} This run was suspended for too long, and stops.",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(1)

    def release(self) -> None:
        self.stopped.set()
        if self.thread.is_alive():
            self.thread.join(BEAT_SECONDS)
        with contextlib.suppress(OSError):
            if self._is_ours():
                self.path.unlink()
        self._release_kernel_lock()
        if self.is_new_folder:
            with contextlib.suppress(OSError):  # a run that wrote nothing leaves no empty folder
                self.folder.rmdir()

    def _release_kernel_lock(self) -> None:
        if self.kernel_lock.is_locked:
            # Deleted while it is locked: a process that opened it meanwhile finds it without a name, and tries again.
            with contextlib.suppress(OSError):
                (self.folder / LOCK).unlink()
            self.kernel_lock.release()


def _read(path: Path) -> tuple[int, str] | None:
    """When the holder's file was last touched, by its file system's clock, and its text; None if there is none.

    It is opened each time, because network file systems ask their server only then.
    """
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return os.fstat(file.fileno()).st_mtime_ns, file.read()
    except FileNotFoundError:
        return None


def _holder(read: tuple[int, str] | None) -> dict[str, Any]:
    try:
        content = json.loads(read[1]) if read is not None else {}
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _name(read: tuple[int, str] | None) -> str:
    holder = _holder(read)
    if not {"pid", "host", "recipe", "since"} <= holder.keys():
        return "a process that left no name"
    return f"process {holder['pid']} on {holder['host']} ({holder['recipe']}, since {holder['since']})"


def _refusal(folder: Path, read: tuple[int, str] | None) -> str:
    return (
        f"Another run is using {folder}: {_name(read)}. Wait until it has ended, stop it, or choose another output_dir."
    )


def _machine() -> str:
    """The id of the kernel's start: the same for two processes on one kernel, also in different containers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def _is_local(folder: Path) -> bool:
    """Whether the folder's file system belongs to this machine alone, according to the system."""
    device = folder.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}" if hasattr(os, "major") else ""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    # Such a line is "36 35 98:0 /root /mount options ... - ext4 /dev/sda1 options".
    kinds = {line.partition(" - ")[2].split(" ")[0] for line in mounts if line.split(" ")[2] == number}
    return bool(kinds) and kinds <= LOCAL_FILE_SYSTEMS
