"""Options out of other packages: the README's own package, and what isn't one."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, Program
from faults import outcome_of, two_lines

from mnist_cli import checkpoint, completion, options, train_step

RUN = ("dataset=digits", "epochs=1", "report=false", "--quiet")
MINE = ("model=tiny", "model.width=24", "optim=radam", "optim.lr=0.02", *RUN)


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def install(site: Path, files: dict[str, str]) -> None:
    """Put a package where Python finds it, as pip would; its entry points are in pyproject.toml."""
    write(site, files)
    project = tomllib.loads(files["pyproject.toml"])["project"]
    info = site / f"{project['name'].replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 1.0\n"
    )
    lines = [f"{name} = {value}" for name, value in project["entry-points"]["mnist_cli"].items()]
    (info / "entry_points.txt").write_text("\n".join(["[mnist_cli]", *lines, ""]))


def package(name: str, module: str, *options: str, text: str | None = None) -> dict[str, str]:
    """The files of a package with one module; `options` are those with a YAML file (group/name)."""
    entry = f'[project]\nname = "{name}"\n[project.entry-points.mnist_cli]\n{name} = "{module}"\n'
    files = {"pyproject.toml": entry}
    if text is not None:
        files[f"{module.replace('.', '/')}.py"] = text
    for option in options:
        files[f"{module.rpartition('.')[0]}/conf/{option}.yaml"] = f"name: {Path(option).name}\n"
    return files


def readme_package() -> dict[str, str]:
    """The files that the README shows."""
    section = (ROOT / "README.md").read_text().split("## Extend it without touching it")[1]
    found = re.findall(
        r"^`([\w./]+)`\n\n((?:    .*\n|\n)+)", section.split("\n## ")[0], re.MULTILINE
    )
    return {name: textwrap.dedent(text) for name, text in found}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder where Python looks for packages; what is imported from it is forgotten."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        module = sys.modules[name]
        places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
        if any(str(place).startswith(str(folder)) for place in places):
            del sys.modules[name]
    options.PLUGINS.clear()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip would install of the README's package; built without a network."""
    folder = tmp_path_factory.mktemp("my-package")
    write(folder, readme_package())
    code = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)
    (built,) = (folder / "dist").iterdir()
    return built


@pytest.fixture
def mine(site: Path, wheel: Path) -> Path:
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
    return site


@pytest.fixture
def is_imported(mine: Path) -> Callable[[], bool]:
    return lambda: "my_package" in sys.modules or "my_package.mnist" in sys.modules


def forget() -> None:
    for name in ("my_package", "my_package.mnist"):
        sys.modules.pop(name, None)


