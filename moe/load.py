"""How evenly experts are used: figures of one step, and their means over the steps of a line of metrics."""

from __future__ import annotations

from collections.abc import Sequence
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
    """Part of all steps' choices that each expert got, layer by layer: as many numbers as the layer has experts."""


class Loads:
    """Adds up the loads of steps, on their device and without waiting for it."""

    def __init__(self, experts: Sequence[int] | None = None) -> None:
        """`experts` of each MoE layer; None: as many as loads have columns."""
        self.steps = 0
        self._experts = experts
        self._total_LE: Tensor | None = None
        self._figures_L4: Tensor | None = None

    def add(self, load_LE: Tensor) -> None:
        """Adds one step's choices per layer and expert, over all ranks; int64 [layers, E], E of the fullest layer."""
        if not load_LE.numel():
            return
        figures_L4 = figures_of(load_LE, self._experts)
        self.steps += 1
        self._total_LE = load_LE.clone() if self._total_LE is None else self._total_LE + load_LE
        self._figures_L4 = figures_L4 if self._figures_L4 is None else self._figures_L4 + figures_L4

    def read(self) -> Load | None:
        """What the steps came to; None for a model without experts."""
        if self._total_LE is None or self._figures_L4 is None:
            return None
        L, E = self._total_LE.shape
        experts = self._experts or [E] * L
        means_L4 = (self._figures_L4 / self.steps).cpu()
        mean = dict(zip(FIGURES, means_L4.mean(0).tolist(), strict=True))
        return Load(
            **mean,
            by_layer=dict(zip(FIGURES, means_L4.t().tolist(), strict=True)),
            dead=sum(experts) - int((self._total_LE > 0).sum()),
            per_layer=[row[:own] for row, own in zip(shares(self._total_LE).tolist(), experts, strict=True)],
        )


def load_of(load_LE: Tensor) -> Load:
    """Reads one step's choices per layer and expert, of one layer at least."""
    loads = Loads()
    loads.add(load_LE)
    load = loads.read()
    assert load is not None
    return load


def figures_of(load_LE: Tensor, experts: Sequence[int] | None = None) -> Tensor:
    """`FIGURES` of every layer; fp64 [layers, 4]. Zeros where nobody chose any expert.

    experts: of each layer, which are the first of E; None: all E.
    """
    L, E = load_LE.shape
    share_LE = shares(load_LE)
    # Without waiting for what the device still has to do.
    own_L = torch.tensor(experts or [E] * L, dtype=torch.float64).to(load_LE.device, non_blocking=True)
    is_own_LE = torch.arange(E, device=load_LE.device) < own_L.unsqueeze(1)
    mean_L1 = share_LE.sum(1, keepdim=True) / own_L.unsqueeze(1)
    deviation_L = (((share_LE - mean_L1) * is_own_LE).square().sum(1) / own_L).sqrt()
    entropy_L = torch.special.entr(share_LE).sum(1) / own_L.clamp(min=2).log()
    # Of a single expert's load nothing is uneven.
    entropy_L = torch.where(own_L > 1, entropy_L, torch.ones_like(entropy_L))
    return torch.stack([share_LE.amax(1) * own_L, deviation_L * own_L, entropy_L, gini(share_LE, own_L)], 1)


def shares(load_LE: Tensor) -> Tensor:
    """Part of its layer's choices that each expert got; fp64 [layers, E]."""
    load_LE = load_LE.double()
    return load_LE / load_LE.sum(1, keepdim=True).clamp(min=1e-300)


def gini(load_LE: Tensor, experts_L: Tensor | None = None) -> Tensor:
    """Gini coefficient of each row of non-negative loads [..., E]; 0 where a row is all zero.

    experts_L: how many of a row's numbers are loads, where the others are zeros that count for nothing.
    """
    E = load_LE.size(-1)
    ordered = load_LE.double().sort(-1).values
    own = torch.full_like(ordered[..., 0], E) if experts_L is None else experts_L
    # Zeros come first: a load's rank among the row's own is less by as many as do not count.
    rank = torch.arange(1 - E, 1, dtype=torch.float64, device=load_LE.device) + own.unsqueeze(-1)
    total = ordered.sum(-1)
    uneven = ((2 * rank - own.unsqueeze(-1) - 1) * ordered).sum(-1) / (own * total.clamp(min=1e-300))
    return torch.where(total > 0, uneven, torch.zeros_like(uneven))
