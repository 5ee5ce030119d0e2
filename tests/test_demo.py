"""`demo` answers a drawing as `predict` answers a file, to the page alone, and ends cleanly."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import urlopen

import faults
import html5lib
import numpy as np
import pytest
import torch
from conftest import ROOT, Program
from faults import Child, Server
from PIL import Image

from mnist_cli import checkpoint, pictures
from mnist_cli.config import train_config
from mnist_cli.console import Console
from mnist_cli.dataset import DatasetSpec
from mnist_cli.demo import facts_of
from mnist_cli.demo.server import MAX_CONNECTIONS, SIDE, answer_of
from mnist_cli.trained import load

pytestmark = pytest.mark.usefixtures("empty_cwd")

Trained = Callable[..., Path]
DIGITS = ("dataset=digits", "model=cnn", "epochs=10")
LINE = ("dataset=linear", "model=linear", "loss=mse", "optim=sgd", "epochs=3")
BLANK = bytes(SIDE * SIDE)


class Reply(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found


class Demo(NamedTuple):
    """A demo in a process of its own."""

    child: Child
    url: str
    checkpoint: str

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc

    @property
    def port(self) -> int:
        return int(urlsplit(self.url).port or 80)

    def ask(self, method: str, path: str, body: Any = None, **headers: str | None) -> Reply:
        """One request, as the page sends it but for `headers`; None leaves a header out."""
        sent = {"Host": self.host, "Origin": self.url.rstrip("/")}
        if body is not None:
            sent["Content-Type"] = "application/octet-stream"
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        kept = {name: value for name, value in sent.items() if value is not None}
        connection.request(method, path, body, kept)
        response = connection.getresponse()
        reply = Reply(response.status, response.headers, response.read())
        connection.close()
        return reply

    def answer(self, pixels: bytes) -> dict[str, Any]:
        reply = self.ask("POST", "/answer", pixels)
        assert reply.status == 200, reply
        return reply.json

    def end(self, number: int = signal.SIGINT) -> faults.Ended:
        self.child.kill(number)
        return self.child.wait(30)


def started(server: Server, run: Path, *words: str) -> Demo:
    child = server.start(faults.program, ["demo", f"checkpoint={run}", "--json", *words])
    child.wait_for(lambda: "\n" in child.stdout() or child.is_over())
    document = json.loads(child.stdout())
    assert list(document) == ["url", "checkpoint"], document
    return Demo(child, **document)


@pytest.fixture(scope="module")
def served(server: Server, trained: Trained) -> Iterator[Demo]:
    """A demo of a model of digits. Whatever is sent to it, it has nothing to say but three lines,
    and ends with 0."""
    demo = started(server, trained(*DIGITS))
    yield demo
    ended = demo.end()
    said = "model    cnn, trained on digits\nstop     Ctrl-C\n\nstopped\n"
    assert (ended.code, ended.stderr) == (0, said)
    assert json.loads(ended.stdout)["url"] == demo.url


def drawings(count: int) -> list[Image.Image]:
    """Handwritten digits as large as a drawing, light on black."""
    from sklearn.datasets import load_digits

    small = (load_digits().images[:count] * 15).astype(np.uint8)
    return [Image.fromarray(image).resize((SIDE, SIDE)) for image in small]


# --- answers -------------------------------------------------------------------------------------


def test_it_answers_as_predict_does(mnist_cli: Program, trained: Trained, served: Demo) -> None:
    spec = checkpoint.load(trained(*DIGITS) / "best.safetensors").spec
    for image in drawings(12):
        image.save("drawing.png")
        words = (f"checkpoint={trained(*DIGITS)}", "images=drawing.png", "--json")
        (expected,) = json.loads(mnist_cli("predict", *words).stdout)
        found = served.answer(image.tobytes())
        assert found.pop("seen") == pictures.prepare(image, spec).flatten().tolist()
        assert found == {key: value for key, value in expected.items() if key != "path"}


def test_several_at_once_get_their_own_answers(served: Demo) -> None:
    pixels = [image.tobytes() for image in drawings(24)]
    expected = [served.answer(each) for each in pixels]
    assert len({str(answer) for answer in expected}) == len(pixels)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(served.answer, pixels * 3)) == expected * 3


def test_where_nothing_is_drawn_it_says_so(served: Demo) -> None:
    reply = served.ask("POST", "/answer", BLANK)
    assert reply.status == 422
    assert reply.json == {"error": "shows nothing: it is all of one color"}


def test_an_exported_file_answers_too(mnist_cli: Program, trained: Trained, served: Demo) -> None:
    assert mnist_cli("export", f"checkpoint={trained(*DIGITS)}", "out=.", "-q").code == 0
    model = load("model.onnx", "cpu", Console())
    assert facts_of(model) == {"checkpoint": "model.onnx", "model": "cnn", "trained on": "digits"}
    pixels = drawings(1)[0].tobytes()
    found, expected = answer_of(model, pixels), served.answer(pixels)
    assert found.pop("probabilities") == pytest.approx(expected.pop("probabilities"), abs=1e-5)
    assert (found["label"], found["seen"]) == (expected["label"], expected["seen"])


# --- who is answered -----------------------------------------------------------------------------


def png_that_says(side: int) -> bytes:
    """The head of a PNG of `side` x `side` pixels, as large as a drawing."""
    head = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + side.to_bytes(4, "big") * 2 + b"\1\0\0\0\0"
    return head.ljust(SIDE * SIDE, b"\0")


REFUSED: dict[str, tuple[int, dict[str, Any]]] = {
    "another name": (421, {"Host": "evil.example"}),
    "another name, the page": (421, {"Host": "evil.example", "method": "GET", "path": "/"}),
    "a name that begins alike": (421, {"Host": "127.0.0.1.evil.example"}),
    "no port": (421, {"Host": "127.0.0.1"}),
    "another port": (421, {"Host": "127.0.0.1:1"}),
    "all addresses": (421, {"Host": "0.0.0.0"}),
    "no name": (421, {"Host": ""}),
    "another site": (403, {"Origin": "http://evil.example"}),
    "another port of this machine": (403, {"Origin": "http://127.0.0.1:1"}),
    "a file or a sandbox": (403, {"Origin": "null"}),
    "no site": (403, {"Origin": None}),
    "a question before a post": (403, {"Origin": "http://evil.example", "method": "OPTIONS"}),
    "a form": (415, {"Content_Type": "application/x-www-form-urlencoded"}),
    "text, which needs no question": (415, {"Content_Type": "text/plain"}),
    "an image": (415, {"Content_Type": "image/png"}),
    "no type": (415, {"Content_Type": None}),
    "nothing": (400, {"body": b""}),
    "one pixel less": (400, {"body": BLANK[1:]}),
    "one pixel more": (413, {"body": BLANK + b"\0"}),
    "much more": (413, {"body": b"\0" * 10**7}),
    "a length that is a lie": (413, {"Content_Length": str(10**12)}),
    "chunks without end": (413, {"body": iter([b"\0" * 9999] * 99), "Content_Length": None}),
    "the page, with a body": (413, {"method": "GET", "path": "/", "body": b"\0" * 10**6}),
    "a cut PNG": (400, {"body": png_that_says(28)[:50]}),
    "a get": (405, {"method": "GET"}),
    "a put": (405, {"method": "PUT"}),
    "a post to the page": (405, {"path": "/"}),
    "another path": (404, {"method": "GET", "path": "/best.safetensors"}),
    "a path upward": (404, {"method": "GET", "path": "/../../../etc/passwd"}),
    "an encoded path upward": (404, {"method": "GET", "path": "/%2e%2e/%2e%2e/etc/passwd"}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_who_is_not_the_page_is_refused(served: Demo, case: str) -> None:
    status, changes = REFUSED[case]
    sent = {"method": "POST", "path": "/answer", "body": BLANK} | changes
    try:
        reply = served.ask(sent.pop("method"), sent.pop("path"), sent.pop("body"), **sent)
    except (BrokenPipeError, ConnectionResetError):  # refused before all was sent
        assert status == 413
    else:
        assert reply.status == status, reply
        assert b"probabilities" not in reply.body and b"<canvas" not in reply.body
    assert served.ask("GET", "/").status == 200


def test_this_machine_is_answered_under_both_its_names(served: Demo) -> None:
    host = f"localhost:{served.port}"
    assert served.ask("GET", "/", Host=host, Origin=None).status == 200
    pixels = drawings(1)[0].tobytes()
    headers = {"Host": host, "Origin": f"http://{host}"}
    assert served.ask("POST", "/answer", pixels, **headers).status == 200
    assert served.ask("POST", "/answer", pixels, Host=host).status == 403


def raw(served: Demo, sent: bytes) -> bytes:
    """All that comes back for these bytes."""
    found = b""
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as connection:
        connection.sendall(sent)
        with contextlib.suppress(ConnectionResetError):  # where not all of it was read
            while data := connection.recv(65536):
                found += data
    return found


GET = b"GET / HTTP/1.1\r\nHost: %(host)b\r\nConnection: close\r\n"
POST = (
    b"POST /answer HTTP/1.1\r\nHost: %(host)b\r\nOrigin: http://%(host)b\r\nConnection: close\r\n"
    b"Content-Type: application/octet-stream\r\n"
)
ODD = {
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    "a picture": (b"\xff\xd8\xff\r\n\r\n", 400),
    "no name": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "no name, long ago": (b"GET / HTTP/1.0\r\n\r\n", 421),
    "two names": (GET + b"Host: evil.example\r\n\r\n", 400),
    "a header without end": (GET + b"X: " + b"x" * 70_000, 400),
    "an address as to a proxy": (GET.replace(b"/", b"http://evil.example/", 1) + b"\r\n", 404),
    "a web socket": (GET.replace(b"close", b"upgrade, close") + b"Upgrade: websocket\r\n\r\n", 200),
    "two lengths": (POST + b"Content-Length: 1, 2\r\n\r\n", 400),
    "no chunks": (POST + b"Transfer-Encoding: chunked\r\n\r\nzzz\r\n", 400),
    "a drawing that never ends": (POST + b"Content-Length: 9\r\n\r\n12345", 408),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_bytes_are_answered_and_forgotten(served: Demo, case: str) -> None:
    sent, status = ODD[case]
    answer = raw(served, sent.replace(b"%(host)b", served.host.encode()))
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert served.ask("GET", "/").status == 200


def test_a_client_may_leave_at_any_instant(served: Demo) -> None:
    for sent in (b"", GET, POST, POST + b"Content-Length: 176400\r\n\r\n" + bytes(5000)):
        with socket.create_connection(("127.0.0.1", served.port), timeout=30) as connection:
            connection.sendall(sent.replace(b"%(host)b", served.host.encode()))
    assert served.ask("GET", "/").status == 200


def test_many_idle_connections_are_bounded(served: Demo) -> None:
    idle = [
        socket.create_connection(("127.0.0.1", served.port), timeout=30)
        for _ in range(MAX_CONNECTIONS)
    ]
    assert served.ask("GET", "/").status == 503
    for connection in idle:
        connection.close()
    served.child.wait_for(lambda: served.ask("GET", "/").status == 200)


def test_no_other_address_leads_to_it(served: Demo) -> None:
    with pytest.raises(OSError):  # on Linux all of 127.0.0.0/8 is this machine
        socket.create_connection(("127.0.0.2", served.port), timeout=5).close()


# --- the page ------------------------------------------------------------------------------------


def parsed(page: bytes) -> Any:
    parser = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return parser.parse(page)


def test_the_page_is_sound_and_may_load_nothing(served: Demo) -> None:
    replies = [served.ask("GET", "/", Origin=None) for _ in range(2)]
    tree = parsed(replies[0].body)
    nonces = {element.get("nonce") for name in ("style", "script") for element in tree.iter(name)}
    policies = [reply.headers["Content-Security-Policy"] for reply in replies]
    (nonce,) = nonces
    assert policies[0] == (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}';"
        " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'"
    )
    assert policies[0] != policies[1]
    for reply in (*replies, served.ask("GET", "/nowhere"), served.ask("POST", "/answer", b"")):
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
        assert reply.headers["Cache-Control"] == "no-store"
        assert reply.headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "Access-Control-Allow-Origin" not in reply.headers
        assert "Server" not in reply.headers
    for element in tree.iter():
        assert not [name for name in element.attrib if name.startswith("on")]
        assert element.get("src") is None
        assert element.get("href") in (None, "data:,")
    for canvas in tree.iter("canvas"):
        assert canvas.get("role") == "img" and canvas.get("aria-label")
    (button,) = tree.iter("button")
    assert (button.get("type"), button.text) == ("button", "Clear")
    assert [e.text for e in tree.iter("span") if e.get("class") == "name"] == list("0123456789")


def test_it_says_which_checkpoint_answers(trained: Trained, served: Demo) -> None:
    run = trained(*DIGITS)
    result = json.loads((run / "result.json").read_text())
    tree = parsed(served.ask("GET", "/").body)
    told = dict(
        zip((e.text for e in tree.iter("dt")), (e.text for e in tree.iter("dd")), strict=True)
    )
    assert told == {
        "checkpoint": str(run / "best.safetensors"),
        "model": "cnn",
        "trained on": "digits",
        "selected epoch": str(result["best"]["epoch"]),
        "validation accuracy": f"{result['best']['value']:.2%}",
        "test accuracy": f"{result['test']['accuracy']:.2%}",
    }
    assert served.checkpoint == told["checkpoint"]


def facts(path: Path) -> dict[str, str]:
    return facts_of(load(str(path), "cpu", Console(quiet=True)))


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "[1]",
        "[" * 100_000,
        '{"status": "", "config_hash": "", "best": {"step": STEP}, "test": [1]}',
        '{"status": "", "config_hash": "", "best": 1, "test": {"accuracy": 0.5}}',
        '{"status": "", "config_hash": "", "best": {"step": 1}, "test": {"accuracy": 0.5}}',
        '{"status": "", "config_hash": "", "best": {"step": STEP}, "test": {"accuracy": "<b>"}}',
        '{"status": "", "config_hash": "", "best": {"step": STEP}, "test": {"accuracy": 1e9}}',
        '{"status": "", "config_hash": "", "best": {"step": STEP}, "test": {"accuracy": NaN}}',
    ],
)
def test_a_result_of_something_else_is_left_away(trained: Trained, text: str | None) -> None:
    source = checkpoint.load(trained(*DIGITS) / "best.safetensors")
    Path("run").mkdir()
    checkpoint.save(Path("run/best.safetensors"), source)
    if text is not None:
        Path("run/result.json").write_text(text.replace("STEP", str(source.progress.step)))
    told = facts(Path("run"))
    assert "validation accuracy" in told and "test accuracy" not in told


def test_weights_that_were_not_selected_are_not_praised(trained: Trained) -> None:
    source = checkpoint.load(trained(*DIGITS) / "best.safetensors")
    progress = dataclasses.replace(source.progress, step=source.progress.step + 1000)
    checkpoint.save(Path("last.safetensors"), dataclasses.replace(source, progress=progress))
    told = facts(Path("last.safetensors"))
    assert told["step"] == f"{progress.step:,}, not the selected one"
    assert not [name for name in told if "accuracy" in name]


EVIL = '"></script><script>alert(1)</script>{{ 7*7 }}'


def test_texts_of_a_checkpoint_stay_texts(server: Server, trained: Trained) -> None:
    source = checkpoint.load(trained(*DIGITS) / "best.safetensors")
    spec = dataclasses.replace(source.spec, classes=tuple(f"{EVIL}{n}" for n in range(10)))
    path = Path("<b>&'.safetensors").absolute()
    checkpoint.save(path, dataclasses.replace(source, spec=spec))
    demo = started(server, path)
    page = demo.ask("GET", "/").body
    tree = parsed(page)
    assert len(list(tree.iter("script"))) == 1 and not list(tree.iter("b"))
    assert [e.text for e in tree.iter("span") if e.get("class") == "name"] == list(spec.classes)
    assert str(path) in [e.text for e in tree.iter("dd")]
    assert demo.answer(drawings(1)[0].tobytes())["label"] == f"{EVIL}0"
    assert demo.end(signal.SIGTERM).code == 0


# --- the command ---------------------------------------------------------------------------------


def refusal(server: Server, code: int, *words: str) -> tuple[str, str]:
    """The error and the hint of a demo that doesn't begin; in a process that can be ended."""
    ended = server.run(faults.program, ["demo", *words], timeout_s=30)
    assert (ended.code, ended.stdout) == (code, "")
    return faults.two_lines(ended.stderr)


