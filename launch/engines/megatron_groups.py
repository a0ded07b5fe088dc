"""Megatron-Core's process groups, over the ranks of our mesh."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state

from ...parallel.mesh import Axis, Mesh
from ..config import TrainConfig
from ..rendezvous import group_timeout


def make_groups(config: TrainConfig, mesh: Mesh) -> bool:
    """Megatron's process groups, over the same ranks as ours; all ranks call it together.

    Returns whether a process group was made here: Megatron wants one also for a rank alone.
    """
    alone = not dist.is_initialized()
    if alone:
        backend = "nccl" if mesh.device.type == "cuda" else "gloo"
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=mesh.pipeline.size,
        expert_model_parallel_size=mesh.expert.size,
        # As long as ours: the watchdog speaks first.
        distributed_timeout_minutes=group_timeout(config.parallel.timeout_seconds) / 60,  # pyright: ignore[reportArgumentType]
        create_gloo_process_groups=False,
    )
    theirs = {
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "stage": parallel_state.get_data_parallel_group(),
        "expert": parallel_state.get_expert_model_parallel_group(),
        "expert_data": parallel_state.get_expert_data_parallel_group(),
    }
    for name, group in theirs.items():
        found, ours = dist.get_process_group_ranks(group), _ranks(getattr(mesh, name))
        assert found == ours, f"Megatron-Core's {name} ranks are {found}, ours {ours}"
    return alone


def _ranks(axis: Axis) -> list[int]:
    return [dist.get_rank()] if axis.group is None else dist.get_process_group_ranks(axis.group)
