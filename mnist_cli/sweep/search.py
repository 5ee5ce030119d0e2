"""A search: Optuna chooses what to try next, out of lists, ranges and intervals.

Ask and tell, with what Optuna knows in `search.journal`, a file of JSON lines in the folder of the
sweep. Randomness is counted here too: the sampler of trial N is seeded by (seed, N) and sees what
was told before, so a search with one job at a time repeats exactly, and one that was killed goes on
as if it had not been. With several at a time the order in which they end decides what is known.

Any number of processes may be at one search, on machines that share the folder: each asks for the
next trial until there are enough. A trial that none of them is at any more is taken up by the one
that finds itself alone, at its start or at its end.
"""

from __future__ import annotations

import itertools
import math
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mnist_cli import durable
from mnist_cli.config import OBJECTIVES, SweepConfig, TrainConfig
from mnist_cli.errors import LockedError, MnistCliError, UsageError
from mnist_cli.sweep import leaderboard
from mnist_cli.sweep.board import Board
from mnist_cli.sweep.job import Document, Job, failure, has_failed, placed, result_of

if TYPE_CHECKING:
    import optuna

JOURNAL = "search.journal"
MIN_FOR_IMPORTANCE = 4  # completed trials; fewer tell nothing


class Choice(NamedTuple):
    """One of `values`, as they are typed."""

    key: str
    values: tuple[str, ...]

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values to check before a search starts."""
        return self.values


class Numbers(NamedTuple):
    """A number from `low` to `high`, both included, in steps where `step` says so."""

    key: str
    low: float
    high: float
    step: float | None
    is_log: bool

    @property
    def ends(self) -> tuple[Any, ...]:
        return (self.low, self.high)


Space = Sequence[Choice | Numbers]


def words_of(space: Space, values: Mapping[str, Any]) -> tuple[str, ...]:
    """The overrides that choose `values`; floats with six digits, which is what is run."""
    typed = (values[part.key] for part in space)
    return tuple(
        f"{part.key}={f'{value:.6g}' if isinstance(value, float) else value}"
        for part, value in zip(space, typed, strict=True)
    )


def check(settings: SweepConfig, config: TrainConfig) -> list[str]:
    """The objectives of a search whose jobs are like `config`.

    Raises:
        UsageError: there is nothing to search by, or Optuna isn't installed.
    """
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise UsageError(
            "sweep.search=optuna needs Optuna, which isn't installed",
            "type pip install 'mnist-cli[optuna]'",
        ) from None
    if config.dataset.val_fraction == 0:
        raise UsageError(
            "a search selects on the validation split, but dataset.val_fraction=0 leaves none",
            "type dataset.val_fraction=0.1",
        )
    objectives = list(settings.objectives) or [config.monitored]
    foreign = {"classification": "val_mse", "regression": "val_accuracy"}[config.task]
    if foreign in objectives:
        raise UsageError(
            f"sweep.objectives names {foreign}, which dataset={config.dataset.name} has not",
            f"name some of: {', '.join(name for name in OBJECTIVES if name != foreign)}",
        )
    return objectives


class Search:
    """The plan of a search: a new trial whenever there is room, until there are enough.

    Made behind the door of its folder.

    Args:
        space: what may be chosen.
        make_job: composes and checks a job of the overrides that were chosen.
        seed: of the sampler.

    Raises:
        UsageError: the folder holds a search of something else.
    """

    def __init__(
        self,
        folder: durable.SharedFolder,
        space: Space,
        make_job: Callable[[Sequence[str]], Job],
        settings: SweepConfig,
        objectives: Sequence[str],
        config: TrainConfig,
    ) -> None:
        self._shared, self._folder = folder, folder.path
        self._space, self._make_job = space, make_job
        self._settings, self._objectives = settings, objectives
        self._num_wanted = settings.trials
        if settings.sampler == "grid":
            num_points = math.prod(len(_steps(part)) for part in space)
            self._num_wanted = min(num_points, settings.trials)
        self._seed, self._monitored = config.seed, config.monitored
        self.asks = settings.pruner != "none"
        self.names_gpu = config.device.startswith("cuda:")
        self.documents: list[Document] = []
        self._running: dict[str, list[optuna.Trial]] = {}
        self._is_over = False
        self._taken: set[int] = set()  # numbers of the trials that were begun here
        self._cut_off: list[optuna.trial.FrozenTrial] = []
        self._study = self._open(folder.arrive())
        self.num_done = sum(trial.state.is_finished() for trial in self._counted())
        self.board: Board | None = None

    def _open(self, is_alone: bool) -> optuna.Study:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        path = self._folder / JOURNAL
        if is_alone:
            _mend(path)
        what = f"{', '.join(self._objectives)} over {[tuple(part) for part in self._space]}"
        try:
            study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(path))),
                study_name="search",
                directions=[OBJECTIVES[name] for name in self._objectives],
                pruner=self._pruner(),
                load_if_exists=True,
            )
            before = study.user_attrs.get("what")
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise UsageError(f"{path} can't be read: {error}", "search in another folder") from None
        if before is None:
            study.set_user_attr("what", what)
        elif before != what:
            raise UsageError(
                f"{self._folder} holds a search of {before}, which is not {what}",
                "type lists, intervals and objectives as they were, or search in another folder",
            )
        if is_alone:
            self._take_up(study)
        return study

    def _take_up(self, study: optuna.Study) -> bool:
        """Take the trials that ended with their process; for one that is alone. False: no such."""
        import optuna

        left = [
            trial
            for trial in study.trials
            if not trial.state.is_finished() and trial.number not in self._taken
        ]
        for trial in left:
            if len(trial.params) == len(self._space):
                self._cut_off.append(trial)
            else:  # its process was killed before it had chosen
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        return bool(left)

    def _counted(self) -> list[optuna.trial.FrozenTrial]:
        """The trials that count: not those that were never begun."""
        return [
            trial
            for trial in self._study.get_trials(deepcopy=False)
            if len(trial.params) == len(self._space) or not trial.state.is_finished()
        ]

    @property
    def num_own(self) -> int:
        """How many trials were this command's to run: all but those of others and of before."""
        elsewhere = sum(trial.number not in self._taken for trial in self._counted())
        return max(self._num_wanted - elsewhere, 0)

    def _pruner(self) -> optuna.pruners.BasePruner:
        from optuna import pruners

        match self._settings.pruner:
            case "median":
                return pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1)
            case "halving":
                return pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
            case _:
                return pruners.NopPruner()

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

        combinations = itertools.product(*(_steps(part) for part in self._space))
        values = next(itertools.islice(combinations, rank, None))
        chosen = dict(zip((part.key for part in self._space), values, strict=True))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", exceptions.ExperimentalWarning)
            return samplers.PartialFixedSampler(chosen, samplers.RandomSampler())

    # --- as a plan -------------------------------------------------------------------------------

    def next_jobs(self) -> Sequence[Job]:
        while (trial := self._next_trial()) is not None:
            words = words_of(self._space, trial.params)
            label = " ".join(words)
            try:
                job = placed(self._make_job(words), self._folder, label)
            except MnistCliError as error:  # a combination that doesn't go together
                self._tell([trial], failure(error, None))
                continue
            key = str(job.config.out)
            if key in self._running:  # the same choice a second time
                self._running[key].append(trial)
                continue
            assert self.board is not None
            self.board.add(job, label, trial.number + 1)
            done = result_of(job, with_pruned=self.asks)
            if done is not None:
                self._tell([trial], done)
                self.board.skipped(job, done)
                continue
            self._running[key] = [trial]
            self.board.started([job])
            return [job]
        return []

    def _next_trial(self) -> optuna.Trial | None:
        import optuna

        while not self._is_over:
            if self._cut_off:
                trial = optuna.Trial(self._study, self._cut_off.pop(0)._trial_id)
                self._taken.add(trial.number)
                return trial
            chosen = self._ask()
            if chosen is not None or self._running:
                return chosen
            with self._shared.door():
                if not (self._shared.arrive() and self._take_up(self._study)):
                    self._is_over = True
                    self._shared.leave()  # so that one of several that end now is the last
        return None

    def _ask(self) -> optuna.Trial | None:
        """A new trial with its choice made; None when there are enough."""
        import optuna

        if len(self._counted()) >= self._num_wanted:
            return None
        trial = self._study.ask()
        rank = sum(other.number < trial.number for other in self._counted())
        if rank >= self._num_wanted:  # others were quicker
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
            return None
        self._taken.add(trial.number)
        self._study.sampler = self._sampler(rank)
        for part in self._space:
            _suggest(trial, part)
        return trial

    def should_stop(self, job: Job, epoch: int, value: float | None) -> bool:
        assert self.board is not None and isinstance(job.config, TrainConfig)
        self.board.epoch(job, epoch, value)
        trial = self._running[str(job.config.out)][0]
        if not self.asks or value is None:
            return False
        trial.report(value, epoch)
        return epoch < job.config.epochs and bool(trial.should_prune())  # numpy's bool is no JSON

    def ended(self, job: Job, document: Document) -> None:
        assert self.board is not None
        trials = self._running.pop(str(job.config.out))
        if document.get("exit_code") == LockedError.exit_code and not self._is_alone():
            # Another process chose the same. Who is alone in the end tells the study of both.
            self._taken.difference_update(trial.number for trial in trials)
            self.board.given_over(job)
            return
        if document.get("exit_code", 0) < 128:  # one that a signal stopped goes on some day
            self._tell(trials, document)
        else:
            self.documents.append(document)
        self.board.ended(job, document)

    def _is_alone(self) -> bool:
        with self._shared.door():
            return self._shared.arrive()

    def tick(self) -> None:
        assert self.board is not None
        self.board.draw()

    def _tell(self, trials: Sequence[optuna.Trial], document: Document) -> None:
        from optuna.trial import TrialState

        self.documents.append(document)
        values = None if "exit_code" in document else self._values(document)
        for trial in trials:
            trial.set_user_attr("job", Path(document.get("run_dir") or "").name)
            if values is not None:
                self._study.tell(trial, values)
            elif not has_failed(document):
                self._study.tell(trial, state=TrialState.PRUNED)
            else:
                self._study.tell(trial, state=TrialState.FAIL)
        if has_failed(document) and self._settings.fail_fast:
            self._is_over = True

    def _values(self, document: Document) -> list[float] | None:
        """What the study is told of a completed job; None of any other."""
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
                for trial in self._counted()
            ],
        }

    def _chosen(self, trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
        """What was chosen, in the order of the line."""
        return {part.key: trial.params.get(part.key) for part in self._space}

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


def _steps(part: Choice | Numbers) -> Sequence[Any]:
    """The values of a part, for sampler=grid. Raises UsageError where they can't be counted."""
    if isinstance(part, Choice):
        return part.values
    if part.step is None:
        raise UsageError(
            f"sweep.sampler=grid can't count the values of {part.key}, an interval",
            "type a list or range(), or take another sampler",
        )
    count = math.floor((part.high - part.low) / part.step + 1e-9) + 1
    return [part.low + position * part.step for position in range(count)]


def check_grid(space: Space) -> None:
    """Raises UsageError where a part can't be counted."""
    for part in space:
        _steps(part)


def _suggest(trial: optuna.Trial, part: Choice | Numbers) -> None:
    """Let the sampler choose a value of `part`."""
    if isinstance(part, Choice):
        trial.suggest_categorical(part.key, part.values)
    elif isinstance(part.low, int) and isinstance(part.high, int):
        step = 1 if part.is_log else int(part.step or 1)
        trial.suggest_int(part.key, part.low, part.high, step=step, log=part.is_log)
    else:
        step_size = None if part.is_log else part.step
        trial.suggest_float(part.key, part.low, part.high, step=step_size, log=part.is_log)


def _mend(journal: Path) -> None:
    """Undo what a process left that was killed while it wrote: its lock, and half a line."""
    with durable.writing(journal):
        Path(f"{journal}.lock").unlink(missing_ok=True)
        if journal.exists():
            content = journal.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:
                durable.write(journal, whole)


def show(board: dict[str, Any], say: Callable[[str], None]) -> None:
    """The lines below the leaderboard of a search."""
    shares = [f"{key} {share:.0%}" for key, share in board["importance"].items()]
    if shares:
        say(f"mattered {', '.join(shares)}")
    for trial in board["pareto"]:
        values = [
            f"{name} {leaderboard.number(name, value)}" for name, value in trial["values"].items()
        ]
        what = " ".join(f"{key}={value}" for key, value in trial["config"].items())
        say(f"front    {', '.join(values)}  {leaderboard.rounded(what)}")
