"""conf/ is read right without a YAML parser, is fully commented, and agrees with the schemas."""

import dataclasses
import types
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from mnist_cli import conf
from mnist_cli.config import (
    DemoConfig,
    EvalConfig,
    ExportConfig,
    PredictConfig,
    ReportConfig,
    SweepConfig,
    TrainConfig,
    flatten,
)
from mnist_cli.options import DatasetConfig, LossConfig, ModelConfig, OptimConfig, ScheduleConfig
from mnist_cli.typed import option_names

FILES = sorted(conf.conf_dir().rglob("*.yaml"))
SCHEMAS = {
    "model": ModelConfig,
    "optim": OptimConfig,
    "loss": LossConfig,
    "dataset": DatasetConfig,
    "schedule": ScheduleConfig,
}
COMMANDS = {
    "train": TrainConfig,
    "eval": EvalConfig,
    "export": ExportConfig,
    "predict": PredictConfig,
    "demo": DemoConfig,
    "report": ReportConfig,
}


def file_id(path: Path) -> str:
    return path.relative_to(conf.conf_dir()).as_posix()


def paths_of(schema: Any) -> set[str]:
    """The keys of a dataclass, nested ones by their full path; groups are left out."""
    paths: set[str] = set()
    for name, hint in get_type_hints(schema).items():
        if isinstance(hint, types.UnionType) and hint in SCHEMAS.values():
            continue
        nested = dataclasses.is_dataclass(hint)
        paths |= {f"{name}.{path}" for path in paths_of(hint)} if nested else {name}
    return paths


@pytest.mark.parametrize("path", FILES, ids=file_id)
def test_reads_as_a_yaml_parser_does(path: Path) -> None:
    tree = yaml.safe_load(path.read_text())
    tree.pop("hydra", None)
    defaults = tree.pop("defaults", [])
    file = conf.read(path)
    assert {key.path: key.value for key in file.keys} == flatten(tree)
    wanted = [next(iter(entry.items())) for entry in defaults if isinstance(entry, dict)]
    assert file.defaults == tuple((key.split()[-1].strip("/"), name) for key, name in wanted)


@pytest.mark.parametrize("path", FILES, ids=file_id)
def test_says_what_it_is_for(path: Path) -> None:
    file = conf.read(path)
    assert file.description[0].isupper() or file.description[0].isdigit()
    assert not file.description.endswith(".")
    if path.parent.name != conf.EXPERIMENT:
        assert [key.path for key in file.keys if not key.text and key.path != "name"] == []


def test_commands_are_described_as_in_their_files() -> None:
    described = {path.stem: conf.read(path).description for path in conf.conf_dir().glob("*.yaml")}
    assert described == {name: conf.COMMANDS[name] for name in described}
    assert set(conf.COMMANDS) - set(described) == {"list"}


@pytest.mark.parametrize("group", conf.GROUPS)
def test_options_and_keys_of_a_group_are_those_of_its_schemas(group: str) -> None:
    by_name = {name: schema for schema in get_args(SCHEMAS[group]) for name in option_names(schema)}
    options = conf.options(group)
    assert set(options) == set(by_name)
    for name, option in options.items():
        fields = {field.name for field in dataclasses.fields(by_name[name])} - {"name"}
        assert {key.path for key in option.keys} == {f"{group}.{field}" for field in fields}
        assert (
            yaml.safe_load((conf.conf_dir() / group / f"{name}.yaml").read_text())["name"] == name
        )


@pytest.mark.parametrize("command", COMMANDS)
def test_keys_of_a_command_are_those_of_its_schema(command: str) -> None:
    keys = [key.path for key in conf.command_keys(command)]
    assert len(keys) == len(set(keys))
    own = {f"sweep.{key}" for key in paths_of(SweepConfig)} if command == "train" else set()
    assert set(keys) == paths_of(COMMANDS[command]) | own


def test_groups_are_fields_of_the_schema() -> None:
    assert tuple(conf.default_options("train")) == conf.GROUPS
    assert set(conf.GROUPS) < {field.name for field in dataclasses.fields(TrainConfig)}
    assert conf.default_options("eval") == {}


def test_options_stand_in_the_order_of_the_contract() -> None:
    assert list(conf.options("model")) == ["linear", "mlp", "cnn", "cnn_dropout", "cnn_deep"]
    assert next(iter(conf.options("dataset"))) == "mnist"
    assert list(conf.options("dataset"))[-1] == "linear"


def test_known_keys() -> None:
    known = conf.known_keys("train")
    assert {"seed", "early_stop.patience", "optim", "optim.lr", "optim.betas"} <= set(known)
    assert {"model.hidden", "dataset.split"} <= set(known)
    assert len(known) == len(set(known))
    assert not {"model.name", "hydra.run.dir", "defaults"} & set(known)
    assert conf.known_keys("list") == []


def test_a_users_folder_adds_options_but_replaces_none(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tiny.yaml").write_text("# Mine\nname: mlp\nhidden: [4]  # few\n")
    (tmp_path / "model" / "bare.yaml").write_text("")
    (tmp_path / "model" / "cnn.yaml").write_text("# Not this\n")
    options = conf.options("model", [tmp_path])
    assert list(options)[-2:] == ["bare", "tiny"]
    assert options["tiny"] == ("tiny", "Mine", (conf.Key("model.hidden", "[4]", "few"),))
    assert options["bare"].description == ""
    assert options["cnn"] == conf.options("model")["cnn"]
    assert "bare" not in conf.options("model", [tmp_path / "missing"])


def test_an_experiment_is_described_by_what_it_chooses(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\n# Softmax regression\n# more\ndefaults:\n"
        "  - override /model: linear\n  - override /optim: sgd\n\n"
        "epochs: 3\noptim:\n  lr: 0.1  # high\n"
    )
    option = conf.options("experiment", [tmp_path])["mine"]
    assert option.description == "Softmax regression"
    assert {key.path: key.value for key in option.keys} == {
        "model": "linear",
        "optim": "sgd",
        "epochs": 3,
        "optim.lr": 0.1,
    }


def test_what_is_not_understood_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text("a: 'x # y'  # text\n- item\n? odd\n\t: x\nb:\n  c:\n    d: \"1\"\ne: ~\n")
    keys = {key.path: key.value for key in conf.read(path).keys}
    assert keys == {"a": "x # y", "b.c.d": "1", "e": None}
    path.write_bytes(b"\xff\xfe")
    assert conf.read(path).keys == ()
    assert conf.read(tmp_path).keys == ()
