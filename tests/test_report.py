"""A page tells of a run what its folder holds, loads nothing, and never costs a run its result."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
from conftest import ROOT, Program
from data_files import write_mnist_like
from pages import EVIL, assert_asks_for_nothing, assert_loads_nothing, parsed, text_of

from mnist_cli import checkpoint, dataset, metrics
from mnist_cli.report import pictures

pytestmark = pytest.mark.usefixtures("empty_cwd")

Trained = Callable[..., Path]
MLP = ("dataset=digits", "epochs=2", "model=mlp", "model.hidden=[16]")
SOFTMAX = ("dataset=digits", "epochs=1", "model=linear", "dataset.val_fraction=0")
LINE = ("dataset=linear", "model=linear", "loss=mse", "optim=sgd", "epochs=3")
WIDE = (
    *("dataset=linear", "model=mlp", "model.hidden=[4]", "loss=mse", "epochs=2"),
    *("dataset.num_samples=60", "dataset.num_features=3", "dataset.val_fraction=0.2"),
)
KINDS = {"mlp": MLP, "softmax": SOFTMAX, "line": LINE, "wide": WIDE}
CSV = ("dataset=digits", "epochs=1", "model=cnn", "predictions=true")


def copy_of(run: Path, name: str = "copy") -> Path:
    return Path(shutil.copytree(run, name))


def changed(run: Path, **values: Any) -> Path:
    """A copy of `run` with other values in its result.json; `a__b` is the key b of a."""
    folder = copy_of(run)
    result = json.loads((folder / "result.json").read_text())
    for key, value in values.items():
        *parents, leaf = key.split("__")
        target = result
        for parent in parents:
            target = target[parent]
        target[leaf] = value
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def document(mnist_cli: Program, *words: str) -> dict[str, Any]:
    outcome = mnist_cli(*words, "--json")
    assert outcome.code == 0, outcome
    found: dict[str, Any] = json.loads(outcome.stdout)
    return found


# --- the page of a run ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_ends_with_a_sound_page_that_loads_nothing(trained: Trained, kind: str) -> None:
    run = trained(*KINDS[kind], "report=true")
    assert_loads_nothing(run / "report.html")
    text = text_of(run / "report.html")
    result = json.loads((run / "result.json").read_text())
    assert f"on {result['dataset']['name']}" in text
    assert f"{result['model']['num_params']:,}" in text
    if "accuracy" in result["test"]:
        assert f"{result['test']['accuracy']:.2%}" in text
        for row in result["test"]["per_class"]:
            assert f"{row['precision']:.4f}" in text
    else:
        assert "mean squared error" in text
        for value in result["model"].get("weight", [[]])[0]:
            assert f"{value:.6f}" in text


def test_the_command_draws_the_same_page_again(mnist_cli: Program, trained: Trained) -> None:
    run = trained(*MLP, "report=true")
    before = (run / "report.html").read_bytes()
    found = document(mnist_cli, "report", f"run={run}", "out=elsewhere/deep")
    path = Path("elsewhere/deep/report.html")
    assert found == {"path": str(path), "bytes": len(before), "runs": [str(run)]}
    assert path.read_bytes() == before
    copy = copy_of(run)
    (copy / "report.html").unlink()
    assert mnist_cli("report", f"run={copy}", "--quiet") == (0, "", "")
    assert text_of(copy / "report.html") == text_of(path).replace(str(run), "copy")


def test_what_differs_from_the_defaults_is_marked(trained: Trained) -> None:
    run = trained(*MLP, "report=true")
    rows = {
        e[0].text: "".join(e[1].itertext()).split()
        for e in parsed(run / "report.html").iter("div")
        if e.get("class") == "changed"
    }
    assert rows == {
        "model": ["mlp", "default", "cnn"],
        "model.hidden": ["[16]", "default", "[512,256]"],
        "dataset": ["digits", "default", "mnist"],
        "epochs": ["2", "default", "10"],
    }
    assert "mnist-cli train model=mlp 'model.hidden=[16]' dataset=digits epochs=2" in text_of(
        run / "report.html"
    )


def test_the_surest_mistakes_are_those_of_errors_csv(trained: Trained) -> None:
    run = trained(*MLP, "report=true")
    rows = sorted(rows_of(run / "errors.csv"), key=lambda row: -float(row["probability"]))
    assert len(rows) > pictures.MAX_TILES
    told = [image.get("alt") for image in parsed(run / "report.html").iter("img")]
    for row, alt in zip(rows[: pictures.MAX_TILES], told[: pictures.MAX_TILES], strict=True):
        assert alt == f"Test image {row['index']}: {row['truth']}, taken for {row['answer']}"
    assert f"And {len(rows) - pictures.MAX_TILES} more in errors.csv" in text_of(
        run / "report.html"
    )


def test_a_run_that_is_not_complete_says_so(mnist_cli: Program, trained: Trained) -> None:
    run = changed(trained(*MLP), status="failed", error="no <power>", val=None, test=None)
    (run / "best.safetensors").unlink()
    (run / "metrics.csv").unlink()
    assert mnist_cli("report", f"run={run}").code == 0
    text = text_of(run / "report.html")
    assert "This run is not complete: failed. no <power>" in text
    assert "No epoch was finished" in text


def test_the_settings_are_those_of_the_whole_run(mnist_cli: Program, trained: Trained) -> None:
    """Not of the selected weights, which may be older than the settings that came by a resume."""
    run = Path(shutil.copytree(trained(*MLP), "run"))
    words = ("optim.lr=0.5", "early_stop.patience=7", "resume_allow=[optim,early_stop]")
    ended = mnist_cli("train", f"resume={run}", "epochs=9", *words, "--quiet")
    assert (ended.code, ended.stderr) == (0, "")
    best, last = (checkpoint.load(run / f"{name}.safetensors") for name in ("best", "last"))
    assert best.progress.step < last.progress.step
    assert mnist_cli("report", f"run={run}").code == 0
    text = text_of(run / "report.html")
    assert "epochs=9" in text and "optim.lr=0.5" in text and "early_stop.patience=7" in text


def test_a_run_whose_data_changed_is_shown_without_them(
    mnist_cli: Program, trained: Trained
) -> None:
    run = copy_of(trained(*MLP))
    found = checkpoint.load(run / "best.safetensors")
    other = dataclasses.replace(found, spec=dataclasses.replace(found.spec, digest="0" * 64))
    checkpoint.save(run / "best.safetensors", other)
    outcome = mnist_cli("report", f"run={run}")
    assert outcome.code == 0
    assert "shown without its test samples: the digits data here is not what" in outcome.stderr
    text = text_of(run / "report.html")
    assert "The test samples are not at hand" in text
    assert "Class by class" in text
    assert "surest mistakes" not in text


def test_a_run_whose_data_are_damaged_is_shown_without_them(
    mnist_cli: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_mnist_like(Path("data"), "mnist", 470, 94)
    monkeypatch.setattr(dataset, "source_of", lambda config: source)
    words = ("dataset.root=data", "model=cnn_deep", "epochs=1", "out=run", "--quiet")
    assert mnist_cli("train", *words).code == 0
    assert "surest mistakes" in text_of(Path("run/report.html"))
    for path in Path("data").rglob("*.gz"):
        path.write_bytes(b"no images")
    outcome = mnist_cli("report", "run=run")
    assert outcome.code == 0, outcome
    assert "expected an intact gzip file" in text_of(Path("run/report.html"))


def test_a_report_downloads_nothing(mnist_cli: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_mnist_like(Path("data"), "mnist", 470, 94)
    monkeypatch.setattr(dataset, "source_of", lambda config: source)
    words = ("dataset.root=data", "model=linear", "epochs=1", "out=run", "--quiet")
    assert mnist_cli("train", *words).code == 0
    Path("data").rename("elsewhere")
    monkeypatch.setenv("MNIST_CLI_DATA", "nowhere")
    outcome = mnist_cli("report", "run=run")
    assert outcome.code == 0
    [warning] = outcome.stderr.splitlines()
    assert warning.startswith("warning: run is shown without its test samples: mnist is not in ")
    assert not Path("nowhere").exists()  # a download begins by making it
    assert "and nothing is downloaded for it" in text_of(Path("run/report.html"))
    mnist_cli("report", "run=run", "dataset.root=elsewhere")
    assert "surest mistakes" in text_of(Path("run/report.html"))


def test_real_mnist_in_less_than_a_megabyte_and_a_half(
    mnist_cli: Program, real_mnist: Path
) -> None:
    words = ("model=mlp", "model.hidden=[64]", "epochs=2", f"dataset.root={real_mnist}")
    assert mnist_cli("train", *words, "out=run", "--quiet").code == 0
    assert Path("run/report.html").stat().st_size < 1_500_000
    assert_loads_nothing(Path("run/report.html"))


# --- folders from anybody ------------------------------------------------------------------------


def test_texts_of_a_run_stay_texts(mnist_cli: Program, trained: Trained) -> None:
    values = {"status": EVIL, "error": EVIL, "device": EVIL, "versions__torch": EVIL}
    run = changed(trained(*MLP), **values)
    for name in ("best", "last"):
        found = checkpoint.load(run / f"{name}.safetensors")
        classes = tuple(f"{EVIL}{number}" for number in range(10))
        other = dataclasses.replace(found, spec=dataclasses.replace(found.spec, classes=classes))
        checkpoint.save(run / f"{name}.safetensors", other)
    folder = run.rename("<b>$&'")
    assert mnist_cli("report", f"run={folder}").code == 0
    assert mnist_cli("report", f"run={folder},{folder}", "out=.").code == 0
    for path in (folder / "report.html", Path("compare.html")):
        assert_loads_nothing(path)
        assert f"{EVIL}3" in text_of(path)
        assert str(folder) in text_of(path)


def mutations() -> Iterator[Any]:
    yield "none", "no JSON"
    yield "empty", "{}"
    yield "a list", "[1]"
    yield "twice", '{"status": "completed", "status": "completed"}'
    yield "deep", "[" * 100_000
    yield "endless", '{"status": "' + "x" * 17 * 2**20
    for key, value in {
        "status": 1,
        "time": "long",
        "time__total_s": -1,
        "model__num_params": "many",
        "test__n": 0,
        "test__accuracy": 2.0,
        "test__confusion": [[1]],
        "test__per_class": [],
        "test__accuracy_ci95": [0.1],
        "test": [],
        "versions__torch": None,
    }.items():
        yield f"{key}={value}", {key: value}


@pytest.mark.parametrize("change", [pytest.param(m[1], id=m[0]) for m in mutations()])
def test_a_damaged_result_is_refused(mnist_cli: Program, trained: Trained, change: Any) -> None:
    run = changed(trained(*MLP), **(change if isinstance(change, dict) else {}))
    if isinstance(change, str):
        (run / "result.json").write_text(change)
    outcome = mnist_cli("report", f"run={run}")
    assert (outcome.code, outcome.stdout) == (4, "")
    assert outcome.error.startswith("copy/result.json can't be used: ")
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"epoch,train_loss\n1,nan\n2,inf\nx,y\n,,\n",
        b"epoch,train_loss,val_loss\n1,2\n2,1,3,4,5\n",
        b'epoch\n"',
        b"<script>,\n1,2\n",
        b"epoch,train_loss\n" + b"1,0\n" * 5000,
        b"epoch,lr,val_accuracy\n1,0,1e308\n2,-1e308,-1e308\n",
    ],
)
def test_odd_metrics_are_left_out(mnist_cli: Program, trained: Trained, content: bytes) -> None:
    run = copy_of(trained(*MLP))
    (run / "metrics.csv").write_bytes(content)
    assert mnist_cli("report", f"run={run}", "--quiet") == (0, "", "")
    assert_loads_nothing(run / "report.html")


def test_what_is_no_run_is_refused(mnist_cli: Program, trained: Trained) -> None:
    Path("sweep/job-1").mkdir(parents=True)
    Path("file").touch()
    for name in ("nowhere", "file", "sweep", "x" * 5000):
        outcome = mnist_cli("report", f"run={name}")
        assert (outcome.code, outcome.stdout) == (4, "")
        assert outcome.hint == "name a run folder: mnist-cli report run=outputs/train/RUN"
    damaged = copy_of(trained(*MLP))
    (damaged / "best.safetensors").write_bytes(b"x" * 100)
    assert mnist_cli("report", f"run={damaged}").code == 4


# --- at the end of a training --------------------------------------------------------------------


def test_a_page_that_cant_be_written_is_a_warning(mnist_cli: Program) -> None:
    Path("run/report.html/in the way").mkdir(parents=True)
    outcome = mnist_cli("train", *MLP, "out=run", "--json")
    assert outcome.code == 0
    assert json.loads(outcome.stdout)["status"] == "completed"
    assert "warning: no report was drawn: can't write run/report.html" in outcome.stderr
    assert outcome.stderr.endswith("type mnist-cli report run=run\n")


def test_a_run_that_goes_on_has_the_page_that_it_began_with(mnist_cli: Program) -> None:
    run = Path("run")
    assert mnist_cli("train", *MLP, "out=run", "report=false", "--quiet").code == 0
    assert mnist_cli("train", "resume=run", "epochs=3", "--quiet").code == 0
    assert not (run / "report.html").exists()
    assert mnist_cli("train", "resume=run", "epochs=4", "report=true", "--quiet").code == 0
    assert "Loss over 4 epochs" in (run / "report.html").read_text()
    before = (run / "report.html").stat().st_mtime_ns
    assert mnist_cli("train", "resume=run", "--quiet").code == 0
    assert (run / "report.html").stat().st_mtime_ns == before
    assert mnist_cli("train", "resume=run", "epochs=5", "--quiet").code == 0
    assert "Loss over 5 epochs" in (run / "report.html").read_text()


WATCHED = """
import sys
from mnist_cli import cli
loaded = []
class Watch:
    encoding = "utf-8"
    def write(self, text): loaded.append(sorted({"matplotlib", "jinja2"} & set(sys.modules)))
    def flush(self): pass
    def isatty(self): return False
