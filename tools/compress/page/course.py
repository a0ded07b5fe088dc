"""Sections of the page: the search, how firm its choice is, how even the ranks are, and what the stages cost."""

from __future__ import annotations

import math
from typing import Any

from ...report.formats import NONE, count, decimals, duration, size
from ...report.markup import Html, element, figure, folded, join, table
from ...report.palette import LIGHT
from ...report.runs import finite
from ...report.svg import new_figure, plain_axes, to_svg
from .figures import divergence
from .folder import WHOLE, Compression
from .marks import forms

UNITS = {"params": "parameters", "bytes": "bytes on disk", "step-time": "seconds of a step", "kl": "parameters"}
"""What the cost of a step counts, by the target of the search."""
SHORT = 12
"""A longer table is folded."""


def search_path(compression: Compression) -> Html | None:
    """The plans on the way to the budget; None without a search."""
    steps = compression.steps
    if not steps:
        return None
    unit = UNITS.get(compression.target, "cost")
    tried = sum(step.tried for step in steps)
    words = element(
        "p",
        f"From the whole model on, one more drop at a time: of the candidates at each step the one that moves the "
        f"predictions least (KL, nats per token) for what it saves in {unit}. {count(tried)} were tried "
        f"for {count(len(steps) - 1)} made.",
    )
    drawing = new_figure(5.0, 2.7)
    axes = drawing.subplots()
    plain_axes(axes)
    costs, kls = [step.cost for step in steps], [step.kl for step in steps]
    axes.plot(costs, kls, color=LIGHT["run-0"], linewidth=1.2, marker="o", markersize=3.5)
    axes.plot(costs[-1:], kls[-1:], color=LIGHT["ink"], marker="o", markersize=8, markerfacecolor="none")
    axes.set_ylim(bottom=min(0.0, *kls) if len(kls) > 1 else 0.0)
    axes.set_xlabel(unit)
    axes.set_ylabel("KL")
    axes.xaxis.set_major_formatter(lambda value, _: _cost(value))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.locator_params(axis="x", nbins=5)
    caption = f"KL from the whole model against {unit}"
    told = f"From {_cost(costs[0])} and {divergence(kls[0])} to {_cost(costs[-1])} and {divergence(kls[-1])}."
    chart = figure(
        caption,
        forms([("●", "run-0", "a plan on the way"), ("○", "ink", "the plan chosen")]),
        to_svg(drawing, "search", f"{caption}. {told}"),
    )
    rows = [
        [
            element("code", step.hash),
            _cost(step.cost),
            divergence(step.kl),
            decimals(step.loss),
            count(step.tried),
        ]
        for step in steps
    ]
    listed = table(["plan", unit, "KL", "loss", "tried"], rows, label="Steps of the search")
    steps_table = folded("Every step", listed, unfolded=len(rows) <= SHORT)
    return join([words, element("div", chart, steps_table, class_="charts")])


def _cost(value: float) -> str:
    """In the unit of the search: whole where large."""
    for factor, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:,.4g} {unit}"
    return f"{value:.4g}"


def stability(compression: Compression) -> Html | None:
    """How soon more text stops changing what is kept; None where that was not measured."""
    points = sorted(compression.quality.stability)
    if not points:
        return None
    words = element(
        "p",
        "Would less text have chosen the same? Of what is kept by a part of the calibration text and what is kept by "
        "all of it, the part that is in both (Jaccard index): 1 is the same choice. A curve that still climbs at its "
        "right end asks for more text.",
    )
    drawing = new_figure(5.0, 2.4)
    axes = drawing.subplots()
    plain_axes(axes)
    tokens, overlap = [t for t, _ in points], [j for _, j in points]
    axes.plot(tokens, overlap, color=LIGHT["run-0"], linewidth=1.2, marker="o", markersize=3.5, clip_on=False)
    axes.set_xscale("log")
    axes.set_xticks(tokens, [count(t) for t in tokens])
    axes.minorticks_off()
    if len(tokens) > 6:
        axes.set_xticks(
            tokens[:: math.ceil(len(tokens) / 6)], [count(t) for t in tokens[:: math.ceil(len(tokens) / 6)]]
        )
    axes.set_ylim(0, 1)
    axes.set_xlabel("tokens of calibration text")
    caption = "Overlap of what is kept with what all of the text keeps"
    told = "; ".join(f"{count(t)} tokens: {decimals(j, 2)}" for t, j in points)
    chart = figure(caption, to_svg(drawing, "stability", f"{caption}. {told}."))
    rows = [[count(t), decimals(j, 3)] for t, j in points]
    listed = table(["tokens", "overlap"], rows, label="Stability")
    return join([words, element("div", chart, listed, class_="charts")])


