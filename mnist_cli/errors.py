"""What can go wrong, and the exit code of each.

    MnistCliError        1  a fault of the program itself
      UsageError         2  the command line or the configuration is wrong; nothing was written (but
                            for compile=true that fails, whose run says so)
        PluginError      2  the code of a plugin raised something else than these
      DataError          3  data missing, damaged or not to be had
      CheckpointError    4  a checkpoint is missing, damaged, foreign or from a newer version
      DivergedError      5  training diverged
      ResourceError      6  out of disk, memory or GPU memory
      LockedError        7  the run folder is in use by another process
      ParityError        8  an export doesn't answer as its checkpoint does
      SweepError         1  some jobs of a sweep failed
      PrunedError        -  a search gave this run up; no failure, and it never reaches the door
    Interrupted      130, 143  SIGINT or SIGTERM; a BaseException, which no `except Exception` stops

Every error carries two lines for a person: what is wrong, and a hint of what to type next.
"""

from __future__ import annotations

from typing import Any


class MnistCliError(Exception):
    """An expected failure: one `error:` line, one `hint:` line, one exit code, no traceback.

    Args:
        document: what `--json` prints in place of these, where a command failed in parts only.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str, document: list[Any] | None = None) -> None:
        super().__init__(message, hint)
        self.document = document
        self.message = one_line(message)
        self.hint = one_line(hint)

    def __str__(self) -> str:
        return self.message


class UsageError(MnistCliError):
    exit_code = 2


class PluginError(UsageError):
    """Its `__cause__` is what the plugin raised: a log keeps the traceback."""


class DataError(MnistCliError):
    exit_code = 3


class CheckpointError(MnistCliError):
    exit_code = 4


class DivergedError(MnistCliError):
    exit_code = 5


class ResourceError(MnistCliError):
    exit_code = 6


class LockedError(MnistCliError):
    exit_code = 7


class ParityError(MnistCliError):
    exit_code = 8


class SweepError(MnistCliError):
    exit_code = 1


class PrunedError(MnistCliError):
    """A search found a run not worth its time after `epoch`. It could go on: all is saved."""

    def __init__(self, epoch: int, hint: str) -> None:
        super().__init__(f"pruned at epoch {epoch}", hint)


class Interrupted(BaseException):
    """A signal asked the program to stop.

    Args:
        signal_number: SIGINT (2) or SIGTERM (15); the exit code is 128 more.
        message: what was saved, for the `error:` line.
        hint: what to type to go on.
    """

    def __init__(self, signal_number: int, message: str, hint: str) -> None:
        super().__init__(message, hint)
        self.exit_code = 128 + signal_number
        self.message = one_line(message)
        self.hint = one_line(hint)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch's CPU allocator, a GPU, or the loader of a library found no memory."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
        or (isinstance(error, ImportError) and "failed to map segment" in str(error))
    )


def one_line(text: str, limit: int = 400) -> str:
    """`text` without control characters (they come escaped) and of at most `limit` characters.

    Foreign strings end up in messages: file names, metadata of a checkpoint, the command line.
    """
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return escaped if len(escaped) <= limit else escaped[: limit - 3] + "..."


def shown(value: object, limit: int = 80) -> str:
    """`value` as it stands in a message: quoted where it is text, escaped, cut at `limit`."""
    return one_line(f"'{value}'" if isinstance(value, str) else repr(value), limit)
