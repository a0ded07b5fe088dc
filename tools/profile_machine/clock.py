"""Seconds of work on a device: medians over turns, in which every contender runs once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..bench.interleave import interleave

Work = Callable[[], object]

_TURN_S = 1e-2
"""Of one turn at least: longer than a scheduler lets other programs run at a time, so that turns feel them alike."""
_MOST_REPEATS = 5000


@dataclass(frozen=True)
class Clock:
    """Times what is given to `device`."""

    device: torch.device

    def seconds(self, work: Work, times: int = 1) -> float:
        """Of `work` done `times` times in a row, each."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(times):
                work()
            return (time.perf_counter() - start) / times
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        start.record()
        for _ in range(times):
            work()
        end.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end) / 1e3 / times

    def medians(self, works: Mapping[str, Work], *, budget_s: float, least_s: float = _TURN_S) -> dict[str, float]:
        """Median seconds of each, over as many turns as `budget_s` allows; one turn of each lasts `least_s` at least.

        For work without collectives: ranks may take different numbers of turns.
        """
        repeats = {}
        for name, work in works.items():
            self.seconds(work)
            repeats[name] = max(1, min(_MOST_REPEATS, round(least_s / max(self.seconds(work), 1e-9))))

        def turn(name: str) -> Callable[[], float]:
            return lambda: self.seconds(works[name], repeats[name]) * repeats[name]

        found = interleave({name: turn(name) for name in works}, rounds=51, warmup=0, budget_s=budget_s)
        return {name: found.median(name) / repeats[name] for name in works}
