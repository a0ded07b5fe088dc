"""One picture of a run: how well it predicts held-out text, and how evenly its experts work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any


def draw(path: Path, lines: Sequence[Mapping[str, Any]], ngram: Mapping[str, float]) -> Path | None:
    """Draws metrics lines to `path` as PNG; None where matplotlib is not installed or nothing was logged."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    steps = [line for line in lines if line.get("loss") is not None]
    evaluations = [line for line in lines if "val_bits_per_byte" in line]
    if not steps:
        return None
    loads = [line for line in steps if line.get("expert_load")]
    figure = Figure(figsize=(10 if loads else 5.5, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if loads else 1, squeeze=False)[0]
    _quality(panels[0], steps, evaluations, ngram)
    if loads:
        _balance(figure, panels[1], loads)
    beside = path.with_name(f".{path.name}")
    figure.savefig(beside, dpi=130, format="png")
    beside.replace(path)
    return path


def _quality(
    panel: Any, steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Any], ngram: Mapping[str, float]
) -> None:
    """Held-out bits per byte against the n-gram models; training loss in the same unit behind it."""
    if evaluations:
        # Bytes per token of held-out text turn the training loss into the same unit.
        last = evaluations[-1]
        per_nat = last["val_bits_per_byte"] / last["val_loss"]
        panel.plot(
            [s["step"] for s in steps], [s["loss"] * per_nat for s in steps], color="0.75", lw=1, label="training"
        )
        panel.plot(
            [e["step"] for e in evaluations],
            [e["val_bits_per_byte"] for e in evaluations],
            "o-",
            color="tab:blue",
            ms=4,
            label="held-out text",
        )
        reached = [e["val_bits_per_byte"] for e in evaluations]
        panel.annotate(
            f"{last['val_bits_per_byte']:.2f}",
            (last["step"], last["val_bits_per_byte"]),
            textcoords="offset points",
            xytext=(0, -14),
            ha="right",
            color="tab:blue",
        )
        # All that is named stays in view; the first steps of training may leave it.
        panel.set_ylim(min(*reached, *ngram.values()) - 0.25, max(*reached, *ngram.values()) + 0.6)
    for order, value in sorted(ngram.items()):
        panel.axhline(value, color="tab:red", lw=0.8, ls="--", alpha=0.7)
        # The curve falls from left to right: names of high lines go right of it, those of low lines left.
        high = value == max(ngram.values())
        panel.annotate(
            f"n-gram of {order} byte{'s' if order != '1' else ''}: {value:.2f}",
            (0.98 if high else 0.02, value),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            xytext=(0, 3 if high else -4),
            ha="right" if high else "left",
            va="bottom" if high else "top",
            fontsize=8,
            color="tab:red",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        )
    panel.set_xlabel("step")
    panel.set_ylabel("bits per byte")
    panel.set_title("Prediction of held-out text", loc="left", fontsize=10)
    if evaluations:
        panel.legend(frameon=False, fontsize=8, loc="upper right")
    panel.spines[["top", "right"]].set_visible(False)


def _balance(figure: Any, panel: Any, loads: Sequence[Mapping[str, Any]]) -> None:
    """Share of each expert over time, all layers one above the other, in units of the even share."""
    counts = [len(layer) for layer in loads[0]["expert_load"]]
    grid = [
        [line["expert_load"][layer][expert] * experts for line in loads]
        for layer, experts in enumerate(counts)
        for expert in range(experts)
    ]
    ends = list(accumulate(counts))
    first = loads[0]["step"]
    last = max(loads[-1]["step"], first + 1)  # one column too has a width
    image = panel.imshow(
        grid,
        aspect="auto",
        cmap="RdBu_r",
        vmin=0,
        vmax=2,
        extent=(first, last, ends[-1], 0),
        interpolation="nearest",
    )
    for end in ends[:-1]:
        panel.axhline(end, color="black", lw=0.6)
    middles = [end - experts / 2 for end, experts in zip(ends, counts, strict=True)]
    panel.set_yticks(middles, [f"layer {i}" for i in range(len(counts))])
    panel.set_xlabel("step")
    panel.set_title("Load of each expert (1 = even share)", loc="left", fontsize=10)
    figure.colorbar(image, ax=panel, shrink=0.85)
