"""Section of the page: what became of every slot and every choice, over the steps and layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .accounts import OF_CHOICES, OF_SLOTS, Account, ledger_lines, slots_of
from .formats import count, percent
from .headline import Entry
from .history import History, history_of
from .markup import Html, element, figure, folded, join, legend
from .palette import LIGHT
from .runs import Run
from .svg import new_figure, plain_axes, step_axis, to_svg

FEW = 8
"""So many layers have larger charts."""

LIMITS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1.0)
"""Where the axis of a layer's chart may end."""


@dataclass(frozen=True)
class View:
    """Parts of one whole, from the bottom of the chart up: what is lost stands on the axis, where it is measured."""

    key: str
    title: str
    whole: str
    parts: tuple[str, ...]
    has_line: bool = False
    """Whether a line over them shows unserved tokens, which are a part of another whole."""


SLOTS = View("slots", "Slots", "experts × capacity", OF_SLOTS[::-1])
CHOICES = View("choices", "Choices", "tokens × top-k", OF_CHOICES[::-1], has_line=True)


def usage(entries: Sequence[Entry]) -> Html:
    """Charts of every run that counted its slots, and a word about those that did not."""
    words = element(
        "p",
        "Every choice of the router (tokens × top-k) is kept in a slot, rectified (an expert on the token's own rank "
        "stands in for it) or dropped. Every slot (experts × capacity) is taken by a kept choice, filled with a "
        "token's next-best choice, or padding. A token is unserved when no expert computed anything for it.",
    )
    return join([words, *(_of_run(i, entry, several=len(entries) > 1) for i, entry in enumerate(entries))])


def _of_run(index: int, entry: Entry, *, several: bool) -> Html:
    run, account = entry.run, entry.account
    heading = element("h3", run.name) if several else ""
    if account is None or not account.num_layers:
        why = "The model is dense: there is nothing to choose." if not run.experts else "The metrics count no slots."
        return join([heading, element("p", why, class_="nothing")])
    if not account.total("dropped", "rectified", "filled", "padding"):
        return join([heading, element("p", "Every choice was kept, and no slot was padding.")])
    history = history_of(ledger_lines(run))
    # Without slots (capacity 0) there is nothing to show of them.
    views = [view for view in (CHOICES, SLOTS) if account.total(*view.parts)]
    whole = element("div", *(_whole(index, run, account, history, view) for view in views), class_="charts")
    layers = [_by_layer(index, run, account, history, view) for view in views] if account.num_layers > 1 else []
    return join([heading, whole, folded("Layer by layer", *layers, unfolded=not several) if layers else ""])


def _whole(index: int, run: Run, account: Account, history: History, view: View) -> Html:
    """All layers together."""
    whole, alike = view.whole, set(slots_of(run, run.world or 1))
    if view is SLOTS and len(alike) == 1:
        [(experts, slots)] = alike
        whole = f"{count(experts)} experts × capacity {count(slots)}"
    caption = f"{view.title} of all layers, as parts of {whole}"
    drawing = new_figure(5.0, 2.5)
    axes = drawing.subplots()
    _draw(axes, history, view, account.top_k)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda value, _: percent(value, 0))
    step_axis(axes)
    description = f"{caption}, over steps. In all: {_told(history, view, view.parts)}."
    return figure(caption, _legend(view), to_svg(drawing, f"usage-{index}-{view.key}", description))


def _by_layer(index: int, run: Run, account: Account, history: History, view: View) -> Html:
    """One small chart a layer, all with the same axis, which ends where there is nothing but what is kept."""
    layers = [history.of_layer(layer) for layer in range(history.num_layers)]
    limit = _limit(layers, view, account.top_k)
    size = (3.1, 1.5) if len(layers) <= FEW else (2.1, 1.15)
    ends = [history.edges[0], history.edges[-1]]
    cells = []
    for layer, number in zip(layers, run.layer_numbers(len(layers)), strict=True):
        drawing = new_figure(*size, fixed=True)
        axes = drawing.subplots()
        _draw(axes, layer, view, account.top_k)
        axes.set_ylim(0, limit)
        axes.set_yticks([0, limit], ["0", percent(limit, 0)])
        axes.set_xticks(ends, [count(step) for step in ends])
        for label, side in zip(axes.get_xticklabels(), ("left", "right"), strict=True):
            label.set(horizontalalignment=side)
        told = _told(layer, view, view.parts[:-1])
        description = f"{view.title} of layer {number}, over steps: {told}."
        name = f"usage-{index}-{view.key}-layer-{number}"
        cells.append(figure(join([element("b", f"layer {number}"), told], " "), to_svg(drawing, name, description)))
    title = f"{view.title} by layer, over steps"
    if limit < 1:
        title += f"; the axes end at {percent(limit, 0)}, all above is kept"
    return element(
        "div",
        element("p", title, class_="caption"),
        _legend(view),
        element("div", *cells, class_="few layers" if len(layers) <= FEW else "layers"),
    )


def _limit(layers: Sequence[History], view: View, top_k: int) -> float:
    """The end of an axis that shows whatever is lost in one of `layers`."""
    *lost, _ = view.parts
    tops = [sum(parts[name] for name in lost) for layer in layers if (parts := layer.parts(view.parts))]
    tops += [layer.unserved(top_k) for layer in layers if view.has_line]
    most = min(1.0, 1.05 * max(float(np.max(top)) for top in tops))
    return next(limit for limit in LIMITS if limit >= most)


def _draw(axes: Any, history: History, view: View, top_k: int) -> None:
    plain_axes(axes, grid=False)
    base = np.zeros(len(history.edges) - 1)
    for name, part in history.parts(view.parts).items():
        axes.stairs(base + part, history.edges, baseline=base, fill=True, color=LIGHT[name], linewidth=0)
        base = base + part
    if view.has_line:
        axes.stairs(history.unserved(top_k), history.edges, baseline=None, color=LIGHT["ink"], linewidth=1)
    axes.set_xlim(history.edges[0], history.edges[-1])


def _told(history: History, view: View, names: Sequence[str]) -> str:
    totals = history.totals(view.parts)
    return ", ".join(f"{name} {percent(totals[name])}" for name in names)


def _legend(view: View) -> Html:
    boxes = legend((name, f"background:var(--{name})") for name in view.parts)
    if not view.has_line:
        return boxes
    line = legend([("unserved (part of all tokens)", "border-top-color:var(--ink)")], lines=True)
    return element("div", boxes, line, class_="legends")
