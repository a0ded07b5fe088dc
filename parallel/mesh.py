"""Which rank does what: named axes as one frozen value, made once and passed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .config import ParallelConfig
from .events import Recorder, Recorders
from .places import lines, places


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh as this rank sees it."""

    name: str
    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    """None where the axis has one rank: nothing to communicate."""


@dataclass(frozen=True)
class Mesh:
    """All ranks = pipeline stages; a stage = data x shard x tensor ranks for dense layers, and the same ranks =
    `expert_data` copies x `expert` ranks for experts (parallel folding). The last named are consecutive ranks."""

    device: torch.device
    world: Axis
    """Every rank."""
    pipeline: Axis
    """Ranks with the same place in every stage."""
    stage: Axis
    """Ranks that hold the same layers: tokens are split over it, gradients of dense weights are summed over it."""
    batch: Axis
    """Ranks of the stage that read other sequences: data x shard."""
    data: Axis
    """Copies of the dense weights."""
    shard: Axis
    """Ranks that share the storage of one copy."""
    tensor: Axis
    """Ranks that compute dense layers together."""
    expert_data: Axis
    """Ranks that hold the same experts: expert gradients are summed over it."""
    expert_shard: Axis
    """Those of `expert_data` within one dense copy, which share the storage of the same experts; with `shard` only."""
    expert: Axis
    """Ranks that together hold all experts: tokens travel over it."""
    dense_mesh: DeviceMesh | None = None
    """DeviceMesh of this stage with those of the axes data, shard and tensor that have more than one rank."""
    expert_mesh: DeviceMesh | None = None
    """Likewise with expert_data and expert; where storage is shared, with data, expert_shard and expert."""
    recorder: Recorder = field(default_factory=Recorders, compare=False)

    @property
    def layout(self) -> dict[str, int]:
        """Sizes of all axes that a checkpoint or a log names."""
        axes = (self.world, self.pipeline, self.data, self.shard, self.tensor, self.expert)
        return {axis.name: axis.size for axis in axes}


_AXES = ("world", "pipeline", "stage", "batch", "data", "shard", "tensor", "expert_data", "expert_shard", "expert")


def single(device: torch.device | str = "cpu", recorder: Recorder | None = None) -> Mesh:
    """The mesh of one process without a process group."""
    axes = {name: Axis(name) for name in _AXES}
    return Mesh(device=torch.device(device), recorder=recorder or Recorders(), **axes)  # pyright: ignore[reportArgumentType]


def make_mesh(config: ParallelConfig, device: torch.device | str, recorder: Recorder | None = None) -> Mesh:
    """Lays the initialised process group out as `config` says; without a process group, one rank.

    Raises ValueError where the world size is not what `config` asks for.
    """
    device = torch.device(device)
    world = dist.get_world_size() if dist.is_initialized() else 1
    everyone = places(config, world)
    if not dist.is_initialized():
        return single(device, recorder)
    rank = dist.get_rank()
    groups: dict[object, dist.ProcessGroup | None] = {}

    def axis(name: str, *varying: str) -> Axis:
        """The ranks that differ from this one in `varying` only; axes of equal ranks share one process group.

        But for experts and tensor parallelism: their exchanges run beside the reduction of gradients. And FSDP2's
        copies: it starts reductions when backward gets there, the buckets of unshared experts theirs when they are
        full.
        """
        rows = tuple(lines(everyone, *varying))
        own = next(row for row in rows if rank in row)
        apart = name in ("expert", "tensor") or (name == "data" and config.shard > 1)
        key = (rows, name if apart else "")
        if key not in groups:
            groups[key] = _group(rows, None if apart else world)
        return Axis(name, len(own), own.index(rank), groups[key])

    axes = {
        "world": axis("world", "pipeline", "data", "shard", "tensor"),
        "pipeline": axis("pipeline", "pipeline"),
        "stage": axis("stage", "data", "shard", "tensor"),
        "batch": axis("batch", "data", "shard"),
        **{name: axis(name, name) for name in ("data", "shard", "tensor", "expert_data", "expert_shard", "expert")},
    }
    stage = next(line for line in lines(everyone, "data", "shard", "tensor") if rank in line)
    # Where storage is shared, the copies of an expert's part are those of the dense weights.
    copies = "data" if config.expert_shard > 1 else "expert_data"
    return Mesh(
        device,
        **axes,
        dense_mesh=_device_mesh(device, stage, [axes[name] for name in ("data", "shard", "tensor")]),
        expert_mesh=_device_mesh(device, stage, [axes[name] for name in (copies, "expert_shard", "expert")]),
        recorder=recorder or Recorders(),
    )


def _group(rows: tuple[tuple[int, ...], ...], world: int | None) -> dist.ProcessGroup | None:
    """This rank's group of those that `rows` list, which all ranks make together; that of the `world` is there."""
    if len(rows[0]) == 1:
        return None
    if len(rows[0]) == world:
        return dist.group.WORLD
    own, _ = dist.new_subgroups_by_enumeration([list(row) for row in rows])
    assert isinstance(own, dist.ProcessGroup)
    return own


def _device_mesh(device: torch.device, ranks: Sequence[int], axes: list[Axis]) -> DeviceMesh | None:
    """`ranks`, with a dim for each of `axes` that has more than one of them; None without any."""
    kept = [axis for axis in axes if axis.group is not None]
    if not kept:
        return None
    return DeviceMesh.from_group(
        [axis.group for axis in kept if axis.group is not None],
        device.type,
        mesh=torch.tensor(ranks).view([axis.size for axis in kept]),
        mesh_dim_names=tuple(axis.name for axis in kept),
    )
