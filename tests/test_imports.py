"""The collector is as before after an import, and leaves alone what much came in."""

from __future__ import annotations

import gc
import sys
import types
from collections.abc import Iterator

import pytest

from mnist_cli import imports


@pytest.fixture
def frozen() -> Iterator[int]:
    """How many objects are frozen before the test; after it, the collector is on."""
    yield gc.get_freeze_count()
    gc.enable()


def load(number: int, patch: pytest.MonkeyPatch) -> None:
    for index in range(number):
        patch.setitem(sys.modules, f"made_up_{index}", types.ModuleType(f"made_up_{index}"))


def test_many_modules_are_frozen(frozen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with imports.importing():
        assert not gc.isenabled()
        load(imports.MANY, monkeypatch)
    assert gc.isenabled() and gc.get_freeze_count() > frozen


def test_what_a_run_makes_is_collected(frozen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with imports.importing():
        load(imports.MANY - 1, monkeypatch)
    assert gc.isenabled() and gc.get_freeze_count() <= frozen


def test_an_import_that_fails_leaves_the_collector_on(frozen: int) -> None:
    with pytest.raises(ImportError), imports.importing():
        raise ImportError
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off(frozen: int) -> None:
    gc.disable()
    with imports.importing():
        pass
    assert not gc.isenabled()
