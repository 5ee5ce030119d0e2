"""The plan of a sweep whose jobs are known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mnist_cli.config import SweepConfig
from mnist_cli.sweep import group
from mnist_cli.sweep.board import Board
from mnist_cli.sweep.job import Document, TrainJob, has_failed, place_of, result_of


class Grid:
    """Stack after stack, what is done left out."""

    asks = False

    def __init__(self, jobs: Sequence[TrainJob], settings: SweepConfig, board: Board) -> None:
        self._settings, self._board = settings, board
        configs = [job.config for job in jobs]
        self._groups = group.planned(configs, settings)
        self._left = [[jobs[place] for place in each.members] for each in reversed(self._groups)]
        self.names_gpu = any(config.device.startswith("cuda:") for config in configs)
        self.documents: dict[str, Document] = {}

    def alone(self) -> Counter[str]:
        """With sweep.fused=true: how many jobs train alone nevertheless, by reason."""
        if self._settings.fused != "true":
            return Counter()
        return Counter(each.alone_because for each in self._groups if each.alone_because)

    def next_jobs(self) -> Sequence[TrainJob]:
        while self._left:
            jobs = []
            for job in self._left.pop():
                done = result_of(job)
                if done is None:
                    jobs.append(job)
                else:
                    self.documents[place_of(job)] = done
                    self._board.skipped(job, done)
            if jobs:
                self._board.started(jobs)
                return jobs
        return []

    def should_stop(self, job: TrainJob, epoch: int, value: float | None) -> bool:
        self._board.epoch(job, epoch, value)
        return False

    def ended(self, job: TrainJob, document: Document) -> None:
        self.documents[place_of(job)] = document
        self._board.ended(job, document)
        if self._settings.fail_fast and has_failed(document):
            self._left.clear()

    def tick(self) -> None:
        self._board.draw()
