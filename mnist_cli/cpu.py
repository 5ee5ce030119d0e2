"""What the processor can do, known without torch."""

from __future__ import annotations

import functools
import re
from pathlib import Path


@functools.cache
def has_amx() -> bool:
    """Whether it multiplies matrices of bfloat16 in hardware; without, they only cost time.

    Linux says so; elsewhere nothing is known, and the answer is no.

    Source: Intel, "Architecture Instruction Set Extensions", 2020, chapter 3.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return re.search(r"^flags\b.*\bamx_bf16\b", text, re.MULTILINE) is not None
