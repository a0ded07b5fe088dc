"""A page as its readers have it: its tags, tables and text, its pixels in a browser; for tests."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """What is in a page: tags with attributes, tables, and the text that a reader sees."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self._open: list[str] = []
        self._rows: list[list[str]] = []
        self.feed(self.source)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {key: value or "" for key, value in attrs}
        assert len(attributes) == len(attrs), f"an attribute of {tag} twice"
        self.tags.append((tag, attributes))
        if tag == "div" and "aria-label" in attributes:
            self._rows = self.tables[attributes["aria-label"]] = []
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th"):
            self._rows[-1].append("")
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data
        if self._open and {"td", "th"} & set(self._open):
            self._rows[-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def stands_alone(page: Page) -> int:
    """Asserts that `page` asks for nothing beside itself and runs nothing; returns how many pictures it holds."""
    assert not {"script", "link", "iframe", "img", "object", "base"} & {tag for tag, _ in page.tags}
    images = 0
    for tag, attributes in page.tags:
        for key, value in attributes.items():
            assert not key.startswith("on"), f"{tag} has a handler"
            if key in ("href", "src", "xlink:href"):
                assert value.startswith(("#", "data:image/png;base64,")), f"{tag} {key}={value[:60]}"
                images += value.startswith("data:")
            for target in re.findall(r"url\(([^)]*)\)", value):
                assert target.startswith("#"), f"{tag} {key}={value[:60]}"
    assert "://" not in page.source
    assert "@import" not in page.source
    assert "url(" not in page.source[: page.source.index("</style>")]
    [policy] = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return images


def references_hold(page: Page) -> set[str]:
    """Asserts that the ids of `page` are unique and that whatever is referred to is there; returns the ids."""
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        targets = [attributes.get("href", "").removeprefix("#")] if attributes.get("href", "").startswith("#") else []
        targets += re.findall(r"url\(#([^)]*)\)", " ".join(attributes.values()))
        targets += [attributes["aria-labelledby"]] if "aria-labelledby" in attributes else []
        assert set(targets) <= set(ids)
    return set(ids)


def pixels_of(page: Path, scratch: Path, *, width: int, dark: bool, height: int = 4000) -> np.ndarray:
    """Colours [pixels, 3] of 0 to 255 that BROWSER shows of `page`; its files go to the folder `scratch`."""
    from matplotlib.image import imread

    assert BROWSER is not None
    picture = scratch / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},{height}"]
    options += [f"--user-data-dir={scratch / 'browser'}", f"--screenshot={picture}"]
    options += ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run([BROWSER, *options, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert picture.exists(), done.stderr
    return (imread(picture)[..., :3] * 255).round().astype(int).reshape(-1, 3)
