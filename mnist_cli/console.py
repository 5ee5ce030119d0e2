"""What a person sees: lines, tables, a progress bar; and the one JSON document for programs.

Warnings and errors go to stderr. With `--json`, stdout carries that document alone and everything
for people goes to stderr. With `--quiet` nothing is said but errors. What is said also goes,
without escape codes, to the log of a run.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any, Literal

from mnist_cli.errors import ResourceError

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.live import Live
    from rich.progress import Progress
    from rich.table import Table

BAR_EVERY_S = 0.1


class Console:
    """Says things on the right stream, and in the log of the run while there is one.

    Args:
        brief: keep `detail` and tables to the log, as in a sweep, where they would bury the rest.
    """

    def __init__(self, *, quiet: bool = False, as_json: bool = False, brief: bool = False) -> None:
        self.quiet = quiet
        self.brief = brief
        self.as_json = as_json
        self._log: IO[str] | None = None
        self._lost: OSError | None = None
        self._progress: Progress | None = None

    @property
    def _stream(self) -> IO[str]:
        return sys.stderr if self.as_json else sys.stdout

    def say(self, text: str = "", short: str | None = None) -> None:
        """One line (or several), as it is; on a terminal without room for it, `short`."""
        self._to_log(text + "\n")
        if short and self._stream.isatty() and len(text) > _rich(self._stream).width:
            text = short
        self._print(text, self._stream)

    def record(self, text: str) -> None:
        """A line for the log of the run alone."""
        self._to_log(text + "\n")

    def detail(self, text: str) -> None:
        """A line that is worth its place where a run stands alone."""
        if self.brief:
            self._to_log(text + "\n")
        else:
            self.say(text)

    def warn(self, text: str) -> None:
        """A line that stands on stderr, where no pipe takes it along."""
        line = f"warning: {text}"
        self._to_log(line + "\n")
        self._print(line, sys.stderr)

    def table(
        self, headers: Sequence[str], rows: Sequence[Sequence[str]], num_texts: int = 1
    ) -> None:
        """A table; its first columns are text, the others are numbers and stand to the right."""
        table = self._table(headers, rows, num_texts)
        plain = io.StringIO()
        _rich(plain, width=max(_width(headers, rows), 1), is_plain=True).print(table)
        if self._progress is None and not (self.quiet or self.brief) and self._stream.isatty():
            self._to_log(plain.getvalue())
            _rich(self._stream).print(table)
        else:
            self.detail(plain.getvalue().rstrip("\n"))

    def has_room(self, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
        """Whether the table stands on the terminal with a line for each row; a pipe has no edge."""
        return not self._stream.isatty() or _width(headers, rows) <= _rich(self._stream).width

    def _table(
        self,
        headers: Sequence[str],
        rows: Sequence[Sequence[str]],
        num_texts: int,
        caption: str | None = None,
        width: int | None = None,
    ) -> Table:
        """A table; one of a `width` has rows of one line each: the longest text gives way."""
        from rich import box
        from rich.table import Table

        is_utf8 = (getattr(self._stream, "encoding", None) or "utf-8").lower().startswith("utf")
        table = Table(
            box=box.SIMPLE_HEAD if is_utf8 else box.ASCII,
            caption=caption,
            collapse_padding=True,
            caption_justify="left",
        )
        for position, header in enumerate(headers):
            is_text = position < num_texts
            justify: Literal["left", "right"] = "left" if is_text else "right"
            table.add_column(
                header,
                justify=justify,
                no_wrap=width is not None or not is_text,
                overflow="fold" if width is None else "ellipsis",
            )
        if width is not None:
            widths = _widths(headers, rows)
            longest = widths.index(max(widths))
            others = _width(headers, rows) - widths[longest]
            table.columns[longest].max_width = max(1, width - others)
        for row in rows:
            table.add_row(*row)
        return table

    def document(self, data: Any) -> None:
        """With `--json`: the one document on stdout. Otherwise nothing."""
        if self.as_json:
            self._deliver(json.dumps(data, allow_nan=False))

    def answer(self, text: str, data: Any) -> None:
        """What a command was asked for: `data` with `--json`, else `text`, also with `--quiet`."""
        if self.as_json:
            self.document(data)
        else:
            self._deliver(text)

    def _deliver(self, text: str) -> None:
        try:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()
        except BrokenPipeError:
            self._give_up(sys.stdout)
        except OSError as error:
            raise _unwritable(error) from error

    def error(
        self,
        message: str,
        hint: str,
        exit_code: int,
        more: dict[str, Any] | None = None,
        instead: list[Any] | None = None,
    ) -> None:
        """The two lines of an expected failure.

        With `--json` also as a document, with `more`; or that of the command `instead`.
        """
        failure = {"error": message, "hint": hint, "exit_code": exit_code} | (more or {})
        self.document(failure if instead is None else instead)
        try:
            sys.stderr.write(f"error: {message}\nhint: {hint}\n")
        except OSError:  # the exit code says it too
            _silence(sys.stderr)

    def _print(self, text: str, stream: IO[str]) -> None:
        if self.quiet:
            return
        try:
            if self._progress is not None and (stream is self._stream or stream.isatty()):
                self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                stream.write(text + "\n")
                stream.flush()
        except OSError as error:  # `| head` closed its end, or a full disk is behind it
            if stream is self._stream and not isinstance(error, BrokenPipeError):
                self._lost = error
            self._give_up(stream)

    def _to_log(self, text: str) -> None:
        if self._log is None:
            return
        try:
            self._log.write(text)
            self._log.flush()
        except OSError as error:
            self._log = None
            self.warn(f"train.log can't be written ({error.strerror}); going on without it")

    def require_delivered(self) -> None:
        """For a command whose only product is what it says.

        Raises:
            ResourceError: something of it could not be written.
        """
        if self._lost is not None:
            raise _unwritable(self._lost)

    def _give_up(self, stream: IO[str]) -> None:
        """Say nothing more on `stream`, but finish the work."""
        self.quiet = self.quiet or stream is self._stream
        _silence(stream)

    @contextlib.contextmanager
    def logging_to(self, log: IO[str]) -> Iterator[None]:
        """Also write what is said to `log`, for the length of the block."""
        self._log = log
        try:
            yield
        finally:
            self._log = None

    @contextlib.contextmanager
    def bar(self) -> Iterator[Bar]:
        """A progress bar where a person watches a terminal; otherwise one that draws nothing."""
        if self.quiet or not self._stream.isatty():
            yield Bar(None)
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        rich = _rich(self._stream)
        with Progress(*columns, console=rich, transient=True, auto_refresh=False) as progress:
            self._progress = progress
            try:
                yield Bar(progress)
            finally:
                self._progress = None

    @contextlib.contextmanager
    def live_table(self) -> Iterator[LiveTable | None]:
        """A table that is drawn over and over; None where no person watches a terminal."""
        if self.quiet or self.as_json or not self._stream.isatty():
            yield None
            return
        from rich.live import Live

        rich = _rich(self._stream)
        with Live(console=rich, transient=True, auto_refresh=False) as live:
            yield LiveTable(self, live)


class LiveTable:
    """The table of what is going on. Redrawn at most ten times a second."""

    def __init__(self, console: Console, live: Live) -> None:
        self._console, self._live = console, live
        self._drawn = 0.0

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._drawn >= BAR_EVERY_S

    @property
    def num_rows(self) -> int:
        """How many rows find room beside the head and the caption."""
        return max(3, self._live.console.height - 7)

    def show(
        self, headers: Sequence[str], rows: Sequence[Sequence[str]], num_texts: int, caption: str
    ) -> None:
        self._drawn = time.monotonic()
        width = self._live.console.width
        table = self._console._table(headers, rows, num_texts, caption, width)
        self._live.update(table, refresh=True)


class Bar:
    """The bar of the running epoch. Redrawn at most ten times a second."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._task = progress.add_task("", note="") if progress else None
        self._drawn = 0.0

    def show(self, done: int, total: int, description: str, note: str) -> None:
        if self._progress is None or self._task is None:
            return
        now = time.monotonic()
        if now - self._drawn < BAR_EVERY_S and done not in (0, total):
            return
        self._drawn = now
        self._progress.update(
            self._task,
            completed=done,
            total=total,
            description=description,
            note=note,
            refresh=True,
        )


def _unwritable(error: OSError) -> ResourceError:
    _silence(sys.stdout)  # nothing is left to flush
    return ResourceError(
        f"can't write to the standard output: {error.strerror}", "send it elsewhere"
    )


def _silence(stream: IO[str]) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _widths(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    """How wide each column is, in characters."""
    return [max(map(len, cells)) for cells in zip(headers, *rows, strict=True)]


def _width(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """How wide a table is, with what parts its columns."""
    return sum(_widths(headers, rows)) + 2 * len(headers) + 2


def _rich(stream: IO[str], width: int | None = None, is_plain: bool = False) -> RichConsole:
    from rich.console import Console as RichConsole

    return RichConsole(
        file=stream,
        highlight=False,
        markup=False,
        width=width,
        force_terminal=False if is_plain else None,  # whatever FORCE_COLOR says
    )
