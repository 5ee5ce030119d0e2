"""The page of a sweep shows what its leaderboard says, loads nothing, and never fails a sweep."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Program
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import EVIL, assert_asks_for_nothing, assert_loads_nothing, parsed, text_of

from mnist_cli.report import sweep_axes, sweep_page, sweep_plots, sweep_record
from mnist_cli.report.sweep_axes import Dot
from mnist_cli.report.sweep_plots import Ending
from mnist_cli.sweep import leaderboard

pytestmark = pytest.mark.usefixtures("empty_cwd")

SVG = "{http://www.w3.org/2000/svg}"
Swept = Callable[[str], Path]
MLP = ("dataset=digits", "model=mlp", "model.hidden=[16]", "epochs=2")
LINE = (
    "dataset=linear", "model=linear", "loss=mse", "dataset.num_samples=200", "epochs=3",
    "dataset.val_fraction=0.2",
)  # fmt: skip
OPTUNA = ("sweep.search=optuna", "sweep.sampler=grid")
SWEEPS: dict[str, tuple[str, ...]] = {
    "grid": (*MLP, "optim=adam,sgd", "optim.lr=0.1,0.001", "seed=0,1"),
    "alone": MLP,
    "seeds": (*MLP, "seed=0,1,2"),
    "line": (*LINE, "optim=sgd,adam", "optim.lr=0.1,0.01,1e30"),
    "failed": (*LINE, "optim=sgd", "optim.lr=1e30,1e31"),
    "blind": (*MLP, "optim=adam,sgd", "dataset.val_fraction=0"),
    "search": (*MLP, *OPTUNA, "epochs=4", "optim.lr=0.1,0.05,0.02,0.01,1e-7,1e-8,1e-9,1e-10",
               "optim=adam,sgd", "sweep.pruner=median", "sweep.trials=16"),
    "front": (*MLP, *OPTUNA, "model.hidden=[4],[8],[16],[32]", "optim.lr=0.05,0.001",
              "sweep.objectives=[val_accuracy,num_params,val_loss]"),
}  # fmt: skip


@pytest.fixture(scope="session")
def swept(mnist_cli: Program, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """Gives the folder of one of `SWEEPS`; run once, so don't write to it."""
    folders: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in folders:
            folder = tmp_path_factory.mktemp(name) / "sweep"
            outcome = mnist_cli("train", "-m", *SWEEPS[name], f"out={folder}", "--quiet")
            assert outcome.code == (1 if name in ("line", "failed") else 0), outcome
            folders[name] = folder
        return folders[name]

    return folder_of


def board_of(sweep: Path) -> dict[str, Any]:
    board: dict[str, Any] = json.loads((sweep / "leaderboard.json").read_text())
    return board


def copy_of(sweep: Path) -> Path:
    return Path(shutil.copytree(sweep, "copy"))


