"""`eval` repeats the numbers of a run to the last bit, and changes nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome, Program
from data_files import write_mnist_like

from mnist_cli import checkpoint, dataset, options, scoring

pytestmark = pytest.mark.usefixtures("empty_cwd")

Trained = Callable[..., Path]
MLP = ("dataset=digits", "epochs=2", "model=mlp", "model.hidden=[16]")
DROPOUT = ("dataset=digits", "epochs=1", "model=cnn_dropout")
LINE = ("dataset=linear", "model=linear", "loss=mse", "optim=sgd", "epochs=3")
NOISY = (*LINE, "dataset.num_samples=50", "dataset.noise=0.1", "dataset.val_fraction=0.2")


def result_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_text())
    return found


def document(outcome: Outcome) -> dict[str, Any]:
    assert outcome.code == 0, outcome
    found: dict[str, Any] = json.loads(outcome.stdout)
    return found


def content(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.is_file()
    }


@pytest.mark.parametrize("words", [MLP, DROPOUT, NOISY], ids=["mlp", "cnn_dropout", "line"])
@pytest.mark.parametrize("split", ["test", "val"])
def test_repeats_the_run_to_the_last_bit(
    mnist_cli: Program, trained: Trained, words: tuple[str, ...], split: str
) -> None:
    run = trained(*words)
    before = content(run)
    found = document(mnist_cli("eval", f"checkpoint={run}", f"split={split}", "--json"))
    assert found == {
        "checkpoint": str(run / "best.safetensors"),
        "split": split,
        "metrics": result_of(run)[split],
    }
    assert content(run) == before
    assert os.listdir() == []


def test_the_training_split(mnist_cli: Program, trained: Trained) -> None:
    run = trained(*MLP)
    found = document(mnist_cli("eval", f"checkpoint={run}", "split=train", "--json"))
    assert found["metrics"]["n"] == result_of(run)["dataset"]["n_train"] == 1366
    assert len({json.dumps(result_of(run)[split]) for split in ("val", "test")}) == 2


@pytest.mark.parametrize("more", [(), ("hydra.verbose=false",)])
def test_each_job_of_several_leaves_its_file(
    mnist_cli: Program, trained: Trained, tmp_path: Path, more: tuple[str, ...]
) -> None:
    run = trained("model=linear", "dataset=digits", "epochs=1")
    words = (f"checkpoint={run}", "split=val,test", f"out={tmp_path}/${{split}}", *more)
    outcome = mnist_cli("eval", "-m", *words)
    assert outcome.code == 0
    for split in ("val", "test"):
        assert (tmp_path / split / "eval.json").exists()
        score = f"{result_of(run)[split]['accuracy']:.2%}"
        assert f"on the {split} split of digits: accuracy {score}" in outcome.stdout


@pytest.mark.parametrize("command", ["eval", "export", "predict", "report"])
def test_a_file_is_no_folder_to_write_to(
    mnist_cli: Program, trained: Trained, command: str
) -> None:
    run, file = trained(*MLP), Path("file")
    file.touch()
    more = {"predict": ("images=file",)}.get(command, ())
    key = "run" if command == "report" else "checkpoint"
    for out, error in (("file", "out=file is a file"), ("file/x", "Not a directory")):
        outcome = mnist_cli(command, f"{key}={run}", *more, f"out={out}", "--quiet")
        if (command, out) == ("predict", "file/x"):  # no picture is found first
            continue
        assert outcome.code == 2 and error in outcome.error
        assert "out=DIR" in outcome.hint
    assert file.stat().st_size == 0


def test_the_data_of_the_run_may_be_gone(
    mnist_cli: Program, trained: Trained, real_mnist: Path
) -> None:
    run = trained("model=linear", "epochs=1", f"dataset.root={real_mnist}")
    Path("empty").mkdir()
    words = ("dataset.root=empty", "--quiet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MNIST_CLI_DOWNLOAD_TIMEOUT", "0.001")
        outcome = mnist_cli("eval", f"checkpoint={run}", *words)
    assert outcome.code == 3
    assert outcome.hint == "name the folder that holds the data of the run: dataset.root=DIR"


def test_an_empty_split_is_a_usage_error(mnist_cli: Program, trained: Trained) -> None:
    run = trained(*LINE)
    outcome = mnist_cli("eval", f"checkpoint={run}", "split=val")
    assert (outcome.code, outcome.stdout) == (2, "")
    assert "dataset.val_fraction=0" in outcome.error
    assert outcome.hint == "type split=test"


def test_a_file_is_evaluated_as_it_is(mnist_cli: Program, trained: Trained) -> None:
    run = trained(*MLP, "optim.lr=0.3", "seed=1", "monitor=val_loss")  # which gets worse soon
    for name in ("best", "last"):
        shutil.copy(run / f"{name}.safetensors", f"{name}.safetensors")
    found = {
        name: document(mnist_cli("eval", f"checkpoint={name}.safetensors", "--json"))["metrics"]
        for name in ("best", "last")
    }
    assert found["best"] == result_of(run)["test"]
    rows = (run / "metrics.csv").read_text().splitlines()
    assert result_of(run)["best"]["epoch"] < len(rows) - 1
    assert found["last"] != found["best"]
    val = document(mnist_cli("eval", "checkpoint=last.safetensors", "split=val", "--json"))
    assert str(val["metrics"]["accuracy"]) == rows[-1].split(",")[5]


@pytest.mark.parametrize("words", [MLP, NOISY], ids=["mlp", "line"])
def test_an_exported_file_gives_the_same_answers(
    mnist_cli: Program, trained: Trained, words: tuple[str, ...]
) -> None:
    run = trained(*words)
    assert mnist_cli("export", f"checkpoint={run}", "out=.", "-q").code == 0
    found = document(mnist_cli("eval", "checkpoint=model.onnx", "--json"))
    expected = result_of(run)["test"]
    assert found["checkpoint"] == "model.onnx"
    assert found["metrics"].keys() == expected.keys()
    for key in ("accuracy", "confusion") if "accuracy" in expected else ():
        assert found["metrics"][key] == expected[key]
    assert found["metrics"]["loss"] == pytest.approx(expected["loss"], rel=1e-4, abs=1e-9)


def test_writes_only_where_it_is_told(mnist_cli: Program, trained: Trained) -> None:
    run = trained(*MLP)
    outcome = mnist_cli("eval", f"checkpoint={run}", "out=a/b", "--json")
    assert [path.name for path in Path("a/b").iterdir()] == ["eval.json"]
    assert json.loads(Path("a/b/eval.json").read_text()) == document(outcome)


def test_shows_a_table_with_a_row_for_each_class(mnist_cli: Program, trained: Trained) -> None:
    run = trained(*MLP)
    code, stdout, stderr = mnist_cli("eval", f"checkpoint={run}")
    assert (code, stderr) == (0, "")
    measured = result_of(run)["test"]
    assert f"{measured['accuracy']:.2%}" in stdout
    for row in measured["per_class"]:
        cells = (f"{row['precision']:.4f}", f"{row['recall']:.4f}", f"{row['f1']:.4f}")
        assert any(line.split()[:4] == [row["label"], *cells] for line in stdout.splitlines())


def test_answers_change_neither_weights_nor_random_numbers(trained: Trained) -> None:
    found = checkpoint.load(trained(*DROPOUT) / "best.safetensors")
    model = found.build_model(torch.device("cpu"))
    data = dataset.load(found.config.dataset, found.config.seed)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    model.train()
    first = scoring.answers(model, found.spec, data.test)
    second = scoring.answers(model, found.spec, data.test)
    assert torch.equal(first, second)
    assert first.shape == (len(data.test), 10) and not first.requires_grad
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_checkpoint_that_is_not_there(mnist_cli: Program) -> None:
    Path("empty").mkdir()
    Path("text.onnx").write_text("no graph")
    Path("text.safetensors").write_text("no tensors")
    for name in ("nowhere", "empty", "text.onnx", "text.safetensors", "nowhere.onnx", "a\0b"):
        outcome = mnist_cli("eval", f"checkpoint={name}")
        assert (outcome.code, outcome.stdout) == (4, ""), name
        assert len(outcome.stderr.splitlines()) == 2
    assert sorted(os.listdir()) == ["empty", "text.onnx", "text.safetensors"]


def test_a_program_is_told_from_a_checkpoint(mnist_cli: Program, trained: Trained) -> None:
    shutil.copytree(trained(*LINE), "run")
    assert mnist_cli("export", "checkpoint=run", "format=torch_export").code == 0
    for command in ("eval", "predict", "export"):
        words = ("images=a.png",) if command == "predict" else ()
        outcome = mnist_cli(command, "checkpoint=run/model.pt2", *words)
        assert outcome.code == 4
        assert outcome.error.startswith("run/model.pt2 is a program for torch.export.load")
        assert outcome.hint == "name its run folder, or export format=onnx"
    assert mnist_cli("eval", "checkpoint=gone.pt2").error == "no checkpoint at gone.pt2"


def test_a_loss_that_is_no_number_is_refused(mnist_cli: Program, trained: Trained) -> None:
    """Weights and answers are finite, but not their squares."""
    path = trained(*LINE) / "best.safetensors"
    found = checkpoint.load(path)
    huge = {name: torch.full_like(tensor, 1e20) for name, tensor in found.model.items()}
    checkpoint.save(Path("huge.safetensors"), dataclasses.replace(found, model=huge))
    outcome = mnist_cli("eval", "checkpoint=huge.safetensors", "out=scores", "--json")
    assert outcome.code == 4
    assert "gives a loss of inf" in json.loads(outcome.stdout)["error"]
    assert not Path("scores").exists()


def test_out_may_begin_at_home(
    mnist_cli: Program, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, home = trained(*LINE), Path("home").absolute()
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    document(mnist_cli("eval", f"checkpoint={run}", "out=~/eval", "--json"))
    document(mnist_cli("report", f"run={run}", "out=~/report", "--json"))
    document(mnist_cli("export", f"checkpoint={run}", "out=~/export", "--json"))
    document(mnist_cli("train", *LINE, "out=~/train", "--json"))
    document(mnist_cli("train", *LINE, "out=~/train", "resume=auto", "--json"))
    made = {path.name for path in home.iterdir()} - {".config"}  # in which matplotlib keeps its own
    assert made == {"eval", "report", "export", "train"}
    assert not Path("~").exists()


def test_a_run_finds_its_data_from_any_folder(
    mnist_cli: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_mnist_like(Path("data"), "fashion_mnist", 470, 94)
    monkeypatch.setattr(dataset, "source_of", lambda config: source)
    monkeypatch.delenv("MNIST_CLI_DATA", raising=False)
    words = ("dataset=fashion_mnist", "dataset.root=data", "model=linear", "epochs=1")
    assert mnist_cli("train", *words, "out=run", "--quiet").code == 0
    assert mnist_cli("train", "-m", *words, "seed=0,1", "out=sweep", "--quiet").code == 0
    here = Path().absolute()
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    for run in (here / "run", *(path.parent for path in (here / "sweep").glob("*/result.json"))):
        measured = mnist_cli("eval", f"checkpoint={run}", "--json")
        assert document(measured)["metrics"]["n"] == 94
        assert mnist_cli("train", f"resume={run}", "epochs=2", "--quiet").code == 0


def test_the_data_of_the_run_may_lie_at_home(
    mnist_cli: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder of any name; and one in a checkpoint that no folder can have is passed over."""
    home, name = Path("home").absolute(), os.fsdecode(b"d\xfe")
    source = write_mnist_like(home / name, "fashion_mnist", 470, 94)
    monkeypatch.setattr(dataset, "source_of", lambda config: source)
    monkeypatch.setenv("HOME", str(home))
    words = ("dataset=fashion_mnist", f"dataset.root=~/{name}", "model=linear", "epochs=1")
    assert mnist_cli("train", *words, "out=run", "--quiet").code == 0
    again = shlex.split(Path("run/overrides.txt").read_text(errors="surrogateescape"))
    assert mnist_cli(*again[1:], "out=again", "--quiet").code == 0
    monkeypatch.delenv("MNIST_CLI_DATA", raising=False)
    assert document(mnist_cli("eval", "checkpoint=run", "--json"))["metrics"]["n"] == 94
    monkeypatch.setenv("MNIST_CLI_DATA", str(home / name))
    found = checkpoint.load(Path("run/best.safetensors"))
    assert isinstance(found.config.dataset, options.ImageFilesConfig)
    for root in ("x" * 300, "~nobody/x", "a\0b", "~a\0b/x"):
        config = dataclasses.replace(
            found.config, dataset=dataclasses.replace(found.config.dataset, root=root)
        )
        checkpoint.save(Path("x.safetensors"), dataclasses.replace(found, config=config))
        assert mnist_cli("eval", "checkpoint=x.safetensors", "--quiet").code == 0


def test_data_of_another_digest_is_said_so(
    mnist_cli: Program, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(*NOISY)
    load = dataset.load

    def other(source: options.DatasetConfig, seed: int, **kind: bool) -> dataset.Dataset:
        data = load(source, seed, **kind)
        object.__setattr__(data.spec, "digest", "f" * 64)
        return data

    monkeypatch.setattr(dataset, "load", other)
    outcome = mnist_cli("eval", f"checkpoint={run}")
    assert outcome.code == 0
    assert "warning: the linear data here is not what the run used" in outcome.stderr
