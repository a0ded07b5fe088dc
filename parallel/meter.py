"""Measures the segments and windows of passes in which everything is computed again on demand."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable

import torch

from .stopwatch import StreamWait

_POLL_S = 50e-6


class Meter:
    """Seconds of segments and of windows, and bytes of segments, by name; a number for each time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.windows: dict[str, list[float]] = defaultdict(list)
        self.bytes: dict[str, list[int]] = defaultdict(list)
        self._computed: dict[str, list[float | StreamWait]] = defaultdict(list)

    def computed(self, name: str, took: float | StreamWait) -> None:
        """Segment `name` was computed again."""
        self._computed[name].append(took)

    def dropped(self, name: str, num_bytes: int) -> None:
        """Segment `name` let go of so many bytes."""
        self.bytes[name].append(num_bytes)

    def wait(self, name: str, arrived: Callable[[], bool]) -> None:
        """Stands still in window `name` until it ends."""
        if self.device.type == "cuda":
            # From when the device is there, not the host.
            torch.cuda.current_stream(self.device).synchronize()
        start = time.perf_counter()
        while not arrived():
            time.sleep(_POLL_S)
        self.windows[name].append(time.perf_counter() - start)

    def seconds(self) -> dict[str, list[float]]:
        """Of segments. Waits for the device."""
        return {
            name: [each.seconds() if isinstance(each, StreamWait) else each for each in took]
            for name, took in self._computed.items()
        }