def table_of(path: Path, kind: str = "board") -> list[list[str]]:
    """The texts of the cells of the table of this class."""
    (table,) = [e for e in parsed(path).iter("table") if kind in (e.get("class") or "").split()]
    return [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")]


def number(value: float | None, metric: str) -> str:
    """A value as the page has it, written down a second time."""
    if value is None:
        return ""
    if "accuracy" in metric:
        return f"{100 * value:.2f}%"
    return f"{value:.4f}" if value == 0 or 0.001 <= value < 1e6 else f"{value:.2e}"


# --- what it shows -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SWEEPS)
def test_the_page_shows_the_leaderboard(swept: Swept, name: str) -> None:
    sweep = swept(name)
    path, board = sweep / "report.html", board_of(sweep)
    assert_loads_nothing(path)
    head, *rows = table_of(path)
    assert head[1 : 1 + len(board["columns"])] == board["columns"]
    assert len(rows) == len(board["rows"]) > 0
    for cells, row in zip(rows, board["rows"], strict=True):
        assert cells[0].split()[0] == str(row["rank"] or "-")
        assert ("winner" in cells[0]) == (row == board["winner"])
        assert cells[-4] == str(row["n"] or row["state"])
        metric = row["metric"] or "val_accuracy"
        for cell, mean, std in ((cells[-3], "mean", "std"), (cells[-2], "test_mean", "test_std")):
            kind = metric if mean == "mean" else row["test_metric"] or ""
            assert number(row[mean], kind) in cell and number(row[std], kind) in cell
    text = text_of(path)
    for failed in (job for row in board["rows"] for job in row["failed"]):
        assert failed["job"] in text and (failed["error"] or "cut off") in text
    if board["winner"] is None:
        assert "There is no winner" in text and board["ranked_by"] in text
    else:
        assert board["winner"]["command"] in text
        assert number(board["winner"]["mean"], board["winner"]["metric"]) in text


DRAWN = {  # how many drawings, and headings
    "grid": (5, {"All at once", "What each key does", "How they learned"}),
    "alone": (2, {"How they learned"}),
    "seeds": (2, {"How they learned"}),
    "line": (5, {"All at once", "What each key does", "How they learned"}),
    "failed": (0, set()),
    "blind": (1, {"How they learned"}),
    "search": (6, {"The search", "All at once", "What each key does", "How they learned"}),
    "front": (7, {"The search", "All at once", "What each key does", "How they learned"}),
}


@pytest.mark.parametrize("name", DRAWN)
def test_there_is_a_drawing_of_all_that_can_be_drawn(swept: Swept, name: str) -> None:
    tree = parsed(swept(name) / "report.html")
    drawings = list(tree.iter(f"{SVG}svg"))
    headings = {"".join(e.itertext()).strip() for e in tree.iter("h2")}
    assert (len(drawings), headings - {"Leaderboard"}) == DRAWN[name]
    for drawing in drawings:
        assert any(True for _ in drawing.iter(f"{SVG}path"))


def test_a_drawing_tells_the_medians_of_a_key(swept: Swept) -> None:
    sweep = swept("grid")
    means = [r["mean"] for r in board_of(sweep)["rows"] if r["config"]["optim"] == "sgd"]
    drawings = parsed(sweep / "report.html").iter(f"{SVG}svg")
    labels = [drawing.get("aria-label") for drawing in drawings]
    (label,) = (label for label in labels if label and "by optim. " in label)
    assert f"sgd: {100 * sum(means) / 2:.2f}%" in label


def test_a_search_shows_what_optuna_says(swept: Swept) -> None:
    board = board_of(swept("search"))
    shares = table_of(swept("search") / "report.html", "shares")
    assert board["importance"]
    assert [[row[0], row[2]] for row in shares] == [
        [key, f"{100 * share:.1f}%"] for key, share in board["importance"].items()
    ]
    pruned = sum(trial["state"] == "pruned" for trial in board["history"])
    assert pruned > 0 and f"Given up {pruned}" in text_of(swept("search") / "report.html")


def test_several_objectives_show_their_front(swept: Swept) -> None:
    board = board_of(swept("front"))
    text = text_of(swept("front") / "report.html")
    assert "val_accuracy over num_params" in text and "val_accuracy over val_loss" in text
    assert len(board["pareto"]) > 1
    for point in board["pareto"]:
        values = point["values"]
        row = f"{values['val_accuracy']:.2%} {values['num_params']:,.0f} {values['val_loss']:.4f}"
        assert row.replace(" ", "") in text.replace(" ", "")


def test_a_large_sweep_stays_small() -> None:
    sweep = Path("sweep")
    for place in range(150):
        leave(sweep, f"j{place}", {"optim.lr": 10 ** (-place / 30), "epochs": place}, place / 150)
        rows = "".join(f"{epoch},{epoch / 400},{1 / epoch}\n" for epoch in range(1, 400))
        text = f"epoch,val_accuracy,train_loss\n{rows}"
        (sweep / f"j{place}" / "metrics.csv").write_text(text)
    leaderboard.write(sweep, leaderboard.build(sweep))
    Path("page").mkdir()
    path = Path("page/report.html")
    path.write_text(sweep_page.render(sweep_record.load(sweep)))
    assert_loads_nothing(path)
    assert path.stat().st_size < 1_500_000
    assert len(table_of(path)) == 1 + sweep_page.MAX_ROWS
    text = text_of(path)
    assert "And 50 more in leaderboard.csv" in text
    assert f"The first {sweep_page.MAX_CURVES} of 150 configurations" in text


# --- when it is drawn ----------------------------------------------------------------------------


def test_the_command_draws_the_same_page_again(mnist_cli: Program, swept: Swept) -> None:
    sweep = swept("grid")
    before = (sweep / "report.html").read_bytes()
    outcome = mnist_cli("report", f"run={sweep}", "out=elsewhere/deep", "--json")
    found = json.loads(outcome.stdout)
    assert outcome.code == 0
    assert Path("elsewhere/deep/report.html").read_bytes() == before
    runs = {str(sweep / job) for row in board_of(sweep)["rows"] for job in row["jobs"]}
    assert set(found.pop("runs")) == runs
    assert found == {
        "path": "elsewhere/deep/report.html", "bytes": len(before), "sweep_dir": str(sweep),
    }  # fmt: skip
    copy = copy_of(sweep)
    (copy / "report.html").unlink()
    assert mnist_cli("report", f"run={copy}", "--quiet") == (0, "", "")
    assert text_of(copy / "report.html") == text_of(sweep / "report.html").replace(
        str(sweep), "copy"
    )


def test_it_is_drawn_after_the_winner_was_told(mnist_cli: Program) -> None:
    outcome = mnist_cli("train", "-m", *LINE, "epochs=1", "optim.lr=0.1,0.01", "out=a")
    assert outcome.code == 0
    *_, repeat, sweep, report = outcome.stdout.splitlines()
    assert repeat.startswith("repeat ") and sweep == "sweep    a"
    assert report == "report   a/report.html"


@pytest.mark.parametrize(("lr", "code"), [("0.1", 0), ("1e30", 1)])
def test_a_page_that_cant_be_written_is_a_warning(mnist_cli: Program, lr: str, code: int) -> None:
    Path("a/report.html/in the way").mkdir(parents=True)
    words = (*LINE, "optim=sgd", f"optim.lr={lr}", "out=a", "--json")
    outcome = mnist_cli("train", "-m", *words)
    assert outcome.code == code
    assert json.loads(outcome.stdout)["leaderboard"] == board_of(Path("a"))["rows"]
    assert "warning: no report was drawn: can't write a/report.html" in outcome.stderr
    assert outcome.stderr.endswith("type mnist-cli report run=a\n")


def test_a_sweep_that_has_not_ended_can_be_looked_at(mnist_cli: Program, swept: Swept) -> None:
    copy = copy_of(swept("search"))
    (copy / "leaderboard.json").unlink()
    (copy / "report.html").unlink()
    assert mnist_cli("report", f"run={copy}", "--quiet") == (0, "", "")
    assert table_of(copy / "report.html") == table_of(swept("search") / "report.html")
    assert "The search" not in text_of(copy / "report.html")


def test_drawing_needs_no_torch(swept: Swept) -> None:
    code = (
        "import sys; from pathlib import Path; from mnist_cli.console import Console;"
        "from mnist_cli.report import draw_sweep; draw_sweep(Path('copy'), Console(quiet=True));"
        "from mnist_cli.cli import main; code = main(['report', 'run=copy', 'out=again', '-q']);"
        "sys.exit(code or bool({'torch', 'optuna'} & set(sys.modules)))"
    )
    copy = copy_of(swept("search"))
    (copy / "report.html").unlink()
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert (copy / "report.html").exists() and Path("again/report.html").exists()


# --- folders from anybody ------------------------------------------------------------------------


def leave(sweep: Path, name: str, config: dict[str, Any], value: float) -> None:
    """A run folder as a launcher may have left it."""
    folder = sweep / name
    folder.mkdir(parents=True)
    words = " ".join(f"{key}={value}" for key, value in config.items())
    (folder / "overrides.txt").write_text(f"mnist-cli train {words}\n")
    result = {
        "status": "completed", "config_hash": name, "seed": 0,
        "best": {"epoch": 1, "step": 1, "monitor": "val_accuracy", "value": value},
        "test": {"accuracy": 0.5}, "time": {"train_s": 1.0},
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))


