"""The share of a training step that is neither a matrix product nor attention: what an MoE layer wastes."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable

from torch.profiler import record_function

from ...launch.profiling import cpu_profile

_STEP = "bench_step"
_INSIDE = re.compile(
    r"""aten::(
        mm | addmm | bmm | baddbmm | _?addmm_activation | addmv | mv | dot | linear | matmul
      | _grouped_mm | grouped_mm
      | mkldnn_linear(_backward\w*)?
      | _?scaled_dot_product_\w+
    )$""",
    re.VERBOSE,
)
"""Operators that do the arithmetic of the model itself, their backward forms included."""


def is_inside(operator: str) -> bool:
    """Whether the profiler's `operator` is a matrix product or attention."""
    return _INSIDE.match(operator) is not None


def outside_share(step: Callable[[], object], steps: int = 3) -> float:
    """Median over `steps` of the time of `step` outside matrix products and attention, as a part of 1.

    Self CPU time by operator from torch.profiler against the wall time of the step under the profiler: Python
    between the operators counts as outside, and so does what the profiler itself costs, so this is an upper
    bound.
    """
    shares = []
    for _ in range(steps):
        with cpu_profile() as trace, record_function(_STEP):
            step()
        events = trace.key_averages()
        total = next(event.cpu_time_total for event in events if event.key == _STEP)
        inside = sum(event.self_cpu_time_total for event in events if is_inside(event.key))
        shares.append(1 - inside / total)
    return statistics.median(shares)
