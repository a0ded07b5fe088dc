"""Figures of matplotlib as SVG that stands inside the page: its colours, its font, no id twice, no namespace."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from ...launch.errors import UserError
from .formats import count
from .markup import Html
from .palette import LIGHT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FONT_POINTS = 8.5
_DROPPED = {"metadata", "style"}
"""matplotlib's, about itself and about every drawing of the page at once."""


def new_figure(width: float, height: float, *, fixed: bool = False) -> Figure:
    """An empty figure of `width` x `height` inches; UserError where matplotlib is missing.

    Its axes make room for what is written around them, or (`fixed`) for a short label only: many charts of one kind
    then look alike, and are drawn twice as fast.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("charts need matplotlib: pip install 'wastenot[viz]'") from error
    figure = Figure(figsize=(width, height), facecolor="none", layout=None if fixed else "constrained")
    if fixed:
        figure.subplots_adjust(left=0.17, right=0.97, bottom=0.17, top=0.96)
    return figure


def plain_axes(axes: Any, *, grid: bool = True) -> None:
    """Axes as every chart has them: two spines, faint ticks, horizontal lines behind."""
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LIGHT["rule"])
    axes.tick_params(colors=LIGHT["faint"], labelsize=FONT_POINTS, width=0.6, length=2.5, pad=2)
    axes.xaxis.label.set(color=LIGHT["faint"], fontsize=FONT_POINTS)
    axes.yaxis.label.set(color=LIGHT["faint"], fontsize=FONT_POINTS)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis="y", color=LIGHT["rule"], linewidth=0.6)


def step_axis(axes: Any) -> None:
    """The horizontal axis of a chart over the steps: whole numbers, few enough to stand apart."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(lambda value, _: count(value))


def to_svg(figure: Figure, name: str, description: str) -> Html:
    """`figure` as an element of the page; `name` is unique on it, `description` says what is to be seen."""
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    root = ElementTree.fromstring(text.getvalue())
    for parent in list(root.iter()):
        for child in [child for child in parent if _local(child.tag) in _DROPPED]:
            parent.remove(child)
    used = {match for node in root.iter() for value in node.attrib.values() for match in _REFERENCE.findall(value)}
    for node in root.iter():
        node.tag, node.tail = _local(node.tag), None
        node.text = node.text if node.tag == "text" else None
        given = {_local(key): value for key, value in node.attrib.items()}
        node.attrib.clear()
        node.attrib.update({k: _rewritten(k, v, name) for k, v in given.items() if k != "id" or v in used})
    title = ElementTree.Element("title", {"id": f"{name}-title"})
    title.text = description
    root.insert(0, title)
    view = root.get("viewBox", "")
    root.attrib.clear()
    root.attrib.update({"viewBox": view, "role": "img", "aria-labelledby": f"{name}-title"})
    return Html(ElementTree.tostring(root, encoding="unicode"))


_REFERENCE = re.compile(r"(?:^|url\()#([^)]+)")
_BY_COLOUR = {colour: f"var(--{name})" for name, colour in LIGHT.items()}


def _local(tag: str) -> str:
    """A name without its namespace, which HTML does not need."""
    return tag.rpartition("}")[2]


def _rewritten(key: str, value: str, name: str) -> str:
    """An attribute's value with ids of this drawing alone, colours by name, and no more digits than can be seen."""
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        # Picture data come with line breaks.
        return f"#{name}-{value[1:]}" if value.startswith("#") else value.replace(" ", "")
    if key == "d":
        return re.sub(r"-?\d+\.\d{2,}", lambda match: f"{float(match[0]):.2f}", " ".join(value.split()))
    if key == "style":
        value = re.sub(r"font-family:[^;]*;?\s*", "", value)
    value = value.replace("url(#", f"url(#{name}-")
    return re.sub(r"#[0-9a-f]{6}\b", lambda match: _BY_COLOUR.get(match[0], match[0]), value)
