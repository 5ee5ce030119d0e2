"""`export`: the file answers as the checkpoint does, or there is no file."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT, Outcome, Program
from torch import Tensor

from mnist_cli import checkpoint, conf, dataset, export, onnx_file, scoring
from mnist_cli.checkpoint import Checkpoint
from mnist_cli.config import ExportConfig, to_plain
from mnist_cli.dataset import Split
from mnist_cli.errors import CheckpointError
from mnist_cli.onnx_file import Answer

pytestmark = pytest.mark.usefixtures("empty_cwd")

Trained = Callable[..., Path]
SIZES = (1, 2, 7, 64)
LINE = ("dataset=linear", "model=linear", "loss=mse", "optim=sgd", "epochs=3")
MODELS = {
    **{name: ("dataset=digits", "epochs=1", f"model={name}") for name in conf.options("model")},
    "regression": (*LINE, "dataset.num_samples=50", "dataset.num_features=3"),
}
LINEAR = MODELS["linear"]
PARITY = {"n", "max_abs_diff", "argmax_agreement", "accuracy_checkpoint", "accuracy_export"}


def document(outcome: Outcome) -> dict[str, Any]:
    assert outcome.code == 0, outcome
    found: dict[str, Any] = json.loads(outcome.stdout)
    return found


def exported(mnist_cli: Program, run: Path, *words: str) -> dict[str, Any]:
    return document(mnist_cli("export", f"checkpoint={run}", "out=out", "--json", *words))


def samples(run: Path) -> tuple[Checkpoint, Split]:
    found = checkpoint.load(run / "best.safetensors")
    return found, dataset.load(found.config.dataset, found.config.seed).test


def expected_answers(found: Checkpoint, split: Split) -> Tensor:
    return scoring.answers(found.build_model(torch.device("cpu")), found.spec, split)


def first(split: Split, size: int) -> Split:
    """`size` rows, repeated where there are fewer."""
    rows = torch.arange(size) % len(split)
    return Split(split.inputs[rows], split.targets[rows])


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("model", MODELS)
def test_onnx(mnist_cli: Program, trained: Trained, model: str) -> None:
    run = trained(*MODELS[model])
    found, test = samples(run)
    before = sorted(path.name for path in run.iterdir())
    made = exported(mnist_cli, run)
    path = Path("out/model.onnx")
    assert os.listdir("out") == ["model.onnx"]  # one file, nothing beside it
    assert sorted(path.name for path in run.iterdir()) == before
    is_image = found.spec.task == "classification"

    assert made.keys() == {"path", "format", "bytes", "parity"}
    assert (made["path"], made["format"]) == (str(path), "onnx")
    assert made["bytes"] == path.stat().st_size
    parity = made["parity"]
    assert parity.keys() == PARITY
    assert (parity["n"], parity["argmax_agreement"]) == (len(test), 1.0)
    assert 0 <= parity["max_abs_diff"] <= 1e-4
    accuracy = json.loads((run / "result.json").read_text())["test"].get("accuracy")
    assert parity["accuracy_checkpoint"] == parity["accuracy_export"] == accuracy

    assert str(ROOT).encode() not in path.read_bytes()  # where the source lies is nobody's business
    graph = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(graph, full_check=True)
    assert [entry.version for entry in graph.opset_import if entry.domain == ""] == [20]
    assert not any(tensor.external_data for tensor in graph.graph.initializer)
    texts = {entry.key: entry.value for entry in graph.metadata_props}
    assert tuple(json.loads(texts["classes"])) == found.spec.classes
    provenance = json.loads(texts["mnist_cli"])
    assert provenance["config"] == to_plain(found.config)
    assert provenance["dataset"] == json.loads(json.dumps(dataclasses.asdict(found.spec)))
    assert provenance["made_by"].startswith("mnist-cli ")

    runtime = session(path)
    (entry,), (leaving,) = runtime.get_inputs(), runtime.get_outputs()
    assert entry.type == ("tensor(uint8)" if is_image else "tensor(float)")
    assert entry.shape[1:] == list(found.spec.input_shape)
    assert isinstance(entry.shape[0], str) and entry.shape[0] == leaving.shape[0]
    assert leaving.shape[1:] == [found.spec.num_outputs]
    for size in SIZES:
        batch = first(test, size)
        (answer,) = runtime.run(None, {entry.name: batch.inputs.numpy()})
        assert answer.dtype == np.float32
        wanted = expected_answers(found, batch).numpy()
        assert np.allclose(answer, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_torch_export(mnist_cli: Program, trained: Trained, model: str) -> None:
    run = trained(*MODELS[model])
    found, test = samples(run)
    made = exported(mnist_cli, run, "format=torch_export")
    assert (os.listdir("out"), made["path"]) == (["model.pt2"], "out/model.pt2")
    assert (made["parity"]["n"], made["parity"]["argmax_agreement"]) == (len(test), 1.0)
    extra = {"mnist_cli.json": ""}
    program = torch.export.load("out/model.pt2", extra_files=extra).module()
    with zipfile.ZipFile("out/model.pt2") as archive:
        assert not any(str(ROOT).encode() in archive.read(name) for name in archive.namelist())
    assert json.loads(extra["mnist_cli.json"])["config"] == to_plain(found.config)
    for size in SIZES:
        batch = first(test, size)
        with torch.inference_mode():
            answer = program(batch.inputs)
        assert torch.allclose(answer, expected_answers(found, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_safetensors(mnist_cli: Program, trained: Trained, model: str) -> None:
    run = trained(*MODELS[model])
    made = exported(mnist_cli, run, "format=safetensors")
    assert (os.listdir("out"), made["parity"]["max_abs_diff"]) == (["model.safetensors"], 0)
    assert made["bytes"] < (run / "best.safetensors").stat().st_size or "sgd" in str(MODELS[model])
    assert checkpoint.load(Path("out/model.safetensors")).optim == {}
    result = json.loads((run / "result.json").read_text())
    again = document(mnist_cli("eval", "checkpoint=out/model.safetensors", "--json"))
    assert again["metrics"] == result["test"]


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_int8(mnist_cli: Program, trained: Trained, model: str) -> None:
    run = trained(*MODELS[model])
    _, test = samples(run)
    whole = exported(mnist_cli, run)
    made = exported(mnist_cli, run, "quantize=int8")
    assert sorted(os.listdir("out")) == ["model.int8.onnx", "model.onnx"]
    assert made["bytes"] < 0.6 * whole["bytes"]  # convolutions stay as they are
    parity = made["parity"]
    assert parity["max_abs_diff"] > 0
    assert parity["accuracy_export"] >= parity["accuracy_checkpoint"] - 0.01
    runtime = session(Path("out/model.int8.onnx"))
    for size in SIZES:
        batch = first(test, size).inputs.numpy()
        (answer,) = runtime.run(None, {runtime.get_inputs()[0].name: batch})
        assert answer.shape == (size, 10)
    again = document(mnist_cli("eval", "checkpoint=out/model.int8.onnx", "--json"))
    assert again["metrics"]["accuracy"] == parity["accuracy_export"]


def test_int8_says_no_more_than_it_should(
    mnist_cli: Program, trained: Trained, caplog: pytest.LogCaptureFixture
) -> None:
    words = ("export", f"checkpoint={trained(*LINEAR)}", "quantize=int8", "out=out", "--quiet")
    assert mnist_cli(*words) == (0, "", "")
    # Outside of a test these would stand on stderr.
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []


# --- parity --------------------------------------------------------------------------------------


def break_export(monkeypatch: pytest.MonkeyPatch, breaks: Callable[[Tensor], Tensor]) -> None:
    """Let the exported file answer with `breaks` of what it would answer."""
    honest = export._FORMATS["onnx"]

    def dishonest(
        config: ExportConfig, found: Checkpoint, model: torch.nn.Module
    ) -> tuple[bytes, Answer]:
        data, answer = honest(config, found, model)
        return data, lambda split: breaks(answer(split).clone())

    monkeypatch.setitem(export._FORMATS, "onnx", dishonest)


def swap_one(outputs: Tensor) -> Tensor:
    """The answer of the last sample changes, by hardly anything."""
    best, second = outputs[-1].topk(2).indices
    outputs[-1, second] = outputs[-1, best] + 1e-6
    outputs[-1, best] -= 1e-6
    return outputs


def shift_one(outputs: Tensor) -> Tensor:
    """One logit is off; every answer stays."""
    row = 3
    outputs[row, outputs[row].argmax()] += 0.01
    return outputs


def lose_one(outputs: Tensor) -> Tensor:
    outputs[5, 5] = torch.nan
    return outputs


@pytest.mark.parametrize("breaks", [swap_one, shift_one, lose_one])
def test_an_export_that_differs_leaves_no_file(
    mnist_cli: Program,
    trained: Trained,
    monkeypatch: pytest.MonkeyPatch,
    breaks: Callable[[Tensor], Tensor],
) -> None:
    run = trained(*LINEAR)
    break_export(monkeypatch, breaks)
    tolerance = ["tolerance=1e9"] if breaks is swap_one else []
    outcome = mnist_cli("export", f"checkpoint={run}", "out=out", *tolerance)
    assert (outcome.code, outcome.stdout, len(outcome.stderr.splitlines())) == (8, "", 2)
    assert "tolerance=" in outcome.error
    assert not Path("out").exists() and not (run / "model.onnx").exists()


def test_any_damaged_byte_of_an_export_is_noticed(mnist_cli: Program, trained: Trained) -> None:
    exported(mnist_cli, trained(*LINEAR))
    whole = Path("out/model.onnx").read_bytes()
    rng = random.Random(0)
    for place in rng.sample(range(len(whole)), 150):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        Path("damaged.onnx").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"damaged\.onnx is not an ONNX file"):
            onnx_file.load(Path("damaged.onnx"))
    outcome = mnist_cli("eval", "checkpoint=damaged.onnx")
    assert outcome.code == 4
    onnx_file.load(Path("out/model.onnx"))


def test_an_export_that_differs_leaves_an_older_file(
    mnist_cli: Program, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(*LINEAR)
    exported(mnist_cli, run)
    before = Path("out/model.onnx").read_bytes()
    break_export(monkeypatch, shift_one)
    outcome = mnist_cli("export", f"checkpoint={run}", "out=out", "overwrite=true", "--json")
    assert (outcome.code, json.loads(outcome.stdout)["exit_code"]) == (8, 8)
    assert os.listdir("out") == ["model.onnx"]
    assert Path("out/model.onnx").read_bytes() == before


def test_the_tolerance_is_the_users(
    mnist_cli: Program, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_export(monkeypatch, shift_one)
    made = exported(mnist_cli, trained(*LINEAR), "tolerance=0.02")
    assert made["parity"]["max_abs_diff"] == pytest.approx(0.01, rel=1e-3)
    assert made["parity"]["argmax_agreement"] == 1


def test_an_int8_export_that_loses_too_much(
    mnist_cli: Program, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(*LINEAR)
    break_export(monkeypatch, lambda outputs: outputs.roll(1, dims=1))
    outcome = mnist_cli("export", f"checkpoint={run}", "quantize=int8", "out=out")
    assert (outcome.code, Path("out").exists()) == (8, False)
    assert "max_accuracy_drop=0.01" in outcome.error
    assert exported(mnist_cli, run, "quantize=int8", "max_accuracy_drop=1")["bytes"] > 0


# --- the other keys ------------------------------------------------------------------------------


def test_a_file_that_is_there_stays(mnist_cli: Program, trained: Trained) -> None:
    run = trained(*LINEAR)
    Path("out").mkdir()
    Path("out/model.safetensors").write_text("mine")
    words = ("export", f"checkpoint={run}", "out=out", "format=safetensors")
    outcome = mnist_cli(*words)
    assert (outcome.code, outcome.stdout) == (2, "")
    assert "out/model.safetensors" in outcome.error and "overwrite=true" in outcome.hint
    assert Path("out/model.safetensors").read_text() == "mine"
    assert mnist_cli(*words, "overwrite=true", "--quiet") == (0, "", "")
    assert (
        checkpoint.load(Path("out/model.safetensors")).config
        == checkpoint.load(run / "best.safetensors").config
    )


def test_without_a_folder_it_lies_beside_its_checkpoint(
    mnist_cli: Program, trained: Trained
) -> None:
    source = Path("deploy/best.safetensors")
    source.parent.mkdir()
    source.write_bytes((trained(*LINEAR) / "best.safetensors").read_bytes())
    made = document(mnist_cli("export", "checkpoint=deploy", "format=torch_export", "--json"))
    assert made["path"] == "deploy/model.pt2"
    assert sorted(os.listdir("deploy")) == ["best.safetensors", "model.pt2"]


def test_a_benchmark_times_both(mnist_cli: Program, trained: Trained) -> None:
    made = exported(mnist_cli, trained(*LINEAR), "benchmark=true", "format=safetensors")
    rows = made["benchmark"]
    assert [row["batch_size"] for row in rows] == [1, 64]  # digits has no 1,000 test images
    for row in rows:
        assert row.keys() == {"batch_size", "checkpoint_ms", "export_ms"}
        assert row["checkpoint_ms"] > 0 and row["export_ms"] > 0


@pytest.mark.parametrize("opset", [18, 23])
def test_the_opset_is_the_users(mnist_cli: Program, trained: Trained, opset: int) -> None:
    run = trained(*MODELS["cnn"])
    exported(mnist_cli, run, f"opset={opset}")
    graph = onnx.load("out/model.onnx")
    assert [entry.version for entry in graph.opset_import if entry.domain == ""] == [opset]
    onnx.checker.check_model(graph, full_check=True)


def test_says_what_it_wrote(mnist_cli: Program, trained: Trained) -> None:
    words = ("export", f"checkpoint={trained(*LINEAR)}", "format=safetensors", "out=out")
    code, stdout, stderr = mnist_cli(*words)
    assert (code, stderr) == (0, "")
    assert "out/model.safetensors" in stdout
    assert "359 test samples" in stdout
    assert "mnist-cli eval checkpoint=out/model.safetensors" in stdout
