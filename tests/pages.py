"""Pages as a browser understands them; used by the tests of reports."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import html5lib

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7*7 }}$x^2$@1@'


def parsed(path: Path) -> Element:
    """The page as a browser understands it; raises where it isn't sound HTML."""
    parser = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # html5lib's own, of the names of SVG's attributes
        found: Element = parser.parse(path.read_text())
    return found


def text_of(path: Path) -> str:
    return " ".join(" ".join(parsed(path).itertext()).split())


def assert_loads_nothing(path: Path) -> None:
    tree = parsed(path)
    names = {element.tag for element in tree.iter() if isinstance(element.tag, str)}
    assert not names & {"script", "link", "iframe", "object", "embed", "form", "base", "a"}
    for element in tree.iter():
        for name, value in element.attrib.items():
            assert not str(name).startswith("on")
            if str(name).endswith(("src", "href")):
                assert value.startswith(("data:image/png;base64,", "#")), value
            assert "url(" not in value.replace("url(#", "")
    (policy,) = [e for e in tree.iter("meta") if e.get("http-equiv")]
    assert policy.get("content", "").startswith("default-src 'none';")
    assert "script-src" not in policy.get("content", "")
    ids = [element.get("id") for element in tree.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    for image in [*tree.iter("img"), *tree.iter("{http://www.w3.org/2000/svg}svg")]:
        assert image.get("alt") or image.get("aria-label")


def assert_asks_for_nothing(browser: Any, pages: Sequence[Path], width: int) -> None:
    """Chromium loads nothing but the pages themselves, and says nothing of them."""
    tab = browser.new_page(viewport={"width": width, "height": 800})
    asked: list[str] = []
    said: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    for path in pages:
        tab.goto(path.as_uri(), wait_until="networkidle")
        assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
        assert said == []
        asked.clear()
        # Nothing is cut off at the side, not even on a phone.
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate(
            "[...document.images].every(image => image.complete && image.naturalWidth > 0)"
        )
    tab.close()
