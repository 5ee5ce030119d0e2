"""What the page of the demo is answered, and who is answered at all.

    GET /         the page
    POST /answer  the pixels of a drawing: what the model sees of it, and what it takes it for

Other machines can't reach the socket. Other sites, which a browser on this machine may show, can:
they are told apart by the headers Host (a foreign name that was made to lead here) and Origin (a
foreign page that posts). A drawing comes as bare pixels of one fixed number, so that no decoder
reads what comes in.

All is answered in the one thread of the event loop, one drawing after the other: each takes
milliseconds, and neither torch nor Pillow has to be safe for several threads.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from mnist_cli import __version__, pictures
from mnist_cli.errors import MnistCliError
from mnist_cli.trained import Trained

SIDE = 420  # pixels of a drawing, on each side
PIXELS = "application/octet-stream"
MAX_CONNECTIONS = 32
UPLOAD_S = 2.0  # a whole drawing comes in a millisecond
_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self';"
    " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = [
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cache-Control", "no-store"),
]


def build_app(model: Trained, facts: Mapping[str, str], hosts: Sequence[str]) -> Starlette:
    """The application.

    Args:
        model: takes grey pictures of at most SIDE x SIDE.
        facts: what the page says of it, by name.
        hosts: the values of the header Host that are answered, such as 127.0.0.1:8000.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("page.html.j2")
    values = {
        "classes": model.spec.classes,
        "subject": _subject(model),
        "size": model.spec.input_shape[1:],
        "side": SIDE,
        "type": PIXELS,
        "facts": facts,
        "version": __version__,
    }

    async def page(request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        policy = _CONTENT_SECURITY_POLICY.format(nonce=nonce)
        return HTMLResponse(
            template.render(values, nonce=nonce), headers={"Content-Security-Policy": policy}
        )

    async def answer(request: Request) -> Response:
        if request.headers.get("content-type") != PIXELS:
            raise HTTPException(415, f"a drawing is sent as {PIXELS}")
        try:
            async with asyncio.timeout(UPLOAD_S):
                pixels = await request.body()
        except (TimeoutError, ClientDisconnect):
            raise HTTPException(408) from None
        if len(pixels) != SIDE * SIDE:
            raise HTTPException(400, f"a drawing has {SIDE}x{SIDE} pixels of a byte each")
        try:
            return JSONResponse(answer_of(model, pixels))
        except MnistCliError as error:
            return JSONResponse({"error": error.message}, 422)

    return Starlette(
        routes=[Route("/", page), Route("/answer", answer, methods=["POST"])],
        middleware=[Middleware(OwnPage, hosts=frozenset(hosts))],
        max_body_size=SIDE * SIDE,
    )


def settings(app: Starlette) -> uvicorn.Config:
    """How `app` is served: nothing is logged but faults, and no client can hold up the end."""
    return uvicorn.Config(
        app,
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="off",
        interface="asgi3",
        proxy_headers=False,
        server_header=False,
        headers=_HEADERS,
        log_config=None,
        log_level="error",
        access_log=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=2 * round(UPLOAD_S),
    )


def answer_of(model: Trained, pixels: bytes) -> dict[str, Any]:
    """What `predict` says of a file with these pixels, and under `seen` the picture it is said of.

    Args:
        pixels: SIDE rows of SIDE bytes, light ink on black.

    Raises:
        DataError: nothing is drawn.
        CheckpointError: the model gives no sound answer.
    """
    drawing = Image.frombytes("L", (SIDE, SIDE), pixels)
    seen = pictures.prepare(drawing, model.spec)  # (1, H, W) uint8
    return model.label([seen])[0] | {"seen": seen.flatten().tolist()}


def _subject(model: Trained) -> str:
    """What one is asked to draw."""
    if model.spec.classes == tuple("0123456789"):
        return "digit"
    return "character" if model.spec.name in pictures.LAYOUTS else "picture"


class OwnPage:
    """Refuses what neither a person asks for nor the page itself.

    A foreign site that has its own name resolve to this machine is known by the header Host, a
    foreign page that posts here by the header Origin, which every browser adds to a post.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if host not in self._hosts:
            refused = PlainTextResponse("this is not the name of the demo", 421)
            await refused(scope, receive, send)
        elif scope["method"] not in ("GET", "HEAD") and headers.get("origin") != f"http://{host}":
            refused = PlainTextResponse("only the page of the demo is answered", 403)
            await refused(scope, receive, send)
        else:
            await self._app(scope, receive, send)
