"""A file that holds its own SHA-256: damage shows, wherever it is.

The digest is that of the whole file with 64 zeros where the digest stands.
"""

from __future__ import annotations

import hashlib

BLANK = "0" * 64


def sealed(data: bytes, place: int) -> bytes:
    """`data` with its digest at `place`, where BLANK stands."""
    assert data[place : place + 64] == BLANK.encode()
    return data[:place] + hashlib.sha256(data).hexdigest().encode() + data[place + 64 :]


def is_intact(data: bytes, place: int) -> bool:
    """Whether the digest at `place` is that of the rest."""
    found = hashlib.sha256(memoryview(data)[:place])
    found.update(BLANK.encode())
    found.update(memoryview(data)[place + 64 :])
    return found.hexdigest().encode() == data[place : place + 64]
