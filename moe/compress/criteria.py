"""Scores of layers, blocks and experts from a profile (METHODS C1-C3), rounded so that every layout ranks them alike.

Sums over ranks differ in their last bits with the number of ranks. Scores are rounded to 6 significant digits before
anything is ranked by them, and of equals the lower index goes first (C5).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from torch import Tensor

from .profile import Profile

__all__ = ["EXPERT_CRITERIA", "ExpertCriterion", "block_scores", "coverage", "expert_scores", "layer_scores", "ranked"]

ExpertCriterion = Literal["mass", "gate", "reap", "msan", "frequency"]
"""What an expert is worth: the router's probability mass (the paper's), the weights it applied, the mean of weight x
|output| over routed tokens (REAP), the mean squared norm of its outputs (MSAN), how many tokens it got."""

EXPERT_CRITERIA: tuple[ExpertCriterion, ...] = get_args(ExpertCriterion)


def layer_scores(profile: Profile) -> dict[int, float]:
    """Layer Drop's s_l of each layer that has experts: mean cos(a, a + MoE(norm(a))); the highest go first (C1)."""
    return {
        layer: _rounded(sums["ffn_cosine"] / sums["tokens"])
        for layer, sums in enumerate(profile.layers)
        if "routed_E" in sums
    }


def block_scores(profile: Profile, blocks: int = 1) -> dict[int, float]:
    """Of each layer i the mean cos(h_i, h_(i+n)), n = `blocks`: how little the n blocks from i on change (C2).

    Layers of a profile under a plan are counted over those that are left. Raises ValueError where the profile's
    window is shorter.
    """
    if blocks > profile.config.window:
        raise ValueError(
            f"blocks: the profile compares blocks over at most {profile.config.window}; profile with --window {blocks}"
        )
    there = [layer for layer, sums in enumerate(profile.layers) if sums]
    return {
        there[place + 1 - blocks]: _rounded(
            profile.layers[layer]["block_cosine_W"][blocks - 1] / _tokens(profile, layer)
        )
        for place, layer in enumerate(there)
        if place + 1 >= blocks
    }


def expert_scores(profile: Profile, criterion: ExpertCriterion) -> dict[int, list[float]]:
    """Of each layer with experts what each is worth; the lowest go first. An expert that got no token scores 0.

    `mass`, `gate` and `frequency` are parts of the layer's whole, so that layers compare with each other.
    """
    if criterion not in EXPERT_CRITERIA:
        raise ValueError(f"criterion: {criterion!r} is not one of {', '.join(EXPERT_CRITERIA)}")
    return {
        layer: [_rounded(value) for value in _worth(sums, criterion)]
        for layer, sums in enumerate(profile.layers)
        if "routed_E" in sums
    }


def coverage(profile: Profile) -> dict[int, list[int]]:
    """Tokens that each expert of each layer got: what its own statistics rest on."""
    return {
        layer: [int(count) for count in sums["routed_E"].tolist()]
        for layer, sums in enumerate(profile.layers)
        if "routed_E" in sums
    }


def ranked(scores: Mapping[int, float], highest: bool) -> list[int]:
    """Indices by score, highest or lowest first; of equals the lower index first."""
    return sorted(scores, key=lambda index: (-scores[index] if highest else scores[index], index))


def _worth(sums: Mapping[str, Tensor], criterion: ExpertCriterion) -> Tensor:
    routed_E = sums["routed_E"].clamp(min=1)
    if criterion == "reap":
        return sums["reap_E"] / routed_E
    if criterion == "msan":
        return sums["square_E"] / routed_E
    if criterion == "gate":
        return sums["gate_E"] / sums["gate_E"].sum()
    if criterion == "frequency":
        return sums["routed_E"] / sums["routed_E"].sum()
    return sums["mass_E"] / sums["tokens"]


def _tokens(profile: Profile, layer: int) -> Tensor:
    return profile.layers[layer]["tokens"]


def _rounded(value: Tensor) -> float:
    return float(f"{value.item():.6g}")