def test_the_package_of_the_readme_trains_evaluates_and_exports(
    mnist_cli: Program, is_imported: Callable[[], bool], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert mnist_cli("train", "plugin=my_models", *MINE, f"out={run}") == (0, "", "")
    found = json.loads((run / "result.json").read_text())
    assert found["model"] == {"name": "tiny", "num_params": 64 * 24 + 24 + 24 * 10 + 10}
    assert found["test"]["accuracy"] > 0.5
    assert "'plugin=[my_models]'" in (run / "overrides.txt").read_text()
    for command in ("eval", "export"):
        forget()
        refused = mnist_cli(command, f"checkpoint={run}")
        error, hint = two_lines(refused.stderr)
        assert (refused.code, is_imported()) == (2, False)
        assert "needs the plugin 'my_models'" in error and "type plugin=my_models" in hint
    measured = mnist_cli("eval", f"checkpoint={run}", "plugin=my_models", "--json", "--quiet")
    assert json.loads(measured.stdout)["metrics"] == found["test"]
    words = (f"checkpoint={run}", "plugin=[my_models]", "format=onnx", "--json", "--quiet")
    exported = json.loads(mnist_cli("export", *words).stdout)
    assert exported["parity"]["argmax_agreement"] == 1
    onnx = f"checkpoint={exported['path']}"
    forget()
    assert "type plugin=my_models" in mnist_cli("eval", onnx).hint and not is_imported()
    assert mnist_cli("eval", onnx, "plugin=my_models", "--quiet").code == 0


def test_a_run_is_continued_with_its_plugin_to_the_same_bits(
    mnist_cli: Program, is_imported: Callable[[], bool], tmp_path: Path
) -> None:
    words = ("train", "plugin=my_models", *MINE)
    one, two = tmp_path / "one", tmp_path / "two"
    assert mnist_cli(*words, "epochs=2", f"out={one}").code == 0
    assert mnist_cli(*words, f"out={two}").code == 0
    forget()
    refused = mnist_cli("train", f"resume={two}", "epochs=2")
    assert (refused.code, is_imported()) == (2, False)
    assert two_lines(refused.stderr)[1].endswith("type plugin=my_models")
    assert mnist_cli("train", f"resume={two}", "epochs=2", "plugin=my_models", "--quiet").code == 0
    assert outcome_of(one) == outcome_of(two)


def test_what_is_printed_to_type_next_names_the_plugin(
    mnist_cli: Program, mine: Path, tmp_path: Path
) -> None:
    words = ("train", "plugin=my_models", "model=tiny", "dataset=digits", "epochs=1")
    said = mnist_cli(*words, f"out={tmp_path / 'run'}").stdout.splitlines()
    following = next(line for line in said if "mnist-cli eval" in line).split()[-2:]
    assert following == [f"checkpoint={tmp_path / 'run'}", "plugin=my_models"]
    assert mnist_cli("eval", *following).code == 0


def test_a_process_that_has_loaded_the_compiler_ends_in_silence(mine: Path, tmp_path: Path) -> None:
    """The optimizer of a plugin loads it, and triton, before the report is drawn."""
    code = (
        "import sys; from mnist_cli.__main__ import program; code = program();"
        " assert 'torch._dynamo' in sys.modules and 'matplotlib' in sys.modules; sys.exit(code)"
    )
    words = ("train", "plugin=my_models", *MINE, "report=true", f"out={tmp_path / 'run'}")
    path = os.pathsep.join([str(mine), str(ROOT)])
    ended = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_a_sweep_runs_on_options_of_a_plugin(
    mnist_cli: Program, mine: Path, tmp_path: Path
) -> None:
    words = ("train", "-m", "plugin=my_models", "model=tiny,mlp", *RUN, "optim=radam", "--json")
    ended = mnist_cli(*words, f"out={tmp_path / 'sweep'}")
    jobs = json.loads(ended.stdout)["jobs"]
    assert [job["model"]["name"] for job in jobs] == ["tiny", "mlp"]


# --- what imports, and what doesn't --------------------------------------------------------------


def test_help_list_and_completion_know_the_options_without_an_import(
    mnist_cli: Program, is_imported: Callable[[], bool]
) -> None:
    for words in (("train", "--help"), ("list",), ("list", "model")):
        assert "One hidden layer with tanh" not in mnist_cli(*words).stdout
        assert "One hidden layer with tanh" in mnist_cli(*words, "plugin=my_models").stdout
    assert (
        "width: 32" in mnist_cli("train", "--cfg", "job", "plugin=my_models", "model=tiny").stdout
    )
    typed = ["train", "plugin=my_models"]
    assert completion.complete(["train"], "plugin=") == ["plugin=my_models"]
    assert completion.complete(typed, "model=t") == ["model=tiny"]
    assert completion.complete([*typed, "model=tiny"], "model.w") == ["model.width="]
    assert completion.complete(["train", "plugin=other"], "model=t") == []
    assert completion.complete(["eval", "plugin=my_models"], "split=v") == ["split=val"]
    assert not is_imported()


def test_options_are_unknown_again_on_the_next_line(mnist_cli: Program, mine: Path) -> None:
    assert mnist_cli("train", "plugin=my_models", "model=tiny", "epochs=0").hint == (
        "epochs must be at least 1 and at most 1,000,000,000"
    )
    assert "there is no model 'tiny'" in mnist_cli("train", "model=tiny").error
    assert mnist_cli("train", "epochs=0").code == 2
    assert options.PLUGINS == {}


def test_a_configuration_file_can_name_a_plugin_but_not_load_it(
    mnist_cli: Program, is_imported: Callable[[], bool], tmp_path: Path
) -> None:
    (tmp_path / "experiment").mkdir()
    recipe = "# @package _global_\nplugin: [my_models]\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(recipe)
    ended = mnist_cli("train", "--config-dir", str(tmp_path), "+experiment=mine")
    assert (ended.code, is_imported()) == (2, False)
    assert two_lines(ended.stderr)[1].endswith("type plugin=my_models")


def test_a_hostile_checkpoint_names_a_plugin_in_vain(
    mnist_cli: Program,
    is_imported: Callable[[], bool],
    trained: Callable[..., Path],
    tmp_path: Path,
) -> None:
    plain = trained(*RUN, "model=linear")
    before = checkpoint.load(plain / "best.safetensors")
    for plugins, code in ((("my_models",), 2), (("os",), 2), (("x; rm",), 4), (("",), 4)):
        changed = dataclasses.replace(before.config, plugin=plugins)
        path = tmp_path / "hostile.safetensors"
        checkpoint.save(path, dataclasses.replace(before, config=changed))
        for command in ("eval", "export"):
            ended = mnist_cli(command, f"checkpoint={path}")
            two_lines(ended.stderr)
            assert (ended.code, is_imported()) == (code, False)


def test_a_key_out_of_range_is_refused_as_any_other(mnist_cli: Program, mine: Path) -> None:
    ended = mnist_cli("train", "plugin=my_models", "model=tiny", "model.width=0")
    assert ended.code == 2 and "model.width=0 is out of range" in ended.error
    ended = mnist_cli("train", "plugin=my_models", "model=tiny", "model.widht=3")
    assert (ended.code, ended.hint) == (2, "did you mean model.width=...?")


# --- what is no plugin ---------------------------------------------------------------------------


def test_an_unknown_name_is_answered_with_the_nearest(mnist_cli: Program, mine: Path) -> None:
    install(mine, package("other", "other.options", "model/x", text="OPTIONS = ()"))
    for words in (("train",), ("train", "--help"), ("list",), ("eval", "checkpoint=x")):
        ended = mnist_cli(*words, "plugin=my_model")
        assert (ended.code, ended.error) == (2, "there is no plugin 'my_model'")
        assert ended.hint.startswith("installed: my_models, other; to add one, pip install ")


HEAD = """
from dataclasses import dataclass
from typing import Literal
from mnist_cli.options import *
"""
LINEAR = """
@dataclass(frozen=True, kw_only=True)
class Mine(PluginModelConfig):
    name: Literal["linear"]
    def build(self, input_shape, num_outputs): ...
OPTIONS = (Mine,)
"""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "there is no module broken.options"),
        ("import nothing_like_it", "No module named 'nothing_like_it'"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("raise ValueError('one\\ntwo')", r"ValueError: one\ntwo"),
        ("def f(:", "SyntaxError"),
        ("", "has no attribute 'OPTIONS'"),
        ("OPTIONS = 3", "TypeError"),
        ("OPTIONS = (int,)", "OPTIONS must hold dataclasses"),
        (f"{HEAD}OPTIONS = (PluginModelConfig,)", "OPTIONS must hold dataclasses"),
        (f"{HEAD}OPTIONS = (CnnConfig,)", "OPTIONS must hold dataclasses"),
        (f"{HEAD}{LINEAR}".replace("build", "biuld"), "Mine has no build()"),
        (f"{HEAD}{LINEAR}", "model=linear is an option already"),
        (HEAD + LINEAR.replace("linear", "lone"), "there is no file"),
        (HEAD + LINEAR.replace("linear", "tiny").replace("(Mine,)", "(Mine, Mine)"), "already"),
    ],
)
def test_a_plugin_that_is_none_ends_in_one_line(
    mnist_cli: Program, site: Path, text: str | None, reason: str
) -> None:
    install(site, package("broken", "broken.options", "model/tiny", "model/linear", text=text))
    ended = mnist_cli("train", "plugin=broken")
    error, _ = two_lines(ended.stderr)
    assert ended.code == 2
    assert "plugin 'broken' (broken.options) can't be used" in error and reason in error


