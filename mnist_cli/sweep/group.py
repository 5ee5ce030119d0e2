"""Which jobs of a sweep are trained as one stack."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mnist_cli.config import SweepConfig, TrainConfig, flatten, to_plain
from mnist_cli.errors import UsageError
from mnist_cli.options import LinearModelConfig, MlpConfig, PluginLossConfig

# What may differ between the members of a group, besides the schedule and the optimizer's numbers.
FREE = {
    "seed", "epochs", "monitor", "early_stop.patience", "grad_clip", "model.dropout",
    "loss.label_smoothing", "report", "predictions", "resume", "resume_allow", "out",
}  # fmt: skip
OPTIMS = {"sgd", "momentum", "adam", "adamw", "rmsprop", "adagrad", "adadelta"}  # of `stacked`
MAX_MEMBERS = 64  # each keeps two files open

# The widest hidden layer for which sweep.fused=auto makes a stack. On two cores 16 runs of one
# layer of 64 are 2.3 times as fast so, eight of 128 1.4 times, and eight of 256 1.1 times: a wide
# product keeps a CPU busy by itself.
WIDEST = 128


@dataclass(frozen=True)
class Group:
    """Jobs that are trained together.

    Attributes:
        members: their places in the list of configurations.
        alone_because: why a job can be trained only alone; None where others could join it.
    """

    members: tuple[int, ...]
    alone_because: str | None = None


def planned(configs: Sequence[TrainConfig], settings: SweepConfig) -> list[Group]:
    """How a sweep goes through its jobs, by `sweep.fused` and `sweep.jobs`."""
    if settings.fused == "false":
        return [Group((place,)) for place in range(len(configs))]
    found = groups(configs)
    if settings.fused == "auto":
        found = [part for group in found for part in _worthwhile(group, configs)]
    num_parts = math.ceil(settings.jobs / len(found))  # so that every process has something to do
    divided = [part for group in found for part in _divided(group, configs, num_parts)]
    return sorted(divided, key=lambda group: min(group.members))


def check(configs: Sequence[TrainConfig], settings: SweepConfig) -> None:
    """Raises UsageError for sweep.fused=true where no two jobs can be trained together."""
    found = groups(configs) if settings.fused == "true" else []
    if found and all(len(group.members) == 1 for group in found):
        reasons = dict.fromkeys(group.alone_because for group in found if group.alone_because)
        why = f"{', '.join(reasons)} can't be stacked" if reasons else "they differ in too much"
        raise UsageError(
            f"sweep.fused=true, but no two jobs can be trained as one: {why}",
            "type sweep.fused=auto, or jobs that differ in optim.lr, seed and the like",
        )


def groups(configs: Sequence[TrainConfig]) -> list[Group]:
    """Sort jobs into groups, each in the order of its first member; every job is in one."""
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
    if config.optim.name not in OPTIMS:
        return f"optim={config.optim.name}"
    if isinstance(config.loss, PluginLossConfig):
        return f"loss={config.loss.name}"
    if config.precision != "float32":
        return f"precision={config.precision}"
    if config.compile:
        return "compile=true"
    if config.cuda_graph:
        return "cuda_graph=true"
    if config.grad_accum > 1:
        return f"grad_accum={config.grad_accum}"
    if config.save_every is not None:
        return f"save_every={config.save_every}"
    if config.profile:
        return "profile=true"
    if config.logger:
        return f"logger=[{','.join(config.logger)}]"
    return None


def _shape(config: TrainConfig) -> str:
    """What all members of a group have in common, as text to compare."""
    fixed = {
        key: value
        for key, value in flatten(to_plain(config)).items()
        if key == "optim.name" or (key not in FREE and not key.startswith(("optim.", "schedule.")))
    }
    return json.dumps(fixed, sort_keys=True)


def _worthwhile(group: Group, configs: Sequence[TrainConfig]) -> list[Group]:
    """`group`, or each of it alone where that was measured to be as fast."""
    model = configs[group.members[0]].model
    if isinstance(model, MlpConfig) and max(model.hidden, default=0) > WIDEST:
        return [Group((place,)) for place in group.members]
    return [group]


def _divided(group: Group, configs: Sequence[TrainConfig], num_parts: int) -> Iterator[Group]:
    """`group` in about `num_parts` parts of at least two, each with as many jobs of each seed."""
    seen: Counter[int] = Counter()
    ranked = []
    for place in group.members:
        seed = configs[place].seed
        ranked.append((seen[seed], seed, place))
        seen[seed] += 1
    places = [place for *_, place in sorted(ranked)]
    num_parts = max(min(num_parts, len(places) // 2), math.ceil(len(places) / MAX_MEMBERS))
    size = math.ceil(len(places) / num_parts)
    if size > len(seen):
        size += -size % len(seen)
    for start in range(0, len(places), size):
        yield Group(tuple(sorted(places[start : start + size])), group.alone_because)
