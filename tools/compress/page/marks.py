"""Marks that tell by their form, not by their colour alone, what is gone or which point is whose."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...report.markup import Html, element

CROSS, HALO = "#101010", "#ffffff"
"""Ink of a cross and what lifts it off dark cells: the same on light and dark paper, as the cells are."""
FORMS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "*": "★"}
"""Markers of charts, and letters that look like them."""


def cross_out(axes: Any, cells: Iterable[tuple[int, int]], width: float) -> None:
    """A cross over each (row, column); `width` of its lines in points."""
    xs: list[float] = []
    ys: list[float] = []
    gap = float("nan")
    for row, column in sorted(cells):
        left, right, top, bottom = column + 0.22, column + 0.78, row + 0.2, row + 0.8
        xs += [left, right, gap, left, right, gap]
        ys += [top, bottom, gap, bottom, top, gap]
    for colour, line in ((HALO, 2.2 * width), (CROSS, width)):
        axes.plot(xs, ys, color=colour, linewidth=line, solid_capstyle="butt", snap=False)


def hatch_rows(axes: Any, rows: Iterable[int], columns: int, hatch: str) -> None:
    """Hatches whole rows, which are paled so that it is seen on dark cells too."""
    from matplotlib.patches import Rectangle

    for row in rows:
        axes.add_patch(Rectangle((0, row), columns, 1, facecolor=HALO, alpha=0.5, linewidth=0))
        axes.add_patch(Rectangle((0, row), columns, 1, fill=False, hatch=hatch, edgecolor=CROSS, linewidth=0.8))


def forms(entries: Iterable[tuple[str, str, str]]) -> Html:
    """What each mark means: (form, name of its colour, text)."""
    items = [
        element("li", element("span", form, style=f"color:var(--{colour})", aria_hidden="true"), element("span", text))
        for form, colour, text in entries
    ]
    return element("ul", *items, class_="legend")
