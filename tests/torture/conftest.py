"""The long suite: the tests of `tests/`, with large numbers."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

os.environ["MNIST_CLI_TORTURE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))
pytest.register_assert_rewrite(
    "test_checkpoint", "test_durable", "test_resume", "test_signals", "test_sweep"
)
