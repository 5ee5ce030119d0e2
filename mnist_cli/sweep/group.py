"""Which runs can be trained as one stack."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from mnist_cli.config import LinearModelConfig, MlpConfig, TrainConfig, flatten, to_plain

# What may differ between the members of a group, besides the schedule and the optimizer's numbers.
FREE = {
    "seed", "epochs", "monitor", "early_stop.patience", "grad_clip", "model.dropout",
    "loss.label_smoothing", "resume", "resume_allow", "out",
}  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Runs that can be trained together.

    Attributes:
        members: their places in the list of configurations.
        alone_because: why the run can be trained only alone; None where others could join it.
    """

    members: tuple[int, ...]
    alone_because: str | None = None


def groups(configs: Sequence[TrainConfig]) -> list[Group]:
    """Sort runs into groups, each in the order of its first member; every run is in one."""
    alike: dict[str, list[int]] = {}
    found: list[Group] = []
    for place, config in enumerate(configs):
        reason = _obstacle(config)
        if reason is None:
            alike.setdefault(_shape(config), []).append(place)
        else:
            found.append(Group((place,), reason))
    found += [Group(tuple(places)) for places in alike.values()]
    return sorted(found, key=lambda group: group.members)


def _obstacle(config: TrainConfig) -> str | None:
    """The key that keeps a run from being stacked, as it would be typed."""
    if not isinstance(config.model, LinearModelConfig | MlpConfig):
        return f"model={config.model.name}"
    if config.precision != "float32":
        return f"precision={config.precision}"
    if config.compile:
        return "compile=true"
    if config.grad_accum > 1:
        return f"grad_accum={config.grad_accum}"
    if config.save_every is not None:
        return f"save_every={config.save_every}"
    if config.profile:
        return "profile=true"
    return None


def _shape(config: TrainConfig) -> str:
    """What all members of a group have in common, as text to compare."""
    fixed = {
        key: value
        for key, value in flatten(to_plain(config)).items()
        if key == "optim.name" or (key not in FREE and not key.startswith(("optim.", "schedule.")))
    }
    return json.dumps(fixed, sort_keys=True)
