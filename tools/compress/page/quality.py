"""Section of the page: what the smaller model still knows, for how many bytes and how much speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...report.formats import count, decimals, percent, short, size
from ...report.markup import Html, element, figure, folded, join, table
from ...report.palette import LIGHT
from ...report.svg import FONT_POINTS, new_figure, plain_axes, to_svg
from .figures import divergence, times
from .folder import WHOLE, Compression, Contender, Quality, Row
from .marks import FORMS, forms

MEBI = 2**20
MANY_ROWS = 16
"""A longer table is folded."""

RANDOM = "random"

LONG_NAME = 16
"""Letters of a point's name in a chart; a longer one ends before."""


@dataclass(frozen=True)
class Point:
    """One model of a chart."""

    method: str
    x: float
    kept: float


Charts = Mapping[str, Sequence[Point]]
"""Points by the names of AXES."""
Looks = Mapping[str, tuple[str, str]]
"""Marker and name of the colour of each method."""


def quality(compression: Compression) -> Html | None:
    """The stages' models in a table and charts, and those of a benchmark; None where nothing was measured."""
    found, bench = compression.quality, compression.bench
    if not found.rows and not bench:
        return None
    words = element(
        "p",
        "Loss is in nats per token, lower is better; accuracy is the part of tokens that the model holds for the "
        "likeliest. Quality kept is what is left of the accuracy beyond that of always guessing the commonest token: "
        "100 % is the whole model, 0 % a model that knows no more than that. KL is how far its predictions are from "
        "those of the whole model, in nats per token. A prompt is read (prefill) faster than an answer is written "
        "(decode), so both have a speed.",
    )
    parts: list[object] = [words]
    if found.rows:
        parts.append(_rows(found))
    of_rows = _of_rows(found)
    parts.append(_charts("quality", of_rows, _looks(of_rows), label_points=True))
    if bench:
        parts += [element("h3", "Beside other compressions"), _bench(bench)]
    return join(parts)


def is_random(method: str) -> bool:
    """Whether `method` chose by chance: there may be many, numbered."""
    return method.lower().startswith(RANDOM)


def front(points: Sequence[Point], rising: bool) -> list[Point]:
    """Those of `points` that no other beats in both; `rising`: more of x is better."""
    sign = -1 if rising else 1
    best, found = -math.inf, []
    for point in sorted(points, key=lambda each: (sign * each.x, -each.kept)):
        if point.kept > best:
            best = point.kept
            found.append(point)
    return found


def _rows(found: Quality) -> Html:
    rows = [
        [
            row.name,
            short(row.parameters),
            size(row.bytes),
            decimals(row.loss),
            percent(row.accuracy),
            percent(found.kept(row)),
            divergence(row.kl),
            count(row.prefill),
            count(row.decode),
        ]
        for row in found.rows
    ]
    headings = ["model", "parameters", "bytes", "loss", "accuracy", "quality kept", "KL"]
    headings += ["prefill tokens/s", "decode tokens/s"]
    where = [f"measured on {found.text}"] if found.text else []
    if found.unigram_accuracy is not None:
        where.append(f"the commonest token alone is right {percent(found.unigram_accuracy)} of the time")
    told = "; ".join(where)
    facts = element("p", f"{told[:1].upper()}{told[1:]}.", class_="facts") if told else ""
    return join([facts, table(headings, rows, label="Quality, size and speed")])


def _of_rows(found: Quality) -> Charts:
    """Points of the three charts."""

    def points(what: Callable[[Row], float | None]) -> list[Point]:
        rows = [(row.name, what(row), found.kept(row)) for row in found.rows]
        return [Point(name, x, kept) for name, x, kept in rows if x is not None and kept is not None]

    return {
        "bytes": points(lambda row: None if row.bytes is None else row.bytes / MEBI),
        "prefill": points(lambda row: found.ratio(row, lambda each: each.prefill)),
        "decode": points(lambda row: found.ratio(row, lambda each: each.decode)),
    }


def _of_bench(bench: Sequence[Contender]) -> Charts:
    def points(what: Callable[[Contender], float | None]) -> list[Point]:
        rows = [(RANDOM if is_random(row.method) else row.method, what(row), row.kept) for row in bench]
        return [Point(name, x, kept) for name, x, kept in rows if x is not None and kept is not None]

    return {
        "bytes": points(lambda row: None if row.bytes is None else row.bytes / MEBI),
        "prefill": points(lambda row: row.prefill_ratio),
        "decode": points(lambda row: row.decode_ratio),
    }


AXES = {
    "bytes": ("Quality kept against bytes", "MiB on disk"),
    "prefill": ("Quality kept against speed of reading", "times the whole model's prefill speed"),
    "decode": ("Quality kept against speed of writing", "times the whole model's decode speed"),
}
"""Captions and axes of the three charts."""


