"""How many experts the layers of a run have, and what a degree must divide for them. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..moe.config import ModelConfig, nearest_divisor
from .config import TrainConfig
from .errors import Violation


@dataclass(frozen=True, order=True)
class Count:
    """Experts of a layer, and where that is said."""

    experts: int
    path: str
    """YAML path."""
    shown: str
    """For messages."""


def counts_of(config: TrainConfig) -> list[Count]:
    """Of each layer that has experts, in order."""
    counts, moe = config.model.expert_counts, config.model.moe
    if moe is None or not moe.per_layer:
        return [Count(n, "model.moe.experts", f"model.moe.experts: {n}") for n in counts.values()]
    path = "model.moe.per_layer"
    return [Count(n, path, f"the {n} experts that {path} gives layer {layer}") for layer, n in counts.items()]


def fewest_of(config: TrainConfig) -> Count | None:
    """Of the emptiest layer with experts; None where no layer has any."""
    return min(counts_of(config), default=None)


def divides_all(config: TrainConfig, degree: int, path: str) -> list[Violation]:
    """What is wrong with `degree`, set at `path`, where it must divide the experts of every layer that has some."""
    counts = counts_of(config)
    odd = next((count for count in counts if count.experts % degree), None)
    if odd is None:
        return []
    fix = nearest_divisor(math.gcd(*(count.experts for count in counts)), degree)
    return [Violation((path, odd.path), f"{degree} does not divide {odd.shown}; use {fix}")]


def unlike_layers(model: ModelConfig) -> str:
    """What no planner is told of, since it knows two kinds of layers alone, dense ones and equal MoE ones; else ''."""
    if bare := [layer for layer in range(model.layers) if not model.has_ffn(layer)]:
        return f"layer {bare[0]} has no feed-forward network"
    counts = sorted(set(model.expert_counts.values()))
    return f"layers have {counts[0]} to {counts[-1]} experts" if len(counts) > 1 else ""
