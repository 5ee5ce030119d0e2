"""The command `demo`: a page to draw on, on this machine alone, and a checkpoint that answers.

server        what is answered, and to whom
page.html.j2  the page
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import webbrowser

import uvicorn

from mnist_cli import formats, trained
from mnist_cli.config import DemoConfig
from mnist_cli.console import Console
from mnist_cli.demo import server
from mnist_cli.errors import Interrupted, UsageError
from mnist_cli.run import RunFolder
from mnist_cli.trained import Trained

ADDRESS = "127.0.0.1"


def run(config: DemoConfig, console: Console) -> None:
    """The command `demo`. It serves until SIGINT or SIGTERM, which is its ordinary end.

    What it prints, or its JSON document of `url` and `checkpoint`, is there once the page is.

    Raises:
        CheckpointError: the checkpoint can't be used.
        UsageError: it doesn't answer to small grey pictures, or the port or the device isn't there.
        Interrupted: by a signal, before the page is there.
    """
    with contextlib.closing(_listening(config.port)) as listening:
        model = trained.load(config.checkpoint, config.device, console)
        _check_takes_drawings(model)
        port = listening.getsockname()[1]
        place = "" if port == 80 else f":{port}"
        url = f"http://{ADDRESS}{place}/"
        app = server.build_app(
            model, facts_of(model), hosts=(f"{ADDRESS}{place}", f"localhost{place}")
        )
        serving = uvicorn.Server(server.settings(app))
        console.say(f"model    {model.config.model.name}, trained on {model.spec.name}")
        with contextlib.suppress(Interrupted):
            console.answer(f"page     {url}", {"url": url, "checkpoint": str(model.path)})
            console.say("stop     Ctrl-C")
            if config.open and not console.as_json:
                _open_browser(url)
            serving.run(sockets=[listening])
        console.say("\nstopped")  # behind the ^C that a terminal shows


def _listening(port: int) -> socket.socket:
    """A socket that only this machine can reach. Raises UsageError."""
    listening = socket.socket()
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((ADDRESS, port))
        listening.listen()
    except OSError as error:
        listening.close()
        raise UsageError(
            f"port={port} can't be used: {error.strerror}",
            "type another one, or leave port= out to get a free one",
        ) from error
    return listening


def _check_takes_drawings(model: Trained) -> None:
    model.check_takes_pictures()
    channels, height, width = model.spec.input_shape
    if channels != 1 or max(height, width) > server.SIDE:
        raise UsageError(
            f"{model.path} was trained on {model.spec.name}, {width}x{height} pixels in"
            f" {channels} channels; what is drawn is grey and {server.SIDE}x{server.SIDE}",
            "name a run on mnist or the like, or type mnist-cli predict ... images=PATH",
        )


def facts_of(model: Trained) -> dict[str, str]:
    """Which checkpoint answers, as the page says it."""
    facts = {
        "checkpoint": os.fsencode(model.path).decode(errors="backslashreplace"),
        "model": model.config.model.name,
        "trained on": model.spec.name,
    }
    progress = model.progress
    if progress is None or progress.best is None:
        return facts
    best = progress.best
    if progress.step != best.step:
        return facts | {"step": f"{progress.step:,}, not the selected one"}
    if best.monitor is None:  # there was no validation split
        facts["last epoch"] = f"{best.epoch:,}"
    else:
        name = best.monitor.removeprefix("val_")
        facts["selected epoch"] = f"{best.epoch:,}"
        facts[f"validation {name}"] = formats.metric(name, best.value)
    accuracy = _test_accuracy(model, best.step)
    return facts if accuracy is None else facts | {"test accuracy": f"{accuracy:.2%}"}


def _test_accuracy(model: Trained, step: int) -> float | None:
    """What the result beside the checkpoint says, if it is of these weights."""
    result = RunFolder(model.path.parent).read_result() or {}
    best, test = result.get("best"), result.get("test")
    if not isinstance(best, dict) or best.get("step") != step or not isinstance(test, dict):
        return None
    accuracy = test.get("accuracy")
    return accuracy if isinstance(accuracy, float) and 0 <= accuracy <= 1 else None


def _open_browser(url: str) -> None:
    """Open `url` where there is a screen; without one Python would start a browser in text."""
    screens = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    if sys.platform != "linux" or any(os.environ.get(name) for name in screens):
        # Some browsers are waited for.
        threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