ODD = (
    HEAD
    + """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, input_shape, num_outputs):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(SHAPE), requires_grad=IS_TRAINED)
        self.output = nn.Linear(64, num_outputs)
    def forward(self, inputs):
        return self.output(inputs.flatten(1)) * (self.scale.mean() if USED else 1.0)

@dataclass(frozen=True, kw_only=True)
class Odd(PluginModelConfig):
    name: Literal["odd"]
    def build(self, input_shape, num_outputs):
        return Net(input_shape, num_outputs)

OPTIONS = [Odd]
"""
)


@pytest.mark.parametrize(
    ("shape", "is_used", "is_trained"), [("1", True, False), ("16, 8", False, True)]
)
def test_a_model_may_have_weights_that_are_not_trained_nor_over_pixels(
    mnist_cli: Program, site: Path, tmp_path: Path, shape: str, is_used: bool, is_trained: bool
) -> None:
    text = ODD.replace("SHAPE", shape).replace("USED", str(is_used))
    text = text.replace("IS_TRAINED", str(is_trained))
    install(site, package("odd", "odd.options", "model/odd", text=text))
    words = ("plugin=odd", "model=odd", "dataset=digits", "epochs=2", f"out={tmp_path / 'run'}")
    ended = mnist_cli("train", *words)
    assert (ended.code, ended.stderr) == (0, "")
    assert (tmp_path / "run" / "report.html").exists()
    whole = checkpoint.load(tmp_path / "run" / "last.safetensors")
    assert {name.partition(".")[0] for name in whole.optim} == {"output"}
    resumed = mnist_cli("train", "plugin=odd", f"resume={tmp_path / 'run'}", "epochs=3", "--quiet")
    assert (resumed.code, resumed.stderr) == (0, "")


