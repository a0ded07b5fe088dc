"""How Triton kernels are started, and how to learn what would be started without a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """One start of a kernel."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    """Compile-time values by name, with `num_warps` and `num_stages`."""


_recording: ContextVar[list[Launch] | None] = ContextVar("recording", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Runs `kernel` for every place of `grid`, or only takes note of it under `recorded`.

    It runs on the device of its first argument, a tensor, whichever is the current one.
    """
    heard = _recording.get()
    if heard is not None:
        heard.append(Launch(kernel, grid, arguments, options))
        return
    device: torch.device = arguments[0].device
    # To ask is cheaper than to change what need not change.
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[grid](*arguments, **options)


def interpreted() -> bool:
    """Whether Triton's interpreter takes the place of its compiler, as TRITON_INTERPRET=1 asks."""
    from triton import knobs

    return knobs.runtime.interpret


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collects launches instead of running them; results stay unwritten, so tensors may be on `meta`."""
    heard: list[Launch] = []
    token = _recording.set(heard)
    try:
        yield heard
    finally:
        _recording.reset(token)
