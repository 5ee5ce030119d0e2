"""What a person sees of a sweep while it runs: a live table, or a line at each start and end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from mnist_cli import formats
from mnist_cli.config import is_maximized
from mnist_cli.console import Console, LiveTable
from mnist_cli.sweep import leaderboard
from mnist_cli.sweep.job import Document, TrainJob, place_of

HEADERS = ("job", "what differs", "state", "best", "time")


@dataclass
class Row:
    """One job on the board."""

    number: int
    label: str
    state: str = "waiting"
    metric: str | None = None
    best: float | None = None
    started_s: float = 0.0
    seconds: float | None = None

    def cells(self) -> tuple[str, ...]:
        seconds = self.seconds
        if self.state.startswith("epoch") or self.state == "starting":
            seconds = time.monotonic() - self.started_s
        best = "" if self.best is None else formats.metric(self.metric, self.best)
        spent = "" if seconds is None else f"{seconds:.1f} s"
        return (str(self.number), self.label, self.state, best, spent)


class Board:
    """The state of every job, drawn in `live`, or said through `console` where that is None."""

    def __init__(
        self, console: Console, live: LiveTable | None, total: int, num_before: int = 0
    ) -> None:
        self._console, self._live, self._total = console, live, total
        self._num_before = num_before
        self._rows: dict[str, Row] = {}
        self._ended: list[Row] = []

    def add(self, job: TrainJob, label: str, number: int) -> None:
        self._rows[place_of(job)] = Row(number, label)

    def skipped(self, job: TrainJob, document: Document) -> None:
        self._end(job, document, "done before")

    def started(self, jobs: Sequence[TrainJob]) -> None:
        """A job has started, or several as one stack."""
        rows = [self._rows[place_of(job)] for job in jobs]
        for row in rows:
            row.state, row.started_s = "starting", time.monotonic()
        if self._live is None:
            many = f"{len(rows)} of {self._total} jobs, trained as one stack"
            self._console.say(f"start    {self._name(rows[0]) if len(rows) == 1 else many}")
        self.draw()

    def epoch(self, job: TrainJob, epoch: int, value: float | None) -> None:
        row = self._rows[place_of(job)]
        row.state, row.metric = f"epoch {epoch}/{job.config.epochs}", job.config.monitored
        if value is not None:
            sign = 1 if is_maximized(row.metric) else -1
            is_better = row.best is None or sign * value > sign * row.best
            row.best = value if is_better else row.best
        self.draw()

    def ended(self, job: TrainJob, document: Document) -> None:
        state = "failed" if "exit_code" in document else leaderboard.state_of(document)
        self._end(job, document, {"completed": "done"}.get(state, state))

    def given_over(self, job: TrainJob) -> None:
        """Another process runs the same job."""
        self._end(job, {}, "elsewhere")

    def draw(self) -> None:
        """Draw the live table anew, if it is time."""
        if self._live is None or not self._live.is_due:
            return
        running = [row for row in self._rows.values() if row.state.startswith(("start", "ep"))]
        waiting = [row for row in self._rows.values() if row.state == "waiting"]
        room = max(1, self._live.num_rows - len(running))
        shown = self._ended[-max(1, room - min(len(waiting), 3)) :] + running
        shown += waiting[: max(0, self._live.num_rows - len(shown))]
        left = self._total - self._num_before - len(self._ended) - len(running)
        counts = {"running": len(running), "to come": left, "done before": self._num_before}
        for row in self._ended:
            counts[row.state] = counts.get(row.state, 0) + 1
        caption = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        self._live.show(HEADERS, [row.cells() for row in shown], 3, caption)

    def _end(self, job: TrainJob, document: Document, state: str) -> None:
        row = self._rows[place_of(job)]
        row.state = state
        row.seconds = time.monotonic() - row.started_s if row.started_s else None
        best = document.get("best")
        if best and best["value"] is not None:
            row.metric, row.best = best["monitor"], best["value"]
        self._ended.append(row)
        if self._live is None:
            self._console.say(self._sentence(row, document))
        self.draw()

    def _sentence(self, row: Row, document: Document) -> str:
        words = [f"{row.state:<8} {self._name(row)}"]
        if row.state == "failed" or document.get("error"):
            words.append(document["error"])
        elif row.best is not None:
            words.append(f"{row.metric} {formats.metric(row.metric, row.best)}")
        if row.seconds is not None:
            words.append(f"{row.seconds:.1f} s")
        return "  ".join(words)

    def _name(self, row: Row) -> str:
        return f"{row.number}/{self._total}  {row.label}"
