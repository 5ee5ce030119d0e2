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
class Line:
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
        self._lines: dict[str, Line] = {}
        self._ended: list[Line] = []

    def add(self, job: TrainJob, label: str, number: int) -> None:
        self._lines[place_of(job)] = Line(number, label)

    def skipped(self, job: TrainJob, document: Document) -> None:
        self._end(job, document, "done before")

    def started(self, jobs: Sequence[TrainJob]) -> None:
        """A job has started, or several as one stack."""
        lines = [self._lines[place_of(job)] for job in jobs]
        for line in lines:
            line.state, line.started_s = "starting", time.monotonic()
        if self._live is None:
            many = f"{len(lines)} of {self._total} jobs, trained as one stack"
            self._console.say(f"start    {self._name(lines[0]) if len(lines) == 1 else many}")
        self.draw()

    def epoch(self, job: TrainJob, epoch: int, value: float | None) -> None:
        line = self._lines[place_of(job)]
        line.state, line.metric = f"epoch {epoch}/{job.config.epochs}", job.config.monitored
        if value is not None:
            sign = 1 if is_maximized(line.metric) else -1
            is_better = line.best is None or sign * value > sign * line.best
            line.best = value if is_better else line.best
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
        running = [line for line in self._lines.values() if line.state.startswith(("start", "ep"))]
        waiting = [line for line in self._lines.values() if line.state == "waiting"]
        room = max(1, self._live.num_rows - len(running))
        shown = self._ended[-max(1, room - min(len(waiting), 3)) :] + running
        shown += waiting[: max(0, self._live.num_rows - len(shown))]
        left = self._total - self._num_before - len(self._ended) - len(running)
        counts = {"running": len(running), "to come": left, "done before": self._num_before}
        for line in self._ended:
            counts[line.state] = counts.get(line.state, 0) + 1
        caption = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        self._live.show(HEADERS, [line.cells() for line in shown], 3, caption)

    def _end(self, job: TrainJob, document: Document, state: str) -> None:
        line = self._lines[place_of(job)]
        line.state = state
        line.seconds = time.monotonic() - line.started_s if line.started_s else None
        best = document.get("best")
        if best and best["value"] is not None:
            line.metric, line.best = best["monitor"], best["value"]
        self._ended.append(line)
        if self._live is None:
            self._console.say(self._sentence(line, document))
        self.draw()

    def _sentence(self, line: Line, document: Document) -> str:
        words = [f"{line.state:<8} {self._name(line)}"]
        if line.state == "failed" or document.get("error"):
            words.append(document["error"])
        elif line.best is not None:
            words.append(f"{line.metric} {formats.metric(line.metric, line.best)}")
        if line.seconds is not None:
            words.append(f"{line.seconds:.1f} s")
        return "  ".join(words)

    def _name(self, line: Line) -> str:
        return f"{line.number}/{self._total}  {line.label}"
