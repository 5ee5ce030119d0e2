"""Files from anybody: what a path names may be a pipe, a device, or endless."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

_KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}


def opened(path: Path | str) -> BufferedReader:
    """A regular file, open for reading; never waits, whatever `path` names.

    Raises:
        OSError: it can't be opened or is something else; `strerror` says what.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a path with a zero byte
        raise OSError(errno.EINVAL, str(error), os.fspath(path)) from error
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        reason = f"it is a {_KINDS.get(kind, 'device')}, not a regular file"
        raise OSError(errno.EINVAL, reason, os.fspath(path))
    return os.fdopen(descriptor, "rb")


def read(path: Path | str, most_bytes: int) -> bytes:
    """The content of a regular file, cut after `most_bytes`. Raises as `opened` does."""
    with opened(path) as file:
        return file.read(most_bytes)