def test_what_has_no_small_grey_pictures_is_refused(server: Server, trained: Trained) -> None:
    error, _ = refusal(server, 2, f"checkpoint={trained(*LINE)}")
    assert "trained on linear, which holds numbers" in error
    source = checkpoint.load(
        trained("dataset=digits", "model=linear", "epochs=1") / "best.safetensors"
    )
    config = json.loads(json.dumps(dataclasses.asdict(source.config)))
    config["dataset"] = {"name": "cifar10", "val_fraction": 0.1, "root": None, "mirror": None}
    color = dataclasses.replace(
        source,
        config=train_config(config),
        spec=dataclasses.replace(
            source.spec, name="cifar10", input_shape=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3
        ),
        model={
            name: torch.zeros(10, 3072) if tensor.dim() == 2 else tensor
            for name, tensor in source.model.items()
        },
        optim={},
    )
    checkpoint.save(Path("color.safetensors"), color)
    error, hint = refusal(server, 2, f"checkpoint={Path('color.safetensors').absolute()}")
    assert "trained on cifar10, 32x32 pixels in 3 channels" in error
    assert "predict" in hint
    refusal(server, 4, "checkpoint=nowhere")


def test_a_port_that_is_taken_is_refused(mnist_cli: Program, served: Demo) -> None:
    outcome = mnist_cli("demo", f"checkpoint={served.checkpoint}", f"port={served.port}", "--json")
    assert outcome.code == 2
    assert outcome.error == f"port={served.port} can't be used: Address already in use"
    assert outcome.hint == "type another one, or leave port= out to get a free one"
    assert json.loads(outcome.stdout)["exit_code"] == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_whatever_its_clients_do(
    server: Server, trained: Trained, number: int
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["demo", f"checkpoint={trained(*DIGITS)}", f"port={port}", "open=false", "--quiet"]
    child = server.start(faults.program, words)
    child.wait_for(lambda: "\n" in child.stdout())
    demo = Demo(child, child.stdout().split()[-1], "")
    assert demo.url == f"http://127.0.0.1:{port}/"
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: ")
        assert demo.ask("GET", "/").status == 200
        ended = demo.end(number)
        assert connection.recv(100) == b""
    assert (ended.code, ended.stdout, ended.stderr) == (0, f"page     {demo.url}\n", "")
    # At once at the same place; and through hydra.main, as any line that speaks of Hydra.
    again = started(server, trained(*DIGITS), f"port={port}", "hydra.verbose=x")
    assert again.url == demo.url
    ended = again.end(number)
    assert (ended.code, ended.stdout.count("\n")) == (0, 1)


def test_it_opens_the_browser_and_ends_with_ctrl_c(trained: Trained) -> None:
    Path("browser").write_text('#!/bin/sh\necho "$1" > opened.new && mv opened.new opened\n')
    Path("browser").chmod(0o755)
    environment = {"BROWSER": str(Path("browser").absolute()), "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        [sys.executable, "-m", "mnist_cli", "demo", f"checkpoint={trained(*DIGITS)}"],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    lines = [child.stdout.readline() for _ in range(3)]
    url = lines[1].split()[-1]
    assert lines == ["model    cnn, trained on digits\n", f"page     {url}\n", "stop     Ctrl-C\n"]
    with urlopen(url, timeout=30) as page:
        assert b"Draw a digit" in page.read()
    while not Path("opened").exists():
        assert child.poll() is None
    assert Path("opened").read_text() == f"{url}\n"
    child.send_signal(signal.SIGINT)
    assert child.wait(30) == 0
    assert child.stdout.read() == "\nstopped\n"
    child.stdout.close()


# --- in a browser --------------------------------------------------------------------------------

# Points of a stroke, from the upper left corner of the paper, in units of its side.
ONE = [(0.54, 0.14), (0.51, 0.5), (0.48, 0.86)]
ZERO = [
    (0.5 + 0.24 * np.sin(angle), 0.5 - 0.34 * np.cos(angle))
    for angle in np.linspace(0, 2 * np.pi, 25).tolist()
]


def places(tab: Any, stroke: list[tuple[float, float]]) -> list[tuple[float, float]]:
    tab.locator("#pad").scroll_into_view_if_needed()
    box = tab.locator("#pad").bounding_box()
    return [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in stroke]


def draw_with_mouse(tab: Any, stroke: list[tuple[float, float]]) -> None:
    first, *rest = places(tab, stroke)
    tab.mouse.move(*first)
    tab.mouse.down()
    for place in rest:
        tab.mouse.move(*place, steps=3)
    tab.mouse.up()


def draw_with_finger(tab: Any, stroke: list[tuple[float, float]]) -> None:
    session = tab.context.new_cdp_session(tab)
    kinds = ["touchStart", *["touchMove"] * (len(stroke) - 1)]
    for kind, (x, y) in zip(kinds, places(tab, stroke), strict=True):
        event = {"type": kind, "touchPoints": [{"x": x, "y": y}]}
        session.send("Input.dispatchTouchEvent", event)
    session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


def wait_for(tab: Any, label: str) -> None:
    tab.wait_for_function("label => document.getElementById('label').value === label", arg=label)


def canvas(tab: Any, name: str) -> Image.Image:
    url = tab.locator(name).evaluate("canvas => canvas.toDataURL()")
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def shows_what_the_model_sees(tab: Any) -> bool:
    """Whether the small picture is what is made of the large one, as it stands now."""
    seen = canvas(tab, "#seen")
    spec = DatasetSpec("digits", "classification", (1, *seen.size), (), (), (), "")
    made = pictures.prepare(canvas(tab, "#pad").getchannel("A"), spec)
    return seen.convert("L").tobytes() == made.numpy().tobytes()


class Watched(NamedTuple):
    tab: Any
    asked: list[str]
    said: list[str]


def watched(browser: Any, url: str, **options: Any) -> Watched:
    """A tab with the page; what it asks for and complains of is noted."""
    tab = browser.new_context(**options).new_page()
    asked: list[str] = []
    said: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto(url)
    return Watched(tab, asked, said)


DEVICES = {
    "desktop": ({"viewport": {"width": 1200, "height": 800}}, draw_with_mouse),
    "phone": (
        {"viewport": {"width": 360, "height": 740}, "has_touch": True, "color_scheme": "dark"},
        draw_with_finger,
    ),
}


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_drawn_is_recognized(served: Demo, browser: Any, device: str) -> None:
    options, draw = DEVICES[device]
    tab, asked, said = watched(browser, served.url, **options)
    for label, stroke in (("1", ONE), ("0", ZERO)):
        draw(tab, stroke)
        served.child.wait_for(lambda tab=tab: shows_what_the_model_sees(tab))
        assert tab.locator("li.answer .name").inner_text() == label
        share = float(tab.locator("li.answer .share").inner_text().rstrip("%"))
        assert share > 50
        shares = tab.locator(".share").all_inner_texts()
        assert sum(float(text.rstrip("%")) for text in shares) == pytest.approx(100, abs=0.1)
        assert tab.locator("#seen").evaluate("e => getComputedStyle(e).imageRendering") == (
            "pixelated"
        )
        tab.locator("#clear").focus()
        tab.keyboard.press("Enter")
        wait_for(tab, "")
        assert set(tab.locator(".share").all_inner_texts()) == {"-"}
    assert tab.evaluate("document.documentElement.scrollWidth") <= options["viewport"]["width"]
    assert set(asked) == {served.url, f"{served.url}answer"}
    assert said == []
    tab.context.close()


def test_real_digits_are_recognized_too(
    server: Server, trained: Trained, real_mnist: Path, browser: Any
) -> None:
    demo = started(server, trained("model=mlp", "epochs=1", f"dataset.root={real_mnist}"))
    tab, asked, said = watched(browser, demo.url)
    for label, stroke in (("1", ONE), ("0", ZERO)):
        draw_with_mouse(tab, stroke)
        wait_for(tab, label)
        tab.locator("#clear").click()
        wait_for(tab, "")
    assert set(asked) == {demo.url, f"{demo.url}answer"}
    assert demo.end().code == 0
    assert said == []
    draw_with_mouse(tab, ONE)
    tab.locator("#notice").get_by_text("can't be reached").wait_for()
    tab.context.close()


def test_clearing_ends_what_is_asked(served: Demo, browser: Any) -> None:
    tab, asked, said = watched(browser, served.url)
    held: list[Any] = []
    tab.route("**/answer", lambda route: held.append(route), times=1)
    draw_with_mouse(tab, ZERO)
    tab.locator("#clear").click()
    [question] = held
    question.continue_()
    tab.wait_for_function("() => !isAsking")
    assert tab.locator("#notice").inner_text() == ""
    assert set(tab.locator(".share").all_inner_texts()) == {"-"}
    assert asked == [served.url, f"{served.url}answer"]
    assert said == []
    tab.context.close()


def test_the_page_can_reach_nothing_else(served: Demo, browser: Any) -> None:
    tab, asked, said = watched(browser, served.url)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        elsewhere = f"http://127.0.0.1:{other.getsockname()[1]}/"
        refused = tab.evaluate(
            """async (url) => {
                const broken = [];
                document.addEventListener("securitypolicyviolation", (event) =>
                    broken.push(event.effectiveDirective));
                await fetch(url).catch(() => null);
                for (const [name, key] of [["img", "src"], ["script", "src"], ["iframe", "src"]]) {
                    const element = document.createElement(name);
                    element[key] = url;
                    document.body.append(element);
                }
                const inline = document.createElement("script");
                inline.textContent = "document.title = 'broken'";
                document.body.append(inline);
                await new Promise((done) => setTimeout(done, 200));
                return broken.sort();
            }""",
            elsewhere,
        )
    expected = ["connect-src", "frame-src", "img-src", "script-src-elem", "script-src-elem"]
    assert refused == expected
    assert tab.title() == "Draw a digit - mnist-cli demo"
    assert said and set(asked) <= {served.url, elsewhere}
    tab.context.close()
