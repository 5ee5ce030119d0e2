"""What the source may not do: run what is only data, or reach over a layer."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import faults
import pytest

PACKAGE = faults.ROOT / "mnist_cli"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Whole modules that turn data into code, or build objects out of names.
FORBIDDEN_MODULES = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml",
    "ruamel", "code", "codeop", "runpy",
}  # fmt: skip
FORBIDDEN_BUILTINS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ANYWHERE = {
    "instantiate", "import_module", "extractall", "unpack_archive", "popen", "get_class",
    "get_method", "get_object", "from_dotlist", "register_new_resolver", "fromfile", "loadtxt",
    "entry_points", "EntryPoint", "EntryPoints",
}  # fmt: skip
FORBIDDEN = {
    "os.system", "torch.load", "torch.jit.load", "torch.hub.load", "torch.package",
    "torch.export.load", "numpy.load", "omegaconf.OmegaConf.load", "omegaconf.OmegaConf.create",
    "omegaconf.OmegaConf.merge",
}  # fmt: skip

ALLOWED = {
    ("hydra_main.py", "omegaconf.OmegaConf.create"): "Hydra's own output of --cfg; never a file",
    ("export.py", "torch.export.load"): "the bytes that were saved a line before, to prove them",
    ("plugin.py", "importlib.metadata.EntryPoint"): "imports the plugins that were typed",
    ("plugin.py", "importlib.metadata.entry_points"): "imports the plugins that were typed",
}


def dotted(node: ast.expr) -> str:
    """`torch.jit.load` of the expression that says so, or its last name."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else node.attr
    return node.id if isinstance(node, ast.Name) else ""


