"""Reading what a path names, whatever that is; and JSON from anybody."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest

from mnist_cli import regular_file, strict_json


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


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": NaN}', "NaN is not a number"),
        ('{"a": 1e999}', "1e999 is out of reach"),
        ('{"a": [-1e999]}', "-1e999 is out of reach"),
        (f'{{"a": {"9" * 21}}}', "a number is too long"),
        ('{"a": 1, "a": 2}', "a key stands there twice"),
        ("[" * 100_000, "it is too deep"),
        ("[]", "it is not an object"),
    ],
)
def test_json_is_read_strictly(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}$"):
        strict_json.parse(text.encode())
    assert strict_json.parse(b'{"a": [1e300, -0.5, 12]}') == {"a": [1e300, -0.5, 12]}
