"""Picture of `bench compress`: what every way of shrinking keeps, beside random drops, and over bytes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .compress_plans import PLANNER, RANDOM
from .panels import draw_panels
from .report import Row

_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")


def draw_compress(rows: Sequence[Row], path: Path) -> Path | None:
    """Left the drops of each case, right everything over its bytes; None where that cannot be drawn."""
    judged = [row for row in rows if "loss" in row]
    drops = [row for row in judged if any(each["case"] == row["case"] and _is_random(each) for each in judged)]
    panels = {
        "drops, beside random ones": partial(_drops, drops),
        "everything, over its bytes": partial(_bytes, [row for row in judged if not _is_random(row)], rows[0]["bytes"]),
    }
    return draw_panels(path, panels, "quality kept, %", width=6.4, same_scale=False)


def _is_random(row: Row) -> bool:
    return row["method"].startswith(RANDOM)


def _drops(rows: Sequence[Row], axes: Any) -> None:
    cases = list(dict.fromkeys(row["case"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows if not _is_random(row)))
    for place, case in enumerate(cases):
        own = [100 * row["kept"] for row in rows if row["case"] == case and _is_random(row)]
        # Side by side, so that they stay apart.
        xs = [place - 0.3 + 0.15 * (number % 7) / 6 for number in range(len(own))]
        axes.plot(xs, own, "o", color="0.72", ms=3, label="random" if place == 0 else None, zorder=1)
    for number, method in enumerate(methods):
        points = [(cases.index(row["case"]), 100 * row["kept"]) for row in rows if row["method"] == method]
        shift = 0.05 + 0.4 * number / max(1, len(methods) - 1)
        xs, ys = [x - 0.05 + shift for x, _ in points], [y for _, y in points]
        size = 8 if method == PLANNER else 5
        axes.plot(xs, ys, _MARKS[number % len(_MARKS)], ms=size, label=method, zorder=2)
    axes.axhline(100, color="0.6", lw=0.8)
    axes.set_xticks(range(len(cases)), [case.replace(" experts", "\nexperts") for case in cases])
    axes.legend(fontsize=7, ncols=2)


def _bytes(rows: Sequence[Row], whole: int, axes: Any) -> None:
    cases = list(dict.fromkeys(row["case"] for row in rows))
    for number, case in enumerate(cases):
        points = [(100 * row["bytes"] / whole, 100 * row["kept"]) for row in rows if row["case"] == case]
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, _MARKS[number % len(_MARKS)], ms=5, label=case)
    axes.set_xlabel("bytes of weights, % of the whole model's in fp32")
    axes.axhline(100, color="0.6", lw=0.8)
    axes.legend(fontsize=7)
