"""Benchmarks by name, imported only when they run."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .report import Report

BENCHMARKS = {
    "train": "tokens/s of a training step against other MoE implementations",
    "train-ranks": "tokens/s on one and two ranks, and how they scale, against other MoE implementations",
    "parity": "the same losses and gradient norms at every (expert, data) layout",
    "engines": "the same losses under DeepSpeed and Megatron-Core as natively, with our router and optimizer",
    "layout-memory": "bytes of every rank at every layout, beside what the planner says",
    "kernels": "the MoE layer alone, forward and backward, against other implementations and its floor",
    "kernels-gpu": "bandwidth of dispatch and combine on a CUDA device, and times of a whole MoE layer",
    "rectify-quality": "held-out loss and accuracy with Rectify-Router, against vanilla and dropless",
    "rectify-speed": "step time, bytes and memory with Rectify-Router, on ranks over a shaped link",
    "adapprox-memory": "bytes of Adapprox's state against AdamW's, on the paper's shapes",
    "adapprox-speed": "a step of Adapprox against AdamW's, by shape and rank, and in a training step",
    "adapprox-speed-gpu": "a step of Adapprox on a CUDA device against torch's fused AdamW",
    "adapprox-quality": "held-out loss with Adapprox against AdamW and its peers, over the bytes of their state",
    "lynx-plan": "what each planner of recomputation exposes, how long it searches, how far it is from the best known",
    "lynx": "step time and memory of a training that recomputes under communication, on ranks over shaped links",
    "compress": "quality, size and speed of a trained mixture after every way of shrinking it, and random ones",
    "lynx-simulate": "predictions beside published figures; time and memory of a simulation by the number of devices",
}
"""Name (also its module's, with underscores) and what it measures."""


class Benchmark(Protocol):
    """A benchmark's module. It may also have `draw(report, path) -> Path | None`, which pictures its report."""

    def run(self, *, quick: bool, command: str, say: Callable[[str], None]) -> Report:
        """Measures; `quick` in 10 minutes on 2 cores. `command` goes into the report, `say` hears progress.

        Raises UserError where what it needs is missing.
        """
        ...


def load(name: str) -> Benchmark:
    """The benchmark called `name`. Raises ValueError for a name that is not in BENCHMARKS."""
    if name not in BENCHMARKS:
        raise ValueError(f"no benchmark is called {name!r}; there are {', '.join(BENCHMARKS)}")
    return importlib.import_module(f".{name.replace('-', '_')}", __package__)  # type: ignore[return-value]