def changed(sweep: Path, **values: Any) -> Path:
    """A copy of `sweep` with other values in its leaderboard.json; `rows__0__n` goes deeper."""
    folder = copy_of(sweep)
    board = board_of(folder)
    for key, value in values.items():
        *parents, leaf = (int(part) if part.isdecimal() else part for part in key.split("__"))
        target: Any = board
        for parent in parents:
            target = target[parent]
        target[leaf] = value
    (folder / "leaderboard.json").write_text(json.dumps(board))
    (folder / "report.html").unlink(missing_ok=True)
    return folder


def test_texts_of_a_sweep_stay_texts(mnist_cli: Program, swept: Swept) -> None:
    board = board_of(swept("search"))
    text = json.dumps(board)
    for harmless in ("optim.lr", "adam", "sgd", "tpe", "grid", "mnist-cli", "by mean"):
        text = text.replace(harmless, json.dumps(f"{EVIL}{harmless}")[1:-1])
    board = json.loads(text)
    board["rows"][3]["failed"] = [{"job": EVIL, "state": EVIL, "error": EVIL}]
    board["rows"][1]["jobs"] = [EVIL]
    folder = copy_of(swept("search")).rename("<b>$&'")
    (folder / "leaderboard.json").write_text(json.dumps(board))
    assert mnist_cli("report", f"run={folder}").code == 0
    assert_loads_nothing(folder / "report.html")
    shown = text_of(folder / "report.html")
    assert f"{EVIL}optim.lr" in shown and f"{EVIL}sgd" in shown and str(folder) in shown
    assert "49" not in shown.replace(EVIL, "")[:200]


