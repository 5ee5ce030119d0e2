"""Completion: what it offers, and that bash, zsh and fish really complete with it."""

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from test_help import HEAVY

import mnist_cli
from mnist_cli import completion, conf, config
from mnist_cli.completion import complete, split

ROOT = Path(mnist_cli.__file__).parent.parent


def offered(line: str) -> list[str]:
    words = split(line)
    return complete(words[1:-1], words[-1])


@pytest.mark.parametrize(
    ("line", "candidates"),
    [
        ("mnist-cli tr", ["train"]),
        ("mnist-cli e", ["eval", "export"]),
        ("mnist-cli --quiet ev", ["eval"]),
        ("mnist-cli train mod", ["model=", "model.channels=", "model.dense="]),
        ("mnist-cli train model=cnn_deep mo", ["monitor="]),
        ("mnist-cli train model=c", ["model=cnn", "model=cnn_dropout", "model=cnn_deep"]),
        ("mnist-cli train -m optim=sgd,adam", ["optim=sgd,adam", "optim=sgd,adamw"]),
        ("mnist-cli train -m model=cnn,m", ["model=cnn,mlp"]),
        ("mnist-cli train optim.b", ["optim.betas="]),
        ("mnist-cli train optim=adagrad optim.l", ["optim.lr=", "optim.lr_decay="]),
        ("mnist-cli train optim=sgd,adadelta optim.r", ["optim.rho="]),
        ("mnist-cli train early", ["early_stop.patience="]),
        ("mnist-cli train comp", ["compile="]),
        ("mnist-cli train compile=", ["compile=true", "compile=false"]),
        ("mnist-cli train precision=b", ["precision=bfloat16"]),
        ("mnist-cli train dataset=emnist dataset.split=l", ["dataset.split=letters"]),
        ("mnist-cli train dataset.split=l", []),
        ("mnist-cli eval split=", ["split=test", "split=val", "split=train"]),
        ("mnist-cli eval m", []),
        ("mnist-cli export for", ["format="]),
        ("mnist-cli export format=o", ["format=onnx"]),
        ("mnist-cli train --mul", ["--multirun"]),
        ("mnist-cli train --json --j", []),
        ("mnist-cli train --cfg ", ["job", "hydra", "all"]),
        ("mnist-cli train --cfg job loss=m", ["loss=mse"]),
        ("mnist-cli predict pre", ["preprocess="]),
        ("mnist-cli predict preprocess=", ["preprocess=auto", "preprocess=none"]),
        ("mnist-cli demo o", ["open="]),
        ("mnist-cli demo open=", ["open=true", "open=false"]),
        ("mnist-cli list op", ["optim"]),
        ("mnist-cli list optim=adag", ["optim=adagrad"]),
        ("mnist-cli list nothing=a", []),
        ("mnist-cli list optim ", []),
        ("mnist-cli nonsense x", []),
    ],
)  # fmt: skip
def test_offers(line: str, candidates: list[str]) -> None:
    assert offered(line) == candidates


def test_offers_all_that_can_come_next() -> None:
    assert offered("mnist-cli ") == list(conf.COMMANDS)
    assert set(offered("mnist-cli train -")) == set(conf.FLAGS)
    after_train = offered("mnist-cli train ")
    assert {"model=", "seed=", "optim.lr=", "dataset.root="} <= set(after_train)
    assert not {"name=", "model=cnn", "model.hidden="} & set(after_train)


