"""The page: one HTML file that asks for nothing beside itself, runs no script, and prints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from ...launch.run_folder import write_atomically
from ..output import check_output, refusals_named
from .headline import Entry, read_entries
from .ledger import ledger
from .load import load
from .losses import losses
from .markup import Html, element, join, safe
from .overview import overview
from .palette import variables
from .settings import settings
from .usage import usage

FILE_NAME = "report.html"
MARK = '<meta name="generator" content="wastenot report">'
"""By which a page is known as one that may be written anew."""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What the browser may fetch or run for this page: nothing. A text that got past the escaping would be inert."""

SECTIONS: Mapping[str, tuple[str, Callable[[Sequence[Entry]], Html]]] = {
    "losses": ("Losses and speed", losses),
    "usage": ("Slots and choices", usage),
    "load": ("Load of the experts", load),
    "ledger": ("The ledger", ledger),
    "configuration": ("Configuration", settings),
}
"""Anchors, headings and what writes the parts of the page below its header."""


def write_report(runs: Sequence[Path], output: Path) -> Path:
    """Writes the page about the runs in the folders `runs` (at least one) to `output`, which it returns.

    Raises UserError where a folder is no run, `output` cannot be written or is something else than such a page,
    or matplotlib is missing.
    """
    return write_page(read_entries(runs), output)


def write_page(entries: Sequence[Entry], output: Path) -> Path:
    """`write_report` of runs that are read already."""
    check_output(output, MARK.encode(), "a report", FILE_NAME)
    with refusals_named(output):
        write_atomically(output, make_page(entries))
    return output


def make_page(entries: Sequence[Entry]) -> Html:
    """The whole text of the page; the same runs make the same text."""
    names = ", ".join(entry.run.name for entry in entries)
    links = [element("a", title, href=f"#{anchor}") for anchor, (title, _) in SECTIONS.items()]
    several = len(entries) > 1
    body = [
        element("header", element("h1", f"{len(entries)} runs") if several else "", overview(entries)),
        element("nav", *links),
        *(element("section", element("h2", title), part(entries), id=i) for i, (title, part) in SECTIONS.items()),
        element("footer", f"Written by wastenot {version('wastenot')}."),
    ]
    style = variables() + files("wastenot.tools.report").joinpath("page.css").read_text(encoding="utf-8")
    head = [
        Html('<meta charset="utf-8">'),
        Html(MARK),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{safe(_POLICY)}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        element("title", f"{names} – wastenot report"),
        element("style", Html(style)),
    ]
    return Html(
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{join(head)}\n</head>\n<body>\n<main>\n{join(body)}\n</main>\n'
        "</body>\n</html>\n"
    )
