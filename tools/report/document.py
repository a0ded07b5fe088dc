"""The frame of a page: one HTML file that asks for nothing beside itself, runs no script, and prints."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from importlib.resources import files

from .markup import Html, element, join, safe
from .palette import variables

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What the browser may fetch or run for this page: nothing. A text that got past the escaping would be inert."""


def mark_of(generator: str) -> Html:
    """By which a page is known as one that `generator` may write anew."""
    return Html(f'<meta name="generator" content="{safe(generator)}">')


def document(title: str, generator: str, header: Html, sections: Mapping[str, tuple[str, Html]]) -> Html:
    """The whole text of a page; `sections` are headings and contents by anchor."""
    links = [element("a", heading, href=f"#{anchor}") for anchor, (heading, _) in sections.items()]
    body = [
        header,
        element("nav", *links),
        *(element("section", element("h2", heading), part, id=i) for i, (heading, part) in sections.items()),
        element("footer", f"Written by wastenot {version('wastenot')}."),
    ]
    style = variables() + files("wastenot.tools.report").joinpath("page.css").read_text(encoding="utf-8")
    head = [
        Html('<meta charset="utf-8">'),
        mark_of(generator),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{safe(_POLICY)}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        element("title", title),
        element("style", Html(style)),
    ]
    return Html(
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{join(head)}\n</head>\n<body>\n<main>\n{join(body)}\n</main>\n'
        "</body>\n</html>\n"
    )