def test_offers_files_for_keys_that_name_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (
        "runs/my run/best.safetensors",
        "runs/model.onnx",
        "runs/notes.txt",
        "runs/.hidden",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert offered("mnist-cli eval checkpoint=") == ["checkpoint=runs/"]
    assert offered("mnist-cli eval checkpoint=runs/") == [
        "checkpoint=runs/model.onnx",
        "checkpoint=runs/my run/",
    ]
    for quoted in (
        r"checkpoint=runs/my\ run/b",
        "'checkpoint=runs/my run/b",
        'checkpoint="runs/my run/b',
    ):
        assert offered(f"mnist-cli eval {quoted}") == ["checkpoint=runs/my run/best.safetensors"]
    for name in ("a.png", "b.JPG", "c.webp"):
        (tmp_path / name).touch()
    assert offered("mnist-cli predict images=") == [
        *("images=a.png", "images=b.JPG", "images=c.webp", "images=runs/")
    ]
    assert offered("mnist-cli predict images=a.png,c") == ["images=a.png,c.webp"]
    assert offered("mnist-cli train out=~/r") == ["out=~/runs/"]
    assert offered("mnist-cli train resume=") == ["resume=runs/", "resume=auto"]
    assert offered("mnist-cli train --config-dir r") == ["runs/"]
    assert offered("mnist-cli train --config-dir=r") == ["--config-dir=runs/"]
    assert offered("mnist-cli train out=missing/") == []


def test_offers_what_a_config_dir_adds(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tiny.yaml").write_text("# Mine\nname: mlp\nhidden: [4]\n")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "fast.yaml").write_text(
        "# Quick\ndefaults:\n  - override /optim: adadelta\nepochs: 1\n"
    )
    for line in (
        f"mnist-cli --config-dir {tmp_path} train",
        f"mnist-cli train --config-dir={tmp_path}",
    ):
        assert offered(f"{line} model=t") == ["model=tiny"]
        assert offered(f"{line} model=tiny model.") == ["model.hidden="]
        assert "+experiment=fast" in offered(f"{line} +experiment=")
        assert offered(f"{line} +exp") == ["+experiment="]
        assert offered(f"{line} +experiment=fast optim.r") == ["optim.rho="]
    assert offered("mnist-cli train model=t") == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a b", ["a", "b"]),
        ("a ", ["a", ""]),
        ("a 'b c", ["a", "b c"]),
        ('a "b c', ["a", "b c"]),
        (r"a b\ c", ["a", "b c"]),
        ("a 'b c' ", ["a", "b c", ""]),
        ("a \"it's", ["a", "it's"]),
        ("", [""]),
    ],
)
def test_splits_as_a_shell_does(line: str, words: list[str]) -> None:
    assert split(line) == words


def literals(schema: Any, prefix: str = "") -> dict[str, tuple[str, ...]]:
    """The choices of each key that has them, be it for one value or for a list of them."""
    hints = get_type_hints(schema)
    kinds = {
        k: get_args(hint)[0] if get_origin(hint) is tuple else hint for k, hint in hints.items()
    }
    return {prefix + k: get_args(kind) for k, kind in kinds.items() if get_origin(kind) is Literal}


def test_pictures_are_offered_by_the_suffixes_that_predict_knows() -> None:
    from mnist_cli import pictures

    assert completion.PATHS["images"] == pictures.SUFFIXES


def test_choices_are_those_of_the_schemas() -> None:
    counted: dict[str, tuple[str, ...]] = {}
    for schema in get_args(config.Config):
        counted |= literals(schema)
    counted |= literals(config.SweepConfig, "sweep.")
    for group in conf.GROUPS:
        for schema in get_args(get_type_hints(config.TrainConfig)[group]):
            counted |= literals(schema, f"{group}.")
    counted = {key: values for key, values in counted.items() if not key.endswith(".name")}
    chosen = {key: values for key, values in completion.CHOICES.items() if key != "device"}
    assert chosen == counted


@pytest.mark.parametrize("args", [["-sc"], ["-sc", "install=tcsh"], ["-sc", "x=bash"], []])
def test_a_wrong_request_is_a_usage_error(
    args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert completion.main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(":")[0] for line in err.splitlines()] == ["error", "hint"]


def test_loads_nothing_heavy() -> None:
    program = (
        "import sys; from mnist_cli import completion; completion.main(['-sc', 'query=fish']);"
        " print(*sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "COMP_LINE": "mnist-cli train model=mlp "},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "model.hidden=" in result.stdout.split()
    assert not HEAVY & set(result.stdout.split())


# --- the real shells -----------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home folder with `bin/mnist-cli`, which shows the words that it was called with."""
    program = tmp_path / "bin" / "mnist-cli"
    program.parent.mkdir()
    program.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = -sc ] && PYTHONPATH="{ROOT}" exec "{sys.executable}" -m mnist_cli "$@"\n'
        "printf 'GOT'; printf '<%s>' \"$@\"; printf 'END\\n'\n"
    )
    program.chmod(0o755)
    run = tmp_path / "runs" / "my run"
    run.mkdir(parents=True)
    (run / "best.safetensors").touch()
    (tmp_path / "runs" / "a:b=c").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "cnn").mkdir()
    return tmp_path


def environment(home: Path) -> dict[str, str]:
    path = f"{home / 'bin'}:{os.environ['PATH']}"
    return {"HOME": str(home), "PATH": path, "TERM": "dumb", "LC_ALL": "C.UTF-8"}


Typed = Callable[[str], list[str]]


