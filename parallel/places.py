"""Where every rank stands in a layout. Torch-free: the mesh is made of it, and a picture is drawn of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from .config import ParallelConfig

DENSE = ("pipeline", "data", "shard", "tensor")
"""The coordinates of a rank as dense layers see it; consecutive ranks differ in the last."""
EXPERTS = ("pipeline", "expert_data", "expert")
"""The same as experts see it (parallel folding)."""
STORAGE = ("pipeline", "expert_copy", "expert_shard", "expert")
"""The same where ranks share the storage of experts."""


@dataclass(frozen=True)
class Place:
    """One rank's coordinates, each from 0."""

    rank: int
    pipeline: int
    data: int
    shard: int
    tensor: int
    expert_data: int
    """Which copy of the experts it has a part of."""
    expert: int
    """Which part."""
    expert_copy: int
    """Which copy of the storage of experts that is."""
    expert_shard: int
    """Which part of that."""


def places(config: ParallelConfig, world: int) -> list[Place]:
    """All ranks in order. Raises ValueError where `config` does not make a world of `world` ranks."""
    stage = config.stage(world)
    if config.world(world) != world or stage % config.expert:
        degrees = " x ".join(f"{name} {getattr(config, name)}" for name in DENSE)
        raise ValueError(
            f"parallel: {degrees}, with experts over {config.expert}, does not make {world} rank(s); use data: auto, "
            f"and degrees whose product divides {world}"
        )
    sizes = (config.pipeline, config.copies(world), config.shard, config.tensor)
    found = []
    for rank, (pipeline, data, shard, tensor) in zip(range(world), product(*map(range, sizes)), strict=True):
        copy, part = divmod(rank % stage, config.expert)
        storage, share = divmod(copy, config.expert_shard)
        found.append(Place(rank, pipeline, data, shard, tensor, copy, part, storage, share))
    return found


def lines(ranks: Sequence[Place], *varying: str) -> list[tuple[int, ...]]:
    """Ranks that differ in the coordinates `varying` only, line by line, each in order of rank.

    The others are those of dense layers, or of experts where `varying` names one of theirs.
    """
    view = next(view for view in (DENSE, EXPERTS, STORAGE) if set(varying) <= set(view))
    fixed = [name for name in view if name not in varying]
    found: dict[tuple[int, ...], list[int]] = {}
    for place in ranks:
        found.setdefault(tuple(getattr(place, name) for name in fixed), []).append(place.rank)
    return [tuple(line) for line in found.values()]
