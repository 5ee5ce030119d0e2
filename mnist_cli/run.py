"""The folder of a run: its name, its lock, and the files in it that are not checkpoints.

config.yaml  overrides.txt  metrics.csv  errors.csv  predictions.csv  result.json  train.log
(and best/last.safetensors, and report.html)
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import io
import json
import math
import os
import re
import secrets
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnist_cli import durable, regular_file, strict_json
from mnist_cli.config import TrainConfig, config_hash, flatten, to_plain
from mnist_cli.console import Console
from mnist_cli.errors import UsageError

SCHEMA = 1
MAX_BYTES = 16 * 2**20  # of a file in a run folder: metrics.csv of a hundred thousand epochs
LARGEST_METRIC = 1e100  # float32 ends long before
_WORD = re.compile(r"(?!(null|true|false|nan|inf)$)[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class RunFolder:
    """Paths and records of one run. Made by `create` or `reopen`, which hold its lock."""

    path: Path

    @property
    def best(self) -> Path:
        return self.path / "best.safetensors"

    @property
    def last(self) -> Path:
        return self.path / "last.safetensors"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def errors(self) -> Path:
        return self.path / "errors.csv"

    @property
    def predictions(self) -> Path:
        return self.path / "predictions.csv"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def trace(self) -> Path:
        return self.path / "trace.json"

    def has_report(self) -> bool:
        """Whether there is a page about the result as it stands."""
        try:
            return self.report.stat().st_mtime_ns >= self.result.stat().st_mtime_ns
        except OSError:
            return False

    def write_config(self, config: TrainConfig) -> None:
        """config.yaml (the whole resolved configuration) and overrides.txt (the command)."""
        durable.write(self.path / "config.yaml", _yaml(to_plain(config)).encode())
        command = f"{command_of(config)}\n"
        # A path can be any bytes.
        durable.write(self.path / "overrides.txt", command.encode(errors="surrogateescape"))

    def write_result(self, result: dict[str, Any]) -> None:
        durable.write(self.result, (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())

    def read_result(self) -> dict[str, Any] | None:
        """What `write_result` wrote, or None where there is nothing that can be read.

        The file may come from anybody, so what it holds may be of any type. `run_dir` is where it
        lies now: people move and copy folders.
        """
        try:
            found = strict_json.read(self.result, MAX_BYTES)
        except (OSError, ValueError):
            return None
        if not {"status", "config_hash"} <= set(found):
            return None
        return found | {"run_dir": str(self.path)}

    def add_metrics(self, row: dict[str, float | int | None]) -> None:
        """Append the row of an epoch, durably; the first one brings the head along."""
        text = io.StringIO()
        writer = csv.DictWriter(text, row, lineterminator="\n")
        with open(self.metrics, "ab", buffering=0) as file:
            size = file.tell()
            if size == 0:
                writer.writeheader()
            writer.writerow(row)
            rest = text.getvalue().encode()
            try:
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(size)  # a part of a row would spoil the next one
                raise

    def read_metrics(self) -> list[dict[str, float]]:
        """The rows of metrics.csv, oldest first; what is no number is left out of its row.

        The file may come from anybody: no more than its first 16 MiB are read.
        """
        try:
            text = regular_file.read(self.metrics, MAX_BYTES).decode(errors="replace")
            rows = list(csv.DictReader(io.StringIO(text)))
        except (OSError, csv.Error):
            return []
        numbers = [
            {key: _number(value) for key, value in row.items() if isinstance(key, str)}
            for row in rows
        ]
        return [{key: x for key, x in row.items() if x is not None} for row in numbers]

    def keep_metrics_until(self, epoch: int) -> int:
        """Drop the rows after `epoch`, and a row cut off by a crash: they will be written again.

        Returns:
            How many rows are left.
        """
        if not self.metrics.is_file():
            return 0
        with durable.writing(self.metrics):
            text = self.metrics.read_text(errors="replace")
        head, *rows = text.splitlines(keepends=True) or [""]
        whole = [row for row in rows if row.endswith("\n") and _is_until(epoch, row)]
        whole = whole if head.startswith("epoch,") else []
        durable.write(self.metrics, (head + "".join(whole)).encode() if whole else b"")
        if not whole:
            self.metrics.unlink()
        return len(whole)

    @contextlib.contextmanager
    def log(self, console: Console) -> Iterator[None]:
        """Let what `console` says go to train.log too."""
        with durable.writing(self.path / "train.log"):
            file = open(  # noqa: SIM115 - closed below
                self.path / "train.log", "a", encoding="utf-8", errors="backslashreplace"
            )
        try:
            with console.logging_to(file):
                yield
        finally:
            with contextlib.suppress(OSError):  # the console has said so
                file.close()


def write_table(path: Path, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file, durably and all at once."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    durable.write(path, text.getvalue().encode())


def _number(text: object) -> float | None:
    try:
        number = float(text) if isinstance(text, str) else math.nan
    except ValueError:
        return None
    return number if abs(number) <= LARGEST_METRIC else None  # NaN is not


def _is_until(epoch: int, row: str) -> bool:
    first = row.partition(",")[0]
    return first.isdecimal() and int(first) <= epoch


@contextlib.contextmanager
def create(out: str | None, parent: str, is_resumed: bool = False) -> Iterator[RunFolder]:
    """A new folder, held for this process: `out`, or an own one under `parent`.

    Args:
        is_resumed: `out` may hold the records of a run that failed before its first checkpoint.

    Raises:
        UsageError: `out` holds a run already, or the folders of others, as that of a sweep does.
        LockedError: another process is making a run in `out`.
        ResourceError: the folder can't be made.
    """
    folder = Path(out) if out is not None else unique_folder(Path(parent))
    durable.make_folder(folder)
    with durable.locked(folder):
        durable.remove_stale_temporaries(folder)
        if any(holds_run(job) for job in folder.glob("*-*/")):
            raise UsageError(
                f"out={folder} holds the folders of other runs", "name another: out=DIR"
            )
        if holds_run(folder) and not (is_resumed and _never_began(folder)):
            raise UsageError(
                f"out={folder} holds a run already",
                "type resume=auto to continue it, or name another folder",
            )
        yield RunFolder(folder)


@contextlib.contextmanager
def reopen(folder: Path) -> Iterator[RunFolder]:
    """The folder of an earlier run, held for this process.

    Raises:
        LockedError: another process is at it.
    """
    with durable.locked(folder, "copy the run elsewhere"):
        durable.remove_stale_temporaries(folder)
        yield RunFolder(folder)


def is_complete(result: dict[str, Any], config: TrainConfig) -> bool:
    """Whether there is nothing left to do for `config` in a run with this result.json."""
    return bool(
        result.get("status") == "completed" and result.get("config_hash") == config_hash(config)
    )


def times_of(result: dict[str, Any] | None) -> dict[str, float]:
    """`time` of a result.json, in seconds; what is no time is left out."""
    times = (result or {}).get("time")
    found = times.items() if isinstance(times, dict) else ()
    return {name: float(s) for name, s in found if type(s) in (int, float) and 0 <= s <= 1e9}


def holds_run(folder: Path) -> bool:
    return any(
        (folder / name).exists() for name in ("config.yaml", "last.safetensors", "result.json")
    )


def _never_began(folder: Path) -> bool:
    """Whether there is nothing to lose in the folder of a run that failed."""
    result = RunFolder(folder).read_result() or {}
    return result.get("status") == "failed" and not RunFolder(folder).metrics.exists()


def unique_folder(parent: Path) -> Path:
    """Make `<parent>/<date>_<time>_<id>`; never one that is there already."""
    while True:
        stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        folder = parent / f"{stamp}_{secrets.token_hex(3)}"
        with durable.writing(folder):
            parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder


def command_of(config: TrainConfig) -> str:
    """The exact command that repeats a run: every group and every key, ready for a shell."""
    words = [f"{key}={value}" for key, value in typed_in(config).items()]
    return shlex.join(["mnist-cli", "train", *words])


def typed_in(config: TrainConfig) -> dict[str, str]:
    """{key: value as one types it} of every group and every key but those of one place or time."""
    return {
        key.removesuffix(".name"): value if key.endswith(".name") else as_typed(value)
        for key, value in flatten(to_plain(config)).items()
        if key not in ("out", "resume", "resume_allow")
    }


def quoted(text: str) -> str:
    """`text` as a quoted value of Hydra's override grammar.

    There a backslash is only special before a quote or at the end.
    """
    escaped = re.sub(r"(\\*)'", r"\1\1\'", text)
    ending = escaped[len(escaped.rstrip("\\")) :]
    return f"'{escaped}{ending}'"


def as_typed(value: Any) -> str:
    """`value` as one types it behind a `=`, in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(as_typed(item) for item in value)}]"
    if isinstance(value, str):
        return value if _WORD.fullmatch(value) else quoted(value)
    return repr(value)


def _yaml(tree: dict[str, Any], indent: str = "") -> str:
    """A tree of dicts, lists and plain values as YAML; JSON is YAML's notation for the leaves."""
    lines = []
    for key, value in tree.items():
        if isinstance(value, dict):
            lines.append(f"{indent}{key}:\n{_yaml(value, indent + '  ')}")
        else:
            lines.append(f"{indent}{key}: {_leaf(value)}\n")
    return "".join(lines)


def _leaf(value: Any) -> str:
    """JSON, but with a point in `1e-08`, which YAML 1.1 would take for text."""
    if isinstance(value, list):
        return f"[{', '.join(_leaf(item) for item in value)}]"
    text = json.dumps(value)
    return text.replace("e", ".0e", 1) if isinstance(value, float) and "." not in text else text