def rank_balance(compression: Compression) -> Html | None:
    """The busiest rank of each layer before and after; None where that was not measured."""
    found = compression.quality
    layers = [each for each in found.balance if each.before is not None or each.after is not None]
    if not layers:
        return None
    ranks = f"{found.ranks} ranks" if found.ranks else "several ranks"
    words = element(
        "p",
        f"Where {ranks} share the experts of a layer, all wait for the busiest. Its load over the mean of the ranks: 1 "
        "is even, 1.5 means that it computes half as much again as the average.",
    )
    drawing = new_figure(5.0, 2.6)
    axes = drawing.subplots()
    plain_axes(axes)
    before = {each.layer: each.before for each in layers if each.before is not None}
    after = {each.layer: each.after for each in layers if each.after is not None}
    for layer in before.keys() & after.keys():
        axes.plot([layer, layer], [before[layer], after[layer]], color=LIGHT["rule"], linewidth=1.6, zorder=1)
    axes.plot(
        list(before),
        list(before.values()),
        color=LIGHT["run-1"],
        linestyle="none",
        marker="o",
        markersize=5,
        markerfacecolor="none",
    )
    axes.plot(list(after), list(after.values()), color=LIGHT["run-0"], linestyle="none", marker="s", markersize=4.5)
    axes.axhline(1.0, color=LIGHT["faint"], linewidth=0.8, linestyle=(0, (4, 3)))
    numbers = [each.layer for each in layers]
    axes.set_xticks(numbers[:: max(1, math.ceil(len(numbers) / 16))])
    axes.set_xlabel("layer")
    axes.set_ylim(bottom=min(0.95, *axes.get_ylim()))
    caption = "Load of the busiest rank over the mean, by layer"
    told = f"Worst before: {_worst(before)}; worst after: {_worst(after)}."
    chart = figure(
        caption,
        forms([("○", "run-1", "before"), ("■", "run-0", "after")]),
        to_svg(drawing, "balance", f"{caption}. {told}"),
    )
    rows = [[f"layer {each.layer}", decimals(each.before), decimals(each.after)] for each in layers]
    listed = table(["busiest / mean", "before", "after"], rows, label="Balance of the ranks")
    by_layer = folded("By layer", listed, unfolded=len(rows) <= SHORT)
    return join([words, element("div", chart, by_layer, class_="charts")])


def _worst(ratios: dict[int, float]) -> str:
    if not ratios:
        return "not measured"
    layer = max(ratios, key=lambda n: ratios[n])
    return f"{decimals(ratios[layer], 2)} in layer {layer}"


def stages(compression: Compression) -> Html | None:
    """Seconds and memory of each stage; None where nobody wrote them down."""
    costs = compression.costs
    rows: list[list[object]] = []
    if costs:
        rows.append(
            [
                "profile",
                duration(finite(costs.get("seconds"))),
                size(finite(costs.get("peak_bytes"))),
                size(finite(costs.get("predicted_bytes"))),
                _off(finite(costs.get("peak_bytes")), finite(costs.get("predicted_bytes"))),
            ]
        )
    for row in compression.quality.rows:
        if row.seconds is not None or row.peak_bytes is not None:
            name = "measuring the whole model" if row.name == WHOLE else row.name
            rows.append([name, duration(row.seconds), size(row.peak_bytes), NONE, NONE])
    if not rows:
        return None
    words = [
        element(
            "p",
            "Peak memory is the most that the stage needed. For the profile it is what a rank needed beyond what it "
            "held before, which was predicted before the work began.",
        )
    ]
    if layout := _layout(costs.get("layout")):
        words.append(element("p", f"The profile was taken on {layout}.", class_="facts"))
    if costs.get("resumed_at_layer"):
        words.append(
            element(
                "p",
                f"It was continued at layer {costs['resumed_at_layer']} after an interruption; its time is that of the "
                "rest.",
                class_="facts",
            )
        )
    headings = ["stage", "time", "peak memory", "predicted", "predicted / measured"]
    return join([*words, table(headings, rows, label="Time and memory of the stages")])


def _off(measured: float | None, predicted: float | None) -> str:
    return NONE if not measured or predicted is None else f"{predicted / measured:.2f}"


def _layout(layout: Any) -> str:
    """The axes of a mesh in words: those that have more than one rank."""
    if not isinstance(layout, dict):
        return ""
    axes = {name: ranks for name, ranks in layout.items() if name != "world" and ranks != 1}
    world = layout.get("world", 1)
    ranks = "one rank" if world == 1 else f"{world} ranks"
    return ranks + (f" ({', '.join(f'{name} {size}' for name, size in axes.items())})" if axes else "")
