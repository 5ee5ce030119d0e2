"""The settings of a process."""

from __future__ import annotations

from pathlib import Path

import faults
from conftest import Program
from faults import Server

# So many weights that torch shares work on them out to its threads.
WIDE = ("model=mlp", "model.hidden=[1024]", "dataset=digits", "report=false")


def test_no_thread_computes_with_numbers_too_small_for_speed(
    server: Server, mnist_cli: Program, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert mnist_cli("train", *WIDE, "epochs=1", f"out={run}").code == 0
    for words in (
        ["train", *WIDE, "epochs=1", f"out={tmp_path / 'new'}"],
        ["train", f"resume={run}", "epochs=2"],
        ["eval", f"checkpoint={run}"],
    ):
        ended = server.run(faults.denormals_after, words, 2)
        assert ended.code == 0, ended.stderr
