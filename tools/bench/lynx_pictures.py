"""Pictures of the benchmark `lynx`: step times over bandwidth, and one step of one rank."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..report.palette import LIGHT
from .panels import draw_panels
from .report import Row

STYLES = {
    "none": ("0.45", ":", "none"),
    "full": ("#cc3311", "-", "s"),
    "full, kept": ("#ee7733", "-", "D"),
    "selective": ("#ccbb44", "-", "^"),
    "lynx-heu": ("#4477aa", "-", "o"),
    "lynx-opt": ("#66ccee", "--", "x"),
}
"""Colour, line and marker of each policy."""
_TICKS_MS = [digit * 10**power for power in range(5) for digit in (1, 2, 3, 5, 7)]
_UNITS = {"mbit": 1e6, "gbit": 1e9}
_LANES = {
    "computes": {
        "forward": LIGHT["forward"],
        "backward": LIGHT["weight-gradient"],
        "recomputation": LIGHT["recomputation"],
        "optimizer": LIGHT["optimizer"],
    },
    "on their way": {"rows": LIGHT["communication"], "gradients": LIGHT["gradient-reduction"]},
}


def bits_per_second(rate: str) -> float:
    """Of a rate as tc writes it, `100mbit`."""
    unit = next(unit for unit in _UNITS if rate.endswith(unit))
    return float(rate.removesuffix(unit)) * _UNITS[unit]


def draw_step_times(rows: Sequence[Row], path: Path) -> Path | None:
    """Step time of each policy over bandwidth, a panel per budget; those that do not fit it are left out."""
    budgets = dict.fromkeys(row["budget"] for row in rows if row["budget"] is not None)
    panels = {
        f"budget: {'what selective takes' if budget.startswith('sel') else budget}": partial(_times, rows, budget)
        for budget in budgets
    }
    return draw_panels(path, panels, "step, ms", same_scale=True)


def _times(rows: Sequence[Row], budget: str, axes: Any) -> None:
    room = {row["rate"]: row["budget_bytes"] for row in rows if row["budget"] == budget}
    for policy, (colour, line, marker) in STYLES.items():
        points = sorted(
            (bits_per_second(row["rate"]), row["step_ms"])
            for row in rows
            if row["policy"] == policy
            and row["rate"] in room
            # What needs no recomputation is shown everywhere, as the floor.
            and (row["budget"] == budget or policy == "none" or (not row["budget"] and _fits(row, room)))
        )
        label = f"{policy} (does not fit)" if policy == "none" else policy
        # Without points for the legend, which is drawn once.
        axes.plot(*_columns(points), color=colour, ls=line, marker=marker, ms=5, lw=1.3, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.set_xticks([bits_per_second(rate) for rate in room], list(room), fontsize=8)
    times = [row["step_ms"] for row in rows]
    ticks = [tick for tick in _TICKS_MS if min(times) / 1.3 < tick < 1.3 * max(times)]
    axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xlabel("link, bit/s")


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _fits(row: Row, room: dict[str, int]) -> bool:
    return row["peak_bytes"] <= room[row["rate"]]


def draw_trace(rows: Sequence[Row], path: Path) -> Path | None:
    """The step of `rows` that was profiled: what the rank computes, and what travels meanwhile."""
    row = next((row for row in rows if row.get("trace")), None)
    if row is None:
        return None

    def lanes(axes: Any) -> None:
        for place, kinds in enumerate(_LANES.values()):
            for kind, colour in kinds.items():
                spans = [(start, end - start) for start, end in row["trace"].get(kind, [])]
                axes.broken_barh(spans, (0.6 * place, 0.45), color=colour, lw=0, label=kind)
        axes.set_yticks([0.6 * place + 0.22 for place in range(len(_LANES))], list(_LANES))
        axes.set_ylim(-0.1, 1.9)
        axes.set_xlabel("ms")

    title = f"one rank, one step of {row['policy']} at {row['rate']}, budget {row['budget']}"
    return draw_panels(path, {title: lanes}, "", width=12.0)
