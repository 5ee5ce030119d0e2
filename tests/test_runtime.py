"""The settings of a process."""

from __future__ import annotations

import faults
from faults import Server


def test_no_thread_computes_with_numbers_too_small_for_speed(server: Server) -> None:
    ended = server.run(faults.flush_denormals, 2)
    assert ended.code == 0, ended.stderr
