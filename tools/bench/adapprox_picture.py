"""The picture of `adapprox-quality`: what a byte of optimizer state buys."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .panels import draw_panels
from .report import Row

STYLES = {
    "adamw": ("#000000", "o"),
    "adapprox": ("#aa3377", "D"),
    "adapprox-int8": ("#aa3377", "s"),
    "adapprox-none": ("#aa3377", "^"),
    "adafactor": ("#228833", "o"),
    "came": ("#ccbb44", "s"),
    "adamw8bit": ("#4477aa", "P"),
    "apollo": ("#66ccee", "X"),
    "muon": ("#ee6677", "*"),
}
"""Colour and marker of each contender."""


def draw_quality(rows: Sequence[Row], path: Path) -> Path | None:
    """Held-out loss over the average bytes of state per parameter, a panel per model.

    Error bars are of the difference to AdamW, paired by seed.
    """
    rows = [row for row in rows if row.get("loss") is not None]
    models = dict.fromkeys(row["model"] for row in rows)
    panels = {model: partial(_points, [row for row in rows if row["model"] == model]) for model in models}
    return draw_panels(path, panels, "held-out loss, nats", width=5.0)


def _points(rows: Sequence[Row], axes: Any) -> None:
    for row in rows:
        colour, marker = STYLES[row["contender"]]
        at, loss, error = row["mean_state_bytes_per_parameter"], row["loss"], row["above_adamw_se"] or 0.0
        style = {"color": colour, "marker": marker, "ms": 6, "lw": 0, "elinewidth": 1.2, "capsize": 2}
        axes.errorbar([at], [loss], [error], label=row["contender"], **style)
        if row["contender"] == "adamw":
            axes.axhline(loss, color="0.6", lw=0.8, zorder=0)
    # Room for the marker of what has next to no state.
    axes.set_xlim(left=-0.25)
    axes.set_xlabel("bytes of optimizer state per parameter, average over the run")
