"""What loggers hold is read with the programs' own readers, and they change nothing in a run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import faults
import numpy as np
import onnxruntime
import pytest
import yaml
from faults import ROOT
from PIL import Image

from mnist_cli import logger, train
from mnist_cli.config import TrainConfig, train_config
from mnist_cli.console import Console
from mnist_cli.errors import PrunedError
from mnist_cli.run import RunFolder

if TYPE_CHECKING:
    from conftest import Program

ALL = ("tensorboard", "mlflow", "wandb")
RUN = ("train", "dataset=digits", "model=mlp", "model.hidden=[16]", "device=cpu", "report=false")
LINE = ("train", "dataset=linear", "model=linear", "loss=mse", "optim=sgd", "report=false")
RUN_EPOCHS = 3
COLUMNS = ("lr", "train_loss", "val_loss", "val_accuracy", "seconds", "samples_per_s")


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that all tests of this module stand in: a new MLflow store takes two seconds."""
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        if shutil.which("git"):  # what a logger could tell of
            for words in ("init -q", "remote add origin https://example.com/my/secret.git"):
                subprocess.run(["git", *words.split()], check=True)
        patch.setenv("WANDB_CACHE_DIR", str(folder / "cache"))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for key in ("MLFLOW_DISABLE_TELEMETRY", "MLFLOW_CONFIGURE_LOGGING"):
            patch.setenv(key, "true")  # put back in the end, as what the program sets is not
        yield folder


@pytest.fixture(scope="module")
def plain(mnist_cli: Program, place: Path) -> Path:
    """A run without loggers."""
    assert mnist_cli(*RUN, f"epochs={RUN_EPOCHS}", "out=runs/plain", "--quiet").code == 0
    return Path("runs/plain").absolute()


@pytest.fixture(scope="module")
def logged(mnist_cli: Program, place: Path) -> Path:
    """The same run with every logger."""
    words = (*RUN, f"epochs={RUN_EPOCHS}", f"logger=[{','.join(ALL)}]", "out=runs/logged")
    outcome = mnist_cli(*words)
    assert (outcome.code, outcome.stderr) == (0, "")
    return Path("runs/logged").absolute()


def config_of(words: tuple[str, ...], loggers: tuple[str, ...], mnist_cli: Program) -> TrainConfig:
    """The configuration of a command line."""
    shown = mnist_cli(*words, f"logger=[{','.join(loggers)}]", "--cfg", "job").stdout
    data = yaml.safe_load(shown)
    data.pop("sweep")
    return train_config(data)


def rows_of(folder: Path) -> list[dict[str, float]]:
    return RunFolder(folder).read_metrics()


def result_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


# --- the readers ---------------------------------------------------------------------------------


