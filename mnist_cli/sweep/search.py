"""A search: Optuna chooses what to try next, out of lists, ranges and intervals.

space        what may be chosen
study        what Optuna knows of it, asked and told
Search       the plan in between: trials into jobs, and how they ended
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mnist_cli import durable
from mnist_cli.config import FREE_KEYS, OBJECTIVES, SweepConfig, TrainConfig
from mnist_cli.errors import LockedError, MnistCliError, UsageError
from mnist_cli.imports import importing
from mnist_cli.run import typed_in
from mnist_cli.sweep.board import Board
from mnist_cli.sweep.job import Document, TrainJob, failure, has_failed, place_of, placed, result_of
from mnist_cli.sweep.leaderboard import part_of
from mnist_cli.sweep.space import Space, words_of
from mnist_cli.sweep.study import Study

if TYPE_CHECKING:
    import optuna


def check(
    settings: SweepConfig, space: Space, config: TrainConfig, other: TrainConfig
) -> list[str]:
    """The objectives of a search in `space` that may come upon `config` and `other`.

    Raises:
        UsageError: there is nothing to search by, a grid of it can't be counted, or Optuna isn't
            installed.
    """
    try:
        with importing():
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
    if part_of(typed_in(config), "dataset") != part_of(typed_in(other), "dataset"):
        raise UsageError(
            "a search can't choose the dataset: scores on different datasets don't compare",
            "search once for each dataset",
        )
    if settings.pruner != "none" and objectives[0] != config.monitored:
        is_metric = objectives[0].startswith("val_")
        raise UsageError(
            f"sweep.pruner={settings.pruner} stops by monitor={config.monitored}, and the search is"
            f" for {objectives[0]}",
            f"type monitor={objectives[0]}" if is_metric else "type sweep.pruner=none",
        )
    if "val_loss" in objectives and config.loss != other.loss:
        raise UsageError(
            "a search by val_loss can't choose the loss: different losses don't compare",
            "type monitor=val_accuracy, or leave it out",
        )
    if settings.sampler == "grid":
        for part in space:
            part.points()
    return objectives


def fixed(config: TrainConfig, space: Space) -> dict[str, str]:
    """What nobody chose between, {key: value as typed}, of a job of the search."""
    typed = typed_in(config) | {"monitor": config.monitored}
    left_out = {*FREE_KEYS, *(part.key for part in space)}
    return {key: value for key, value in typed.items() if key not in left_out}


class Search:
    """The plan of a search: a new trial whenever there is room, until there are enough.

    Args:
        space: what may be chosen.
        make_job: composes and checks a job of the overrides that were chosen.
        names_gpu: whether jobs name a GPU, as device=cuda:1.
    """

    def __init__(
        self,
        folder: durable.SharedFolder,
        study: Study,
        board: Board,
        space: Space,
        make_job: Callable[[Sequence[str]], TrainJob],
        settings: SweepConfig,
        names_gpu: bool,
    ) -> None:
        self._folder, self._study, self._board = folder, study, board
        self._space, self._make_job = space, make_job
        self._fail_fast = settings.fail_fast
        self.asks = settings.pruner != "none"
        self.names_gpu = names_gpu
        self.documents: list[Document] = []
        self._running: dict[str, list[optuna.Trial]] = {}
        self._is_over = False

    def next_jobs(self) -> Sequence[TrainJob]:
        while (trial := self._next_trial()) is not None:
            words = words_of(self._space, trial.params)
            label = " ".join(words)
            try:
                job = placed(self._make_job(words), self._folder.path, label)
            except MnistCliError as error:  # a combination that doesn't go together
                self._tell([trial], failure(error, None))
                continue
            key = place_of(job)
            if key in self._running:  # the same choice a second time
                self._running[key].append(trial)
                continue
            shown = " ".join(words_of(self._space, trial.params, digits=4))
            self._board.add(job, shown, trial.number + 1)
            done = result_of(job, with_pruned=self.asks)
            if done is not None:
                self._tell([trial], done)
                self._board.skipped(job, done)
                continue
            self._running[key] = [trial]
            self._board.started([job])
            return [job]
        return []

    def _next_trial(self) -> optuna.Trial | None:
        while not self._is_over:
            trial = self._study.ask()
            if trial is not None or self._running:
                return trial
            with self._folder.door():
                if not (self._folder.arrive() and self._study.take_up()):
                    self._is_over = True
                    self._folder.leave()  # so that one of several that end now is the last
        return None

    def should_stop(self, job: TrainJob, epoch: int, value: float | None) -> bool:
        self._board.epoch(job, epoch, value)
        trial = self._running[place_of(job)][0]
        if not self.asks or value is None:
            return False
        trial.report(value, epoch)
        return epoch < job.config.epochs and bool(trial.should_prune())  # numpy's bool is no JSON

    def ended(self, job: TrainJob, document: Document) -> None:
        trials = self._running.pop(place_of(job))
        if document.get("exit_code") == LockedError.exit_code and not self._is_alone():
            self._study.give_over(trials)  # another process chose the same
            self._board.given_over(job)
            return
        if document.get("exit_code", 0) < 128:
            self._tell(trials, document)
        else:  # one that a signal stopped goes on some day
            self.documents.append(document)
        self._board.ended(job, document)

    def _is_alone(self) -> bool:
        with self._folder.door():
            return self._folder.arrive()

    def _tell(self, trials: Sequence[optuna.Trial], document: Document) -> None:
        self.documents.append(document)
        self._study.tell(trials, document)
        if has_failed(document) and self._fail_fast:
            self._is_over = True

    def tick(self) -> None:
        self._board.draw()
