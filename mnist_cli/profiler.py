"""profile=true: a trace of the first steps, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

from pathlib import Path

from mnist_cli import durable, runtime
from mnist_cli.console import Console
from mnist_cli.errors import MnistCliError, ResourceError, one_line

PROFILED_STEPS = 20
MAX_TRACE_BYTES = 64 * 2**20


class Profiler:
    """Writes a trace of the first steps in its block to `path`; nothing if `path` is None."""

    def __init__(self, path: Path | None, console: Console) -> None:
        self._path = path
        self._console = console
        self._left = PROFILED_STEPS if path else 0

    def __enter__(self) -> Profiler:
        if self._left:
            from torch.profiler import profile

            self._profile = profile()
            with runtime.silent_stderr():  # here it says that there is no GPU, as an error
                self._profile.start()
        return self

    def advance(self, num_steps: int) -> None:
        """Count steps that were taken; after the last one to be profiled the trace is written."""
        if self._left:
            self._left = max(0, self._left - num_steps)
            if not self._left:
                self._write()

    def __exit__(self, *error: object) -> None:
        if self._left:
            self._write()

    def _write(self) -> None:
        assert self._path is not None
        try:
            # torch takes no path that isn't UTF-8, and tells of a failure on stderr alone.
            with durable.temporary_folder(MAX_TRACE_BYTES) as folder:
                trace = folder / self._path.name
                with runtime.silent_stderr():
                    self._profile.stop()
                    self._profile.export_chrome_trace(str(trace))
                content = trace.read_bytes() if trace.exists() else b""
            if not content:
                raise ResourceError("torch wrote none", "try again")
            durable.write(self._path, content)
        except (OSError, MnistCliError) as error:
            self._console.warn(f"no trace was written: {one_line(str(error))}")
