"""Templates into one file that opens from disk and loads nothing; all that is put in is escaped."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jinja2

from mnist_cli import __version__, conf, formats
from mnist_cli.config import TrainConfig, flatten, to_plain
from mnist_cli.run import as_typed

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
        "percent": formats.percent,
        "number": lambda value: formats.metric(None, value),
        "count": lambda value: f"{value:,}",
        "seconds": seconds,
        "plain": as_typed,
        "value": lambda value, metric: formats.metric(metric, value),
    }
    return environment


def seconds(value: float) -> str:
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def settings(config: TrainConfig) -> dict[str, Any]:
    """What a run was made with, by key; the option of a group stands under the group's name."""
    flat = flatten(to_plain(config))
    return {key.removesuffix(".name"): value for key, value in flat.items() if key not in _PLACES}


def defaults(config: TrainConfig) -> dict[str, Any]:
    """The defaults of the same keys, those of an option being the option's own."""
    return conf.defaults("train", {group: getattr(config, group).name for group in conf.GROUPS})
