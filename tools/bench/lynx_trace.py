"""What one rank does in a step, and what travels meanwhile, from torch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ...launch.profiling import cpu_profile

Span = tuple[float, float]
"""Begin and end, in milliseconds."""
JOIN_MS = 0.3
"""Pauses up to so long do not show."""
_RECOMPUTE, _BACKWARD, _OPTIMIZER = "recompute ", "autograd::engine::evaluate_function", "Optimizer.step"
_COLLECTIVES = {"gloo:all_to_all": "rows", "gloo:all_reduce": "gradients"}


def trace_of(step: Callable[[], object]) -> dict[str, list[Span]]:
    """When `step` computed what, by `forward`, `backward`, `recomputation`, `optimizer`; and when `rows` or `gradients`
    were on their way. Of this rank, from the step's start."""
    with cpu_profile() as trace:
        step()
    return spans([(e.name, e.thread, e.time_range.start / 1e3, e.time_range.end / 1e3) for e in trace.events() or []])


def spans(events: Iterable[tuple[str, int, float, float]]) -> dict[str, list[Span]]:
    """Of the profiler's events: name, thread, begin and end in milliseconds."""
    events = sorted(events, key=lambda event: (event[2], -event[3]))
    own = next((thread for name, thread, *_ in events if name.startswith(_BACKWARD)), None)
    begin = events[0][2] if events else 0.0
    found: dict[str, list[Span]] = {}
    open_until: dict[str, float] = {}
    done = float("-inf")
    for name, thread, start, end in events:
        kind = next((kind for prefix, kind in _COLLECTIVES.items() if name.startswith(prefix)), None)
        if kind is not None:
            found.setdefault(kind, []).append((start - begin, end - begin))
            continue
        if thread != own:
            continue
        for prefix in (_RECOMPUTE, _BACKWARD, _OPTIMIZER):
            if name.startswith(prefix):
                open_until[prefix] = max(end, open_until.get(prefix, end))
        # Operators alone compute; what is called within one is part of it.
        if name.startswith("aten::") and start >= done:
            done = end
            inside = (p for p in (_RECOMPUTE, _OPTIMIZER, _BACKWARD) if start < open_until.get(p, start))
            what = {_RECOMPUTE: "recomputation", _OPTIMIZER: "optimizer", _BACKWARD: "backward"}
            found.setdefault(what.get(next(inside, ""), "forward"), []).append((start - begin, end - begin))
    return {kind: joined(each) for kind, each in found.items()}


def joined(found: list[Span]) -> list[Span]:
    """Spans that touch or nearly do in one; in order."""
    whole: list[Any] = []
    for start, end in sorted(found):
        if whole and start - whole[-1][1] <= JOIN_MS:
            whole[-1][1] = max(whole[-1][1], end)
        else:
            whole.append([start, end])
    return [(round(start, 3), round(end, 3)) for start, end in whole]
