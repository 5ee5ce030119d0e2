"""Files that are whole or absent, whatever happens to the process, and locks that die with it.

The accepted minimum for a durable replace: a temporary file in the same folder, write, fsync,
rename, fsync of the folder. Readers never see a part; a stale temporary carries the process id of
its dead writer and is removed by the next one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mnist_cli.errors import LockedError, MnistCliError, ResourceError, UsageError

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.tmp")

ELSEWHERE = "name another folder with out=DIR"


def write(path: Path, data: bytes) -> None:
    """Put `data` at `path`, durably and all at once.

    Raises:
        ResourceError: the disk is full, read-only or broken; what stood at `path` still stands.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with writing(path):
        temporary.unlink(missing_ok=True)
        try:
            descriptor = os.open(temporary, flags, 0o644)
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make `folder`, and those above it, unless it is there.

    Raises:
        UsageError: a file stands there, or no folder can, as in /proc.
        ResourceError: the disk is full, read-only or broken.
    """
    with writing(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:
            hint = "name another folder with out=DIR"
            raise UsageError(f"can't make {folder}: {error.strerror}", hint) from error


@contextlib.contextmanager
def writing(path: Path, elsewhere: str = ELSEWHERE) -> Iterator[None]:
    """Turn an OSError of the block into a ResourceError that names `path`.

    Args:
        elsewhere: what to do if it can't be written there.

    Raises:
        UsageError: a file stands where a folder is wanted, or the name is too long.
    """
    try:
        yield
    except OSError as error:
        raise _denied(f"can't write {path}", error, elsewhere) from error


@contextlib.contextmanager
def temporary_folder(room_bytes: int = 0) -> Iterator[Path]:
    """A folder for libraries that only write to files; it is gone after the block.

    Args:
        room_bytes: what must be free there: a library may not notice that a file is cut short.

    Raises:
        ResourceError: there is no place for it, or none is left in it.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            if shutil.disk_usage(folder).free < room_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield Path(folder)
    except OSError as error:
        elsewhere = "name a folder for them: TMPDIR=DIR mnist-cli ..."
        raise _denied("can't write temporary files", error, elsewhere) from error


def _denied(what: str, error: OSError, elsewhere: str) -> MnistCliError:
    """The error for something that can't be written here, but maybe `elsewhere`."""
    # A file stands where a folder is wanted, or it is no name that can be.
    if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EILSEQ):
        return UsageError(f"{what}: {error.strerror}", elsewhere)
    reasons = {
        errno.ENOSPC: "free some space",
        errno.EDQUOT: "free some space",
        errno.EROFS: "make it writable",
        errno.EACCES: "make it writable",
    }
    hint = f"{reasons.get(error.errno or 0, 'check the disk')}, or {elsewhere}"
    if error.errno == errno.EMFILE:
        hint = "allow more with ulimit -n 1024"
    return ResourceError(f"{what}: {error.strerror or error}", hint)


def remove_stale_temporaries(folder: Path) -> None:
    """Remove the temporaries of `write` in `folder` whose process is gone.

    Raises:
        ResourceError: the folder can't be read.
    """
    with writing(folder):
        entries = list(folder.iterdir())
    for entry in entries:
        match = _TEMPORARY.fullmatch(entry.name)
        if match and not _is_alive(int(match["pid"])):
            with contextlib.suppress(OSError):
                entry.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return pid != os.getpid()


@contextlib.contextmanager
def locked(folder: Path, elsewhere: str = ELSEWHERE) -> Iterator[None]:
    """Hold `folder` for this process. The kernel lets go when the process ends, however it ends.

    Args:
        elsewhere: what to do if it can't be held.

    Raises:
        LockedError: another process holds it.
        ResourceError: it can't be written, or its file system has no locks.
    """
    path = folder / ".lock"
    with writing(path, elsewhere):
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode("ascii", "replace").strip()
            stop = f" or stop it (kill {holder})" if holder else ""
            raise LockedError(
                f"{folder} is in use by process {holder or 'unknown'}",
                f"wait for it{stop}, or name another folder",
            ) from None
        except OSError as error:  # a file system without locks
            raise _denied(f"can't lock {folder}", error, elsewhere) from error
        with writing(path, elsewhere):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


class SharedFolder:
    """A folder that several processes work in, on one machine or on many that share it.

    Each is present from `with SharedFolder(...)` until it leaves. What concerns all of them is done
    behind the door, one process at a time. The kernel lets go of both when a process ends; between
    machines that takes a file system whose locks reach all of them, as those of NFS do.

    Raises:
        ResourceError: the folder can't be written, or its file system has no locks.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder

    def __enter__(self) -> SharedFolder:
        self._presence = _open_lock(self.path / ".present")
        try:
            self._door = _open_lock(self.path / ".door")
        except ResourceError:
            os.close(self._presence)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._presence)
        os.close(self._door)

    @contextlib.contextmanager
    def door(self) -> Iterator[None]:
        """Wait until no other process is behind the door, and keep all others out of it."""
        with writing(self.path):
            fcntl.flock(self._door, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._door, fcntl.LOCK_UN)

    def arrive(self) -> bool:
        """Take or keep the shared lock; whether no other process holds it. Behind the door only."""
        with writing(self.path):
            try:
                fcntl.flock(self._presence, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_alone = True
            except BlockingIOError:
                is_alone = False
            fcntl.flock(self._presence, fcntl.LOCK_SH)  # at once: who holds more is behind the door
        return is_alone

    def leave(self) -> None:
        """Give the shared lock back."""
        fcntl.flock(self._presence, fcntl.LOCK_UN)


def _open_lock(path: Path) -> int:
    with writing(path):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
