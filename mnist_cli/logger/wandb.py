"""Weights & Biases: an offline run in `RUN/wandb`, for `wandb sync` to send if one wants to.

Nothing is sent from here, and nothing about machine, packages or repository is collected. A run
that is resumed is written anew from metrics.csv, under the id that it had.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from mnist_cli.config import TrainConfig
from mnist_cli.logger import Finished, Row, Status, finals_of, numbers_of, params_of
from mnist_cli.run import RunFolder


class Wandb:
    def __init__(self, config: TrainConfig, folder: RunFolder) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when it is imported
        import wandb

        self._wandb: Any = wandb
        place = folder.path / "wandb"
        run_id = None
        for old in sorted(place.glob("offline-run-*")):
            match = re.fullmatch(r"offline-run-\d+_\d+-([a-z0-9]+)", old.name)
            run_id = match[1] if match else run_id
            shutil.rmtree(old)
        settings = wandb.Settings(
            mode="offline",
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            save_code=False,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        hooks = sys.excepthook, sys.exit  # wandb puts its own there, to see how a program ends
        try:
            self._run: Any = wandb.init(
                project=folder.path.absolute().parent.name,
                name=folder.path.absolute().name,
                id=run_id,
                dir=str(folder.path),
                config=params_of(config),
                settings=settings,
            )
        except BaseException:
            wandb.teardown()
            raise
        finally:
            sys.excepthook, sys.exit = hooks
        self.where = str(place / Path(self._run.settings.sync_dir).name)

    def log(self, row: Row) -> None:
        self._run.log(numbers_of(row), step=int(row["epoch"] or 0))

    def finish(self, finished: Finished) -> None:
        self._run.summary.update(finals_of(finished.result))

    def close(self, status: Status) -> None:
        try:
            self._run.finish(exit_code=0 if status == "completed" else 1)
        finally:
            self._wandb.teardown()  # else its process lives on until this one ends
