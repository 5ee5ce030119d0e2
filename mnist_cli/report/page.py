"""Templates into one file that opens from disk and loads nothing; all that is put in is escaped."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jinja2

from mnist_cli import __version__, conf
from mnist_cli.config import TrainConfig, flatten, to_plain
from mnist_cli.sweep import display

_PLACES = ("out", "resume", "resume_allow")  # where a run was made, not what it is


def render(template: str, **values: Any) -> str:
    """The page `templates/<template>` with `values`."""
    return _environment().get_template(template).render(version=__version__, **values)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "number": number,
        "count": lambda value: f"{value:,}",
        "seconds": seconds,
        "plain": plain,
        "value": lambda value, metric: display.number(metric, value),
    }
    return environment


def percent(fraction: float) -> str:
    return f"{fraction:.2%}"


def number(value: float | None) -> str:
    """Four digits behind the point, or an exponent where these would hide the value."""
    if value is None:
        return "-"
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.001 else f"{value:.2e}"


def seconds(value: float) -> str:
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def plain(value: Any) -> str:
    """A value of the configuration as one types it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(plain, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def settings(config: TrainConfig) -> dict[str, Any]:
    """What a run was made with, by key; the option of a group stands under the group's name."""
    flat = flatten(to_plain(config))
    return {key.removesuffix(".name"): value for key, value in flat.items() if key not in _PLACES}


def defaults(config: TrainConfig) -> dict[str, Any]:
    """The defaults of the same keys, those of an option being the option's own."""
    return conf.defaults("train", {group: getattr(config, group).name for group in conf.GROUPS})
