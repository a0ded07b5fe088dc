"""What a layer does, step by step in forward order, and the planner's Layer that this makes.

A Step is a forward operator together with its backward; an Exchange is a collective together with the one that its
gradient takes. The backward runs them in reverse.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from .problem import Backward, Kind, Layer, Operator, Window


@dataclass(frozen=True, kw_only=True)
class Step:
    """Compute on one rank."""

    name: str
    seconds: float = 0.0
    """Of the forward."""
    bytes: int = 0
    """Of its output."""
    inputs: tuple[str, ...] = ()
    """Earlier steps and exchanges that it reads; an exchange that is no operator stands for what it passes on."""
    reads: tuple[str, ...] = ()
    """Steps, also itself, whose outputs its backward reads."""
    backward: float = 0.0
    """Seconds of the gradients of its inputs ..."""
    weights: float = 0.0
    """... and of its weights, which nothing waits for."""
    again: Window | None = None
    """A collective that its backward repeats for the gradient of its weights."""
    kind: Kind = "compute"
    flops: float = 0.0
    """Of the forward's matrix products."""
    gradient_bytes: int = 0
    """Of the gradient of its weight, where that is formed before it is added."""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Communication in the forward, the backward, or both."""

    name: str
    forward: float = 0.0
    """Seconds; 0: the forward does not communicate, and passes on what it reads."""
    backward: float = 0.0
    """Seconds; 0: nor does the backward."""
    bytes: int = 0
    """Of its result in the forward."""
    inputs: tuple[str, ...] = ()
    speed: float = 1.0
    """rho: of compute under it."""
    axis: str = "tensor"
    """Of the ranks that take part: tensor or expert."""


@dataclass(frozen=True, kw_only=True)
class LayerWork:
    """A layer for the planner, and what a simulator asks beside it."""

    layer: Layer
    weight_gradients: Mapping[str, float]
    """Of each backward operator, by name, the seconds that the gradients of weights take: they may be put off."""
    axes: Mapping[str, str]
    """Of each window, by name, the axis whose ranks communicate: tensor or expert."""
    flops: float
    """Of the forward's matrix products on this rank."""
    working: int
    """Bytes at most of gradients that one backward operator reads and writes."""

    @cached_property
    def forward(self) -> float:
        """Seconds of compute in the forward."""
        return sum(operator.seconds for operator in self.layer.operators if operator.kind != "collective")

    @cached_property
    def backward(self) -> float:
        """Seconds of compute in the backward, without recomputation."""
        return sum(each.seconds for each in self.layer.backward if isinstance(each, Backward))

    @cached_property
    def forward_exchange(self) -> float:
        """Seconds of communication in the forward."""
        return sum(window.seconds for window in self.layer.forward)

    @cached_property
    def backward_exchange(self) -> float:
        """Seconds of communication in the backward."""
        return sum(window.seconds for window in self.layer.backward_windows)

    @cached_property
    def saved(self) -> int:
        """Bytes where all that the backward reads is kept."""
        pairs = zip(self.layer.operators, self.layer.is_needed, strict=True)
        return sum(operator.bytes for operator, needed in pairs if needed or operator.kind == "input")


def assemble(name: str, steps: Sequence[Step | Exchange]) -> LayerWork:
    """The layer that does `steps` in this order. Raises ValueError where one reads what is not before it."""
    stand_ins: dict[str, tuple[str, ...]] = {}
    operators, windows = [], []
    for step in steps:
        inputs = tuple(dict.fromkeys(source for given in step.inputs for source in stand_ins.get(given, (given,))))
        if isinstance(step, Step):
            operators.append(
                Operator(name=step.name, seconds=step.seconds, bytes=step.bytes, inputs=inputs, kind=step.kind)
            )
        elif step.forward:
            operators.append(
                Operator(name=step.name, seconds=step.forward, bytes=step.bytes, inputs=inputs, kind="collective")
            )
            windows.append(Window(name=step.name, seconds=step.forward, speed=step.speed))
        else:
            stand_ins[step.name] = inputs
    layer = Layer(name=name, operators=tuple(operators), forward=tuple(windows), backward=tuple(_backward(steps)))
    computing = [step for step in steps if isinstance(step, Step)]
    axes = {step.name: step.axis for step in steps if isinstance(step, Exchange)}
    axes |= {f"{each} gradient": axis for each, axis in axes.items()}
    axes |= {step.again.name: "tensor" for step in computing if step.again is not None}
    return LayerWork(
        layer=layer,
        weight_gradients={f"{step.name} backward": step.weights for step in computing if step.weights},
        axes={each.name: axes[each.name] for each in (*layer.forward, *layer.backward_windows)},
        flops=sum(step.flops for step in computing),
        working=_working(layer, computing),
    )


def _backward(steps: Sequence[Step | Exchange]) -> Iterator[Backward | Window]:
    for step in reversed(steps):
        if isinstance(step, Exchange):
            if step.backward:
                yield Window(name=f"{step.name} gradient", seconds=step.backward, speed=step.speed)
            continue
        if step.again is not None:
            yield step.again
        seconds = step.backward + step.weights
        if seconds or step.reads:
            yield Backward(name=f"{step.name} backward", seconds=seconds, reads=step.reads)


def _working(layer: Layer, steps: Sequence[Step]) -> int:
    sizes = {operator.name: operator.bytes for operator in layer.operators}
    inputs = {operator.name: operator.inputs for operator in layer.operators}
    return max(
        sizes[step.name] + sum(sizes[name] for name in inputs[step.name]) + step.gradient_bytes
        for step in steps
        if step.backward or step.weights
    )
