"""MLflow: a run with parameters, metrics, artifacts and the model, in a store that runs share.

The store is where MLFLOW_TRACKING_URI says, else `outputs/mlflow` (SQLite, and artifacts beside
it). The experiment is named after the folder that holds the run folder, so a sweep is one. Only the
client is used: unlike `mlflow.start_run` it collects nothing about user, machine or repository.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mnist_cli import __version__, conf, durable, export
from mnist_cli.config import TrainConfig, config_hash, export_config
from mnist_cli.console import Console
from mnist_cli.logger import Finished, Row, Status, finals_of, numbers_of, params_of
from mnist_cli.run import RunFolder

STORE = Path("outputs/mlflow")
RUN_ID = "mlflow_run.txt"  # in the run folder, so that a resumed run goes on with it
ENDINGS = {"completed": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}

# Read when MLflow is imported or asked: it sends no usage data, and a server that is gone costs
# seconds instead of minutes. What the user has set stands.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_CONFIGURE_LOGGING": "false",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
}


class MLflow:
    def __init__(self, config: TrainConfig, folder: RunFolder) -> None:
        for key, value in ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        from mlflow import MlflowClient

        self._config, self._folder = config, folder
        self.where = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{STORE / 'mlflow.db'}"
        with _one_at_a_time():
            self._client = MlflowClient(tracking_uri=self.where)
            run = self._run_before() or self._new_run()
        self._run_id: str = run.info.run_id
        self._experiment_id: str = run.info.experiment_id
        history = self._client.get_metric_history(self._run_id, "train_loss")
        self._logged = max((point.step for point in history), default=0)
        self._log_params(run.data.params)

    def log(self, row: Row) -> None:
        epoch = int(row["epoch"] or 0)
        if epoch > self._logged:
            self._log_metrics(numbers_of(row), epoch)
            self._logged = epoch

    def finish(self, finished: Finished) -> None:
        self._log_metrics(finals_of(finished.result), finished.epoch)
        names = ("result.json", "metrics.csv", "errors.csv", "config.yaml", "overrides.txt")
        for path in (*map(self._folder.path.joinpath, names), self._folder.best):
            if path.exists():
                self._client.log_artifact(self._run_id, str(path))
        self._log_model(finished)

    def close(self, status: Status) -> None:
        self._client.set_terminated(self._run_id, ENDINGS[status])

    def _run_before(self) -> Any:
        """The run that is continued, or None where there is none in this store."""
        from mlflow import MlflowException

        try:
            with open(self._folder.path / RUN_ID, encoding="ascii", errors="replace") as file:
                run_id = file.read(64).strip()
        except FileNotFoundError:
            return None
        if not re.fullmatch(r"[0-9a-f]{32}", run_id):
            return None
        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        if run.info.lifecycle_stage != "active":
            return None
        self._client.update_run(run_id, status="RUNNING")
        return run

    def _new_run(self) -> Any:
        tags = {
            "mlflow.source.name": "mnist-cli train",
            "mnist_cli.version": __version__,
            "mnist_cli.config_hash": config_hash(self._config),
        }
        name = self._folder.path.absolute().name
        run = self._client.create_run(self._experiment(), tags=tags, run_name=name)
        durable.write(self._folder.path / RUN_ID, f"{run.info.run_id}\n".encode())
        return run

    def _experiment(self) -> str:
        """The id of the experiment: found, or made by us or by another process just now."""
        from mlflow import MlflowException

        name = "/".join(self._folder.path.absolute().parts[-3:-1])
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        is_ours = not os.environ.get("MLFLOW_TRACKING_URI")
        artifacts = (STORE / "artifacts").absolute().as_uri() if is_ours else None
        try:
            return str(self._client.create_experiment(name, artifact_location=artifacts))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return str(self._client.get_experiment_by_name(name).experiment_id)

    def _log_params(self, before: dict[str, str]) -> None:
        """MLflow's parameters never change, so what a resumed run changed becomes a tag."""
        from mlflow.entities import Param, RunTag

        params = {key: str(value) for key, value in params_of(self._config).items()}
        new = [Param(key, value) for key, value in params.items() if key not in before]
        changed = [
            RunTag(f"resumed.{key}", value)
            for key, value in params.items()
            if before.get(key, value) != value
        ]
        self._client.log_batch(self._run_id, params=new, tags=changed, synchronous=True)

    def _log_metrics(self, values: dict[str, float], epoch: int) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        points = [Metric(name, value, now_ms, epoch) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=points, synchronous=True)

    def _log_model(self, finished: Finished) -> None:
        """The selected model as ONNX, once it has answered every test sample as it should.

        MLflow's own format for torch models is a pickle.
        """
        import mlflow.onnx
        import numpy as np
        import onnx
        import onnxruntime
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import ModelSignature
        from mlflow.types import Schema, TensorSpec

        with durable.temporary_folder() as temporary:
            exported = export.run(self._export_config(temporary), Console(quiet=True))
            proto = onnx.load(exported["path"])
            spec = finished.data.spec
            kind = np.dtype("uint8" if spec.task == "classification" else "float32")
            inputs = TensorSpec(kind, (-1, *spec.input_shape), proto.graph.input[0].name)
            outputs = TensorSpec(
                np.dtype("float32"), (-1, spec.num_outputs), proto.graph.output[0].name
            )
            mlflow.onnx.save_model(
                proto,
                str(temporary / "model"),
                signature=ModelSignature(Schema([inputs]), Schema([outputs])),
                pip_requirements=[  # else they are looked for in a process of their own
                    f"onnx=={onnx.__version__}", f"onnxruntime=={onnxruntime.__version__}",
                ],
                save_as_external_data=False,
            )  # fmt: skip
            model = self._client.create_logged_model(
                self._experiment_id,
                name="model",
                source_run_id=self._run_id,
                model_type=self._config.model.name,
            )
            self._client.log_model_artifacts(model.model_id, str(temporary / "model"))
        self._client.finalize_logged_model(model.model_id, "READY")
        outcome = LoggedModelOutput(model.model_id, finished.epoch)
        self._client.log_outputs(self._run_id, [outcome])

    def _export_config(self, out: Path) -> Any:
        keys = {key.path: key.value for key in conf.command_keys("export")}
        defaults = {key: value for key, value in keys.items() if "." not in key}
        return export_config(
            defaults | {
                "checkpoint": str(self._folder.best),
                "dataset": {"root": keys["dataset.root"]},
                "plugin": list(self._config.plugin),
                "out": str(out),
            }
        )  # fmt: skip


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Two processes that make one SQLite store at the same time break it, as jobs of a sweep might.

    The current folder itself is the lock, so no file is left.
    """
    descriptor = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a file system that knows no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
