"""How evenly experts are used: figures of one step, and their means over the steps of a line of metrics."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FIGURES = ("max_over_mean", "cv", "entropy", "gini")
"""Of the choices that the experts of a layer get in one step.

max_over_mean: the busiest expert's in units of the mean; cv: standard deviation over mean; entropy: of the shares, in
units of the even one's (1 is even, 0 one expert for all); gini: 0 is even, towards 1 is one expert for all.
"""


@dataclass(frozen=True)
class Load:
    """Figures of a load: means over steps and layers, but `dead`."""

    max_over_mean: float
    cv: float
    entropy: float
    gini: float
    by_layer: dict[str, list[float]]
    """Each of `FIGURES` layer by layer, means over steps."""
    dead: int
    """Experts, over all layers, that nobody chose in any step."""
    per_layer: list[list[float]]
    """Part of all steps' choices that each expert got, layer by layer."""


class Loads:
    """Adds up the loads of steps, on their device and without waiting for it."""

    def __init__(self) -> None:
        self.steps = 0
        self._total_LE: Tensor | None = None
        self._figures_L4: Tensor | None = None

    def add(self, load_LE: Tensor) -> None:
        """Adds one step's choices per layer and expert, over all ranks; int64 [layers, E]."""
        if not load_LE.numel():
            return
        figures_L4 = figures_of(load_LE)
        self.steps += 1
        self._total_LE = load_LE.clone() if self._total_LE is None else self._total_LE + load_LE
        self._figures_L4 = figures_L4 if self._figures_L4 is None else self._figures_L4 + figures_L4

    def read(self) -> Load | None:
        """What the steps came to; None for a model without experts."""
        if self._total_LE is None or self._figures_L4 is None:
            return None
        means_L4 = (self._figures_L4 / self.steps).cpu()
        mean = dict(zip(FIGURES, means_L4.mean(0).tolist(), strict=True))
        return Load(
            **mean,
            by_layer=dict(zip(FIGURES, means_L4.t().tolist(), strict=True)),
            dead=int((self._total_LE == 0).sum()),
            per_layer=shares(self._total_LE).tolist(),
        )


def load_of(load_LE: Tensor) -> Load:
    """Reads one step's choices per layer and expert, of one layer at least."""
    loads = Loads()
    loads.add(load_LE)
    load = loads.read()
    assert load is not None
    return load


def figures_of(load_LE: Tensor) -> Tensor:
    """`FIGURES` of every layer; fp64 [layers, 4]. Zeros where nobody chose any expert."""
    E = load_LE.size(1)
    share_LE = shares(load_LE)
    entropy_L = torch.special.entr(share_LE).sum(1)
    # Of a single expert's load nothing is uneven.
    entropy_L = entropy_L / math.log(E) if E > 1 else torch.ones_like(entropy_L)
    return torch.stack([share_LE.amax(1) * E, share_LE.std(1, correction=0) * E, entropy_L, gini(share_LE)], 1)


def shares(load_LE: Tensor) -> Tensor:
    """Part of its layer's choices that each expert got; fp64 [layers, E]."""
    load_LE = load_LE.double()
    return load_LE / load_LE.sum(1, keepdim=True).clamp(min=1e-300)


def gini(load_LE: Tensor) -> Tensor:
    """Gini coefficient of each row of non-negative loads [..., E]; 0 where a row is all zero."""
    E = load_LE.size(-1)
    ordered = load_LE.double().sort(-1).values
    rank_E = torch.arange(1, E + 1, dtype=torch.float64, device=load_LE.device)
    total = ordered.sum(-1)
    uneven = ((2 * rank_E - E - 1) * ordered).sum(-1) / (E * total.clamp(min=1e-300))
    return torch.where(total > 0, uneven, torch.zeros_like(uneven))
