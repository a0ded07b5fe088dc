"""Heat maps of what layers and experts have beside what would be even, drawn alike wherever they stand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .palette import LIGHT
from .svg import FONT_POINTS, plain_axes


def heat_image(
    drawing: Any, axes: Any, grid: Sequence[Sequence[float]], extent: tuple[float, ...], most: float = 2.0
) -> None:
    """Draws `grid`, where 1 is the even share: blue is below it, red above, as far as `most`; NaN is left blank."""
    from matplotlib.colors import TwoSlopeNorm

    values = np.array(grid, dtype=float)
    bar = _image(drawing, axes, values, extent, "RdBu_r", TwoSlopeNorm(1.0, 0.0, most), float(np.nanmax(values)) > most)
    bar.set_ticks([0, 0.5, 1, *([1.5, 2] if most == 2 else [most])])


def cosine_image(drawing: Any, axes: Any, grid: Sequence[Sequence[float]], extent: tuple[float, ...]) -> None:
    """Draws `grid` of cosines from its lowest (dark) to its highest value; NaN is left blank."""
    from matplotlib.colors import Normalize

    values = np.array(grid, dtype=float)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    _image(drawing, axes, values, extent, "viridis", Normalize(low, high if high > low else low + 1e-6), False)


def layer_ticks(axes: Any, numbers: Sequence[int]) -> None:
    """Names rows after the layers `numbers`, few enough of them to stand apart."""
    every = max(1, math.ceil(len(numbers) / 16))
    axes.set_yticks(
        [row + 0.5 for row in range(0, len(numbers), every)],
        [f"layer {number}" if row == 0 else str(number) for row, number in enumerate(numbers)][::every],
    )


def expert_ticks(axes: Any, experts: int) -> None:
    """Names columns after experts, few enough of them to stand apart."""
    every = max(1, experts // 8)
    axes.set_xticks([e + 0.5 for e in range(0, experts, every)], [str(e) for e in range(0, experts, every)])
    axes.set_xlabel("expert")


def _image(
    drawing: Any, axes: Any, values: np.ndarray, extent: tuple[float, ...], colours: str, norm: Any, over: bool
) -> Any:
    """Draws `values` without a frame, and returns the bar of its colours."""
    plain_axes(axes, grid=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    image = axes.imshow(values, aspect="auto", cmap=colours, norm=norm, extent=extent, interpolation="none")
    bar = drawing.colorbar(image, ax=axes, shrink=0.9, aspect=24, pad=0.02, extend="max" if over else "neither")
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=LIGHT["faint"], labelsize=FONT_POINTS - 1, width=0.5, length=2)
    return bar
