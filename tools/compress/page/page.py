"""The page about one compression: its sections in their order, and the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ....launch.run_folder import write_atomically
from ...output import check_output, refusals_named
from ...report.document import document, mark_of
from ...report.markup import Html
from .course import rank_balance, search_path, stability, stages
from .experts import experts, tokens_per_expert
from .folder import Compression
from .header import header
from .plan_text import plan_text, verification
from .quality import quality
from .similarity import similarity
from .unmeasured import unmeasured

FILE_NAME = "report.html"
GENERATOR = "wastenot compress report"
MARK = mark_of(GENERATOR)
"""By which a page is known as one that may be written anew."""

SECTIONS: Mapping[str, tuple[str, Callable[[Compression], Html | None]]] = {
    "quality": ("Quality, size and speed", quality),
    "similarity": ("Similarity of layers and blocks", similarity),
    "experts": ("Worth of the experts", experts),
    "tokens": ("Tokens behind the scores", tokens_per_expert),
    "balance": ("Balance of the ranks", rank_balance),
    "search": ("The search", search_path),
    "stability": ("Stability", stability),
    "stages": ("Time and memory", stages),
    "plan": ("The plan", plan_text),
    "verification": ("Verification", verification),
    "unmeasured": ("What was not measured", unmeasured),
}
"""Anchors, headings and what writes the parts of the page; a part that has nothing to show is left out, and the last
one says so."""


def write_page(compression: Compression, output: Path) -> None:
    """Writes the page about `compression` to `output`.

    Raises UserError where `output` cannot be written or is something else than such a page, or matplotlib is missing.
    """
    check_output(output, MARK.encode(), "a report of a compression", FILE_NAME)
    with refusals_named(output):
        write_atomically(output, make_page(compression))


def make_page(compression: Compression) -> Html:
    """The whole text of the page; the same files make the same text."""
    drawn = {anchor: (heading, draw(compression)) for anchor, (heading, draw) in SECTIONS.items()}
    sections = {anchor: (heading, part) for anchor, (heading, part) in drawn.items() if part is not None}
    name = compression.quality.checkpoint or compression.name
    return document(f"{name} – {GENERATOR}", GENERATOR, header(compression), sections)
