"""The page about runs: its sections in their order, and the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ...launch.run_folder import write_atomically
from ..output import check_output, refusals_named
from .document import document, mark_of
from .headline import Entry, read_entries
from .ledger import ledger
from .load import load
from .losses import losses
from .markup import Html, element
from .overview import overview
from .settings import settings
from .usage import usage

FILE_NAME = "report.html"
GENERATOR = "wastenot report"
MARK = mark_of(GENERATOR)
"""By which a page is known as one that may be written anew."""

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
    several = len(entries) > 1
    heading = element("h1", f"{len(entries)} runs") if several else ""
    sections = {anchor: (title, part(entries)) for anchor, (title, part) in SECTIONS.items()}
    return document(f"{names} – {GENERATOR}", GENERATOR, element("header", heading, overview(entries)), sections)