sys.stdout = Watch()
words = ["train", "dataset=linear", "model=linear", "loss=mse", "epochs=1", "--json"]
assert cli.main([*words, "out=plain", "report=false"]) == 0
after_plain = sorted({"matplotlib", "jinja2"} & set(sys.modules))
assert cli.main([*words, "out=drawn"]) == 0
after_drawn = sorted({"matplotlib", "jinja2"} & set(sys.modules))
print(loaded, after_plain, after_drawn, file=sys.stderr)
"""


def test_nothing_is_loaded_to_draw_before_the_result_is_printed() -> None:
    command = [sys.executable, "-c", WATCHED]
    ended = subprocess.run(command, capture_output=True, text=True, env=None, check=False)
    assert ended.returncode == 0, ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last == "[[], []] [] ['jinja2', 'matplotlib']"
    assert not Path("plain/report.html").exists()
    assert Path("drawn/report.html").exists()


@pytest.mark.parametrize("launcher", [(), ("hydra/launcher=basic",)], ids=["own", "launcher"])
def test_the_jobs_of_a_sweep_are_drawn_only_where_that_is_typed(
    mnist_cli: Program, launcher: tuple[str, ...]
) -> None:
    words = ("train", "-m", *SOFTMAX, "seed=0,1", "--quiet", *launcher)
    for typed, count in (((), 0), (("report=true",), 2), (("report=false",), 0)):
        sweep = Path(f"sweep{len(typed)}{count}")
        assert mnist_cli(*words, *typed, f"out={sweep}").code == 0
        assert len(list(sweep.glob("*/report.html"))) == count
        assert (sweep / "report.html").exists() == (typed != ("report=false",))


def test_a_line_that_speaks_of_hydra_draws_too(mnist_cli: Program) -> None:
    assert mnist_cli("train", *SOFTMAX, "out=run", "hydra.verbose=x", "--quiet").code == 0
    assert Path("run/report.html").exists()


# --- files for programs --------------------------------------------------------------------------


def test_predictions_are_what_the_result_counts(trained: Trained) -> None:
    run = trained(*CSV)
    test = json.loads((run / "result.json").read_text())["test"]
    rows, errors = rows_of(run / "predictions.csv"), rows_of(run / "errors.csv")
    assert list(rows[0]) == ["index", "truth", "answer", "probability", "correct"]
    assert [row["index"] for row in rows] == [str(index) for index in range(test["n"])]
    assert {row["correct"] for row in rows} == {"true", "false"}
    assert all((row["truth"] == row["answer"]) == (row["correct"] == "true") for row in rows)
    cells = [[0] * 10 for _ in range(10)]
    for row in rows:
        cells[int(row["truth"])][int(row["answer"])] += 1
    assert cells == test["confusion"]
    confidences = torch.tensor([float(row["probability"]) for row in rows], dtype=torch.float64)
    correct = torch.tensor([row["correct"] == "true" for row in rows])
    assert metrics.calibration_error(confidences, correct) == test["ece"]
    wrong = [{k: v for k, v in row.items() if k != "correct"} for row in rows]
    assert errors == [row for row in wrong if row["truth"] != row["answer"]] != []


def test_predictions_are_written_where_they_are_asked_for(trained: Trained) -> None:
    assert not (trained(*MLP) / "predictions.csv").exists()
    run = trained(*WIDE, "predictions=true")
    rows = rows_of(run / "predictions.csv")
    errors = [float(row["answer"]) - float(row["truth"]) for row in rows]
    test = json.loads((run / "result.json").read_text())["test"]
    assert sum(error**2 for error in errors) / len(rows) == pytest.approx(test["mse"])
    assert not (run / "errors.csv").exists()


# --- two runs ------------------------------------------------------------------------------------


def test_two_runs_side_by_side(mnist_cli: Program, trained: Trained) -> None:
    a, b = trained(*CSV), trained(*SOFTMAX, "predictions=true")
    found = document(mnist_cli, "report", f"run={a},{b}")
    path = Path(found["path"])
    assert path.parent.parent == Path("outputs/report")
    assert found["runs"] == [str(a), str(b)]
    assert found["bytes"] == path.stat().st_size
    right = [[row["correct"] for row in rows_of(run / "predictions.csv")] for run in (a, b)]
    pairs = list(zip(*right, strict=True))
    only_a, only_b = pairs.count(("true", "false")), pairs.count(("false", "true"))
    p_value = scipy.stats.binomtest(only_a, only_a + only_b).pvalue
    assert found["mcnemar"] == {
        "both": pairs.count(("true", "true")),
        "only_a": only_a,
        "only_b": only_b,
        "neither": pairs.count(("false", "false")),
        "p_value": pytest.approx(p_value),
    }
    assert_loads_nothing(path)
    text = text_of(path)
    assert f"A alone is right on {only_a} test samples, B alone on {only_b}" in text
    for run in (a, b):
        assert f"{json.loads((run / 'result.json').read_text())['test']['accuracy']:.2%}" in text
    rows = [[cell.text for cell in row] for row in parsed(path).iter("tr")]
    assert ["model", "cnn", "linear"] in rows
    assert ["dataset.val_fraction", "0.05", "0.0"] in rows
    assert not any(row[0] == "epochs" for row in rows)
    assert sum(1 for _ in parsed(path).iter("img")) > 0


def test_the_better_of_two_runs_is_named(mnist_cli: Program, trained: Trained) -> None:
    good, bad = trained(*MLP), trained(*MLP, "optim.lr=1e-30")
    for runs, better in (((good, bad), "A"), ((bad, good), "B")):
        outcome = mnist_cli("report", f"run={runs[0]},{runs[1]}", f"out={better}")
        assert f"{better} is better (p < 0.0001)" in outcome.stdout
        assert f"{better} is better" in text_of(Path(better) / "compare.html")


def test_two_regressions(mnist_cli: Program, trained: Trained) -> None:
    words = tuple(word for word in WIDE if word != "epochs=2")
    a, b = trained(*WIDE), trained(*words, "epochs=5")
    found = document(mnist_cli, "report", f"run={a},{b}", "out=both")
    assert (found["path"], found["mcnemar"]) == ("both/compare.html", None)
    assert_loads_nothing(Path("both/compare.html"))
    assert "r2" in text_of(Path("both/compare.html"))


def test_a_run_beside_itself(mnist_cli: Program, trained: Trained) -> None:
    run = trained(*MLP)
    outcome = mnist_cli("report", f"run={run},{run}", "out=.")
    assert "no evidence that one is better (p = 1)" in outcome.stdout
    assert "both runs have the same configuration" in text_of(Path("compare.html"))


def test_runs_on_different_data_are_refused(mnist_cli: Program, trained: Trained) -> None:
    outcome = mnist_cli("report", f"run={trained(*MLP)},{trained(*WIDE)}")
    assert (outcome.code, outcome.stdout) == (2, "")
    assert "were made with different data: digits" in outcome.error
    assert not Path("outputs").exists()


def test_with_m_the_runs_are_jobs(mnist_cli: Program, trained: Trained) -> None:
    copies = [copy_of(trained(*MLP), name) for name in ("a", "b")]
    assert mnist_cli("report", "-m", "run=a,b", "--quiet").code == 0
    assert all((copy / "report.html").exists() for copy in copies)


# --- in a browser --------------------------------------------------------------------------------


def test_a_browser_asks_for_nothing_and_complains_of_nothing(
    mnist_cli: Program, trained: Trained, browser: Any
) -> None:
    runs = [trained(*words, "report=true") for words in (MLP, LINE)]
    assert mnist_cli("report", f"run={runs[0]},{trained(*SOFTMAX)}", "out=.").code == 0
    pages = [*(run / "report.html" for run in runs), Path("compare.html").absolute()]
    for width in (360, 1200):
        assert_asks_for_nothing(browser, pages, width)


def test_the_pages_of_the_readme_are_small() -> None:
    for path in (ROOT / "docs").glob("*.png"):
        assert path.stat().st_size < 150_000, path
