"""A forward pass cut into stages, each timed, and its backward, stage by stage.

The graph is cut between stages: what one gives is a leaf for those that read it. Gradients gather at leaves as autograd
gathers them anywhere, those of weights where training keeps them. Stages run in the order and the surroundings of a
real pass, so that caches hold what they hold there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Made = Tensor | tuple[Tensor, ...]


@dataclass
class _Stage:
    name: str
    made: list[tuple[Tensor, Tensor]]
    """What it gave, with its graph, and the leaf that stands for it."""
    reads: list[Tensor]
    """Leaves and weights that its backward reaches."""


@dataclass
class Tape:
    """One pass. Marks are taken on the device's stream where it has one, and read once at the end."""

    device: torch.device
    stages: list[_Stage] = field(default_factory=list)
    marks: list[tuple[str, object]] = field(default_factory=list)
    """Name of what ended, and when."""

    def start(self) -> None:
        """Time begins."""
        self._mark("")

    def leaf(self, tensor: Tensor) -> Tensor:
        """An input of the pass."""
        return tensor.detach().requires_grad_()

    def step(
        self, name: str, run: Callable[..., Made], *inputs: Tensor, of: Sequence[nn.Module] = (), replaced: Made = ()
    ) -> tuple[Tensor, ...]:
        """Runs `run(*inputs)`, whose weights are those of the modules `of`; returns leaves of what it gave.

        replaced: values that later stages get instead.
        """
        given = run(*inputs)
        outputs = given if isinstance(given, tuple) else (given,)
        values = replaced if isinstance(replaced, tuple) else (replaced,)
        leaves = tuple(self.leaf(value) for value in (values or outputs))
        self._mark(name)
        weights = [weight for module in of for weight in module.parameters()]
        self.stages.append(_Stage(name, list(zip(outputs, leaves, strict=True)), [*inputs, *weights]))
        return leaves

    def backward(self, gradient: Tensor) -> None:
        """Through all stages, from the last one's output."""
        self.stages[-1].made[0][1].grad = gradient
        self._mark("")
        for stage in reversed(self.stages):
            reached = [(made, leaf.grad) for made, leaf in stage.made if leaf.grad is not None and made.requires_grad]
            if reached:
                tensors, gradients = zip(*reached, strict=True)
                torch.autograd.backward(tensors, gradients, inputs=[each for each in stage.reads if each.requires_grad])
            self._mark(f"{stage.name} backward")
            # As autograd lets go of what it has used.
            stage.made.clear()

    def seconds(self) -> list[tuple[str, float]]:
        """Of each stage, in order. Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found = []
        for (_, before), (name, after) in zip(self.marks, self.marks[1:], strict=False):
            if name:
                found.append((name, self._between(before, after)))
        return found

    def _mark(self, name: str) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.perf_counter()))

    def _between(self, before: object, after: object) -> float:
        if isinstance(before, torch.cuda.Event) and isinstance(after, torch.cuda.Event):
            return before.elapsed_time(after) / 1e3
        assert isinstance(before, float) and isinstance(after, float)
        return after - before
