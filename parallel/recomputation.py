"""Planned recomputation: which segments of a forward are dropped, and in which window each is computed again.

Two pieces, for any module and any asynchronous collective:

    recomputation.segment(name, function, *args)   a call whose tensors may be dropped (segment.py)
    recomputation.window(name)                     what to do between a collective's start and the wait for it: of
                                                   one in collectives.py, or any other through windowed.py

A window of the backward computes segments of its own pass; one of the forward computes those of the oldest pass that
waits for its backward (METHODS section 2, L3 and L7; arXiv 2406.08756). Collectives are never part of a segment, so
that none is sent again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .meter import Meter
from .segment import Segment, given
from .stopwatch import StreamWait

During = Callable[[Callable[[], bool]], None]
"""during(arrived): called between a collective's start and the wait for it; `arrived()` says whether it is done."""


def nothing(arrived: Callable[[], bool]) -> None:
    """No window, or nothing planned for it."""


@dataclass(frozen=True)
class Schedule:
    """What is dropped, and what is computed again where. Names are the caller's own."""

    dropped: frozenset[str] = frozenset()
    """Segments whose tensors are not kept."""
    windows: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By name of a window: segments computed again there, in this order. What is dropped and in none is on demand."""

    def __post_init__(self) -> None:
        kept = {name for names in self.windows.values() for name in names} - self.dropped
        if kept:
            raise ValueError(f"windows: {min(kept)!r} is to be computed again and is not dropped; add it to `dropped`")


KEEP = Schedule()


@dataclass
class Spent:
    """Recomputation since the last `take`: seconds, or what will know them."""

    hidden: list[float | StreamWait] = field(default_factory=list)
    """Begun while what its window waits for was on its way."""
    exposed: list[float | StreamWait] = field(default_factory=list)

    def seconds(self) -> tuple[float, float]:
        """Hidden and exposed. Waits for the device where that computes."""
        for part in (self.hidden, self.exposed):
            part[:] = [sum((each.seconds() if isinstance(each, StreamWait) else each for each in part), 0.0)]
        return float(self.hidden[0]), float(self.exposed[0])  # pyright: ignore[reportArgumentType]

    def take(self) -> tuple[float, float]:
        """As `seconds`; starts anew."""
        found = self.seconds()
        self.hidden.clear()
        self.exposed.clear()
        return found


class Recomputation:
    """The segments and windows of one module over all its passes."""

    def __init__(self, schedule: Schedule = KEEP, *, debug: bool = False) -> None:
        """debug: compares what is computed again with what was, by a hash of every tensor; slow."""
        self.schedule = schedule
        """Of the passes that begin from now on."""
        self.debug = debug
        self.spent = Spent()
        self.meter: Meter | None = None
        """Set for passes that are to be measured: their windows are waited for, and do nothing else."""
        self.inside = 0
        """Depth of segments being computed: what they call is part of them."""
        self._passes: list[weakref.ref[Pass]] = []
        """Oldest first; a pass lives as long as its graph."""
        self.current = Pass(self, KEEP, frozenset())

    def begin(self, module: nn.Module) -> None:
        """A forward of `module` begins, whose weights are there until its backward ends."""
        self._passes = [weak for weak in self._passes if (each := weak()) is not None and not each.is_begun]
        if not self.schedule.dropped or not torch.is_grad_enabled():
            self.current = Pass(self, KEEP, frozenset())
            return
        weights = frozenset(weight.untyped_storage()._cdata for weight in module.parameters())
        self.current = Pass(self, self.schedule, weights)
        self._passes.append(weakref.ref(self.current))

    def segment(self, name: str, function: Callable[..., Any], *args: Any, draws: bool = False) -> Any:
        """function(*args), where `name` says whether its tensors are kept.

        The function sends nothing, depends on its arguments and on weights alone, and changes none of them; `draws`: it
        draws random numbers. Tensors that it closes over are kept; where backward reads one, the function is called
        again for it, which those among `args` spare. Segments within a segment are part of it.
        """
        return self.current.segment(name, function, args, draws)

    def window(self, name: str, forward: bool = False) -> During:
        """For the window `name` of the current pass: of its backward, or of its forward."""
        mine, meter = self.current, self.meter
        if meter is not None:
            return partial(meter.wait, name)
        if name not in mine.schedule.windows:
            return nothing
        if forward:
            return lambda arrived: self._ahead(mine, name, arrived)
        # Weak: the graph of a pass holds this, and must not hold itself.
        weak = weakref.ref(mine)
        return lambda arrived: _in_window(weak(), name, arrived)

    def _ahead(self, mine: Pass, name: str, arrived: Callable[[], bool]) -> None:
        waiting = (each for weak in self._passes if (each := weak()) is not None and not each.is_begun)
        _in_window(next((each for each in waiting if each is not mine), None), name, arrived)


def _in_window(of: Pass | None, name: str, arrived: Callable[[], bool]) -> None:
    if of is not None:
        of.recompute(of.schedule.windows.get(name, ()), arrived)


class Pass:
    """One forward and its backward."""

    def __init__(self, owner: Recomputation, schedule: Schedule, weights: frozenset[int]) -> None:
        """weights: the storages of all parameters."""
        self.owner, self.schedule, self._weights = owner, schedule, weights
        self.debug = owner.debug
        self.is_begun = False
        """Whether its backward has begun."""
        self._segments: dict[str, list[weakref.ref[Segment]]] = {}

    def segment(self, name: str, function: Callable[..., Any], args: tuple[Any, ...], draws: bool) -> Any:
        """See `Recomputation.segment`."""
        if not self.schedule.dropped or self.owner.inside or not torch.is_grad_enabled():
            return function(*args)
        dropped, origins = name in self.schedule.dropped, tuple(given(arg) for arg in args)
        if not dropped and not any(origins):
            return function(*args)
        made = Segment(name, self._inside(function) if dropped else function, self, dropped, draws)
        if dropped:
            self._segments.setdefault(name, []).append(weakref.ref(made))
        returned = made.forward(args, origins)
        if dropped and self.owner.meter is not None:
            self.owner.meter.dropped(name, made.dropped_bytes)
        return returned

    def recompute(self, names: Iterable[str], arrived: Callable[[], bool]) -> None:
        """Computes segments ahead of their use, those that are still wanted."""
        for name in names:
            for weak in self._segments.get(name, ()):
                segment = weak()
                if segment is not None and segment.is_wanted:
                    segment.compute(hidden=not arrived())

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether `tensor` is a parameter of the module, or a view of one."""
        return tensor.untyped_storage()._cdata in self._weights

    def computed(self, name: str, took: float | StreamWait, hidden: bool) -> None:
        """Segment `name` was computed again."""
        (self.owner.spent.hidden if hidden else self.owner.spent.exposed).append(took)
        if self.owner.meter is not None:
            self.owner.meter.computed(name, took)

    def asked(self) -> None:
        """Backward has reached a segment."""
        self.is_begun = True

    def _inside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        owner = self.owner

        def whole(*args: Any) -> Any:
            owner.inside += 1
            try:
                return function(*args)
            finally:
                owner.inside -= 1

        return whole
