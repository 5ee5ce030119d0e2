"""SIGINT and SIGTERM: raised, held back, or noted so that work can be brought to a good end."""

from __future__ import annotations

import contextlib
import os
import signal
import types
from collections.abc import Iterator

from mnist_cli.errors import Interrupted

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def raise_them() -> None:
    """From now on SIGINT and SIGTERM raise Interrupted; one that is ignored stays so.

    Not KeyboardInterrupt: Python ends itself by the signal after one that went through an `exec`,
    as every dataclass has it, whatever became of it.
    """
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _raise)


def ignore_them() -> None:
    """From now on they change nothing: for when all is done, and the exit code stands.

    With torch Python takes a third of a second to end itself. It gives up its handlers on the way,
    and one that came later would end the process by the signal.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _raise(number: int, frame: types.FrameType | None) -> None:
    name = signal.Signals(number).name
    raise Interrupted(number, f"interrupted by {name}", "type the command again to start over")


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Hold a signal back until the block ends; a second one ends the process at once.

    For imports, and for what Hydra does: an exception can leave them half done, come out as
    another one, or not at all.
    """
    received: list[int] = []

    def note(number: int, frame: types.FrameType | None) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)

    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])


class SignalWatch:
    """Notes SIGINT and SIGTERM so that the loop can finish its step and save.

    The second signal leaves at once; the last checkpoint on disk is whole at any instant.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._is_signalled = False
        self._is_patient = True

    def __enter__(self) -> SignalWatch:
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def ask(self, number: int) -> None:
        """Ask for the same end as the signal `number`; asking again changes nothing.

        It is no signal: one that comes behind it is the first.
        """
        if self.received is None:
            self.received = number

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """In the block a signal raises Interrupted, also one that came before: nothing is lost."""
        if self.received is not None:
            _raise(self.received, None)
        self._is_patient = False
        try:
            yield
        finally:
            self._is_patient = True

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        if not self._is_patient:
            self.received = number
            _raise(number, frame)
        if self._is_signalled:
            raise Interrupted(
                number, "stopped at once by a second signal", "type resume=RUN to continue the run"
            )
        self._is_signalled = True
        self.ask(number)
