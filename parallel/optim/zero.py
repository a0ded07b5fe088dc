"""Adapprox under DeepSpeed's ZeRO, whose stages flatten parameters and give every rank a range of the result.

    engine, *_ = deepspeed.initialize(model=model, optimizer=Adapprox(model.named_parameters()), config=config)
    follow_zero(engine)

Stages 1 and 2 flatten each parameter group as a whole; stage 3 flattens and cuts each parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .adapprox import Adapprox
from .pieces import AdapproxOfPieces, Block, Parameter, Piece

__all__ = ["follow_zero"]


def follow_zero(engine: Any) -> torch.optim.Optimizer:
    """Lets the Adapprox that `engine` was given step whole parameters under ZeRO 1, 2 and 3; collective.

    Returns the optimizer that steps them now, `engine.optimizer.optimizer`; under stage 0 it is the given one. State
    goes into the engine's checkpoints, and is for the same number of ranks.

    Args:
        engine: what deepspeed.initialize returns, before its first step.

    Raises ValueError for another optimizer than Adapprox, offloaded state, and elastic checkpoints.
    """
    adapprox, zero = engine.basic_optimizer, engine.optimizer
    if not isinstance(adapprox, Adapprox):
        raise ValueError(f"the engine's optimizer is {type(adapprox).__name__}; give deepspeed.initialize an Adapprox")
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return adapprox
    if adapprox.state:
        raise ValueError("the engine has stepped already; call follow_zero right after deepspeed.initialize")
    config = engine._config.zero_config
    if any(part is not None and part.device != "none" for part in (config.offload_optimizer, config.offload_param)):
        raise ValueError("offload_optimizer and offload_param keep weights out of reach; leave them out for Adapprox")
    if getattr(zero, "elastic_checkpoint", False):
        raise ValueError("elastic_checkpoint wants flat state, which factors are not; leave it out for Adapprox")
    names: dict[Tensor, str] = zero.param_names if stage < 3 else {p: n for n, p in engine.module.named_parameters()}
    blocks = _blocks_by_parameter(zero, adapprox, names) if stage == 3 else _blocks_by_group(zero, adapprox, names)
    zero.optimizer = AdapproxOfPieces(adapprox, blocks, agree=zero.dp_process_group)
    return zero.optimizer


def _blocks_by_group(zero: Any, adapprox: Adapprox, names: dict[Tensor, str]) -> list[Block]:
    """Stages 1 and 2: a group's parameters one after the other, and the result in equal parts."""
    if hasattr(zero, "bf16_groups"):
        # Stage 1 of bf16 weights with fp32 gradients is a class of its own.
        flats, in_order = zero.fp32_groups_flat_partition, zero.bf16_groups
        offsets = [_ends(group) for group in in_order]
    else:
        flats, in_order = zero.single_partition_of_fp32_groups, zero.round_robin_bit16_groups
        offsets = zero.round_robin_bit16_offsets
    blocks: list[Block] = []
    for i, (group, flat, parameters) in enumerate(zip(zero.optimizer.param_groups, flats, in_order, strict=True)):
        ranks = zero.real_dp_process_group[i]
        first = dist.get_rank(ranks) * flat.numel()
        pieces: list[Piece] = []
        for number, (parameter, offset) in enumerate(zip(parameters, offsets[i], strict=False)):
            start, stop = max(first - offset, 0), min(first + flat.numel() - offset, parameter.numel())
            if start < stop:
                pieces.append(Piece(number, start, stop, flat, offset + start - first))
        shapes = [tuple(parameter.shape) for parameter in parameters]
        blocks.append(_block(adapprox, group, parameters, shapes, names, pieces, ranks, flat))
    return blocks


def _blocks_by_parameter(zero: Any, adapprox: Adapprox, names: dict[Tensor, str]) -> list[Block]:
    """Stage 3: every parameter in equal parts, and those of one sub-group after each other."""
    blocks: list[Block] = []
    for i, (parameters, flat) in enumerate(zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)):
        ranks = zero.sub_group_process_groups[i]
        rank, offset = dist.get_rank(ranks), 0
        pieces: list[Piece] = []
        for number, parameter in enumerate(parameters):
            size = parameter.partition_numel()
            start, stop = rank * size, min((rank + 1) * size, parameter.ds_numel)
            if start < stop:
                pieces.append(Piece(number, start, stop, flat, offset))
            offset += size
        group = zero.optimizer.param_groups[zero.sub_group_to_group_id[i]]
        shapes = [tuple(parameter.ds_shape) for parameter in parameters]
        blocks.append(_block(adapprox, group, parameters, shapes, names, pieces, ranks, flat))
    return blocks


def _block(
    adapprox: Adapprox,
    group: dict[str, Any],
    parameters: Sequence[Tensor],
    shapes: Sequence[tuple[int, ...]],
    names: dict[Tensor, str],
    pieces: Sequence[Piece],
    ranks: dist.ProcessGroup,
    flat: Tensor,
) -> Block:
    if strange := [names[parameter] for parameter in parameters if parameter not in adapprox.given]:
        raise ValueError(f"{strange[0]} was made by the engine, not given to Adapprox; leave its replaced modules out")
    of_all = [
        Parameter(names[parameter], shape, adapprox.given[parameter].place)
        for parameter, shape in zip(parameters, shapes, strict=True)
    ]
    expert_group = adapprox.expert_group if group.get("moe") else None
    return Block(group, of_all, pieces, ranks, flat.device, flat, expert_group)


def _ends(parameters: Sequence[Tensor]) -> list[int]:
    """Where each parameter starts when they lie after one another."""
    starts = [0]
    for parameter in parameters:
        starts.append(starts[-1] + parameter.numel())
    return starts
