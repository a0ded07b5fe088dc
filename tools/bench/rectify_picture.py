"""Pictures of the benchmarks of rectification: what each method brings, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .panels import STYLES, draw_panels
from .report import Row


def draw_quality(rows: Sequence[Row], path: Path) -> Path | None:
    """How far below vanilla each method's held-out loss is, over the capacity factor; a panel per setting and top_k."""
    rows = [row for row in rows if row.get("gain") is not None]
    groups = dict.fromkeys((row["setting"], row["top_k"]) for row in rows)
    panels = {
        f"{setting}, top-{top_k}": partial(_gains, [r for r in rows if (r["setting"], r["top_k"]) == (setting, top_k)])
        for setting, top_k in groups
    }
    return draw_panels(path, panels, "held-out loss below vanilla's, nats")


def _gains(rows: Sequence[Row], axes: Any) -> None:
    for shift, (method, (colour, marker)) in enumerate(STYLES.items()):
        points = sorted((row["factor"], row["gain"], row["gain_se"] or 0.0) for row in rows if row["method"] == method)
        if points:
            xs, ys, errors = zip(*points, strict=True)
            # Side by side, so that error bars stay apart.
            xs = [x + 0.02 * (shift - 1.5) for x in xs]
            axes.errorbar(xs, ys, errors, color=colour, marker=marker, ms=5, lw=1.2, capsize=2, label=method)
    axes.axhline(0, color="0.6", lw=0.8)
    axes.set_xticks(sorted({row["factor"] for row in rows}))
    axes.set_xlabel("capacity factor")


def draw_speed(rows: Sequence[Row], path: Path) -> Path | None:
    """Each method's step time in units of vanilla's, with quartiles, by router; a panel per world and top_k."""
    groups = dict.fromkeys((row["world"], row["top_k"]) for row in rows)
    panels = {
        f"{world} ranks, top-{top_k}": partial(_times, [r for r in rows if (r["world"], r["top_k"]) == (world, top_k)])
        for world, top_k in groups
    }
    return draw_panels(path, panels, "step time / vanilla's", width=4.8, same_scale=True)


def _times(rows: Sequence[Row], axes: Any) -> None:
    places = list(dict.fromkeys((row["dispatch"], row["router"], row["gini"]) for row in rows))
    for shift, (method, (colour, marker)) in enumerate(STYLES.items()):
        points = [row for row in rows if row["method"] == method]
        xs = [places.index((row["dispatch"], row["router"], row["gini"])) + 0.15 * (shift - 1.5) for row in points]
        ys = [row["vs_vanilla"] for row in points]
        quartiles = [row["vs_vanilla_quartiles"] or (y, y) for row, y in zip(points, ys, strict=True)]
        # Of few rounds a rounded quartile may lie on the other side of the median.
        below = [max(0.0, y - low) for y, (low, _) in zip(ys, quartiles, strict=True)]
        above = [max(0.0, high - y) for y, (_, high) in zip(ys, quartiles, strict=True)]
        axes.errorbar(xs, ys, (below, above), color=colour, marker=marker, ms=4, lw=0, elinewidth=1.2, label=method)
    axes.axhline(1, color="0.6", lw=0.8)
    names = [f"{router}\n{dispatch}\nGini {gini:.2f}" for dispatch, router, gini in places]
    axes.set_xticks(range(len(places)), names, fontsize=6.5)