def tensorboard_of(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    return found.Reload()


def mlflow_of(folder: Path) -> tuple[Any, Any]:
    """MLflow's client, and the run of `folder` in its store."""
    from mlflow import MlflowClient

    store = Path("outputs/mlflow/mlflow.db").absolute()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of SQLAlchemy, at MLflow's first question
        client = MlflowClient(tracking_uri=f"sqlite:///{store}")
        return client, client.get_run((folder / "mlflow_run.txt").read_text().strip())


def wandb_of(folder: Path) -> tuple[dict[int, dict[str, float]], dict[str, Any], Any]:
    """History by epoch, summary, and the record of the run, out of the one offline run.

    The file is LevelDB's log: blocks of 32 KiB; each part has a checksum, a length and a kind.
    """
    from wandb.proto import wandb_internal_pb2

    (path,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    data, records, place, parts = path.read_bytes(), [], 7, b""
    while place < len(data):
        room = 2**15 - place % 2**15
        if room < 7:
            place += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    history: dict[int, dict[str, float]] = {}
    summary: dict[str, Any] = {}
    run = None
    for record in records:
        kind_of = record.WhichOneof("record_type")
        if kind_of == "history":
            items = {name_of(item): json.loads(item.value_json) for item in record.history.item}
            assert items["_step"] not in history
            history[items["_step"]] = items
        elif kind_of == "summary":
            updates = record.summary.update
            summary |= {name_of(item): json.loads(item.value_json) for item in updates}
        elif kind_of == "run":
            run = record.run
    return history, summary, run


def name_of(item: Any) -> str:
    return item.key or ".".join(item.nested_key)


# --- what they hold ------------------------------------------------------------------------------


def test_tensorboard_finds_scalars_hparams_images_and_graph(logged: Path) -> None:
    from tensorboard.plugins.hparams import plugin_data_pb2

    found, rows, result = tensorboard_of(logged), rows_of(logged), result_of(logged)
    for name in COLUMNS:
        points = found.Scalars(f"epoch/{name}")
        assert [point.step for point in points] == [1, 2, 3]
        assert [point.value for point in points] == pytest.approx([row[name] for row in rows])
    (point,) = found.Scalars("test/accuracy")
    assert (point.step, point.value) == (
        result["best"]["epoch"], pytest.approx(result["test"]["accuracy"]),
    )  # fmt: skip
    content = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert start.hparams["model"].string_value == "mlp"
    assert start.hparams["model.hidden"].string_value == "[16]"
    assert start.hparams["optim.lr"].number_value == 0.001
    assert "out" not in start.hparams
    content = found.summary_metadata["_hparams_/experiment"].plugin_data.content
    experiment = plugin_data_pb2.HParamsPluginData.FromString(content).experiment
    assert {"test/accuracy", "val/accuracy"} <= {m.name.tag for m in experiment.metric_infos}
    assert {m.name.tag for m in experiment.metric_infos} <= set(found.Tags()["scalars"])
    (image,) = found.Images("surest mistakes")
    sheet = Image.open(io.BytesIO(image.encoded_image_string))
    assert sheet.width == 800 and len(sheet.getcolors(2**24) or ()) > 50
    assert any("Linear" in node.name for node in found.Graph().node)


def test_mlflow_finds_run_params_metrics_artifacts_and_model(logged: Path, place: Path) -> None:
    import mlflow.onnx
    import mlflow.pyfunc

    client, run = mlflow_of(logged)
    rows, result = rows_of(logged), result_of(logged)
    experiment = client.get_experiment(run.info.experiment_id)
    assert experiment.name == f"{place.name}/runs"
    assert (run.info.run_name, run.info.status) == ("logged", "FINISHED")
    assert run.data.params["model.hidden"] == "[16]" and run.data.params["epochs"] == "3"
    assert not {"out", "dataset.root"} & set(run.data.params)
    for name in COLUMNS:
        points = client.get_metric_history(run.info.run_id, name)
        assert [(point.step, point.value) for point in points] == [
            (row["epoch"], row[name]) for row in rows
        ]
    assert run.data.metrics["test/accuracy"] == result["test"]["accuracy"]
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    files = ("result.json", "metrics.csv", "config.yaml", "overrides.txt", "errors.csv")
    assert names == {*files, "best.safetensors"}
    got = client.download_artifacts(run.info.run_id, "result.json")
    assert Path(got).read_bytes() == (logged / "result.json").read_bytes()
    models = client.search_logged_models([run.info.experiment_id])
    (model,) = (model for model in models if model.source_run_id == run.info.run_id)
    assert model.status == "READY" and run.outputs.model_outputs[0].model_id == model.model_id
    place_of_model = model.artifact_location
    proto = mlflow.onnx.load_model(place_of_model)
    images = np.zeros((2, 1, 8, 8), dtype=np.uint8)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    (expected,) = session.run(None, {"images": images})
    answers = mlflow.pyfunc.load_model(place_of_model).predict(images)["logits"]
    assert np.array_equal(answers, expected) and answers.shape == (2, 10)
    held = {path.suffix for path in Path(place_of_model.removeprefix("file://")).iterdir()}
    assert not held & {".pkl", ".pickle", ".pt", ".pth"}


def test_wandb_holds_the_run_offline(logged: Path) -> None:
    history, summary, run = wandb_of(logged)
    rows = rows_of(logged)
    assert sorted(history) == [1, 2, 3]
    for row in rows:
        found = history[int(row["epoch"])]
        assert {name: found[name] for name in COLUMNS} == {name: row[name] for name in COLUMNS}
    assert summary["test/accuracy"] == result_of(logged)["test"]["accuracy"]
    config = {name_of(item): json.loads(item.value_json) for item in run.config.update}
    assert config["model.hidden"] == "[16]" and config["optim.lr"] == 0.001
    assert (run.display_name, run.project) == ("logged", "runs")
    assert not run.HasField("git")


def test_the_run_is_the_same_to_the_last_bit(plain: Path, logged: Path) -> None:
    assert faults.outcome_of(plain) == faults.outcome_of(logged)


def test_a_regression_has_all_but_mistakes(mnist_cli: Program) -> None:
    with warnings.catch_warnings(action="ignore"):  # of its own type hints
        import mlflow.pyfunc

    words = (*LINE, "dataset.num_samples=200", "dataset.val_fraction=0.2", "epochs=2")
    outcome = mnist_cli(*words, f"logger=[{','.join(ALL)}]", "out=runs/line")
    assert outcome.code == 0 and outcome.stderr == ""
    folder = Path("runs/line")
    found = tensorboard_of(folder)
    assert len(found.Scalars("epoch/val_mse")) == 2 and found.Scalars("test/mse")
    assert found.Tags()["images"] == [] and found.Graph().node
    client, run = mlflow_of(folder)
    assert run.data.metrics["test/r2"] == result_of(folder)["test"]["r2"]
    (output,) = run.outputs.model_outputs
    where = client.get_logged_model(output.model_id).artifact_location
    answers = mlflow.pyfunc.load_model(where).predict(np.zeros((3, 1), dtype=np.float32))
    assert answers["outputs"].shape == (3, 1)
    assert wandb_of(folder)[1]["test/mse"] == result_of(folder)["test"]["mse"]


# --- resumed -------------------------------------------------------------------------------------


def cut_off(config: TrainConfig, after: int) -> None:
    """Train for `after` epochs, as a search that then gives the run up."""
    with pytest.raises(PrunedError):
        train.run(config, Console(quiet=True), should_stop=lambda epoch, value: epoch == after)


def test_a_resumed_run_is_one_run(mnist_cli: Program, plain: Path) -> None:
    """Also for a logger that joins later."""
    words = (*RUN, f"epochs={RUN_EPOCHS}", "out=runs/resumed")
    cut_off(config_of(words, ("tensorboard", "mlflow"), mnist_cli), after=2)
    folder = Path("runs/resumed")
    before = mlflow_of(folder)[1].info
    assert before.status == "KILLED"
    outcome = mnist_cli("train", f"resume={folder}", f"logger=[{','.join(ALL)}]")
    assert outcome.code == 0 and outcome.stderr == ""
    assert faults.outcome_of(folder) == faults.outcome_of(plain)
    found = tensorboard_of(folder)
    assert [point.step for point in found.Scalars("epoch/train_loss")] == [1, 2, 3]
    assert len(found.Scalars("test/accuracy")) == 1
    client, run = mlflow_of(folder)
    assert (run.info.run_id, run.info.status) == (before.run_id, "FINISHED")
    history = client.get_metric_history(run.info.run_id, "train_loss")
    assert [point.step for point in history] == [1, 2, 3]
    assert sorted(wandb_of(folder)[0]) == [1, 2, 3]


def test_more_epochs_go_on_in_the_same_runs(mnist_cli: Program, logged: Path) -> None:
    shutil.copytree(logged, "runs/longer", symlinks=True)
    folder = Path("runs/longer")
    wandb_id = wandb_of(folder)[2].run_id
    outcome = mnist_cli("train", f"resume={folder}", f"epochs={RUN_EPOCHS + 1}")
    assert outcome.code == 0 and outcome.stderr == ""
    found = tensorboard_of(folder)
    assert [point.step for point in found.Scalars("epoch/lr")] == [1, 2, 3, 4]
    from tensorboard.plugins.hparams import plugin_data_pb2

    content = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert start.hparams["epochs"].number_value == 4
    client, run = mlflow_of(folder)
    assert run.info.run_id == mlflow_of(logged)[1].info.run_id
    history = client.get_metric_history(run.info.run_id, "val_loss")
    assert [point.step for point in history] == [1, 2, 3, 4]
    assert run.data.params["epochs"] == "3" and run.data.tags["resumed.epochs"] == "4"
    history_of, _, record = wandb_of(folder)
    assert sorted(history_of) == [1, 2, 3, 4] and record.run_id == wandb_id


# --- failures ------------------------------------------------------------------------------------


def children() -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid() and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def test_loggers_that_fail_in_the_middle_cost_a_warning_each(
    mnist_cli: Program,
    plain: Path,
    logged: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The folder is gone, the store is destroyed, the process is dead."""
    store = tmp_path / "store.db"
    words = (*RUN, f"epochs={RUN_EPOCHS}", "out=runs/failing")
    config = config_of(words, ALL, mnist_cli)

    def destroy_after_one(epoch: int, value: float | None) -> bool:
        if epoch > 1:
            return False
        shutil.rmtree("runs/failing/tensorboard")
        store.write_bytes(b"no database" * 1000)
        (process,) = (p for p in children() if b"wandb-core" in command_of(p))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        return False

    before = children()
    shutil.copy("outputs/mlflow/mlflow.db", store)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")
    result = train.run(config, Console(), should_stop=destroy_after_one)
    assert result["status"] == "completed"
    assert faults.outcome_of(Path("runs/failing")) == faults.outcome_of(plain)
    out, err = capfd.readouterr()
    warnings = [line.split()[:2] for line in err.splitlines()]
    assert sorted(warnings) == sorted(["warning:", f"logger={name}"] for name in ALL)
    assert "Traceback" not in out
    assert children() == before


def command_of(process: int) -> bytes:
    return Path(f"/proc/{process}/cmdline").read_bytes()


def test_a_server_that_is_not_there_is_said_without_its_password(
    mnist_cli: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    outcome = mnist_cli(*LINE, "epochs=1", "logger=mlflow", "out=runs/offline")
    assert outcome.code == 0
    [line] = outcome.stderr.splitlines()
    assert line.startswith("warning: logger=mlflow failed and is left out from now on: ")
    assert "127.0.0.1" in line and "hunter2" not in line
    for path in Path("runs/offline").iterdir():
        assert b"hunter2" not in path.read_bytes()


@pytest.mark.parametrize("name", ALL)
def test_a_logger_that_is_not_installed(
    mnist_cli: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    out = tmp_path / "run"
    outcome = mnist_cli(*RUN, "epochs=1", f"logger={name}", f"out={out}")
    assert (outcome.code, outcome.stdout) == (2, "")
    assert outcome.error == f"logger={name} needs packages that aren't installed"
    assert outcome.hint == f"type pip install 'mnist-cli[{name}]'"
    assert not out.exists()


def test_a_run_is_not_resumed_without_its_logger(
    mnist_cli: Program, logged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    copy = tmp_path / "run"
    shutil.copytree(logged, copy, symlinks=True)
    before = {path: path.read_bytes() for path in copy.glob("*") if path.is_file()}
    outcome = mnist_cli("train", f"resume={copy}", "epochs=9")
    assert outcome.code == 2 and outcome.hint == "type pip install 'mnist-cli[tensorboard]'"
    assert {path: path.read_bytes() for path in copy.glob("*") if path.is_file()} == before
    assert mnist_cli("train", f"resume={copy}", "epochs=4", "logger=[]", "--quiet").code == 0


def test_a_folder_of_that_name_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lonely").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(logger.NEEDS, "lonely", ("lonely",))
    with pytest.raises(logger.UsageError):
        logger.require(["lonely"])


def test_a_logger_that_does_not_exist(mnist_cli: Program) -> None:
    outcome = mnist_cli(*RUN, "logger=tensorbord", "out=runs/none")
    assert outcome.code == 2 and not Path("runs/none").exists()
    assert outcome.hint == "logger is one of: tensorboard, mlflow, wandb"


# --- sweeps and processes ------------------------------------------------------------------------


def test_a_sweep_is_one_experiment(mnist_cli: Program, place: Path) -> None:
    words = ("-m", "seed=0,1", "epochs=1", "logger=[tensorboard,mlflow]", "out=swept")
    assert mnist_cli(*RUN, *words, "--quiet").code == 0
    folders = sorted(path.parent for path in Path("swept").glob("*/result.json"))
    client, run = mlflow_of(folders[0])
    assert client.get_experiment(run.info.experiment_id).name == f"{place.name}/swept"
    runs = client.search_runs([run.info.experiment_id])
    assert sorted(run.info.run_name for run in runs) == [folder.name for folder in folders]
    assert sorted(run.data.params["seed"] for run in runs) == ["0", "1"]
    for folder in folders:
        assert len(tensorboard_of(folder).Scalars("epoch/lr")) == 1


@pytest.mark.torture
@pytest.mark.skipif(
    not faults.TORTURE, reason="two processes load everything; make torture runs it"
)
def test_jobs_at_a_time_share_a_new_store(
    mnist_cli: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("-m", "seed=0,1", "epochs=1", "logger=mlflow", "out=swept", "sweep.jobs=2")
    assert mnist_cli(*RUN, *words, "--quiet").code == 0
    for path in Path("swept").glob("*/result.json"):
        assert mlflow_of(path.parent)[1].info.status == "FINISHED"
        assert "warning" not in (path.parent / "train.log").read_text()


def processes_in(folder: Path) -> list[str]:
    """The command lines of the processes that were started there."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cwd").readlink() == folder:
                found.append((process / "cmdline").read_text())
    return found


def test_a_process_says_one_document_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """No other process, no line of a library, nothing of the environment, nothing in the home."""
    secret = "swordfish-4711"
    home = tmp_path / "home"
    home.mkdir()
    kept = {key: os.environ[key] for key in ("PATH", "OMP_NUM_THREADS", "XDG_CACHE_HOME")}
    words = (*RUN, "epochs=1", "--json", f"logger=[{','.join(ALL)}]", "out=run")
    done = subprocess.run(
        [sys.executable, "-m", "mnist_cli", *words],
        cwd=tmp_path,
        env=kept | {"PYTHONPATH": str(ROOT), "HOME": str(home), "MY_TOKEN": secret},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["status"] == "completed"
    assert len(done.stdout.splitlines()) == 1
    allowed = ("model", "data", "optim", "select", "device", "run", "logger", "epoch", "stopped")
    for line in done.stderr.splitlines():
        first = line.split()[0] if line.strip() else "run"
        assert first in (*allowed, "selected", "metric", "loss", "accuracy", "f1", "ece", "test",
                         "next", "mnist-cli") or set(line.strip()) == {"─"}, line  # fmt: skip
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert secret.encode() not in path.read_bytes(), path
    until = time.monotonic() + 10
    while left := processes_in(tmp_path):
        assert time.monotonic() < until, left
        time.sleep(0.05)
    assert not list(home.rglob("*mlflow*"))
