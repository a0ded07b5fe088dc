"""How a model's layers lie on the ranks of a pipeline. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from .config import ParallelConfig

__all__ = ["RUN", "Stages", "even_cut", "lay_out", "whole"]

RUN = "run"
"""Name of a model's method that runs one of its stages (moe/decoder.py)."""


@dataclass(frozen=True)
class Stages:
    """The stages of a model, and those that one rank holds. A stage is a run of consecutive layers."""

    layers: tuple[range, ...]
    """Of each stage."""
    ranks: tuple[int, ...]
    """Rank of the pipeline that holds each stage."""
    rank: int = 0
    """This one."""

    @property
    def own(self) -> tuple[int, ...]:
        """Stages of this rank, in the model's order."""
        return tuple(stage for stage, rank in enumerate(self.ranks) if rank == self.rank)

    @property
    def held(self) -> tuple[int, ...]:
        """Layers of this rank."""
        return tuple(layer for stage in self.own for layer in self.layers[stage])

    @property
    def last(self) -> int:
        """The stage with the output layer."""
        return len(self.layers) - 1

    @property
    def has_first(self) -> bool:
        """Whether this rank reads tokens."""
        return self.ranks[0] == self.rank

    @property
    def has_last(self) -> bool:
        """Whether this rank computes the loss."""
        return self.ranks[-1] == self.rank


def whole(num_layers: int) -> Stages:
    """A model that is not cut."""
    return Stages((range(num_layers),), (0,))


def lay_out(config: ParallelConfig, costs: Sequence[int], rank: int) -> Stages:
    """The stages that `config` asks for, as rank number `rank` of the pipeline sees them.

    costs: of each layer, in any unit; the cut is `config.cut`, or `even_cut` of these. Raises ValueError where
    `config.cut` is not one of all layers.
    """
    num_stages = config.num_stages
    cut = config.cut or even_cut(costs, num_stages)
    if len(cut) != num_stages or sum(cut) != len(costs):
        raise ValueError(f"cut: {list(cut)} does not make {len(costs)} layers in {num_stages} stages")
    ends = [sum(cut[: stage + 1]) for stage in range(num_stages)]
    layers = tuple(range(end - size, end) for end, size in zip(ends, cut, strict=True))
    return Stages(layers, tuple(_rank_of(config, stage) for stage in range(num_stages)), rank)


def _rank_of(config: ParallelConfig, stage: int) -> int:
    """Chunk after chunk starts at the first rank; in a V the second comes back the way the first went."""
    chunk, place = divmod(stage, config.pipeline)
    back = config.schedule == "dualpipev" and chunk % 2 == 1
    return config.pipeline - 1 - place if back else place


def even_cut(costs: Sequence[int], num_stages: int) -> tuple[int, ...]:
    """Layers of each stage, so that the dearest stage costs least, and the others are as even as that allows.

    Of cuts that are equally good, the one with more layers in earlier stages: of equal layers, that of Lynx. Raises
    ValueError for more stages than layers.
    """
    if not 1 <= num_stages <= len(costs):
        raise ValueError(f"pipeline: {num_stages} stages for {len(costs)} layers; use 1 to {len(costs)}")
    sums = [0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    @cache
    def dearest(first: int, stages: int) -> int:
        """Least cost of the dearest of `stages` stages of the layers from `first` on."""
        if stages == 1:
            return sums[-1] - sums[first]
        ends = range(first + 1, len(costs) - stages + 2)
        return min(max(sums[end] - sums[first], dearest(end, stages - 1)) for end in ends)

    limit = dearest(0, num_stages)

    @cache
    def best(first: int, stages: int) -> tuple[int, tuple[int, ...]] | None:
        """Least sum of squares within the limit, and the negative sizes, which decide ties."""
        ends = range(first + 1, len(costs) - stages + 2) if stages > 1 else (len(costs),)
        found = []
        for end in ends:
            cost = sums[end] - sums[first]
            rest = best(end, stages - 1) if stages > 1 else (0, ())
            if cost <= limit and rest is not None:
                found.append((cost**2 + rest[0], (first - end, *rest[1])))
        return min(found, default=None)

    found = best(0, num_stages)
    assert found is not None
    return tuple(-size for size in found[1])