DAMPED = (
    HEAD
    + """
import torch

@dataclass(frozen=True, kw_only=True)
class Damped(PluginOptimConfig):
    name: Literal["damped"]
    def build(self, params):
        return torch.optim.SGD(params, lr=self.lr, momentum=0.9, dampening=0.5)

OPTIONS = [Damped]
"""
)


def test_an_optimizer_is_given_no_state_that_it_did_not_leave(
    mnist_cli: Program, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first step may be another than one from zeros; here the run was killed before it."""
    files = package("damped", "damped.options", "optim/damped", text=DAMPED)
    files["damped/conf/optim/damped.yaml"] += "lr: 0.1\n"
    install(site, files)

    def killed(*arguments: object) -> float:
        raise KeyboardInterrupt

    words = ("plugin=damped", "optim=damped", "model=linear", *RUN)
    assert mnist_cli("train", *words, f"out={tmp_path / 'whole'}").code == 0
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_step, "take_step", killed)
        mnist_cli("train", *words, f"out={tmp_path / 'cut'}")
    resumed = mnist_cli("train", "plugin=damped", f"resume={tmp_path / 'cut'}", "--quiet")
    assert (resumed.code, resumed.stderr) == (0, "")
    assert outcome_of(tmp_path / "cut") == outcome_of(tmp_path / "whole")


def test_two_plugins_may_not_have_the_same_option_or_name(mnist_cli: Program, mine: Path) -> None:
    text = HEAD + LINEAR.replace("linear", "tiny")
    install(mine, package("twin", "twin.options", "model/tiny", text=text))
    ended = mnist_cli("train", "plugin=[my_models,twin]")
    assert ended.code == 2 and "model=tiny is an option already" in ended.error
    files = package("third", "third.options", "model/tiny", text=text)
    files["pyproject.toml"] = files["pyproject.toml"].replace("third = ", "twin = ")
    install(mine, files)
    assert "several packages have a plugin 'twin'" in mnist_cli("train", "plugin=twin").error


# --- the other groups ----------------------------------------------------------------------------

ALL = (
    HEAD
    + """
import torch
from mnist_cli.errors import UsageError

@dataclass(frozen=True, kw_only=True)
class Huber(PluginLossConfig):
    name: Literal["huber"]
    def build(self, task):
        if task != "regression":
            raise UsageError("loss=huber compares numbers", "type loss=cross_entropy")
        return torch.nn.functional.huber_loss

@dataclass(frozen=True, kw_only=True)
class Halves(PluginScheduleConfig):
    name: Literal["halves"]
    def factor(self, step, steps_per_epoch, total_steps):
        return 1.0 if 2 * step < total_steps else 0.5

@dataclass(frozen=True, kw_only=True)
class Stripes(PluginDatasetConfig):
    name: Literal["stripes"]
    damage: Literal["none", "labels"]
    def classes(self):
        return ("flat", "upright")
    def load(self):
        images = torch.zeros(200, 1, 8, 8, dtype=torch.uint8)
        labels = torch.arange(200, dtype=torch.uint8) % 2
        images[labels == 0, :, ::2] = 255
        images[labels == 1, :, :, ::2] = 255
        if self.damage == "labels":
            labels = labels * 3
        return images, labels, images[:50], labels[:50]

@dataclass(frozen=True, kw_only=True)
class Factored(PluginOptimConfig):
    name: Literal["factored"]
    def build(self, params):
        return torch.optim.Adafactor(params, lr=self.lr)

OPTIONS = [Huber, Halves, Stripes, Factored]
"""
)


@pytest.fixture
def all_groups(site: Path) -> Path:
    names = ("loss/huber", "schedule/halves", "dataset/stripes", "optim/factored")
    files = package("all", "all_groups.options", *names, text=ALL)
    files["all_groups/conf/schedule/halves.yaml"] += "warmup_epochs: 0.0\n"
    files["all_groups/conf/dataset/stripes.yaml"] += "val_fraction: 0.1\ndamage: none\n"
    files["all_groups/conf/optim/factored.yaml"] += "lr: 0.1\n"
    install(site, files)
    return site


def test_a_dataset_and_a_schedule_of_a_plugin(
    mnist_cli: Program, all_groups: Path, tmp_path: Path
) -> None:
    words = ("plugin=all", "model=linear", "dataset=stripes", "schedule=halves")
    assert mnist_cli("train", *words, "epochs=2", f"out={tmp_path / 'a'}", "--quiet").code == 0
    measured = mnist_cli("eval", "plugin=all", f"checkpoint={tmp_path / 'a'}", "--json")
    assert json.loads(measured.stdout)["metrics"]["accuracy"] == 1
    lines = (tmp_path / "a" / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[2] for line in lines[1:]] == ["0.001", "0.0005"]
    ended = mnist_cli("train", *words, "dataset.damage=labels")
    assert ended.code == 3 and "dataset=stripes gives a training set" in ended.error


def test_a_loss_of_a_plugin_may_be_for_numbers(
    mnist_cli: Program, all_groups: Path, tmp_path: Path
) -> None:
    words = ("plugin=all", "model=linear", "loss=huber", "epochs=2", "--quiet")
    assert mnist_cli("train", *words, "dataset=linear", f"out={tmp_path / 'a'}").code == 0
    assert mnist_cli("train", *words, "dataset=digits", f"out={tmp_path / 'b'}").code == 2
    assert not (tmp_path / "b").exists()


def test_an_optimizer_whose_state_no_checkpoint_holds_is_refused_at_once(
    mnist_cli: Program, all_groups: Path, tmp_path: Path
) -> None:
    words = ("plugin=all", "model=linear", "optim=factored", *RUN)
    ended = mnist_cli("train", *words, f"out={tmp_path / 'a'}")
    assert ended.code == 2 and "in another shape than its parameter's" in ended.error
    assert not (tmp_path / "a").exists()


# --- what fails --------------------------------------------------------------------------------

FAILING = (
    HEAD
    + """
import torch
from mnist_cli.errors import UsageError

@dataclass(frozen=True, kw_only=True)
class Model(PluginModelConfig):
    name: Literal["bad"]
    fails: Literal["no", "build", "refuse", "nothing", "forward", "shape"]
    def build(self, input_shape, num_outputs):
        if self.fails == "build":
            return {}[input_shape]
        if self.fails == "refuse":
            raise UsageError("model=bad is for nothing", "take another")
        if self.fails == "nothing":
            return None
        first = torch.nn.Linear(63 if self.fails == "forward" else 64, num_outputs)
        more = [torch.nn.Linear(10, 7)] if self.fails == "shape" else []
        return torch.nn.Sequential(torch.nn.Flatten(), first, *more)

@dataclass(frozen=True, kw_only=True)
class Optim(PluginOptimConfig):
    name: Literal["bad"]
    def build(self, params):
        return torch.optim.LBFGS(params, lr=self.lr)

@dataclass(frozen=True, kw_only=True)
class Loss(PluginLossConfig):
    name: Literal["bad"]
    fails: Literal["build", "call"]
    def build(self, task):
        if self.fails == "build":
            raise SystemExit(0)
        return lambda outputs, labels: outputs[0, 10].sum()

@dataclass(frozen=True, kw_only=True)
class Schedule(PluginScheduleConfig):
    name: Literal["bad"]
    fails: Literal["start", "end", "later"]
    def factor(self, step, steps_per_epoch, total_steps):
        if self.fails == "later":
            return {0: 1.0, 1: 1.0}[step]
        return 1 / step if self.fails == "start" else ([1.0] * total_steps)[step]

@dataclass(frozen=True, kw_only=True)
class Dataset(PluginDatasetConfig):
    name: Literal["bad"]
    def classes(self):
        return ("a", "b")
    def load(self):
        return open("/nothing/there").read()

OPTIONS = [Model, Optim, Loss, Schedule, Dataset]
"""
)


@pytest.fixture
def failing(site: Path) -> Path:
    """The file of a plugin of which each option fails."""
    names = [f"{group}/bad" for group in ("model", "optim", "loss", "schedule", "dataset")]
    files = package("bad", "bad.options", *names, text=FAILING)
    files["bad/conf/model/bad.yaml"] += "fails: 'no'\n"
    files["bad/conf/optim/bad.yaml"] += "lr: 0.1\n"
    files["bad/conf/loss/bad.yaml"] += "fails: build\n"
    files["bad/conf/schedule/bad.yaml"] += "warmup_epochs: 0.0\nfails: start\n"
    files["bad/conf/dataset/bad.yaml"] += "val_fraction: 0.1\n"
    install(site, files)
    return site / "bad" / "options.py"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("model=bad model.fails=build", "build model=bad: KeyError: (1, 8, 8)"),
        ("model=bad model.fails=nothing", "build model=bad: TypeError: build() gave None"),
        ("model=bad model.fails=forward", "answer with model=bad: RuntimeError: "),
        ("optim=bad", "build optim=bad: TypeError: "),
        ("loss=bad", "build loss=bad: SystemExit: 0"),
        ("loss=bad loss.fails=call", "compute loss=bad: IndexError: "),
        ("schedule=bad", "compute schedule=bad: ZeroDivisionError: division by zero"),
        ("dataset=bad", "load dataset=bad: FileNotFoundError: "),
    ],
)
def test_what_fails_in_a_plugin_names_it_and_leaves_nothing(
    mnist_cli: Program, failing: Path, tmp_path: Path, words: str, reason: str
) -> None:
    line = ("plugin=bad", "model=linear", *RUN, *words.split(), f"out={tmp_path / 'run'}")
    ended = mnist_cli("train", *line)
    error, hint = two_lines(ended.stderr)
    assert ended.code == 2
    assert f"the plugin 'bad' failed to {reason}" in error
    assert str(failing) in hint
    assert not (tmp_path / "run").exists()


def test_a_schedule_is_not_asked_for_a_step_behind_its_last(
    mnist_cli: Program, failing: Path, tmp_path: Path
) -> None:
    words = ("plugin=bad", "model=linear", "schedule=bad", "schedule.fails=end", *RUN)
    run = tmp_path / "run"
    assert mnist_cli("train", *words, f"out={run}").code == 0
    (run / "result.json").unlink()  # as a kill before its end would have left it
    ended = mnist_cli("train", "plugin=bad", f"resume={run}")
    assert ended.code == 0, ended.stderr
    assert (run / "result.json").exists()


def test_the_place_in_the_plugin_is_named(mnist_cli: Program, failing: Path) -> None:
    ended = mnist_cli("train", "plugin=bad", "model=bad", "model.fails=build", *RUN)
    line = 1 + FAILING.splitlines().index("            return {}[input_shape]")
    assert f"mend line {line} of {failing}, " in ended.hint


@pytest.mark.parametrize("fused", ["false", "true"])
def test_what_fails_in_a_plugin_only_after_some_steps_names_it_too(
    mnist_cli: Program, failing: Path, tmp_path: Path, fused: str
) -> None:
    run, sweep = tmp_path / "run", tmp_path / "sweep"
    words = ("plugin=bad", "model=linear", "schedule=bad", "schedule.fails=later", *RUN)
    ended = mnist_cli("train", *words, f"out={run}")
    line = 1 + FAILING.splitlines().index("            return {0: 1.0, 1: 1.0}[step]")
    message = "the plugin 'bad' failed: KeyError: 2"
    hint = f"mend line {line} of {failing}, update its package, or leave it out"
    assert ended[::2] == (2, f"error: {message}\nhint: {hint}\n")
    assert json.loads((run / "result.json").read_text())["error"] == message
    ended = mnist_cli(
        "train", "-m", *words, "optim.lr=0.1,0.2", f"sweep.fused={fused}", f"out={sweep}"
    )
    assert ended.code == 1
    results = [json.loads(path.read_text()) for path in sweep.glob("*/result.json")]
    assert [result["error"] for result in results] == [message] * 2
    assert all("Traceback" in path.read_text() for path in sweep.glob("*/train.log"))


def test_what_a_plugin_refuses_is_said_in_its_words(mnist_cli: Program, failing: Path) -> None:
    ended = mnist_cli("train", "plugin=bad", "model=bad", "model.fails=refuse", *RUN)
    assert ended[::2] == (2, "error: model=bad is for nothing\nhint: take another\n")
    ended = mnist_cli("train", "plugin=bad", "model=bad", "model.fails=shape", *RUN)
    assert ended.code == 2
    assert "gives outputs of shape (64, 7) for 64 samples, not (64, 10)" in ended.error


def test_a_job_that_fails_in_a_plugin_keeps_the_traceback_in_its_log(
    mnist_cli: Program, failing: Path, tmp_path: Path
) -> None:
    words = ("model=bad", "model.fails=no,build", *RUN, f"out={tmp_path / 'sweep'}")
    assert mnist_cli("train", "-m", "plugin=bad", *words).code == 1
    [log] = (tmp_path / "sweep").glob("*build*/train.log")
    assert "Traceback" in log.read_text() and "return {}[input_shape]" in log.read_text()


def test_a_checkpoint_whose_plugin_fails_by_now_is_not_called_damaged(
    mnist_cli: Program, failing: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert mnist_cli("train", "plugin=bad", "model=bad", *RUN, f"out={run}").code == 0
    failing.write_text(FAILING.replace("if self.fails ==", "if self.fails < 3 and self.fails =="))
    for name in ("bad", "bad.options"):
        sys.modules.pop(name, None)
    ended = mnist_cli("eval", "plugin=bad", f"checkpoint={run}")
    assert (
        ended.code == 2 and "the plugin 'bad' failed to build model=bad: TypeError" in ended.error
    )
