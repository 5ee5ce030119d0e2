"""Importing much at once."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator

from mnist_cli.signals import held

MANY = 100  # modules; where there are fewer, most objects are not theirs


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """The block imports much: the garbage collector leaves it alone, and signals wait for it.

    Modules stay to the end. Left to itself the collector walks through the objects of torch several
    times while they are made, in every full collection of the run, and once more when the process
    ends: a quarter of the time of `python -c 'import torch'`.

    Source: gc.freeze in the documentation of Python.
    """
    num_modules, was_enabled = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        with held():
            yield
    finally:
        if len(sys.modules) >= num_modules + MANY:
            gc.freeze()
        if was_enabled:
            gc.enable()


def thaw() -> None:
    """Let the collector at what was frozen, before the process ends, if triton is loaded.

    torch's compiler loads it: for a plugin's optimizer, `compile=true`, `logger=mlflow`. It writes
    thirty lines to stderr about objects that outlive the interpreter, as frozen ones do. Without
    it the time of this collection is saved.
    """
    if "triton" in sys.modules:
        gc.unfreeze()
