"""One file over https: bounded in time and size, from the first mirror that gives the right one."""

from __future__ import annotations

import http.client
import os
import queue
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnist_cli.dataset.files import shown_path
from mnist_cli.errors import DataError, UsageError, one_line, shown

CHUNK_BYTES = 1 << 18


@dataclass(frozen=True)
class Patience:
    """How long a download may take.

    Attributes:
        total_s: everything together; the environment variable MNIST_CLI_DOWNLOAD_TIMEOUT sets it.
        first_byte_s: until anything at all was received, so that no network shows soon.
        socket_s: one operation of a connection.
        least_rate: bytes per second that a connection has to average once it is `socket_s` old.
        tries: for each mirror.
        backoff_s: the pause before the second try; it doubles with each.
    """

    total_s: float = 1800.0
    first_byte_s: float = 20.0
    socket_s: float = 8.0
    least_rate: float = 2_000.0
    tries: int = 3
    backoff_s: float = 0.5


class Clock:
    """Counts the seconds of one download against its `Patience`."""

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self.started = time.monotonic()
        self.flowing = False

    def left_s(self) -> float:
        limit = self.patience.total_s
        if not self.flowing:
            limit = min(limit, self.patience.first_byte_s)
        return self.started + limit - time.monotonic()


class TransferError(Exception):
    """One try failed; `final` says that another try at the same mirror would fail too."""

    def __init__(self, reason: str, final: bool = False) -> None:
        super().__init__(one_line(reason, 160))
        self.final = final


def patience_from_environment() -> Patience:
    """The default, with MNIST_CLI_DOWNLOAD_TIMEOUT as its total. Raises UsageError."""
    text = os.environ.get("MNIST_CLI_DOWNLOAD_TIMEOUT")
    if not text:
        return Patience()
    try:
        total_s = float(text)
    except ValueError:
        total_s = 0.0
    if not 0 < total_s < 1e9:
        raise UsageError(
            f"MNIST_CLI_DOWNLOAD_TIMEOUT={shown(text)} is no number of seconds",
            "set MNIST_CLI_DOWNLOAD_TIMEOUT=600, or unset it",
        )
    return Patience(total_s=total_s)


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str
    ) -> Any:
        fp.close()  # or urllib reads the body, however long it is
        if not newurl.lower().startswith("https://"):
            raise TransferError(f"redirected to {newurl}, which is not https", final=True)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@dataclass(frozen=True)
class Network:
    """The mirrors to ask, the time that is left, the certificates to trust."""

    mirrors: tuple[str, ...]
    clock: Clock
    context: ssl.SSLContext

    def download(self, name: str, path: Path, most: int, check: Callable[[Path], None]) -> Path:
        """Download `name` to `path`, from the first mirror whose file `check` lets pass.

        Every mirror is asked once before one is asked again.

        Raises:
            TransferError: no mirror has it, or the time is up; the reasons of the last try.
        """
        failure = TransferError("there is no mirror to ask")
        mirrors = list(self.mirrors)
        for attempt in range(self.clock.patience.tries):
            for mirror in tuple(mirrors):
                try:
                    self._pause(attempt)
                    self._attempt(f"{mirror}{name}", path, most, check)
                    return path
                except TransferError as error:
                    failure = TransferError(f"{mirror}{name}: {error}")
                    if self.clock.left_s() <= 0:
                        raise failure from error
                    if error.final:
                        mirrors.remove(mirror)
        raise failure

    def _pause(self, attempt: int) -> None:
        if attempt > 0:
            pause_s = self.clock.patience.backoff_s * 2 ** (attempt - 1)
            time.sleep(max(0.0, min(pause_s, self.clock.left_s())))

    def _attempt(self, url: str, path: Path, most: int, check: Callable[[Path], None]) -> None:
        path.unlink(missing_ok=True)
        self._within_time(lambda: self._transfer(url, path, most))
        try:
            check(path)
        except DataError as error:
            reason = error.message.removeprefix(f"{shown_path(path)}: ")
            raise TransferError(reason, final=True) from error

    def _within_time(self, work: Callable[[], None]) -> None:
        """Do `work` in a thread that is left behind when time is up.

        No time-out reaches into a name look-up, or into a header that comes byte by byte.
        """
        results: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def report() -> None:
            try:
                work()
            except BaseException as error:
                results.put(error)
            else:
                results.put(None)

        threading.Thread(target=report, daemon=True).start()
        while True:
            try:
                error = results.get(timeout=max(0.0, self.clock.left_s()))
            except queue.Empty:
                if self.clock.left_s() <= 0:
                    raise TransferError(self._out_of_time(), final=True) from None
            else:
                if error is not None:
                    raise error
                return

    def _transfer(self, url: str, path: Path, most: int) -> None:
        with open(path, "xb") as file:
            for chunk in self._chunks(url, most):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())

    def _chunks(self, url: str, most: int) -> Iterator[bytes]:
        """The body of `url`, checked while it comes: its size, its pace, its end."""
        try:
            with self._open(url) as response:
                announced, received, started = response.length, 0, time.monotonic()
                if announced is not None and announced > most:
                    raise TransferError(
                        f"expected at most {most} bytes, found {announced}", final=True
                    )
                while chunk := response.read1(CHUNK_BYTES):
                    self.clock.flowing = True
                    received += len(chunk)
                    if received > most:
                        raise TransferError(
                            f"expected at most {most} bytes, found more", final=True
                        )
                    self._check_pace(received, time.monotonic() - started)
                    yield chunk
                if announced is not None and received != announced:
                    raise TransferError(
                        f"expected {announced} bytes, found an end after {received}"
                    )
        except urllib.error.HTTPError as error:
            error.close()
            raise TransferError(f"HTTP status {error.code}", final=error.code < 500) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise TransferError(
                f"{getattr(error, 'reason', None) or error or type(error).__name__}"
            ) from error

    def _open(self, url: str) -> http.client.HTTPResponse:
        if not url.lower().startswith("https://"):
            raise TransferError("only https is used", final=True)
        https = urllib.request.HTTPSHandler(context=self.context)
        opener = urllib.request.build_opener(_HttpsOnly, https)
        request = urllib.request.Request(url, headers={"User-Agent": "mnist-cli"})
        timeout_s = max(0.01, min(self.clock.patience.socket_s, self.clock.left_s()))
        response: http.client.HTTPResponse = opener.open(request, timeout=timeout_s)
        return response

    def _check_pace(self, received: int, seconds: float) -> None:
        if self.clock.left_s() <= 0:
            raise TransferError(self._out_of_time(), final=True)
        patience = self.clock.patience
        if seconds > patience.socket_s and received < seconds * patience.least_rate:
            raise TransferError(f"only {received} bytes in {seconds:.0f} s", final=True)

    def _out_of_time(self) -> str:
        if not self.clock.flowing:
            return f"nothing received within {self.clock.patience.first_byte_s:g} s"
        return f"not done within {self.clock.patience.total_s:g} s (MNIST_CLI_DOWNLOAD_TIMEOUT)"
