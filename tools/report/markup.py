"""HTML from values. Text is escaped unless it is `Html`, which only the functions of this package make."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from .formats import NONE


class Html(str):
    """Text that is markup already."""


def safe(value: object) -> Html:
    """`value` as markup: escaped, unless it is markup."""
    return value if isinstance(value, Html) else Html(html.escape(str(value), quote=True))


def join(parts: Iterable[object], between: str = "\n") -> Html:
    """Markup of all `parts`, one after the other."""
    return Html(between.join(safe(part) for part in parts))


def element(tag: str, *content: object, **attributes: object) -> Html:
    """`<tag …>content</tag>`; an attribute's final underscore is dropped (`class_`), None leaves the attribute out."""
    given = "".join(f' {k.rstrip("_").replace("_", "-")}="{safe(v)}"' for k, v in attributes.items() if v is not None)
    return Html(f"<{tag}{given}>{join(content, '')}</{tag}>")


def folded(summary: str, *content: object, unfolded: bool = False) -> Html:
    """What opens on a click."""
    tag = element("summary", summary)
    return Html(f"<details{' open' if unfolded else ''}>{join([tag, *content])}</details>")


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], *, label: str, texts: int = 1) -> Html:
    """A table that scrolls by itself where it is too wide.

    The first cell of a row heads it; the first `texts` columns hold text, the others numbers. `label` is what
    assistive technology calls it.
    """
    head = element("tr", *(element("th", name, scope="col", class_=_kind(i, texts)) for i, name in enumerate(headings)))
    body = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(element("td", cell, class_=_kind(i, texts)) for i, cell in enumerate(row[1:], start=1)),
        )
        for row in rows
    ]
    inside = element("table", element("thead", head), element("tbody", join(body)))
    # The keyboard must reach what scrolls.
    return element("div", inside, class_="scroll", tabindex=0, role="region", aria_label=label)


def tile(title: str, value: str, note: str) -> Html:
    """One of the figures at the head of a page; `note` says what it is a part of or stands beside."""
    return element(
        "div",
        element("dt", title),
        element("dd", value, class_="none" if value == NONE else None),
        element("small", note),
    )


def wide(drawing: Html) -> Html:
    """A drawing that scrolls where the page is narrower than it can be read."""
    return element("div", drawing, class_="wide scroll", tabindex=0, role="group")


def legend(entries: Iterable[tuple[str, str]], *, lines: bool = False) -> Html:
    """What each colour means: pairs of a text and a style, the latter of a box or (`lines`) of a line."""
    kind = "line" if lines else "box"
    items = [
        element("li", element("i", class_=kind, style=style, aria_hidden="true"), element("span", text))
        for text, style in entries
    ]
    return element("ul", *items, class_="legend")


def figure(caption: object, *drawings: object) -> Html:
    """A drawing with the words that it goes with above it."""
    return element("figure", element("figcaption", caption), *drawings)


def _kind(column: int, texts: int) -> str | None:
    return None if column < texts else "number"