def _charts(name: str, of_chart: Charts, looks: Looks, *, label_points: bool) -> Html:
    """Those charts of the three that have a model beside the whole one."""
    drawn = [
        _chart(name, what, points, looks, label_points)
        for what, points in of_chart.items()
        if any(point.method != WHOLE for point in points)
    ]
    return element("div", *drawn, class_="three charts") if drawn else Html("")


def _chart(name: str, what: str, points: Sequence[Point], looks: Looks, label_points: bool) -> Html:
    caption, axis = AXES[what]
    drawing = new_figure(3.9, 2.7)
    axes = drawing.subplots()
    plain_axes(axes)
    best = front([point for point in points if not is_random(point.method)], rising=what != "bytes")
    axes.plot([p.x for p in best], [p.kept for p in best], color=LIGHT["rule"], linewidth=1.4, zorder=1)
    for method, (marker, colour) in looks.items():
        mine = [point for point in points if point.method == method]
        axes.plot(
            [point.x for point in mine],
            [point.kept for point in mine],
            color=LIGHT[colour],
            linestyle="none",
            marker=marker,
            markersize=4 if is_random(method) else 9 if marker == "*" else 6,
            zorder=2 if is_random(method) else 3,
        )
    # Room for names right of their points.
    axes.margins(x=0.25 if label_points else 0.08, y=0.12)
    if label_points:
        _name_points(axes, points)
    if what != "bytes":
        axes.axvline(1.0, color=LIGHT["faint"], linewidth=0.8, linestyle=(0, (4, 3)))
    low, high = axes.get_ylim()
    places = 0 if high - low > 0.08 else 1 if high - low > 0.008 else 2
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.{places}f} %")
    axes.set_xlabel(axis)
    unit = " MiB" if what == "bytes" else " times"
    shown = [point for point in points if not is_random(point.method)]
    told = "; ".join(f"{p.method}: {percent(p.kept)} at {decimals(p.x, 2)}{unit}" for p in shown[:MANY_ROWS])
    return figure(caption, to_svg(drawing, f"{name}-{what}", f"{caption}. {told}."))


def _name_points(axes: Any, points: Sequence[Point]) -> None:
    """Writes names beside points, each a line's distance from the next where points lie close."""
    low, high = axes.get_ylim()
    distance, place = 0.085 * (high - low), -math.inf
    for point in sorted(points, key=lambda each: each.kept):
        place = max(point.kept, place + distance)
        axes.annotate(
            point.method if len(point.method) <= LONG_NAME else f"{point.method[: LONG_NAME - 1]}…",
            (point.x, place),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=FONT_POINTS - 0.5,
            color=LIGHT["ink"],
            parse_math=False,
        )


def _looks(of_chart: Charts) -> Looks:
    """The same look for a method in all charts; chance is grey dots."""
    methods = dict.fromkeys(point.method for points in of_chart.values() for point in points)
    names = [name for name in methods if not is_random(name) and name != WHOLE]
    markers = [marker for marker in FORMS if marker != "*"]
    # Neither alone tells more than seven apart; the two together do.
    looks = {name: (markers[i % 7], f"run-{(i + i // 7) % 7}") for i, name in enumerate(names)}
    for name in methods:
        if is_random(name):
            looks[name] = ("o", "faint")
        elif name == WHOLE:
            looks[name] = ("*", "ink")
    return looks


def _bench(bench: Sequence[Contender]) -> Html:
    of_chart = _of_bench(bench)
    looks = _looks(of_chart)
    legend = forms((FORMS[marker], colour, method) for method, (marker, colour) in looks.items())
    told = [row for row in bench if not is_random(row.method)]
    words = element(
        "p",
        "Grey dots chose at random: a method that lies among them chose nothing worth choosing. The line joins those "
        "that no other compression beats in both.",
    )
    rows = [
        [
            row.case,
            row.method,
            size(row.bytes),
            decimals(row.loss),
            percent(row.accuracy),
            percent(row.kept),
            times(row.prefill_ratio),
            times(row.decode_ratio),
        ]
        for row in told
    ]
    headings = ["case", "method", "bytes", "loss", "accuracy", "quality kept", "prefill", "decode"]
    listed = table(headings, rows, label="Benchmark of compressions", texts=2)
    summary = f"{count(len(told))} compressions" + (", random ones left out" if len(told) < len(bench) else "")
    folding = folded(summary, listed, unfolded=len(rows) <= MANY_ROWS)
    return join([words, legend, _charts("bench", of_chart, looks, label_points=False), folding])
