"""From measured seconds to the figures of the cost model: arithmetic alone, no device.

kernels       an efficiency is what the model counts over what was reached, of all kernels of a class together: so the
              sum over a layer is right, and each kernel as far as it is like the others
links         seconds = steps * latency + bytes / rate, by least squares of relative errors
overlap       rho = (exchange + compute - both) / exchange: what a window hides, as the planner counts it (METHODS L5)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

LEAST_SPEED = 0.01
"""Of compute under communication: a window that hides nothing still has a speed above 0."""

Sample = tuple[float, float]
"""Bytes that one rank sent, and seconds."""


@dataclass(frozen=True, kw_only=True)
class Class:
    """Kernels whose efficiency is one figure: what they do in all, and how long it took."""

    work: float
    """FLOPs, or bytes moved, as the cost model counts them."""
    seconds: float
    """Launches included."""
    launches: float
    """Operators that the cost model gives a launch each."""

    def rate(self, launch: float) -> float:
        """FLOP/s or bytes/s beside the launches, which are half of the time at most."""
        return self.work / max(self.seconds - self.launches * launch, self.seconds / 2)


@dataclass(frozen=True, kw_only=True)
class LinkFit:
    """Figures of a link, as a cluster has them."""

    latency: float
    bandwidth: float
    collective: float
    all_to_all: float


def fit_line(samples: Sequence[Sample]) -> tuple[float, float]:
    """Latency and seconds per byte of one collective; neither is below 0, and the latency is above it."""
    sizes, seconds = (np.array(column, dtype=float) for column in zip(*samples, strict=True))
    columns = np.stack([np.ones_like(sizes), sizes], axis=1) / seconds[:, None]
    (start, slope), *_ = np.linalg.lstsq(columns, np.ones_like(seconds), rcond=None)
    if slope <= 0:
        return float(seconds.mean()), 0.0
    if start <= 0:
        # No latency can be seen: as much as the smallest message took, less what its bytes take.
        return float(max(seconds.min() / 10, seconds.min() - slope * sizes.min())), float(slope)
    return float(start), float(slope)


def fit_link(samples: Mapping[str, Sequence[Sample]], steps: Mapping[str, int]) -> LinkFit:
    """Of samples by collective: `all-to-all`, and others, which share a rate. Medians of what their lines say.

    steps: latencies that the cost model gives each collective.
    """
    lines = {name: fit_line(those) for name, those in samples.items()}
    latency = median(start / steps[name] for name, (start, _) in lines.items())

    def rate(names: Sequence[str]) -> float:
        slopes = [lines[name][1] for name in names if lines[name][1] > 0]
        # Where noise hides what bytes cost, at least as fast as the fastest message was in all.
        return 1 / median(slopes) if slopes else max(size / s for name in names for size, s in samples[name])

    all_to_all = rate(["all-to-all"])
    others = rate([name for name in samples if name != "all-to-all"])
    bandwidth = max(all_to_all, others)
    return LinkFit(
        latency=latency, bandwidth=bandwidth, collective=others / bandwidth, all_to_all=all_to_all / bandwidth
    )


def speed_under(exchange: float, compute: float, both: float) -> float:
    """rho of an exchange beside more compute than it lasts: what it hid over how long it is, in (0, 1]."""
    return min(1.0, max(LEAST_SPEED, (exchange + compute - both) / exchange))
