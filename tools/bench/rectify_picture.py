"""The picture of `rectify-quality`: how far below vanilla each method's held-out loss is, over the capacity factor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import Row

STYLES = {"IR": ("#ccbb44", "o"), "FR": ("#228833", "s"), "both": ("#aa3377", "D"), "dropless": ("#4477aa", "^")}


def draw_quality(rows: Sequence[Row], path: Path) -> Path | None:
    """Writes `path` as PNG, a panel per setting and top_k; None without matplotlib or rows."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    rows = [row for row in rows if row.get("gain") is not None]
    groups = list(dict.fromkeys((row["setting"], row["top_k"]) for row in rows))
    if not groups:
        return None
    figure = Figure(figsize=(3.6 * len(groups) + 0.6, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for panel, (setting, top_k) in zip(panels, groups, strict=True):
        _panel(panel, [row for row in rows if (row["setting"], row["top_k"]) == (setting, top_k)])
        panel.set_title(f"{setting}, top-{top_k}", loc="left", fontsize=10)
    panels[0].set_ylabel("held-out loss below vanilla's, nats")
    panels[0].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}")
    figure.savefig(beside, dpi=130, format="png")
    beside.replace(path)
    return path


def _panel(panel: Any, rows: Sequence[Row]) -> None:
    factors = sorted({row["factor"] for row in rows})
    for shift, (method, (colour, marker)) in enumerate(STYLES.items()):
        points = sorted((row["factor"], row["gain"], row["gain_se"] or 0.0) for row in rows if row["method"] == method)
        if points:
            xs, ys, errors = zip(*points, strict=True)
            # Side by side, so that error bars stay apart.
            xs = [x + 0.02 * (shift - 1.5) for x in xs]
            panel.errorbar(xs, ys, errors, color=colour, marker=marker, ms=5, lw=1.2, capsize=2, label=method)
    panel.axhline(0, color="0.6", lw=0.8)
    panel.set_xticks(factors)
    panel.set_xlabel("capacity factor")
    panel.spines[["top", "right"]].set_visible(False)
