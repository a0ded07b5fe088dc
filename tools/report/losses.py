"""Section of the page: how well the runs predict, and how fast they go."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .formats import count, decimals
from .headline import Entry
from .markup import Html, element, figure, folded, join, legend
from .palette import DASHES, LIGHT, run_line
from .runs import Line, Run, finite
from .svg import FONT_POINTS, new_figure, plain_axes, step_axis, to_svg

MOST_POINTS = 400
"""A curve of more lines than this is drawn through means of neighbouring ones."""


@dataclass(frozen=True)
class Curve:
    """One run's values over its steps; NaN where a value was not finite."""

    run: int
    steps: Sequence[float]
    values: Sequence[float]


def losses(entries: Sequence[Entry]) -> Html:
    """Held-out text, training loss and speed of all runs, one chart each."""
    names = [(entry.run.name, _line_style(i)) for i, entry in enumerate(entries)]
    held_out = [_curve(i, entry.run.evaluations, "val_bits_per_byte") for i, entry in enumerate(entries)]
    training = [_curve(i, entry.run.lines, "loss") for i, entry in enumerate(entries)]
    speed = [_curve(i, entry.run.lines, "tokens_per_second") for i, entry in enumerate(entries)]
    lines = max(len(entry.run.lines) for entry in entries)
    thinned = (
        f"Each point of a curve is the mean of up to {_group(lines)} lines of metrics." if _group(lines) > 1 else ""
    )
    charts = [
        _chart("chart-held-out", "Held-out text, bits per byte", held_out, entries, references=_ngrams(entries)),
        _chart("chart-training", "Training loss, nats per token", training, entries),
        _chart("chart-speed", "Throughput, tokens per second", speed, entries, from_zero=True),
    ]
    return join(
        [
            legend(names, lines=True) if len(entries) > 1 else "",
            element("p", thinned, class_="caption") if thinned else "",
            element("div", *charts, class_="three charts"),
            _samples([entry.run for entry in entries]),
        ]
    )


def _samples(runs: Sequence[Run]) -> Html:
    """What the trained models write by themselves."""
    texts = [(run.name, run.summary["sample"]) for run in runs if run.summary.get("sample")]
    if not texts:
        return Html("")
    several = len(runs) > 1
    parts = [
        join([element("h3", name) if several else "", element("pre", text, class_="sample")]) for name, text in texts
    ]
    return folded("Texts from the models" if several else "A text from the model", *parts)


def _line_style(run: int) -> str:
    colour, dashes = run_line(run)
    return f"border-top-color:var(--{colour});border-top-style:{dashes}"


def _curve(run: int, lines: Sequence[Line], key: str) -> Curve:
    values = [(float(line["step"]), finite(line.get(key))) for line in lines if key in line]
    group = _group(len(values))
    steps, means = [], []
    for first in range(0, len(values), group):
        part = values[first : first + group]
        known = [value for _, value in part if value is not None]
        steps.append(part[-1][0])
        means.append(sum(known) / len(known) if known else math.nan)
    return Curve(run, steps, means)


def _group(lines: int) -> int:
    """How many lines make a point."""
    return max(1, math.ceil(lines / MOST_POINTS))


def _ngrams(entries: Sequence[Entry]) -> Mapping[tuple[str, str], float]:
    """What n-gram models reach, by (text, colour): the run's colour where the runs' corpora differ."""
    found: dict[tuple[str, str], float] = {}
    for order in ("1", "3", "5"):
        key = f"order{order}_bits_per_byte"
        values = {i: finite(entry.run.summary.get(key)) for i, entry in enumerate(entries)}
        if order == "5":
            values |= {i: entries[i].headline.order5_bits_per_byte for i in values if values[i] is None}
        known = {i: value for i, value in values.items() if value is not None}
        same = len({round(value, 6) for value in known.values()}) == 1
        for i, value in known.items():
            found[
                "n-gram, 1 byte" if order == "1" else f"n-gram, {order} bytes", "faint" if same else run_line(i)[0]
            ] = value
    return found


def _chart(
    name: str,
    title: str,
    curves: Sequence[Curve],
    entries: Sequence[Entry],
    *,
    references: Mapping[tuple[str, str], float] | None = None,
    from_zero: bool = False,
) -> Html:
    curves = [curve for curve in curves if any(math.isfinite(value) for value in curve.values)]
    if not curves:
        return figure(title, element("p", "Nothing logged yet.", class_="nothing"))
    drawing = new_figure(3.9, 2.6)
    axes = drawing.subplots()
    plain_axes(axes)
    for curve in curves:
        colour, dashes = run_line(curve.run)
        axes.plot(
            curve.steps,
            curve.values,
            color=LIGHT[colour],
            linestyle=("-", "--", ":")[DASHES.index(dashes)],
            linewidth=1.3,
            marker="o" if len(curve.steps) <= 30 else None,
            markersize=3,
        )
    if references:
        _draw_references(axes, references)
    step_axis(axes)
    axes.margins(x=0.02)
    axes.set_xlim(left=0)
    if from_zero:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: count(value))
    return figure(title, to_svg(drawing, name, f"{title}, over steps. {_told(curves, entries)}"))


def _draw_references(axes: Any, references: Mapping[tuple[str, str], float]) -> None:
    """Dashed lines with their names right of the chart, where no curve crosses them; names keep a line's distance."""
    for (_, colour), value in references.items():
        axes.axhline(value, color=LIGHT[colour], linewidth=0.9, linestyle=(0, (4, 3)))
    low, high = axes.get_ylim()
    distance = 0.065 * (high - low)
    place = -math.inf
    for (text, colour), value in sorted(references.items(), key=lambda item: item[1]):
        place = max(value, place + distance)
        axes.annotate(
            f"{text}: {value:.2f}",
            (1.01, place),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=FONT_POINTS - 0.5,
            color=LIGHT[colour],
            annotation_clip=False,
        )


def _told(curves: Sequence[Curve], entries: Sequence[Entry]) -> str:
    """The curves in words."""
    told = []
    for curve in curves:
        known = [(s, v) for s, v in zip(curve.steps, curve.values, strict=True) if math.isfinite(v)]
        (first, start), (last, end) = known[0], known[-1]
        digits = 0 if abs(end) >= 100 else 3
        text = f"{decimals(end, digits)} at step {count(last)}"
        if len(known) > 1:
            text = f"from {decimals(start, digits)} at step {count(first)} to {text}"
        told.append(f"{entries[curve.run].run.name}: {text}.")
    return " ".join(told)
