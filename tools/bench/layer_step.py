"""One pass through an MoE layer, the same for every contender: forward alone, or forward and backward."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ...launch.peak_memory import peak_bytes
from .layer_cases import LayerCase, LayerWeights, make_tokens
from .layer_reference import Outcome, differences
from .memory import saved_for_backward

Pass = Literal["forward", "both"]
PASSES: tuple[Pass, ...] = ("forward", "both")
"""Forward as training does it, keeping what backward needs; and backward after it."""


@dataclass(frozen=True)
class PeerLayer:
    """The layer of one contender, with the weights of a case."""

    module: nn.Module
    """Holds the parameters."""
    forward: Callable[[Tensor], Tensor]
    """[T, D] -> [T, D], differentiable."""
    gradients: Callable[[], LayerWeights]
    """Those that the last backward left, in one shape for all contenders."""


@dataclass(frozen=True)
class Probed:
    """What a contender computes and keeps."""

    differences: dict[str, float]
    """Relative, of output and gradients from the reference's."""
    saved_bytes: int
    """Kept by forward for backward, weights left out."""
    peak_bytes: int
    """Most that lived at once in both passes beyond weights and tokens; gradients of the weights included."""


class LayerStep:
    """Runs `layer` on the tokens of one case."""

    def __init__(self, layer: PeerLayer, case: LayerCase, expected: Outcome) -> None:
        self.layer, self.expected = layer, expected
        x_TD, self.grad_TD = make_tokens(case)
        self.x_TD = x_TD.requires_grad_()
        layer.module.train()

    def probe(self) -> Probed:
        """One pass held against the reference, and two whose memory is counted."""
        y_TD = self._work("both").detach()
        assert self.x_TD.grad is not None
        found = differences(Outcome(y_TD, self.x_TD.grad, *self.layer.gradients()), self.expected)
        self._clear()
        with saved_for_backward(self.layer.module) as saved:
            self._work("forward")
        peak = peak_bytes(lambda: self._work("both"))
        self._clear()
        return Probed(found, sum(saved.values()), peak)

    def run(self, what: Pass) -> float:
        """Does one pass and returns its seconds."""
        start = time.perf_counter()
        y_TD = self._work(what)
        took = time.perf_counter() - start
        # The graph lives until here: in training it is backward that lets go of it.
        del y_TD
        self._clear()
        return took

    def close(self) -> None:
        """Nothing to release in this process."""

    def _work(self, what: Pass) -> Tensor:
        y_TD = self.layer.forward(self.x_TD)
        if what == "both":
            y_TD.backward(self.grad_TD)
        return y_TD

    def _clear(self) -> None:
        self.x_TD.grad = None
        self.layer.module.zero_grad(set_to_none=True)


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """Its gradient; zeros where no token came by."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def whole(
    parameters: tuple[nn.Parameter, nn.Parameter, nn.Parameter], weights: LayerWeights
) -> Callable[[], LayerWeights]:
    """Writes `weights` into `parameters` of their shapes; what then is `PeerLayer.gradients`."""
    with torch.no_grad():
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)
    return lambda: LayerWeights(*map(gradient_of, parameters))
