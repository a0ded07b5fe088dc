"""How long a rank stands still for a collective, on devices whose host does not wait."""

from __future__ import annotations

import time

import torch


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
