"""The wheel works outside the checkout, and the lock holds what the project asks for."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import mnist_cli

ROOT = Path(__file__).parent.parent


def build(kind: str, source: Path, target: Path) -> Path:
    """Build a wheel or an sdist of `source`, with the hatchling that is installed; no network."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(target)],
        cwd=source,
        check=True,
        capture_output=True,
    )
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel is installed; the dependencies are those of the tests."""
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--offline", "--no-deps"]
    subprocess.run([*command, "--target", str(site), str(wheel)], check=True)
    return site


def run(command: list[str], site: Path, tmp_path: Path) -> str:
    """What `command` prints in an empty folder, with an empty home, on the installed wheel."""
    for name in ("home", "elsewhere"):
        (tmp_path / name).mkdir(exist_ok=True)
    kept = {key: value for key, value in os.environ.items() if key in ("PATH", "LANG", "LC_ALL")}
    result = subprocess.run(
        command,
        cwd=tmp_path / "elsewhere",
        env={**kept, "HOME": str(tmp_path / "home"), "PYTHONPATH": str(site)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert not list((tmp_path / "elsewhere").iterdir())
    return result.stdout


def test_the_wheel_holds_the_program_and_its_conf_and_no_more(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mnist_cli").rglob("*.py")}
    pages = (ROOT / "mnist_cli/report/templates").iterdir()
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "conf").rglob("*.yaml")}
    info = f"mnist_cli-{mnist_cli.__version__}.dist-info"
    assert {name for name in names if not name.startswith(f"{info}/")} == {
        *modules,
        *(path.relative_to(ROOT).as_posix() for path in pages),
        *(f"mnist_cli/{name}" for name in files),
        "mnist_cli/py.typed",
    }
    assert f"{info}/licenses/LICENSE" in names


def test_the_sdist_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    sdist = build("sdist", ROOT, tmp_path / "sdist")
    subprocess.run(["tar", "-xzf", sdist, "-C", tmp_path], check=True)
    again = build("wheel", tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path / "wheel")
    assert again.name == wheel.name
    assert zipfile.ZipFile(again).namelist() == zipfile.ZipFile(wheel).namelist()


def test_the_installed_wheel_runs_from_another_folder(site: Path, tmp_path: Path) -> None:
    where = "import mnist_cli, mnist_cli.conf as c; print(mnist_cli.__file__); print(c.conf_dir())"
    shown = run([sys.executable, "-c", where], site, tmp_path).split()
    assert shown == [str(site / "mnist_cli/__init__.py"), str(site / "mnist_cli/conf")]
    assert "cnn_dropout" in run([sys.executable, "-m", "mnist_cli", "list"], site, tmp_path)
    program = [sys.executable, str(site / "bin/mnist-cli")]
    assert run([*program, "--version"], site, tmp_path).split() == [
        "mnist-cli",
        mnist_cli.__version__,
    ]
    assert "seed: 0" in run([*program, "train", "--cfg", "job"], site, tmp_path)


def locked() -> dict[str, str]:
    text = (ROOT / "requirements.txt").read_text()
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", text, re.MULTILINE))


def test_the_lock_holds_what_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.split(r"[<>=]", requirement)[0] for requirement in asked}
    assert names <= set(locked())


def test_the_lock_pins_by_hash_and_names_no_place() -> None:
    text = (ROOT / "requirements.txt").read_text()
    for block in re.findall(r"^\S+==.*(?:\n    --hash=.*)*", text, re.MULTILINE):
        assert "--hash=sha256:" in block
    assert not re.search(r"://|--index|--find-links|file:|/", re.sub(r"#.*", "", text))
    assert "+" not in locked()["torch"] + locked()["torchvision"]
