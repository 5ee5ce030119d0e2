"""What all benchmarks measure with: whole processes, in turn, and ratios of neighbours."""

from __future__ import annotations

import gzip
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
FILES = ("train-images", "train-labels", "t10k-images", "t10k-labels")

Spread = tuple[float, float, float]  # median, least, largest


class Run(NamedTuple):
    """Of one process: what it said, its wall time in seconds, its largest memory in MB."""

    said: str
    wall_s: float
    peak_mb: float


def timed(command: Sequence[str], *, cwd: Path | None = None, code: int = 0, **env: str) -> Run:
    """Run a command to its end, which must be `code`."""
    with tempfile.TemporaryFile("w+") as out:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.DEVNULL, cwd=cwd, env=os.environ | env
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # nothing that still runs may disturb the next measurement
            process.kill()
            raise
        wall_s = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != code:
            sys.exit(f"error: exit code {process.returncode} of {' '.join(command)}")
        out.seek(0)
        return Run(out.read(), wall_s, usage.ru_maxrss / 1024)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Theirs over ours, pair by pair."""
    return spread_of([b / a for a, b in zip(ours, theirs, strict=True)])


def spread_of(values: Sequence[float]) -> Spread:
    return statistics.median(values), min(values), max(values)


def unpack(source: Path, target: Path) -> None:
    """MNIST as torchvision lays it out, for the peers."""
    raw = target / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in FILES:
        path = source / f"{name}-idx{3 if 'images' in name else 1}-ubyte.gz"
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))


def told(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