def imports_of(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Every module that `tree` imports, with the names it takes out of it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def aliases_of(tree: ast.AST) -> dict[str, str]:
    """What a name of the module stands for: `import torch.jit as j` gives {j: torch.jit}."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return found


def forbidden_in(source: str, name: str) -> list[str]:
    tree = ast.parse(source)
    aliases, found = aliases_of(tree), []
    for _, module in imports_of(tree):
        if module.split(".")[0] in FORBIDDEN_MODULES:
            found.append(f"import {module}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load):
            first, _, rest = dotted(node).partition(".")
            full = ".".join(filter(None, (aliases.get(first, first), rest)))
            is_builtin = isinstance(node, ast.Name) and full in FORBIDDEN_BUILTINS
            if is_builtin or full in FORBIDDEN or full.split(".")[-1] in FORBIDDEN_ANYWHERE:
                found.append(full)
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg == "shell" and not (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                ):
                    found.append("shell=True")
                if keyword.arg in ("weights_only", "allow_pickle"):
                    found.append(f"{keyword.arg}=")
        if isinstance(node, ast.Constant) and node.value == "_target_":
            found.append("_target_")
    return [what for what in found if (name, what) not in ALLOWED]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_data_is_run(path: Path) -> None:
    assert forbidden_in(path.read_text(), str(path.relative_to(PACKAGE))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import yaml",
        "import torch\ntorch.load(path)",
        "from torch import load\nload(path)",
        "import torch as t\nt.jit.load(path)",
        "from torch import jit\njit.load(path)",
        "import torch\ntorch.export.load(path)",
        "eval(text)",
        "exec(text)",
        "from hydra.utils import instantiate\ninstantiate(config)",
        "import hydra\nhydra.utils.instantiate(config)",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "import os\nos.system(text)",
        "archive.extractall(folder)",
        "from omegaconf import OmegaConf\nOmegaConf.load(path)",
        "from omegaconf import OmegaConf as O\nO.create(text)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import importlib\nimportlib.import_module(name)",
        "load = torch.load",
        "from importlib.metadata import entry_points\nentry_points()['x'].load()",
        "from importlib import metadata as m\nm.EntryPoint('a', 'b', 'c').load()",
        "from importlib.metadata import distribution\ndistribution('x').entry_points",
    ],
)
def test_the_scan_finds_what_it_looks_for(source: str) -> None:
    assert forbidden_in(source, "x.py")


def test_every_exception_is_still_needed() -> None:
    for name, what in ALLOWED:
        assert what in forbidden_in((PACKAGE / name).read_text(), "elsewhere.py")


def test_an_entry_point_is_loaded_in_one_place_alone() -> None:
    """No other room may touch entry points, and here one line turns a name into a module."""
    tree = ast.parse((PACKAGE / "plugin.py").read_text())
    loading = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "load"]
    (register,) = (n for n in tree.body if getattr(n, "name", "") == "_register")
    assert len(loading) == 1 and loading[0] in ast.walk(register)


# --- layers --------------------------------------------------------------------------------------

# A room may import the rooms below it; of its own layer only what stands beside it.
LAYERS: dict[str, dict[str, set[str]]] = {
    "door": {
        "__main__": {"cli"},
        "cli": {"line", "help", "completion", "compose", "multirun", "hydra_main"},
        "compose": {"command", "line", "explain"}, "command": set(), "explain": {"line"},
        "multirun": {"command", "compose", "line", "explain"},
        "hydra_main": {"command", "compose", "multirun", "line", "explain"}, "line": set(),
        "help": {"line"}, "completion": {"line"},
    },
    "commands": {
        "train": {"learner", "train_step", "loop", "cuda_graph", "outcome", "logger"},
        "learner": set(), "train_step": {"learner"}, "loop": {"learner", "train_step"},
        "cuda_graph": {"learner", "train_step"}, "stacked": {"learner", "train_step", "loop"},
        "outcome": {"learner", "train_step", "loop", "logger"}, "logger": {"export"},
        "evaluate": {"trained"}, "export": {"onnx_file"}, "onnx_file": set(),
        "trained": {"onnx_file"}, "predict": {"trained"}, "demo": {"trained"},
        "sweep": {"train", "outcome", "loop", "stacked"}, "report": {"sweep"},
    },
    "records": {
        "checkpoint": set(), "run": set(), "find": {"run"}, "plugin": set(),
        "resume": {"checkpoint", "find", "run"},
    },
    "parts": {
        "dataset": set(), "model": set(), "loss": set(), "optim": set(), "schedule": set(),
        "metrics": set(), "pictures": {"dataset"}, "scoring": {"dataset", "metrics", "loss"},
    },
    "ground": {
        "__init__": set(), "conf": set(), "config": {"errors", "typed", "options"}, "errors": set(),
        "formats": set(), "cpu": set(),
        "imports": {"signals"},
        "options": {"errors", "typed"}, "plugin_code": {"errors", "options"},
        "console": {"errors"}, "runtime": {"cpu", "errors"},
        "profiler": {"console", "durable", "errors", "runtime"},
        "signals": {"errors"}, "strict_json": {"regular_file"}, "regular_file": set(),
        "seal": set(), "typed": {"errors"}, "durable": {"errors"},
    },
}  # fmt: skip
ORDER = list(LAYERS)
LAYER_OF = {room: layer for layer, rooms in LAYERS.items() for room in rooms}
HYDRA = ("compose", "explain", "hydra_main", "multirun")
TORCH_FREE = (
    *HYDRA, "cli", "command", "conf", "find", "run", "line", "help", "completion", "plugin",
    "config", "options", "typed", "errors", "formats", "cpu", "imports", "console", "signals",
    "regular_file", "strict_json",
    "sweep/__init__", "sweep/job", "sweep/each", "sweep/grid", "sweep/pool", "sweep/board",
    "sweep/display", "sweep/leaderboard", "sweep/search", "sweep/space", "sweep/study",
    "sweep/group",
    "logger/__init__", "logger/wandb",
)  # fmt: skip


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def rooms_imported(path: Path) -> set[str]:
    found = set()
    for _, module in imports_of(ast.parse(path.read_text())):
        parts = module.split(".")
        if parts[0] == "mnist_cli" and len(parts) > 1 and parts[1] in LAYER_OF:
            found.add(parts[1])
    return found - {room_of(path)}


def test_every_room_has_a_layer() -> None:
    assert {room_of(path) for path in SOURCES} <= set(LAYER_OF)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downward(path: Path) -> None:
    room = room_of(path)
    layer = LAYER_OF[room]
    for other in rooms_imported(path):
        above = ORDER.index(LAYER_OF[other]) < ORDER.index(layer)
        beside = LAYER_OF[other] == layer and other not in LAYERS[layer][room]
        assert not above, f"{room} ({layer}) imports {other} ({LAYER_OF[other]})"
        assert not beside, f"{room} imports {other} of its own layer"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_hydra_stops_at_the_door(path: Path) -> None:
    if room_of(path) not in HYDRA:
        for _, module in imports_of(ast.parse(path.read_text())):
            assert module.split(".")[0] not in ("hydra", "omegaconf")


def test_what_answers_at_once_imports_nothing_heavy() -> None:
    heavy = {"torch", "numpy", "hydra", "omegaconf", "rich", "sklearn", "onnx", "matplotlib"}
    for room in TORCH_FREE:
        tree = ast.parse((PACKAGE / f"{room}.py").read_text())
        for node in tree.body:
            if isinstance(node, ast.If) and dotted(node.test) == "TYPE_CHECKING":
                continue
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            for _, module in imports_of(node):
                allowed = {"hydra", "omegaconf"} if room in HYDRA else set()
                assert module.split(".")[0] not in heavy - allowed, f"{room} imports {module}"


def test_composing_loads_no_torch() -> None:
    code = "import sys, mnist_cli.hydra_main, mnist_cli.cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=faults.ROOT, check=True)
