"""Which rank does what: named axes as one frozen value, made once and passed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .config import ParallelConfig
from .events import Recorder, Recorders


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
    """All ranks = `data` copies x `expert` ranks; consecutive ranks share one copy of the experts."""

    device: torch.device
    world: Axis
    """Every rank: dense weights are replicated over it, tokens are split over it."""
    data: Axis
    """Ranks that hold the same experts: expert gradients are summed over it."""
    expert: Axis
    """Ranks that together hold all experts: tokens travel over it."""
    device_mesh: DeviceMesh | None = None
    """The (data, expert) DeviceMesh behind the axes, for DTensor; None without a process group."""
    recorder: Recorder = field(default_factory=Recorders, compare=False)


def single(device: torch.device | str = "cpu", recorder: Recorder | None = None) -> Mesh:
    """The mesh of one process without a process group."""
    axes = (Axis("world"), Axis("data"), Axis("expert"))
    return Mesh(torch.device(device), *axes, recorder=recorder or Recorders())


def make_mesh(config: ParallelConfig, device: torch.device | str, recorder: Recorder | None = None) -> Mesh:
    """Lays the initialised process group out as `config` says; without a process group, one rank.

    Raises ValueError where the world size is not data x expert.
    """
    device = torch.device(device)
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world % config.expert or (config.data != "auto" and config.data * config.expert != world):
        raise ValueError(
            f"parallel: data {config.data} x expert {config.expert} does not make the {world} rank(s) that were "
            f"started; use data: auto and an expert degree that divides {world}"
        )
    if not dist.is_initialized():
        return single(device, recorder)
    device_mesh = init_device_mesh(
        device.type, (world // config.expert, config.expert), mesh_dim_names=("data", "expert")
    )

    def axis(name: str) -> Axis:
        part = device_mesh[name]
        size = part.size()
        return Axis(name, size, part.get_local_rank(), part.get_group() if size > 1 else None)

    everyone = Axis("world", world, dist.get_rank(), dist.group.WORLD if world > 1 else None)
    return Mesh(device, everyone, axis("data"), axis("expert"), device_mesh, recorder or Recorders())
