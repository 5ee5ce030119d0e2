"""Help and `list` say everything, fit on the page, and load nothing heavy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mnist_cli import conf, help
from mnist_cli.errors import UsageError

HEAVY = {
    "dataclasses",
    "hydra",
    "inspect",
    "mnist_cli.config",
    "mnist_cli.options",
    "omegaconf",
    "rich",
    "torch",
    "yaml",
}


@pytest.mark.parametrize("columns", [None, 80, 200])
@pytest.mark.parametrize("command", [None, *conf.COMMANDS])
def test_fits_on_the_page(
    monkeypatch: pytest.MonkeyPatch, command: str | None, columns: int | None
) -> None:
    """A pipe has 100 columns, a terminal what it has; but commands to copy are never broken."""

    def size(descriptor: int) -> os.terminal_size:
        if columns is None:
            raise OSError
        return os.terminal_size((columns, 24))

    monkeypatch.setattr(os, "get_terminal_size", size)
    text = help.usage() if command is None else help.command_usage(command)
    lines = text.splitlines()
    flowing = [line for line in lines if "mnist-cli" not in line and "Flags: " not in line]
    assert max(map(len, lines)) <= help.WIDTH
    assert max(map(len, flowing)) <= min(columns or help.WIDTH, help.WIDTH)
    assert text.isascii()
    assert not [line for line in lines if line != line.rstrip()]


def test_usage_names_commands_flags_shells_and_codes() -> None:
    text = help.usage()
    for word in (*conf.COMMANDS, *conf.FLAGS, "install=bash", "install=zsh", "install=fish", "143"):
        assert word in text


@pytest.mark.parametrize("command", conf.COMMANDS)
def test_a_command_shows_its_keys_and_three_examples(command: str) -> None:
    text = help.command_usage(command)
    assert text.startswith(f"usage: mnist-cli {command}")
    for key in conf.command_keys(command):
        assert f"  {key.path}=" in text
    assert len(help.EXAMPLES[command]) == 3
    assert all(example.split()[:2] == ["mnist-cli", command] for example in help.EXAMPLES[command])


def test_train_shows_groups_options_and_the_keys_of_the_defaults() -> None:
    text = help.command_usage("train")
    for group in conf.GROUPS:
        assert f"\n{group}=  (default " in text
        for option in conf.options(group).values():
            assert f"\n  {option.name} " in text
            assert option.description.split()[0] in text
    assert "optim.lr=0.001" in text
    assert "optim.rho" not in text


def test_what_is_required_says_so() -> None:
    text = help.command_usage("eval")
    assert "mnist-cli eval checkpoint=VALUE [key=value ...]" in text
    assert "checkpoint=(required)" in text


def test_list_has_one_line_for_each_option() -> None:
    lines = help.list_text().splitlines()
    for group in conf.GROUPS:
        assert f"{group}=" in lines
        for option in conf.options(group).values():
            assert [
                line for line in lines if line.split() == [option.name, *option.description.split()]
            ]
    options = sum(len(conf.options(group)) for group in (*conf.GROUPS, conf.EXPERIMENT))
    assert len([line for line in lines if line.startswith("  ")]) == options


def test_list_of_a_group_is_its_part_of_the_whole() -> None:
    assert help.list_text("optim") in help.list_text()
    assert len(help.list_text("optim").splitlines()) == 1 + len(conf.options("optim"))


def test_list_of_an_option_shows_its_keys() -> None:
    first, line, empty, *keys = help.list_text("optim=adadelta").splitlines()
    assert (first, line.split()[0], empty) == ("optim=", "adadelta", "")
    assert [key.split("=")[0].strip() for key in keys] == [
        key.path for key in conf.options("optim")["adadelta"].keys
    ]
    [option] = help.list_data("optim=adadelta")["optim"]
    assert option["keys"]["optim.rho"] == 0.9
    with pytest.raises(UsageError, match="no optim 'adm'") as error:
        help.list_text("optim=adm")
    with pytest.raises(UsageError, match="no optim ''"):
        help.list_text("optim=")
    assert "adam, adamw" in error.value.hint


def test_list_for_programs() -> None:
    data = help.list_data()
    assert list(data) == [*conf.GROUPS, conf.EXPERIMENT]
    assert json.loads(json.dumps(data)) == data
    mlp = next(option for option in data["model"] if option["name"] == "mlp")
    assert mlp["keys"] == {"model.hidden": [512, 256], "model.dropout": 0.2}
    assert mlp["description"]
    assert help.list_data("loss") == {"loss": data["loss"]}


def test_an_unknown_group_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="optimizer") as error:
        help.list_text("optimizer")
    assert "model, optim, loss, dataset, schedule, experiment" in error.value.hint


def test_a_users_options_are_shown(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tiny.yaml").write_text("# Mine\nname: mlp\n")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "fast.yaml").write_text("# Quick\nepochs: 1\n")
    text = help.command_usage("train", [tmp_path])
    assert "  tiny         Mine\n" in text
    assert "\n+experiment=  (a recipe" in text
    assert "Quick" in help.list_text(None, [tmp_path])


def test_loads_nothing_heavy() -> None:
    program = (
        "import sys; from mnist_cli import help; help.usage(); help.command_usage('train');"
        " help.list_text(); print(*sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert not HEAVY & set(result.stdout.split())
