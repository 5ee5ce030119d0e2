"""SIGINT and SIGTERM, noted so that work can be brought to a good end."""

from __future__ import annotations

import signal
import types

from mnist_cli.errors import Interrupted

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SignalWatch:
    """Notes SIGINT and SIGTERM so that the loop can finish its step and save.

    The second signal leaves at once; the last checkpoint on disk is whole at any instant.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> SignalWatch:
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def ask(self, number: int) -> None:
        """Ask for the same end as the signal `number`; asking again changes nothing."""
        if self.received is None:
            self.received = number

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        if self.received is not None:
            raise Interrupted(
                number, "stopped at once by a second signal", "type resume=RUN to continue the run"
            )
        self.received = number
