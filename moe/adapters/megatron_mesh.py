"""Megatron-Core's process groups as our `Mesh`, so that what is written for ours runs in its models (0.16)."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ...parallel.mesh import Axis, Mesh, single

try:
    from megatron.core.process_groups_config import ProcessGroupCollection
except ImportError as error:
    raise ImportError(
        "wastenot.moe.adapters.megatron_mesh needs Megatron-Core; pip install 'wastenot[megatron]'"
    ) from error

__all__ = ["GROUPS", "default_groups", "mesh_of"]

GROUPS = ("tp", "pp", "dp_cp", "tp_dp_cp", "ep", "expt_tp", "expt_dp")
"""The groups of a collection that `mesh_of` reads."""


def default_groups() -> ProcessGroupCollection:
    """Those that `parallel_state.initialize_model_parallel` made, all that a mesh and a MoE layer read."""
    return ProcessGroupCollection.use_mpu_process_groups([*GROUPS, "cp", "tp_cp", "tp_ep"])


def mesh_of(pg_collection: ProcessGroupCollection, device: torch.device | str) -> Mesh:
    """This rank's place among the groups of `pg_collection`; makes no group, and no DeviceMesh.

    Context-parallel ranks are copies of the dense weights as data-parallel ones are. `mesh.expert.group` is what
    `Adapprox(expert_group=...)` asks for.

    Raises ValueError where a group is missing, or experts are cut by tensor parallelism, which ours never are.
    """
    missing = [name for name in GROUPS if not hasattr(pg_collection, name)]
    if missing:
        raise ValueError(
            f"pg_collection: has no {', '.join(missing)}; make it with ProcessGroupCollection.use_mpu_process_groups()"
        )
    if not dist.is_initialized():
        return single(device)

    def axis(name: str, group: dist.ProcessGroup | None) -> Axis:
        size = 1 if group is None else group.size()
        return Axis(name) if group is None or size == 1 else Axis(name, size, group.rank(), group)

    groups = pg_collection
    if axis("expert_tensor", groups.expt_tp).size > 1:
        raise ValueError(
            f"expert_tensor_parallel_size: {groups.expt_tp.size()} would cut each expert; use 1, and tensor "
            "parallelism for the dense layers only"
        )
    return Mesh(
        torch.device(device),
        world=axis("world", dist.group.WORLD),
        pipeline=axis("pipeline", groups.pp),
        stage=axis("stage", groups.tp_dp_cp),
        batch=axis("batch", groups.dp_cp),
        data=axis("data", groups.dp_cp),
        shard=Axis("shard"),
        tensor=axis("tensor", groups.tp),
        expert_data=axis("expert_data", groups.expt_dp),
        expert_shard=Axis("expert_shard"),
        expert=axis("expert", groups.ep),
    )
