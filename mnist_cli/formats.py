"""Metrics as people read them, the same on the screen and on every page."""

from __future__ import annotations


def metric(name: str | None, value: float | None) -> str:
    """A value of the metric `name`; with an exponent where four digits would hide it."""
    if value is None:
        return "-"
    if isinstance(value, int) or name == "num_params":
        return f"{value:,.0f}"
    if name is not None and "accuracy" in name:
        return percent(value)
    return f"{value:.4f}" if value == 0 or 0.001 <= abs(value) < 1e6 else f"{value:.2e}"


def percent(fraction: float) -> str:
    return f"{fraction:.2%}"