@pytest.fixture(params=["bash", "zsh"])
def typed(request: pytest.FixtureRequest, home: Path) -> Any:
    """Type a line with TABs into a real interactive shell; the words that `mnist-cli` then got."""
    shell = request.param
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    command = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"]}[shell]
    master, slave = pty.openpty()
    process = subprocess.Popen(
        command,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        cwd=home,
        env=environment(home),
        start_new_session=True,
    )
    os.close(slave)
    written = ""

    def answer(line: str, pattern: str) -> re.Match[str]:
        nonlocal written
        written = ""
        os.write(master, line.encode())
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if select.select([master], [], [], 0.1)[0]:
                written += os.read(master, 65536).decode(errors="replace")
            match = re.search(pattern, written.replace("\r\n", "\n"))
            if match:
                return match
        raise AssertionError(f"{line!r} led to {written!r}")

    def words(line: str) -> list[str]:
        match = answer(f"{line}\n", r"GOT((?:<[^<>]*>)+)END")
        return match[1].strip("<>").split("><")

    if shell == "zsh":
        answer(
            "unsetopt zle_bracketed_paste; PS1='> '; bindkey '^I' complete-word; echo se''t\n",
            "set\n",
        )
    answer(f'eval "$(mnist-cli -sc install={shell})"; echo rea""dy\n', r"ready\n")
    yield words
    process.kill()
    process.wait()
    os.close(master)


def test_bash_and_zsh_complete(typed: Typed) -> None:
    assert typed("mnist-cli tr\tmodel=ml\t") == ["train", "model=mlp"]
    assert typed("mnist-cli train model=cnn_dr\t") == ["train", "model=cnn_dropout"]
    assert typed("mnist-cli -m train model=cnn,ml\t") == ["-m", "train", "model=cnn,mlp"]
    assert typed("mnist-cli train optim=adadelta optim.rh\t0.5") == [
        *("train", "optim=adadelta", "optim.rho=0.5")
    ]
    assert typed("mnist-cli train --mul\tcompile=t\tx=1") == [
        *("train", "--multirun", "compile=true", "x=1")
    ]
    assert typed("./bin/mnist-cli exp\tformat=on\t") == ["export", "format=onnx"]
    assert typed("cd . && mnist-cli lis\tsched\t") == ["list", "schedule"]


def test_bash_and_zsh_complete_paths(typed: Typed) -> None:
    best = "checkpoint=runs/my run/best.safetensors"
    assert typed("mnist-cli eval checkpoint=ru\tmy\tbe\tx") == ["eval", best, "x"]
    assert typed(r"mnist-cli eval checkpoint=runs/my\ r" + "\tb\t") == ["eval", best]
    assert typed("mnist-cli eval checkpoint='runs/my r\tb\t") == ["eval", best]
    assert typed("mnist-cli train out=runs/a\tnew") == ["train", "out=runs/a:b=c/new"]


def test_completing_leaves_the_users_word_breaks(typed: Typed) -> None:
    before = typed('mnist-cli "${#COMP_WORDBREAKS}"')
    assert typed("mnist-cli train model=ml\t") == ["train", "model=mlp"]
    assert typed('mnist-cli "${#COMP_WORDBREAKS}"') == before


def test_bash_keeps_the_users_word_breaks(home: Path) -> None:
    script = (
        'a=$COMP_WORDBREAKS; eval "$(mnist-cli -sc install=bash)"; [[ $a == "$COMP_WORDBREAKS" ]]'
    )
    script += '; eval "$(mnist-cli -sc uninstall=bash)"; ! complete -p mnist-cli 2>/dev/null'
    subprocess.run(["bash", "-ec", script], env=environment(home), check=True)


@pytest.mark.skipif(not shutil.which("fish"), reason="fish is not installed")
@pytest.mark.parametrize(
    ("line", "candidates"),
    [
        ("mnist-cli tr", ["train"]),
        ("mnist-cli train model=cnn_", ["model=cnn_dropout", "model=cnn_deep"]),
        ("mnist-cli train -m model=cnn,ml", ["model=cnn,mlp"]),
        ("mnist-cli train --mul", ["--multirun"]),
        ("~/bin/mnist-cli ev", ["eval"]),
        ("true; mnist-cli ev", ["eval"]),
        (r"mnist-cli eval checkpoint=runs/my\ run/", ["checkpoint=runs/my run/best.safetensors"]),
    ],
)
def test_fish_completes(home: Path, line: str, candidates: list[str]) -> None:
    result = subprocess.run(
        ["fish", "-c", "mnist-cli -sc install=fish | source; complete -C $argv[1]", line],
        cwd=home,
        env=environment(home),
        capture_output=True,
        text=True,
        check=True,
    )
    offered = [re.sub(r"\\(.)", r"\1", word) for word in result.stdout.splitlines()]
    assert sorted(offered) == sorted(candidates)
