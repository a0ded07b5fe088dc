"""How long a rank stands still for a collective, on devices whose host does not wait."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
import torch.distributed as dist


class StreamWait:
    """Time a CUDA stream stood still, known once the device has got there."""

    def __init__(self, start: torch.cuda.Event, end: torch.cuda.Event) -> None:
        self._start, self._end = start, end

    def seconds(self) -> float:
        """Waits for the device to have passed the end; for places where the host waits for it anyway."""
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3


class Stopwatch:
    """Runs from its making: over the host's waiting on CPU, over the current stream's on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._start = self._event() if device.type == "cuda" else time.perf_counter()

    def stop(self) -> float | StreamWait:
        """Seconds, or what will know them; asks nothing of the device."""
        if isinstance(self._start, torch.cuda.Event):
            return StreamWait(self._start, self._event())
        return time.perf_counter() - self._start

    @staticmethod
    def _event() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Underway:
    """How long collectives travel while their rank does other things; known on CPUs, where the host sees them arrive.

    Runs from its making, which is when they start.
    """

    def __init__(self, works: Iterable[dist.Work | None], device: torch.device) -> None:
        self._start = time.perf_counter()
        self._is_known = device.type == "cpu"
        self._missing = 0
        self._arrived = self._start
        for work in works if self._is_known else ():
            if work is not None:
                self._missing += 1
                work.get_future().add_done_callback(self._arrive)

    def hidden(self) -> float:
        """Seconds until now, or until all had arrived; 0 where that is not known."""
        if not self._is_known:
            return 0.0
        return (time.perf_counter() if self._missing else self._arrived) - self._start

    def _arrive(self, _: object) -> None:
        self._arrived = time.perf_counter()
        self._missing -= 1
