"""Gradients under DeepSpeed: where they lie at each stage of ZeRO, their norm, and clipping.

DeepSpeed divides what it sums by the number of all ranks, dense or of experts, at every stage; the engine multiplies
the loss by it. Its own norm averages those of experts, so the norm is ours: every parameter once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ...parallel.collectives import all_reduce
from ...parallel.gradients import clipping, sum_of_squares
from ...parallel.mesh import Mesh


class WholeGradients:
    """Of ZeRO 0: every rank has all of its parameters' gradients. See `parallel.gradients.Summing`."""

    def __init__(self, engine: Any, mesh: Mesh) -> None:
        self.engine, self.mesh = engine, mesh

    def zero(self) -> None:
        # Where the last step was skipped there are some.
        self.engine.zero_grad()
        self.engine.set_gradient_accumulation_boundary(False)

    @contextmanager
    def reduced(self) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(True)
        yield

    def norm(self) -> Tensor:
        dense, experts = [], []
        for parameter in self.engine.module.parameters():
            (dense if getattr(parameter, "allreduce", True) else experts).append(parameter.grad)
        total = sum_of_squares(dense, self.mesh.device)
        if experts:
            own = sum_of_squares(experts, self.mesh.device)
            total = total + all_reduce(own, self.mesh.expert, "gradient-norm", self.mesh.recorder)
        return total.sqrt()

    def clip(self, norm: Tensor, limit: float) -> None:
        factor = clipping(norm, limit)
        for gradient in self._all():
            gradient.mul_(factor)

    def _all(self) -> Iterator[Tensor]:
        yield from (parameter.grad for parameter in self.engine.module.parameters())


class SharedGradients(WholeGradients):
    """Of ZeRO 1 to 3: every rank has its part of them."""

    def zero(self) -> None:
        optimizer = self.engine.optimizer
        optimizer.zero_grad(set_to_none=True)
        optimizer.averaged_gradients.clear()
        self.engine.set_gradient_accumulation_boundary(False)

    def norm(self) -> Tensor:
        own = sum_of_squares(self._all(), self.mesh.device)
        return all_reduce(own, self.mesh.world, "gradient-norm", self.mesh.recorder).sqrt()

    def _all(self) -> Iterator[Tensor]:
        for parts in self.engine.optimizer.averaged_gradients.values():
            yield from parts or ()
