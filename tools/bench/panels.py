"""Pictures of benchmarks: panels side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..output import replacing

STYLES = {"IR": ("#ccbb44", "o"), "FR": ("#228833", "s"), "both": ("#aa3377", "D"), "dropless": ("#4477aa", "^")}
"""Colour and marker of each method of rectification beside vanilla."""


def draw_panels(
    path: Path, panels: Mapping[str, Callable[[Any], None]], label: str, width: float = 3.6, same_scale: bool = False
) -> Path | None:
    """Writes `path` as PNG, a panel for each title of `panels`, which draws on its axes; None without matplotlib.

    label: of the vertical axis; width: of a panel, in inches; same_scale: one vertical axis for all. Raises UserError
    where the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not panels:
        return None
    figure = Figure(figsize=(width * len(panels) + 0.6, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(panels), sharey=same_scale, squeeze=False)[0]
    for axes, (title, draw) in zip(all_axes, panels.items(), strict=True):
        draw(axes)
        axes.set_title(title, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].set_ylabel(label)
    all_axes[0].legend(frameon=False, fontsize=8, ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=130, format="png")
    return path
