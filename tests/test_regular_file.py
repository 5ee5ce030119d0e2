"""Reading what a path names, whatever that is."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from mnist_cli import regular_file


def test_a_file_is_read_up_to_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(10)))
    assert regular_file.read(path, 4) == bytes(range(4))
    assert regular_file.read(path, 10) == regular_file.read(str(path), 99) == bytes(range(10))


def test_nothing_else_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them is waited for: a pipe without a writer, a device without an end."""
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    os.mkfifo("pipe")
    os.mkdir("folder")
    Path("link").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for path, reason in {
            "pipe": "it is a named pipe, not a regular file",
            "link": "it is a named pipe, not a regular file",
            "folder": "it is a folder, not a regular file",
            "/dev/zero": "it is a device, not a regular file",
            "socket": "No such device or address",
            "missing": "No such file or directory",
            "zero\0byte": "embedded null byte",
        }.items():
            before = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
            with pytest.raises(OSError) as caught:
                regular_file.read(path, 4)
            assert caught.value.strerror == reason
            after = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
            assert len(after) == len(before), "a descriptor was left open"
