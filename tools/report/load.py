"""Section of the page: how evenly the experts are used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from .balance import load_lines, mean_figures, mean_load
from .formats import count, decimals
from .headline import Entry
from .heat import expert_ticks, heat_image, layer_ticks
from .markup import Html, element, figure, folded, join, table
from .palette import LIGHT
from .runs import Line, Run
from .svg import new_figure, step_axis, to_svg

MOST_ROWS = 128
"""Experts of all layers that still have a row each in a chart over the steps."""

MOST_COLUMNS = 200
"""Lines of metrics are averaged until no more columns than this are left."""

FIGURE_TITLES = ("busiest / mean", "cv", "entropy", "Gini")
"""Of `moe.load.FIGURES`."""

END = 0.1
"""The part of the run that counts as its end."""


def load(entries: Sequence[Entry]) -> Html:
    """Heat-maps and tables of every run that has experts."""
    told = "1 is the even share. Cv and Gini are 0 and entropy is 1 where all experts of a layer are used alike."
    return join(
        [
            element("p", f"How many of the router's choices each expert gets, before any is dropped; {told}"),
            *(_of_run(i, entry.run, several=len(entries) > 1) for i, entry in enumerate(entries)),
        ]
    )


def _of_run(index: int, run: Run, *, several: bool) -> Html:
    heading = element("h3", run.name) if several else ""
    lines = load_lines(run)
    if not lines:
        why = "The model is dense: it has no experts." if not run.experts else "The metrics tell no loads."
        return join([heading, element("p", why, class_="nothing")])
    late = lines[-max(1, math.ceil(END * len(lines))) :]
    shares = mean_load(late)
    layers = len(shares)
    numbers = run.layer_numbers(layers)
    span = f"step {count(late[0]['step'])}" + (f" to {count(late[-1]['step'])}" if len(late) > 1 else "")
    draw = _over_steps if sum(map(len, shares)) <= MOST_ROWS else _busiest
    parts = [draw(index, numbers, lines)]
    parts.append(_at_the_end(index, numbers, shares, span))
    charts = element("div", *parts, class_="charts")
    figures = mean_figures(late, layers)
    if figures is None:
        return join([heading, charts])
    rows = [
        [f"layer {number}", *map(decimals, figures[i]), count(shares[i].count(0))] for i, number in enumerate(numbers)
    ]
    balance = table(["", *FIGURE_TITLES, "unused experts"], rows, label=f"Balance of the layers of {run.name}")
    told = f"Balance by layer, mean over single steps, {span}"
    return join([heading, charts, folded(told, balance, unfolded=layers <= 12 and not several)])


def _over_steps(index: int, numbers: Sequence[int], lines: Sequence[Line]) -> Html:
    """A row for every expert of every layer."""
    columns = _columns(lines)
    counts = list(map(len, columns[0]))
    grid = [
        [column[layer][e] * experts for column in columns]
        for layer, experts in enumerate(counts)
        for e in range(experts)
    ]
    drawing = new_figure(5.0, min(4.6, max(2.2, 0.5 + 0.09 * len(grid))))
    axes = drawing.subplots()
    heat_image(drawing, axes, grid, (*_span(lines), len(grid), 0))
    ends = list(accumulate(counts))
    for end in ends[:-1]:
        axes.axhline(end, color=LIGHT["ink"], linewidth=0.8)
    middles = [end - experts / 2 for end, experts in zip(ends, counts, strict=True)]
    axes.set_yticks(middles, [f"layer {number}" for number in numbers])
    step_axis(axes)
    caption = "Load of every expert over the steps"
    return figure(caption, to_svg(drawing, f"load-{index}-steps", f"{caption}: a row for each expert."))


def _busiest(index: int, numbers: Sequence[int], lines: Sequence[Line]) -> Html:
    """A row for every layer: its busiest expert."""
    columns = _columns(lines)
    grid = [[max(column[layer]) * len(column[layer]) for column in columns] for layer in range(len(numbers))]
    drawing = new_figure(5.0, min(4.6, max(1.6, 0.6 + 0.075 * len(grid))))
    axes = drawing.subplots()
    most = max(2.0, math.ceil(max(map(max, grid))))
    heat_image(drawing, axes, grid, (*_span(lines), len(grid), 0), most)
    layer_ticks(axes, numbers)
    step_axis(axes)
    caption = "Load of each layer's busiest expert over the steps"
    return figure(caption, to_svg(drawing, f"load-{index}-busiest", f"{caption}: a row for each layer."))


def _at_the_end(index: int, numbers: Sequence[int], shares: Sequence[Sequence[float]], span: str) -> Html:
    """Layers x experts; blank beyond the experts of a layer that has fewer than others."""
    experts = max(map(len, shares))
    grid = [[share * len(layer) for share in layer] + [math.nan] * (experts - len(layer)) for layer in shares]
    drawing = new_figure(5.0, min(4.6, max(1.6, 0.6 + (0.22 if len(grid) <= 12 else 0.075) * len(grid))))
    axes = drawing.subplots()
    heat_image(drawing, axes, grid, (0, experts, len(grid), 0))
    layer_ticks(axes, numbers)
    expert_ticks(axes, experts)
    if len(grid) * experts <= 64:
        for row, layer in enumerate(grid):
            for e, value in enumerate(layer):
                if math.isnan(value):
                    continue
                # Both ends of the scale are dark.
                ink = "#ffffff" if abs(value - 1) > 0.65 else "#101010"
                axes.text(e + 0.5, row + 0.5, f"{value:.1f}", ha="center", va="center", fontsize=6.5, color=ink)
    caption = f"Load of every expert at the end ({span})"
    return figure(caption, to_svg(drawing, f"load-{index}-end", f"{caption}: layers by experts."))


def _columns(lines: Sequence[Line]) -> list[list[list[float]]]:
    group = max(1, math.ceil(len(lines) / MOST_COLUMNS))
    return [mean_load(lines[first : first + group]) for first in range(0, len(lines), group)]


def _span(lines: Sequence[Line]) -> tuple[int, int]:
    """Where the picture begins and ends: one line, too, has a width."""
    first = lines[0]["step"] - lines[0].get("ledger_steps", 1)
    return first, lines[-1]["step"]
