"""The study of a search: what Optuna knows of it, in `search.journal`, a file of JSON lines.

Any number of processes may be at one study, on machines that share the folder: each asks for the
next trial until there are enough. A trial that none of them is at any more is taken up by the one
that finds itself alone, at its start or at its end.

Randomness is counted here too: the sampler of trial N is seeded by (seed, N) and sees what was told
before, so a search with one job at a time repeats exactly, and one that was killed goes on as if it
had not been. With several at a time the order in which they end decides what is known.
"""

from __future__ import annotations

import itertools
import math
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnist_cli import durable, formats
from mnist_cli.config import OBJECTIVES, SweepConfig
from mnist_cli.errors import UsageError
from mnist_cli.sweep import display
from mnist_cli.sweep.job import JOURNAL, Document, has_failed
from mnist_cli.sweep.space import Space, as_run

if TYPE_CHECKING:
    import optuna

MIN_FOR_IMPORTANCE = 4  # completed trials; fewer tell nothing


class Study:
    """The trials of a search, those of other processes among them.

    Opened behind the door of its folder.

    Args:
        space: what may be chosen.
        fixed: {key: value as typed} of what is not to be chosen.
        seed: of the sampler.
        is_alone: whether no other process is at the folder.

    Raises:
        UsageError: the folder holds a search of something else.
    """

    def __init__(
        self,
        folder: Path,
        space: Space,
        settings: SweepConfig,
        objectives: Sequence[str],
        fixed: Mapping[str, str],
        seed: int,
        is_alone: bool,
    ) -> None:
        self._folder, self._space, self._seed = folder, space, seed
        self._settings, self._objectives = settings, objectives
        self._num_wanted = settings.trials
        if settings.sampler == "grid":
            num_points = math.prod(len(part.points()) for part in space)
            self._num_wanted = min(num_points, settings.trials)
        self._taken: set[int] = set()  # numbers of the trials that were begun here
        self._cut_off: list[optuna.trial.FrozenTrial] = []
        if is_alone:
            _mend(folder / JOURNAL)
        self._study = self._open(fixed)
        if is_alone:
            self.take_up()

    def _open(self, fixed: Mapping[str, str]) -> optuna.Study:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        path = self._folder / JOURNAL
        try:
            study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(path))),
                study_name="search",
                directions=[OBJECTIVES[name] for name in self._objectives],
                pruner=self._pruner(),
                load_if_exists=True,
            )
            before, now = study.user_attrs.get("what"), self._what(fixed)
            if before is None:
                study.set_user_attr("what", now)
            elif before != now:
                raise UsageError(
                    f"{self._folder} holds a search {_difference(dict(before), dict(now))}",
                    "type everything as it was, or search in another folder",
                )
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise UsageError(f"{path} can't be read: {error}", "search in another folder") from None
        return study

    def _what(self, fixed: Mapping[str, str]) -> list[list[str]]:
        """What may not change while a search goes on, as (key, value)."""
        chosen = {part.key: part.told for part in self._space}
        what = {"sweep.objectives": ",".join(self._objectives), **chosen, **fixed}
        return [[key, value] for key, value in what.items()]

    def _pruner(self) -> optuna.pruners.BasePruner:
        from optuna import pruners

        match self._settings.pruner:
            case "median":
                return pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1)
            case "halving":
                return pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
            case _:
                return pruners.NopPruner()

    def take_up(self) -> bool:
        """Take over the trials whose process has died, if there are any. Only while alone."""
        import optuna

        left = [
            trial
            for trial in self._study.trials
            if not trial.state.is_finished() and trial.number not in self._taken
        ]
        for trial in left:
            if len(trial.params) == len(self._space):
                self._cut_off.append(trial)
            else:  # its process was killed before it had chosen
                self._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        return bool(left)

    def give_over(self, trials: Sequence[optuna.Trial]) -> None:
        """Leave trials to another process that is at them too; the last one tells of them."""
        self._taken.difference_update(trial.number for trial in trials)

    def counted(self) -> list[optuna.trial.FrozenTrial]:
        """The trials that count: not those that were never begun."""
        return [
            trial
            for trial in self._study.get_trials(deepcopy=False)
            if len(trial.params) == len(self._space) or not trial.state.is_finished()
        ]

    @property
    def num_done(self) -> int:
        """How many trials have ended, in any process."""
        return sum(trial.state.is_finished() for trial in self.counted())

    @property
    def num_own(self) -> int:
        """How many trials were this command's to run: all but those of others and of before."""
        elsewhere = sum(trial.number not in self._taken for trial in self.counted())
        return max(self._num_wanted - elsewhere, 0)

    # --- ask and tell ----------------------------------------------------------------------------

    def ask(self) -> optuna.Trial | None:
        """A trial with its choice made, one that was cut off first; None when there are enough."""
        import optuna

        if self._cut_off:
            trial = optuna.Trial(self._study, self._cut_off.pop(0)._trial_id)
            self._taken.add(trial.number)
            return trial
        if len(self.counted()) >= self._num_wanted:
            return None
        trial = self._study.ask()
        rank = sum(other.number < trial.number for other in self.counted())
        if rank >= self._num_wanted:  # others were quicker
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
            return None
        self._taken.add(trial.number)
        self._study.sampler = self._sampler(rank)
        for part in self._space:
            part.suggest(trial)
        return trial

    def _sampler(self, rank: int) -> optuna.samplers.BaseSampler:
        from optuna import samplers

        seed = zlib.crc32(f"{self._seed}/{rank}".encode())
        match self._settings.sampler:
            case "tpe":
                return samplers.TPESampler(seed=seed)
            case "gp":
                return samplers.GPSampler(seed=seed)
            case "grid":
                return self._at_grid_point(rank)
            case _:
                return samplers.RandomSampler(seed=seed)

    def _at_grid_point(self, rank: int) -> optuna.samplers.BaseSampler:
        """What chooses the combination number `rank` of the grid."""
        from optuna import exceptions, samplers

        combinations = itertools.product(*(part.points() for part in self._space))
        values = next(itertools.islice(combinations, rank, None))
        chosen = dict(zip((part.key for part in self._space), values, strict=True))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", exceptions.ExperimentalWarning)
            return samplers.PartialFixedSampler(chosen, samplers.RandomSampler())

    def tell(self, trials: Sequence[optuna.Trial], document: Document) -> None:
        """`trials`, all of the same choice, ended with `document`."""
        from optuna.trial import TrialState

        values = None if "exit_code" in document else self._values(document)
        for trial in trials:
            trial.set_user_attr("job", Path(document.get("run_dir") or "").name)
            if values is not None:
                self._study.tell(trial, values)
            elif not has_failed(document):
                self._study.tell(trial, state=TrialState.PRUNED)
            else:
                self._study.tell(trial, state=TrialState.FAIL)

    def _values(self, document: Document) -> list[float] | None:
        """The objectives of a completed job; None of any other."""
        if document["status"] != "completed":
            return None
        found = {
            "train_s": document["time"]["train_s"],
            "num_params": document["model"]["num_params"],
            document["best"]["monitor"]: document["best"]["value"],
        }
        for name in ("loss", "accuracy", "mse"):
            found.setdefault(f"val_{name}", document["val"].get(name))
        return [float(found[name]) for name in self._objectives]

    # --- what came of it -------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """What leaderboard.json holds of a search, besides what every sweep has."""
        return {
            "objectives": {name: OBJECTIVES[name] for name in self._objectives},
            "sampler": self._settings.sampler,
            "pruner": self._settings.pruner,
            "importance": self._importance(),
            "pareto": self._front(),
            "history": [
                {
                    "trial": trial.number,
                    "state": trial.state.name.lower(),
                    "values": trial.values if trial.state.name == "COMPLETE" else None,
                    "epochs": len(trial.intermediate_values) or None,
                    "config": self._chosen(trial),
                    "job": trial.user_attrs.get("job"),
                }
                for trial in self.counted()
            ],
        }

    def _chosen(self, trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
        """What was run, in the order of the line."""
        return {part.key: as_run(trial.params.get(part.key)) for part in self._space}

    def _importance(self) -> dict[str, float]:
        """The share of each key in what sets the best trials apart; empty for too few of them.

        Watanabe et al., "PED-ANOVA", 2023, as Optuna has it.
        """
        import optuna

        done = [trial for trial in self._study.trials if trial.state.name == "COMPLETE"]
        if len(done) < MIN_FOR_IMPORTANCE or len({trial.values[0] for trial in done}) == 1:
            return {}
        try:
            found = optuna.importance.get_param_importances(self._study)
        except (ValueError, RuntimeError):  # no key was tried with two values
            return {}
        return {key: float(value) for key, value in found.items() if math.isfinite(value)}

    def _front(self) -> list[dict[str, Any]]:
        """With several objectives: the trials that no other beats in all of them."""
        if len(self._objectives) == 1:
            return []
        return [
            {
                "job": trial.user_attrs.get("job"),
                "config": self._chosen(trial),
                "values": dict(zip(self._objectives, trial.values, strict=True)),
            }
            for trial in self._study.best_trials
        ]


def show(board: dict[str, Any], say: Callable[[str], None]) -> None:
    """The lines below the leaderboard of a search."""
    shares = [f"{key} {share:.0%}" for key, share in board["importance"].items()]
    if shares:
        say(f"mattered {', '.join(shares)}")
    for trial in board["pareto"]:
        values = [
            f"{name} {formats.metric(name, value)}" for name, value in trial["values"].items()
        ]
        chosen = trial["config"].items()
        what = " ".join(f"{key}={display.short_cell(value)}" for key, value in chosen)
        say(f"front    {', '.join(values)}  {what}")


def _difference(before: dict[str, str], now: dict[str, str]) -> str:
    """Where two searches differ, in words: their first difference."""
    for key in {**before, **now}:
        if before.get(key) != now.get(key):
            was, is_now = (
                f"with {key}={what[key]}" if key in what else f"without {key}"
                for what in (before, now)
            )
            return f"{was}, and this one is {is_now}"
    return "with its keys in another order"


def _mend(journal: Path) -> None:
    """Undo what a process left that was killed while it wrote: its lock, and half a line."""
    with durable.writing(journal):
        Path(f"{journal}.lock").unlink(missing_ok=True)
        if journal.exists():
            content = journal.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:
                durable.write(journal, whole)