def mutations() -> Iterator[Any]:
    yield "empty", "{}"
    yield "a list", "[1]"
    yield "twice", '{"rows": [], "rows": []}'
    yield "deep", "[" * 100_000
    yield "nan", '{"columns": [], "ranked_by": "", "rows": NaN}'
    for key, value in {
        "columns": "optim",
        "columns__0": 1,
        "rows": {},
        "rows__0__rank": -1,
        "rows__0__n": "many",
        "rows__0__mean": 1e200,
        "rows__0__mean ": "0.5",
        "rows__0__metric": EVIL,
        "rows__0__test_metric": "speed",
        "rows__0__config": [1],
        "rows__0__config__optim": {"a": 1},
        "rows__0__config__optim ": [[1]],
        "rows__0__jobs": "job",
        "rows__0__failed": [{}],
        "objectives": {},
        "objectives ": {"speed": "maximize"},
        "objectives  ": {"val_accuracy": "sideways"},
        "importance": {"optim": "much"},
        "history": [{"trial": 0, "state": "complete", "values": [1, 2], "job": None}],
        "pareto": [{"config": {}, "values": {"val_loss": 1}}],
    }.items():
        yield f"{key}={value}", {key.strip(): value}


@pytest.mark.parametrize("change", [pytest.param(m[1], id=m[0]) for m in mutations()])
def test_a_damaged_leaderboard_is_refused(mnist_cli: Program, swept: Swept, change: Any) -> None:
    sweep = changed(swept("search"), **(change if isinstance(change, dict) else {}))
    if isinstance(change, str):
        (sweep / "leaderboard.json").write_text(change)
    outcome = mnist_cli("report", f"run={sweep}")
    assert (outcome.code, outcome.stdout) == (4, "")
    assert outcome.error.startswith("copy/leaderboard.json can't be used: ")
    assert not (sweep / "report.html").exists()


def test_only_what_lies_in_the_folder_is_read(mnist_cli: Program, swept: Swept) -> None:
    sweep = swept("alone")
    (job,) = board_of(sweep)["rows"][0]["jobs"]
    shutil.copytree(sweep / job, "outside")
    for name in ("metrics.csv", "overrides.txt"):
        shutil.copy(sweep / job / name, ".")
    for name in ("../outside", str(Path("outside").absolute()), "..", ".", "", "a\0b", "x" * 5000):
        folder = changed(sweep, rows__0__jobs=[name])
        for path in (folder / job / "metrics.csv", folder / job / "overrides.txt"):
            path.rename(folder / path.name)
        shutil.rmtree(folder / job)
        assert mnist_cli("report", f"run={folder}", "--quiet") == (0, "", ""), name
        assert "How they learned" not in text_of(folder / "report.html")
        assert "digits" not in text_of(folder / "report.html").replace("=digits", "")
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["metrics.csv", "overrides.txt"])
def test_a_pipe_is_not_waited_for(mnist_cli: Program, swept: Swept, name: str) -> None:
    copy = copy_of(swept("alone"))
    (job,) = board_of(copy)["rows"][0]["jobs"]
    (copy / job / name).unlink()
    os.mkfifo(copy / job / name)
    assert mnist_cli("report", f"run={copy}", "--quiet") == (0, "", "")


values = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=30) | st.lists(st.integers() | st.text(max_size=3), max_size=3).map(tuple)
)  # fmt: skip
scores = st.none() | st.floats(-1e100, 1e100) | st.floats(0, 1)


