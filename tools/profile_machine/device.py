"""Figures of a device: all kernels timed in turns, on all ranks at once, and what the cost model makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from .clock import Clock
from .fit import Class
from .kernels import Kernel, Sizes, kernels

CLASSES = ("matmul", "grouped", "attention", "attention_backward", "memory")


@dataclass(frozen=True, kw_only=True)
class DeviceFigures:
    """As a cluster has them."""

    launch: float
    bandwidth: float
    peak: Mapping[str, float]
    efficiency: Mapping[str, float]


def measure(sizes: Sizes, clock: Clock, budget_s: float) -> tuple[list[Kernel], dict[str, float]]:
    """The kernels, and median seconds of each, on this rank; the other ranks have to do the same now."""
    found = kernels(sizes)
    return found, clock.medians({kernel.name: kernel.run for kernel in found}, budget_s=budget_s)


def middle(of_ranks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Medians over ranks, by name."""
    return {name: median(each[name] for each in of_ranks) for name in of_ranks[0]}


def figures(found: Sequence[Kernel], seconds: Mapping[str, float], dtype: str) -> DeviceFigures:
    """What `seconds` by name make of a device that computes in `dtype`.

    Peaks are the highest rates that anything reached, so that no part of them is above 1: the large product's and the
    large copy's, or those of kernels whose operands a cache holds.
    """

    def of(belongs: str) -> list[Kernel]:
        return [kernel for kernel in found if kernel.belongs == belongs]

    launch = median(seconds[kernel.name] for kernel in of("launch"))
    peak = {kernel.name.removeprefix("peak "): kernel.work / seconds[kernel.name] for kernel in of("peak")}
    bandwidth = max(kernel.work / seconds[kernel.name] for kernel in of("bandwidth"))
    rates = {name: _class(of(name), seconds).rate(launch) for name in CLASSES if of(name)}
    products = [rate for name, rate in rates.items() if name != "memory"]
    peak[dtype] = max([peak[dtype], *products])
    bandwidth = max(bandwidth, rates["memory"])
    efficiency = {name: rate / (bandwidth if name == "memory" else peak[dtype]) for name, rate in rates.items()}
    return DeviceFigures(launch=launch, bandwidth=bandwidth, peak=peak, efficiency=efficiency)


def _class(members: Sequence[Kernel], seconds: Mapping[str, float]) -> Class:
    def own(kernel: Kernel) -> float:
        # What it contains cannot have taken all of it: noise might say so.
        return max(seconds[kernel.name] - sum(seconds[name] for name in kernel.less), seconds[kernel.name] / 10)

    return Class(
        work=sum(kernel.work * kernel.occurs for kernel in members),
        seconds=sum(own(kernel) * kernel.occurs for kernel in members),
        launches=sum(kernel.launches * kernel.occurs for kernel in members),
    )
