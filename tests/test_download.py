"""Downloads from real https servers on 127.0.0.1, well-behaved and hostile."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from data_files import (
    downloads,
    gzip_bomb,
    pack,
    part_contents,
    small_source,
    write,
    write_mnist_like,
)
from faults import figure

from mnist_cli.dataset import download, image_files, sources
from mnist_cli.dataset.download import LOCK_FILE, STAGING_FOLDER, fetch
from mnist_cli.dataset.sources import Source
from mnist_cli.dataset.transfer import Patience, patience_from_environment
from mnist_cli.errors import DataError, UsageError

ROOT = Path(__file__).parents[1]
SHORT = Patience(
    total_s=2.0, first_byte_s=1.5, socket_s=0.4, least_rate=5_000, tries=3, backoff_s=0.01
)
PATIENT = Patience(total_s=40.0, first_byte_s=20.0, socket_s=10.0, tries=3, backoff_s=0.01)
SLOW = ("slow body", "slow header", "silent", "stops in the middle")
IMAGES = "train-images-idx3-ubyte.gz"


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MNIST_CLI_DOWNLOAD_TIMEOUT", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for 127.0.0.1, its key in the same file."""
    folder = tmp_path_factory.mktemp("certificate")
    key, path = folder / "key.pem", folder / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + key.read_bytes())
    return path


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` by name; `behave` may answer in its stead, and then returns True."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, certificate: Path | None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.behave: Callable[[Handler, str], bool] = lambda handler, name: False
        self.requests: list[str] = []
        self.ended = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(
                self.socket, server_side=True, do_handshake_on_connect=False
            )
            self.url = f"https://127.0.0.1:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves is no error of the server's."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.server.requests.append(name)
        if not self.server.behave(self, name):
            self.answer(self.server.files.get(name))

    def answer(self, content: bytes | None, status: int = 200, length: int | None = None) -> None:
        self.send_response(404 if content is None else status)
        self.send_header("Content-Length", str(len(content or b"") if length is None else length))
        self.end_headers()
        self.wfile.write(content or b"")

    def trickle(self, content: bytes) -> None:
        """Byte by byte, until the client leaves or the test ends."""
        for index in range(len(content)):
            self.wfile.write(content[index : index + 1])
            if self.server.ended.wait(0.05):
                return

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def start(certificate: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start_server(tls: bool = True) -> Server:
        server = Server(certificate if tls else None)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    yield start_server
    for server in servers:
        server.ended.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def trusted(certificate: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificate))


def small(name: str = "fashion_mnist", num_train: int = 40, num_test: int = 20) -> Source:
    return small_source(name, num_train, num_test)


def files_below(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()}


# --- well-behaved --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fashion_mnist", "emnist-letters", "cifar10"])
def test_success(name: str, tmp_path: Path, start: Callable[..., Server], trusted: Any) -> None:
    server = start()
    counts = (50, 10) if name == "cifar10" else (52, 26)
    source, server.files = downloads(small(name, *counts))
    root = tmp_path / "deep" / "root"
    decoded = image_files.load(source, str(root), server.url[:-1], PATIENT, trusted)
    assert len(decoded.train_labels) == counts[0]
    assert sorted(server.requests) == sorted(server.files)
    assert not (root / STAGING_FOLDER).exists()
    kept = set() if source.archive is None else {source.archive.path}
    suffix = "" if name == "cifar10" else ".gz"
    parts = {f"{source.folder}/{part.file}{suffix}" for part in source.parts}
    assert files_below(root) == {LOCK_FILE} | kept | parts
    assert image_files.load(source, str(root)).digest == decoded.digest


def test_only_what_is_missing_is_fetched(
    tmp_path: Path, start: Callable[..., Server], trusted: Any
) -> None:
    server = start()
    source, server.files = downloads(small())
    write(tmp_path / source.folder / IMAGES[:-3], part_contents(source)[IMAGES[:-3]])
    fetch(source, tmp_path, server.url, PATIENT, trusted)
    assert len(server.requests) == 3 and IMAGES not in server.requests


def test_only_what_lacks_is_named(tmp_path: Path) -> None:
    """In a flat folder too, to which nothing is downloaded."""
    source, _ = downloads(small())
    *there, last = source.parts
    for part in there:
        (tmp_path / part.file).write_bytes(b"")
    with pytest.raises(DataError) as caught:
        image_files.load(source, str(tmp_path), "https://127.0.0.1:9/", SHORT)
    assert caught.value.message.startswith(f"{source.name}: {last.file} not found in ")


def test_next_mirror(tmp_path: Path, start: Callable[..., Server], trusted: Any) -> None:
    """Refused, missing, wrong, right."""
    missing, wrong, right = start(), start(), start()
    source, right.files = downloads(small())
    wrong.files = dict.fromkeys(right.files, gzip.compress(b"something else"))
    nobody = socket.create_server(("127.0.0.1", 0))
    refused = f"https://127.0.0.1:{nobody.getsockname()[1]}/"
    nobody.close()
    source = replace(source, mirrors=(refused, missing.url, wrong.url, right.url))
    fetch(source, tmp_path, None, PATIENT, trusted)
    assert len(right.requests) == len(wrong.requests) == len(missing.requests) == 4
    assert source.find(tmp_path) is not None


def test_tries_again(tmp_path: Path, start: Callable[..., Server], trusted: Any) -> None:
    server = start()
    source, server.files = downloads(small())

    def behave(handler: Handler, name: str) -> bool:
        first = server.requests.count(name) == 1
        if first:
            handler.answer(b"busy", 503)
        return first

    server.behave = behave
    fetch(source, tmp_path, server.url, PATIENT, trusted)
    assert len(server.requests) == 8 and source.find(tmp_path) is not None


def test_redirect_to_https_is_followed(
    tmp_path: Path, start: Callable[..., Server], trusted: Any
) -> None:
    first, second = start(), start()
    source, second.files = downloads(small())
    first.behave = redirecting(lambda name: f"{second.url}{name}")
    fetch(source, tmp_path, first.url, PATIENT, trusted)
    assert source.find(tmp_path) is not None


def test_archive_that_lies_there_already(tmp_path: Path, start: Callable[..., Server]) -> None:
    source, served = downloads(small("cifar10", 50, 10))
    path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(served[path.name])
    fetch(source, tmp_path, "https://127.0.0.1:9/", SHORT)
    assert source.find(tmp_path) is not None
    shutil.rmtree(tmp_path / source.folder)
    path.write_bytes(served[path.name] + b"x")
    with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz: expected md5"):
        fetch(source, tmp_path, "https://127.0.0.1:9/", SHORT)


def test_recompressed_mnist_has_the_right_content(
    tmp_path: Path, start: Callable[..., Server], trusted: Any
) -> None:
    here = ROOT.parent / "shared" / "mnist"
    real = Path(os.environ.get("MNIST_CLI_DATA") or here)
    if not real.is_dir():
        pytest.skip("the real MNIST is not here: set MNIST_CLI_DATA")
    server = start()
    server.files = {path.name: path.read_bytes() for path in real.glob("*.gz")}
    labels = "t10k-labels-idx1-ubyte.gz"
    server.files[labels] = gzip.compress(gzip.decompress(server.files[labels]), 1)
    fetch(sources.MNIST, tmp_path, server.url, PATIENT, trusted)
    assert sources.MNIST.find(tmp_path) is not None


def test_the_catalogue_agrees_with_torchvision() -> None:
    from torchvision import datasets

    for source in (sources.MNIST, sources.FASHION_MNIST, sources.KMNIST):
        assert set(download.published_md5(source)) == {f"{part.file}.gz" for part in source.parts}
    assert download.published_md5(sources.emnist("letters")) == {"gzip.zip": datasets.EMNIST.md5}
    assert list(download.published_md5(sources.CIFAR10)) == ["cifar-10-binary.tar.gz"]
    assert list(sources.FASHION_MNIST.classes) == datasets.FashionMNIST.classes
    assert list(sources.KMNIST.classes) == datasets.KMNIST.classes
    for split in datasets.EMNIST.splits:
        known = [name for name in datasets.EMNIST.classes_split_dict[split] if name != "N/A"]
        assert list(sources.emnist(split).classes) == known
    for source in (*sources.SOURCES.values(), sources.emnist("digits")):
        assert source.mirrors and all(mirror.startswith("https://") for mirror in source.mirrors)


# --- hostile -------------------------------------------------------------------------------------


def redirecting(target: Callable[[str], str]) -> Callable[[Handler, str], bool]:
    def behave(handler: Handler, name: str) -> bool:
        handler.send_response(302)
        handler.send_header("Location", target(name))
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return True

    return behave


def status(code: int) -> Callable[[Handler, str, bytes], None]:
    return lambda handler, name, good: handler.answer(b"no", code)


def html(handler: Handler, name: str, good: bytes) -> None:
    handler.answer(b"<!DOCTYPE html><html><body>Log in to the hotel's network</body></html>")


def slow_body(handler: Handler, name: str, good: bytes) -> None:
    handler.answer(b"", length=len(good))
    handler.trickle(good)


def slow_header(handler: Handler, name: str, good: bytes) -> None:
    handler.trickle(b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 4000)


def silent(handler: Handler, name: str, good: bytes) -> None:
    handler.server.ended.wait(5)


def stops_in_the_middle(handler: Handler, name: str, good: bytes) -> None:
    handler.answer(good[: len(good) // 2], length=len(good))
    handler.wfile.flush()
    handler.server.ended.wait(5)


def cut_at_half(handler: Handler, name: str, good: bytes) -> None:
    handler.answer(good[: len(good) // 2], length=len(good))


def longer_than_announced(handler: Handler, name: str, good: bytes) -> None:
    handler.answer(good, length=len(good) - 10)


def endless(handler: Handler, name: str, good: bytes) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(good)
    while not handler.server.ended.is_set():
        handler.wfile.write(bytes(1 << 16))


def endless_redirect(handler: Handler, name: str, good: bytes) -> None:
    handler.send_response(302)
    handler.send_header("Location", handler.server.url + name)
    handler.end_headers()
    while not handler.server.ended.is_set():
        handler.wfile.write(bytes(1 << 16))


def announces_a_petabyte(handler: Handler, name: str, good: bytes) -> None:
    handler.answer(good, length=10**15)


def negative_length(handler: Handler, name: str, good: bytes) -> None:
    handler.answer(good + b"x", length=-5)


def bomb(handler: Handler, name: str, good: bytes) -> None:
    handler.answer(gzip_bomb())


def no_http(handler: Handler, name: str, good: bytes) -> None:
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n")


def hangs_up(handler: Handler, name: str, good: bytes) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def chunks_cut(handler: Handler, name: str, good: bytes) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    handler.wfile.write(f"{len(good):x}\r\n".encode() + good[:100])


def wrong_chunk_size(handler: Handler, name: str, good: bytes) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" + good)


def many_headers(handler: Handler, name: str, good: bytes) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 1000 + b"\r\n" + good)


HOSTILE: dict[str, tuple[Callable[[Handler, str, bytes], object], str]] = {
    "404": (status(404), "HTTP status 404"),
    "403": (status(403), "HTTP status 403"),
    "500": (status(500), "HTTP status 500"),
    "503": (status(503), "HTTP status 503"),
    "no content": (lambda handler, name, good: handler.answer(b"", 204), "expected md5"),
    "html": (html, "expected md5"),
    "redirect to http": (
        lambda handler, name, good: redirecting(lambda n: f"http://127.0.0.1:9/{n}")(handler, name),
        "redirected to http://127.0.0.1:9/",
    ),
    "redirect to a file": (
        lambda handler, name, good: redirecting(lambda n: "file:///etc/passwd")(handler, name),
        "HTTP status 302",
    ),
    "redirect in circles": (
        lambda handler, name, good: redirecting(lambda n: handler.server.url + n)(handler, name),
        "HTTP status 302",
    ),
    "endless redirect": (endless_redirect, "HTTP status 302"),
    "slow body": (slow_body, "only"),
    "slow header": (slow_header, "nothing received within 1.5 s"),
    "silent": (silent, "timed out"),
    "stops in the middle": (stops_in_the_middle, "timed out"),
    "cut at half": (cut_at_half, "found an end after"),
    "longer than announced": (longer_than_announced, "expected md5"),
    "endless": (endless, "found more"),
    "announces a petabyte": (announces_a_petabyte, "found 1000000000000000"),
    "negative length": (negative_length, "expected md5"),
    "wrong content": (
        lambda handler, name, good: handler.answer(gzip.compress(bytes(40_000))),
        "expected md5",
    ),
    "one bit": (
        lambda handler, name, good: handler.answer(bytes([good[0] ^ 1]) + good[1:]),
        "expected md5",
    ),
    "gzip bomb": (bomb, "expected md5"),
    "not http": (no_http, "nor downloaded"),
    "hangs up": (hangs_up, "nor downloaded"),
    "chunks cut": (chunks_cut, "IncompleteRead"),
    "wrong chunk size": (wrong_chunk_size, "IncompleteRead"),
    "many headers": (many_headers, "headers"),
}


@pytest.mark.torture
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_server(
    case: str, tmp_path: Path, start: Callable[..., Server], trusted: Any
) -> None:
    server = start()
    source, server.files = downloads(small())
    answer, found = HOSTILE[case]

    def behave(handler: Handler, name: str) -> bool:
        if name == IMAGES:
            answer(handler, name, server.files[name])
        return name == IMAGES

    server.behave = behave
    patience = SHORT if case in SLOW else PATIENT
    unavailable(source, tmp_path, server.url, found, trusted, patience)
    assert server.requests.count(IMAGES) <= 3 or "redirect" in case


def unavailable(
    source: Source,
    root: Path,
    mirror: str | None,
    found: str,
    context: ssl.SSLContext | None,
    patience: Patience = PATIENT,
) -> None:
    started = time.monotonic()
    with pytest.raises(DataError) as caught:
        image_files.load(source, str(root), mirror, patience, context)
    assert time.monotonic() - started < 2 * patience.total_s
    error = caught.value
    assert found in error.message and source.parts[0].file in error.message
    assert "dataset=digits" in error.hint and "MNIST_CLI_DATA" in error.hint
    assert files_below(root) - {LOCK_FILE} == set() and not (root / STAGING_FOLDER).exists()
    figure("hostile download servers")


@pytest.mark.torture
def test_pinned_content_needs_no_md5(
    tmp_path: Path, start: Callable[..., Server], trusted: Any
) -> None:
    """A bomb and a wrong file that no md5 stops are stopped by what is in them."""
    server = start()
    source, good = downloads(small())
    pinned = tuple(replace(part, sha256="0" * 64) for part in source.train)
    source = replace(source, train=pinned)
    server.files = good
    unavailable(source, tmp_path, server.url, "with SHA-256 000", trusted)
    server.behave = lambda handler, name: bomb(handler, name, b"") or True
    unavailable(source, tmp_path, server.url, "expected IDX magic", trusted)


@pytest.mark.torture
def test_untrusted_certificate(tmp_path: Path, start: Callable[..., Server]) -> None:
    server = start()
    source, server.files = downloads(small())
    untrusting = ssl.create_default_context()
    unavailable(source, tmp_path, server.url, "CERTIFICATE_VERIFY_FAILED", untrusting)


@pytest.mark.torture
def test_http_behind_an_https_address(
    tmp_path: Path, start: Callable[..., Server], trusted: Any
) -> None:
    server = start(tls=False)
    source, server.files = downloads(small())
    unavailable(source, tmp_path, server.url.replace("http:", "https:"), "SSL", trusted)
    assert server.requests == []


@pytest.mark.parametrize("mirror", ["http://127.0.0.1:9/", "ftp://h/", "file:///etc/", "h"])
def test_nothing_but_https_is_asked(mirror: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="only https is used"):
        image_files.load(small(), str(tmp_path), mirror, SHORT)


@pytest.mark.parametrize("seconds", ["abc", "0", "-1", "nan", "inf", "1e999"])
def test_timeout_has_to_be_seconds(
    seconds: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MNIST_CLI_DOWNLOAD_TIMEOUT", seconds)
    with pytest.raises(UsageError, match="MNIST_CLI_DOWNLOAD_TIMEOUT="):
        fetch(small(), tmp_path / "root")
    assert not (tmp_path / "root").exists()


def test_timeout_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNIST_CLI_DOWNLOAD_TIMEOUT", "12.5")
    assert patience_from_environment() == Patience(total_s=12.5)


@pytest.mark.torture
def test_no_network(tmp_path: Path) -> None:
    source = replace(small(), mirrors=("https://nowhere.invalid/", "https://127.0.0.1:9/"))
    unavailable(replace(source, md5={}), tmp_path, None, "nor downloaded: https://", None)


def test_pickled_cifar_is_explained(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    source = replace(small("cifar10", 50, 10), mirrors=("https://127.0.0.1:9/",))
    with pytest.raises(DataError) as caught:
        fetch(source, tmp_path, None, SHORT)
    assert "cifar-10-batches-py is not read, because pickle" in caught.value.hint
    assert "cifar-10-batches-bin" in caught.value.hint and "dataset=digits" in caught.value.hint


ARCHIVES: dict[str, Callable[[dict[str, bytes]], dict[str, bytes]]] = {
    "a member is missing": lambda contents: dict(list(contents.items())[1:]),
    "a member is too short": lambda contents: contents | {"data_batch_1.bin": b"short"},
    "a member is too long": lambda contents: contents | {"data_batch_1.bin": bytes(3 << 20)},
    "a member is elsewhere": lambda contents: {f"../{name}": c for name, c in contents.items()},
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_archive_with_the_right_md5_and_wrong_members(case: str, tmp_path: Path) -> None:
    source = small("cifar10", 50, 10)
    packed = pack(source, ARCHIVES[case](part_contents(source)))
    path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(packed)
    source = replace(source, md5={path.name: hashlib.md5(packed).hexdigest()})
    with pytest.raises(DataError, match=r"data_batch_1\.bin.*expected.*found"):
        fetch(source, tmp_path, "https://127.0.0.1:9/", SHORT)
    assert files_below(tmp_path) == {LOCK_FILE, path.name}


# --- the folder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ["file", "file/below", "/proc/nowhere"])
def test_root_that_cannot_be_written_to(root: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match=r"can't be downloaded there") as caught:
        image_files.load(small(), str(tmp_path / root), "https://127.0.0.1:9/", SHORT)
    assert "MNIST_CLI_DATA" in caught.value.hint and "dataset=digits" in caught.value.hint
    assert files_below(tmp_path) == {"file"}


@pytest.mark.parametrize("name", [LOCK_FILE, STAGING_FOLDER])
def test_links_in_the_way_are_not_followed(name: str, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine")
    root = tmp_path / "root"
    root.mkdir()
    (root / name).symlink_to(precious / "file" if name == LOCK_FILE else precious)
    with pytest.raises(DataError, match="can't be downloaded there"):
        fetch(small(), root, "https://127.0.0.1:9/", SHORT)
    assert (precious / "file").read_text() == "mine"


def test_lock_that_is_never_given_up(tmp_path: Path) -> None:
    with download._locked(tmp_path, 1.0), pytest.raises(DataError, match="another process"):
        fetch(small(), tmp_path, "https://127.0.0.1:9/", replace(SHORT, total_s=0.2))


def test_read_only_root_with_good_files_is_not_touched(tmp_path: Path) -> None:
    root = tmp_path / "root"
    source = write_mnist_like(root, "fashion_mnist", 40, 20)
    before = files_below(root)
    image_files.load(source, str(root))
    assert files_below(root) == before


# --- many processes, and killed ones -------------------------------------------------------------

PROGRAM = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from data_files import downloads, small_source
from mnist_cli.dataset.download import fetch
from mnist_cli.dataset.transfer import Patience
from mnist_cli.errors import MnistCliError

task, root, mirror = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
source = downloads(small_source("fashion_mnist", 40, 20))[0]
patience = Patience(total_s=20)

def start():
    child = os.fork()
    if child:
        return child
    try:
        fetch(source, root, mirror, patience)
    except MnistCliError as error:
        print(error, flush=True)
        os._exit(error.exit_code)
    os._exit(0)

def wait(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

if task == "together":
    children = [start() for _ in range(8)]
    print(json.dumps([wait(child) for child in children]))
elif task == "killed":
    codes = []
    for number in range(25):
        child = start()
        time.sleep(0.01 * number)
        os.kill(child, signal.SIGKILL)
        codes.append(wait(child))
    print(json.dumps([codes, wait(start())]))
elif task == "disks":
    full = wait(start())
    subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
    print(json.dumps([full, wait(start())]))
"""


def run_program(task: str, root: Path, server: Server, certificate: Path, *shell: str) -> str:
    environment = os.environ | {
        "SSL_CERT_FILE": str(certificate),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }
    command = [*shell, sys.executable, "-c", PROGRAM, task, str(root), server.url]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_eight_processes_fetch_each_file_once(
    tmp_path: Path, start: Callable[..., Server], certificate: Path
) -> None:
    server = start()
    source, server.files = downloads(small())
    assert json.loads(run_program("together", tmp_path, server, certificate)) == [0] * 8
    assert sorted(server.requests) == sorted(server.files)
    assert image_files.load(source, str(tmp_path)).train_images.shape == (40, 1, 28, 28)


def test_killed_downloads_leave_nothing_in_the_way(
    tmp_path: Path, start: Callable[..., Server], certificate: Path
) -> None:
    server = start()
    source, server.files = downloads(small())

    def behave(handler: Handler, name: str) -> bool:
        content = server.files[name]
        handler.answer(content[: len(content) // 2], length=len(content))
        time.sleep(0.02)
        handler.wfile.write(content[len(content) // 2 :])
        return True

    server.behave = behave
    codes, last = json.loads(run_program("killed", tmp_path, server, certificate))
    assert set(codes) <= {-9, 0} and codes.count(-9) >= 3 and last == 0
    assert image_files.load(source, str(tmp_path)).train_images.shape == (40, 1, 28, 28)
    # Empty, where a kill came between the last file and the removal of the folder.
    assert list(tmp_path.glob(f"{STAGING_FOLDER}/*")) == []


def test_full_and_read_only_disk(
    tmp_path: Path, start: Callable[..., Server], certificate: Path
) -> None:
    mount = f'mount -t tmpfs -o size=8k none {tmp_path} && exec "$@"'
    shell = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    allowed = (
        shutil.which("unshare")
        and not subprocess.run([*shell, "true"], capture_output=True, check=False).returncode
    )
    if not allowed:
        pytest.skip("this kernel gives no mount namespace to an unprivileged user")
    server = start()
    _, server.files = downloads(small())
    output = run_program("disks", tmp_path, server, certificate, *shell).splitlines()
    assert "No space left on device" in output[0]
    assert "Read-only file system" in output[1]
    assert json.loads(output[2]) == [6, 3]
