"""One pipeline stage as a planner sees it (METHODS L1-L5): operators, windows, and the unit that repeats.

A unit is one forward pass of a micro-batch and one backward pass of an earlier one, over all layers of the stage. Its
events, in order: the forward windows of layers 0, 1, ..., stalls between both passes, and the backward of the last
layer, of the one before it, ... with backward operators and windows in the order in which they run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

Kind = Literal["compute", "collective", "input"]


@dataclass(frozen=True, kw_only=True)
class Operator:
    """A forward operator: what computing its output again takes, and what keeping it takes."""

    name: str
    seconds: float
    """C: of computing it again; of a collective, the exposed time of replaying it."""
    bytes: int
    """M: of its output, while that is there for the backward."""
    inputs: tuple[str, ...] = ()
    """Operators of the same layer, before it, whose outputs it reads."""
    kind: Kind = "compute"
    """`input`: what came from the layer before, always kept. `collective`: kept, or replayed where that is allowed."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """Communication, or a wait, under which compute may run."""

    name: str
    seconds: float
    """T."""
    speed: float = 1.0
    """rho: of compute under it, as a part of its speed alone; (0, 1]."""

    @property
    def room(self) -> float:
        """Seconds of recomputation, at full speed, that it hides."""
        return self.seconds * self.speed


@dataclass(frozen=True, kw_only=True)
class Backward:
    """A backward operator, and the outputs of forward operators of its layer that it reads."""

    name: str
    seconds: float
    reads: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What every layer of one structure does."""

    name: str
    operators: tuple[Operator, ...]
    """In an order in which they can run."""
    forward: tuple[Window, ...] = ()
    """Of its forward pass; what is recomputed there belongs to an earlier micro-batch."""
    backward: tuple[Backward | Window, ...] = ()
    """In the order in which they run."""

    def __post_init__(self) -> None:
        names = [operator.name for operator in self.operators]
        if len(set(names)) < len(names):
            raise ValueError(f"layer {self.name}: operators have one name twice; give each its own")
        for number, operator in enumerate(self.operators):
            unknown = set(operator.inputs) - set(names[:number])
            if unknown:
                raise ValueError(f"layer {self.name}: {operator.name} reads {unknown.pop()!r}, which is not before it")
        for each in self.backward:
            unknown = set(each.reads) - set(names) if isinstance(each, Backward) else set()
            if unknown:
                raise ValueError(
                    f"layer {self.name}: backward {each.name} reads {unknown.pop()!r}, which is no operator"
                )

    @cached_property
    def index(self) -> Mapping[str, int]:
        """Place of each operator by name."""
        return {operator.name: i for i, operator in enumerate(self.operators)}

    @cached_property
    def inputs(self) -> tuple[tuple[int, ...], ...]:
        """Places of what each operator reads."""
        return tuple(tuple(self.index[name] for name in operator.inputs) for operator in self.operators)

    @cached_property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        """Places of the operators that read each."""
        found: list[list[int]] = [[] for _ in self.operators]
        for i, inputs in enumerate(self.inputs):
            for j in inputs:
                found[j].append(i)
        return tuple(map(tuple, found))

    @cached_property
    def is_needed(self) -> tuple[bool, ...]:
        """Whether the backward reads each operator's output."""
        read = {name for each in self.backward if isinstance(each, Backward) for name in each.reads}
        return tuple(operator.name in read for operator in self.operators)

    @property
    def backward_windows(self) -> tuple[Window, ...]:
        """In order."""
        return tuple(each for each in self.backward if isinstance(each, Window))


@dataclass(frozen=True)
class Event:
    """One point of the unit: a window, or a backward operator with what it reads."""

    layer: int
    """-1: a stall, which belongs to none."""
    what: Window | Backward
    backward: bool
    """Whether it is part of the backward pass."""

    @property
    def window(self) -> Window | None:
        """None at a backward operator."""
        return self.what if isinstance(self.what, Window) else None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Layers of one pipeline stage, and the memory that their activations must fit in."""

    layers: tuple[Layer, ...]
    in_flight: int
    """N: micro-batches whose forward has begun and whose backward has not ended."""
    budget: int
    """Bytes of the device."""
    static: int = 0
    """Bytes beside activations: parameters, gradients, optimizer state, buffers, working memory."""
    stalls: tuple[Window, ...] = ()
    """Waits between the forward and the backward of a unit."""
    replay: bool = False
    """Whether collectives may be replayed on demand."""

    def __post_init__(self) -> None:
        if self.in_flight < 1:
            raise ValueError(f"in_flight: {self.in_flight} micro-batches; use 1 or more")

    @cached_property
    def events(self) -> tuple[Event, ...]:
        """The unit. With one micro-batch in flight the backward follows its own forward: no forward window is before it
        and after its forward, so none counts (L3)."""
        found = []
        if self.in_flight > 1:
            found += [Event(i, window, False) for i, layer in enumerate(self.layers) for window in layer.forward]
        found += [Event(-1, window, False) for window in self.stalls]
        for i in reversed(range(len(self.layers))):
            found += [Event(i, each, True) for each in self.layers[i].backward]
        return tuple(found)

    @cached_property
    def windows(self) -> Mapping[tuple[int, bool], tuple[int, ...]]:
        """Events that are windows, in order, by layer (-1: stalls) and whether they are part of the backward."""
        found: dict[tuple[int, bool], list[int]] = {}
        for at, event in enumerate(self.events):
            if event.window is not None:
                found.setdefault((event.layer, event.backward), []).append(at)
        return {key: tuple(each) for key, each in found.items()}

    @cached_property
    def reads(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Of each layer and operator, the events at which the backward reads its output, in order."""
        found: list[list[list[int]]] = [[[] for _ in layer.operators] for layer in self.layers]
        for at, event in enumerate(self.events):
            if isinstance(event.what, Backward):
                for name in event.what.reads:
                    found[event.layer][self.layers[event.layer].index[name]].append(at)
        return tuple(tuple(map(tuple, layer)) for layer in found)

    @cached_property
    def last_window(self) -> tuple[tuple[int, ...], ...]:
        """Of each layer and operator, the event before which a window must be to serve it: its first use, or its
        readers' (L3)."""
        found = []
        for number, layer in enumerate(self.layers):
            until = [min(reads, default=-1) for reads in self.reads[number]]
            for i in reversed(range(len(layer.operators))):
                # What only recomputations read is of use as long as they are.
                until[i] = max([until[i], *(until[j] for j in layer.readers[i])]) if until[i] < 0 else until[i]
            found.append(tuple(until))
        return tuple(found)


Source = Literal["keep", "demand", "none"] | int
"""Where an output comes from: kept since the forward, computed in the window that is event number so-and-so, computed
just before its first use, or nowhere."""
Assignment = tuple[tuple[Source, ...], ...]
"""Of each layer and operator."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an assignment comes to, per unit."""

    exposed: float
    """Seconds of recomputation that nothing hides (L5): on demand, and what spills over from windows."""
    hidden: float
    """Seconds of recomputation under windows."""
    peak: int
    """Bytes at most, all in (L4)."""
    kept: int
    """Bytes kept for one micro-batch."""
    peak_at: int
    """Event of the peak; -1 where what is kept is all there is."""
    spilled: Mapping[int, float] = field(default_factory=dict)
    """Seconds by window that did not fit."""
