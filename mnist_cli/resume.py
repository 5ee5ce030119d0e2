"""Continuing a run: which folder, from which checkpoint, and with which changes.

The configuration comes out of the checkpoint; only what the user typed is laid over it. A key that
would change the numbers of the run is refused with its name, unless `resume_allow` lists it.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mnist_cli import checkpoint as checkpoints
from mnist_cli import find, optim, schedule
from mnist_cli.checkpoint import Checkpoint
from mnist_cli.config import FREE_KEYS, TrainConfig, flatten, to_plain, train_config
from mnist_cli.console import Console
from mnist_cli.errors import CheckpointError, UsageError
from mnist_cli.run import RunFolder, as_typed

# With others the position in an epoch, the tensors, or the value of the best epoch would mean
# something else.
FIXED_KEYS = (
    *("model", "dataset", "batch_size", "grad_accum", "seed", "monitor"),
    *("optim.name", "loss.name"),
)


def load(
    folder: RunFolder, given: TrainConfig, typed: Collection[str], console: Console
) -> tuple[TrainConfig, Checkpoint]:
    """The configuration to go on with, and where the run stands.

    That is the newer of `last` and `best`: a crash may come between the two. A damaged `last` falls
    back to `best`, with a warning.

    Raises:
        CheckpointError: no checkpoint of the run can be used, or the selected weights are missing.
        UsageError: a key was changed that would change the run.
    """
    sound: dict[Path, Checkpoint] = {}
    reasons: list[str] = []
    for path in find.checkpoints_in(folder):
        try:
            sound[path] = _load_whole(path)
        except CheckpointError as error:
            reasons.append(error.message)
            console.warn(error.message)
    if not sound:
        raise CheckpointError(
            "; ".join(reasons), "no checkpoint of the run can be used: mend that, or start it anew"
        )
    selected = sound.get(folder.best)
    path, found = next(iter(sound.items()))
    is_newer = selected is not None and selected.progress.step > found.progress.step
    if selected is not None and is_newer and selected.config == found.config:  # not another run's
        path, found = folder.best, selected
    if found.progress.best is not None and found.progress.best.monitor is not None:
        hint = "put it back, or start the run anew"
        if selected is None:
            raise CheckpointError(f"{folder.best}, the selected weights, can't be used", hint)
        if selected.progress.step != found.progress.best.step:
            raise CheckpointError(
                f"{folder.best} doesn't hold the weights of epoch {found.progress.best.epoch},"
                " which were selected",
                hint,
            )
    if reasons:
        console.warn(f"going on from {path}, at step {found.progress.step}")
    return merge(found.config, given, typed, folder.path), found


def _load_whole(path: Path) -> Checkpoint:
    """The checkpoint, with all that is needed to go on from it. Raises CheckpointError."""
    found = checkpoints.load(path)
    is_bare = not found.optim and bool(optim.state_names(found.config.optim))
    # The first steps of float16 find the scale of the loss, and may leave no state.
    if found.progress.step and is_bare and found.progress.loss_scale is None:
        raise CheckpointError(f"{path} holds no state of the optimizer", "")
    return found


def merge(
    stored: TrainConfig, given: TrainConfig, typed: Collection[str], folder: Path
) -> TrainConfig:
    """`stored` with the `typed` keys of `given` laid over it."""
    merged, plain = to_plain(stored), to_plain(given)
    if "experiment" in typed and given.resume != "auto":
        raise UsageError(
            f"resume={given.resume} and experiment= name two configurations",
            "leave experiment= out: the run goes on with its own",
        )
    if "experiment" in typed:
        merged = copy.deepcopy(plain)
    for key in typed:
        *parents, leaf = key.split(".")
        source, target = plain, merged
        for parent in parents:
            source, target = source[parent], target[parent]
        if leaf in source and not _is_same_option(source[leaf], target.get(leaf)):
            target[leaf] = source[leaf]
    merged |= {key: plain[key] for key in ("resume_allow", "profile")}  # of this session alone
    new = train_config(merged | {"resume": None, "out": str(folder)})
    _check_changes(stored, new, given.resume_allow)
    return new


def _is_same_option(given: Any, stored: Any) -> bool:
    """Whether a group is chosen as it was: then only its keys that were typed count."""
    return (
        isinstance(given, dict)
        and isinstance(stored, dict)
        and given.get("name") == stored.get("name") is not None
    )


def _check_changes(stored: TrainConfig, new: TrainConfig, allowed: Collection[str]) -> None:
    before, after = flatten(to_plain(stored)), flatten(to_plain(new))
    # The choice of an option comes before its keys, which differ because of it.
    for key in sorted(before.keys() | after.keys(), key=lambda key: (not _is_choice(key), key)):
        was, now = before.get(key), after.get(key)
        if was == now or key in FREE_KEYS:
            continue
        if key == "epochs" and new.epochs > stored.epochs and schedule.may_extend(new.schedule):
            continue
        fixed = any(key == name or key.startswith(f"{name}.") for name in FIXED_KEYS)
        group = key.partition(".")[0]
        if not fixed and (key in allowed or group in allowed):
            continue
        typed = group if _is_choice(key) else key
        allowing = f"or allow it: resume_allow=[{typed}]"
        if key == "epochs" and new.epochs < stored.epochs:
            allowing = f"or, if no more than {now} are done, allow it: resume_allow=[epochs]"
        raise UsageError(
            f"{typed}={as_typed(now)} differs from the run's {typed}={as_typed(was)}",
            f"leave out what sets {typed}, or start a new run"
            if fixed
            else f"leave out what sets {typed}, {allowing}",
        )


def _is_choice(key: str) -> bool:
    return key.endswith(".name")