@st.composite
def records(draw: st.DrawFn) -> sweep_record.SweepRecord:
    """Any sweep that passes the checks of `sweep_record.load`."""
    columns = tuple(draw(st.lists(st.text(max_size=25), max_size=3, unique=True)))
    metric = draw(st.sampled_from(["val_accuracy", "val_loss", "val_mse"]))
    has_winner = draw(st.booleans())
    rows = []
    for place in range(draw(st.integers(0, 6))):
        is_done = has_winner and (place == 0 or draw(st.booleans()))
        row = sweep_record.Row(
            rank=place + 1 if is_done else None,
            config={key: draw(values) for key in columns},
            state=draw(st.text(max_size=9)), n=int(is_done), metric=metric if is_done else None,
            mean=draw(scores.filter(lambda score: score is not None)) if is_done else None,
            std=draw(scores), best_so_far=None if is_done else draw(scores), test_metric=None,
            test_mean=draw(scores), test_std=None, train_s=draw(st.none() | st.floats(0, 1e100)),
            jobs=(draw(st.text(max_size=9)),), failed=(), command=draw(st.none() | st.text()),
        )  # fmt: skip
        rows.append(row)
    return sweep_record.SweepRecord(Path("nowhere"), draw(st.text()), columns, tuple(rows), None)


@settings(max_examples=40, deadline=None)
@given(record=records())
def test_any_sweep_can_be_drawn(
    tmp_path_factory: pytest.TempPathFactory, record: sweep_record.SweepRecord
) -> None:
    path = tmp_path_factory.mktemp("any") / "report.html"
    path.write_bytes(sweep_page.render(record).encode("utf-8", "backslashreplace"))
    assert "Leaderboard" in path.read_text()


@pytest.mark.parametrize("least", [5e-324, 1e-300, 1e-99, 0.0])
def test_a_number_may_be_as_small_as_it_likes(least: float) -> None:
    numbers = (least, 1.0, 1e50)
    dots = [Dot(value, value, True, value == least) for value in numbers]
    assert "<svg" in sweep_plots.effect_of_choices("val_loss", dots, "")
    assert "<svg" in sweep_plots.effect_of_number("val_loss", dots, "")
    lines = [Ending("", [1, 2], [least, value], True, value == least) for value in numbers]
    assert "<svg" in sweep_plots.curves(lines, "")
    axes = [sweep_axes.axis_of_numbers("lr", numbers), sweep_axes.axis_of_scores("loss", numbers)]
    assert "<svg" in sweep_plots.parallel(axes, "")


# --- in a browser --------------------------------------------------------------------------------


def test_a_browser_asks_for_nothing_and_complains_of_nothing(swept: Swept, browser: Any) -> None:
    names = ("grid", "search", "front", "line", "failed")
    for width in (360, 1200):
        assert_asks_for_nothing(browser, [swept(name) / "report.html" for name in names], width)


# --- parallel coordinates ------------------------------------------------------------------------


def test_a_run_that_learned_nothing_leaves_the_others_their_axis() -> None:
    scores = [0.99, 0.988, 0.985, 0.981, 0.979, 0.975, 0.972, 0.11, 0.1]
    axis = sweep_axes.axis_of_scores("val_accuracy", scores)
    assert axis.places[0] == 1 and axis.places[-2:] == [0, 0]
    assert axis.places[6] == pytest.approx(1 / 9)
    assert axis.ticks[0] == (0, "≤ 11.00%")
    assert all(text[0] not in "≤≥" for _, text in axis.ticks[1:])
    losses = sweep_axes.axis_of_scores("val_mse", [0.1, 0.11, 0.12, 0.13, 0.14, 7.0])
    assert losses.places[0] == 0 and losses.places[-1] == 1
    assert losses.ticks[0] == (1, "≥ 7.0000")


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30))
def test_places_of_scores_keep_their_order_and_the_winner_its_own(scores: list[float]) -> None:
    axis = sweep_axes.axis_of_scores("val_loss", scores)
    placed = [place for _, place in sorted(zip(scores, axis.places, strict=True))]
    assert placed == sorted(placed)
    assert all(0 <= place <= 1 for place in placed)
    for place, text in axis.ticks:
        if text[0] in "≤≥":
            assert place in (0, 1) and axis.places[0] != place
