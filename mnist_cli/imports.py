"""Importing much at once."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator

from mnist_cli.signals import held

MANY = 100  # modules; where there are fewer, most objects are not theirs


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """What is imported inside is never looked through for garbage: modules stay to the end.

    Left to itself the collector walks through the objects of torch several times while they are
    made, in every full collection of the run, and once more when the process ends: a quarter of
    the time of `python -c 'import torch'`.

    A signal waits until all is imported.

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
