"""Adapprox in the place of Megatron-Core's AdamW, also under its distributed optimizer.

    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", use_distributed_optimizer=True, ...), [model])
    put_adapprox(optimizer, [model])

Megatron makes its optimizers of a configuration, which cannot name another, and its distributed optimizer cuts the
buffer of all parameters at equal lengths. Its formats of optimizer checkpoints know two moments of a parameter's shape,
so what Adapprox keeps goes into them as one object of each rank, for as many ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .adapprox import Adapprox
from .finite import are_too_large, not_finite
from .pieces import AdapproxOfPieces, Block, Loads, Parameter, Piece

__all__ = ["put_adapprox"]

_CUDA = torch.device("cuda")
_OF_THE_CONFIG = ("lr", "betas", "eps", "weight_decay")


def put_adapprox(
    optimizer: Any,
    model_chunks: Sequence[nn.Module],
    *,
    expert_group: dist.ProcessGroup | None = None,
    places: Mapping[str, int] | None = None,
    **options: Any,
) -> list[Adapprox | AdapproxOfPieces]:
    """Lets `optimizer` step by Adapprox; collective over all ranks.

    Returns the optimizers that step now: one, or one of dense parameters and one of experts. Learning rates, decay of
    weights and both betas stay those of Megatron's configuration and its schedules. Before any of them steps all ranks
    agree that gradients are finite: a step is made by all or by none, and one left out is Megatron's unsuccessful step.

    Args:
        optimizer: what get_megatron_optimizer returns, before its first step.
        model_chunks: what it was made of.
        expert_group: as Adapprox has it; for experts only.
        places: of each parameter in the model, by name; by default their order on this rank.
        options: all others of Adapprox.

    Raises ValueError for options of the configuration, and for forms of Megatron's optimizers that hold weights or
    state elsewhere: offloaded, precision aware, or Megatron-FSDP.
    """
    if wrong := [name for name in _OF_THE_CONFIG if name in options]:
        raise ValueError(f"{', '.join(wrong)}: set in Megatron's OptimizerConfig; leave it out here")
    names = {p: name for name, p in _named(model_chunks)}
    known = places or {name: place for place, name in enumerate(names.values())}
    if missing := [name for name in names.values() if name not in known]:
        raise ValueError(f"places lack {missing[0]}; give every parameter of the model one")
    of_all = {p: Parameter(name, tuple(p.shape), known[name]) for p, name in names.items()}
    found: list[Adapprox | AdapproxOfPieces] = []
    loads: Loads = {}
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        if each.is_stub_optimizer:
            continue
        _check(each)
        has_experts = any(group.get("is_expert_parallel") for group in each.optimizer.param_groups)
        own = {**options, "expert_group": expert_group if has_experts else None}
        made = _of_pieces(each, of_all, own, loads) if hasattr(each, "buffers") else _of_whole(each, of_all, own)
        each.optimizer = made
        _keep_whole_state(each)
        found.append(made)
    # Megatron's device is CUDA's also where a stage has no parameters.
    _check_gradients(optimizer, found, options.get("nonfinite", "raise"), next((p.device for p in names), _CUDA))
    return found


def _check(each: Any) -> None:
    if each.optimizer.state:
        raise ValueError("the optimizer has stepped already; call put_adapprox before its first step")
    for name in ("optimizer_cpu_offload", "use_precision_aware_optimizer"):
        if getattr(each.config, name):
            raise ValueError(f"{name} keeps weights or state out of reach; leave it out for Adapprox")
    if getattr(getattr(each, "ddp_config", None), "use_megatron_fsdp", False):
        raise ValueError("use_megatron_fsdp cuts parameters otherwise; use the distributed optimizer for Adapprox")


def _named(model_chunks: Sequence[nn.Module]) -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = []
    for number, chunk in enumerate(model_chunks):
        prefix = f"{number}." if len(model_chunks) > 1 else ""
        for name, parameter in chunk.named_parameters():
            found.append((prefix + name.removeprefix("module."), parameter))
    return found


def _of_whole(each: Any, of_all: dict[Tensor, Parameter], options: dict[str, Any]) -> Adapprox:
    """FP32 and float16 optimizers: parameters, or fp32 copies of them."""
    known = dict(of_all)
    for copied, copies in zip(
        getattr(each, "float16_groups", ()), getattr(each, "fp32_from_float16_groups", ()), strict=True
    ):
        known |= {copy: of_all[parameter] for parameter, copy in zip(copied, copies, strict=True)}
    for group in each.optimizer.param_groups:
        group["places"] = [known[p].place for p in group["params"]]
        group["params"] = [(known[p].name, p) for p in group["params"]]
    return Adapprox(each.optimizer.param_groups, **options)


def _of_pieces(each: Any, of_all: dict[Tensor, Parameter], options: dict[str, Any], loads: Loads) -> AdapproxOfPieces:
    groups, ranks = each.optimizer.param_groups, each.data_parallel_group
    # Views of weights in fp32 are no leaves, which torch's constructor wants.
    adapprox = Adapprox([{**group, "params": []} for group in groups], **options)
    for group, own in zip(groups, adapprox.param_groups, strict=True):
        group.update({key: value for key, value in own.items() if key != "params"})
    adapprox.param_groups = groups
    here = [(of_all[p], number) for p, (number, _) in each.model_param_group_index_map.items()]
    everyone: list[Any] = [None] * dist.get_world_size(ranks)
    dist.all_gather_object(everyone, here, group=ranks)
    numbers = {parameter: number for some in everyone for parameter, number in some}
    blocks: list[Block] = []
    for number, group in enumerate(groups):
        parameters = sorted((p for p, of in numbers.items() if of == number), key=lambda p: p.place)
        order = {parameter: i for i, parameter in enumerate(parameters)}
        pieces: list[Piece] = []
        for p, (of, i) in each.model_param_group_index_map.items():
            if of == number:
                inside = each._get_model_param_range_map(p)["param"]
                pieces.append(Piece(order[of_all[p]], inside.start, inside.end, group["params"][i]))
        device = each.buffers[0].grad_data.device
        blocks.append(Block(group, parameters, pieces, ranks, device, expert_group=options["expert_group"]))
    return AdapproxOfPieces(adapprox, blocks, agree=ranks, loads=loads)


def _check_gradients(
    optimizer: Any, found: Sequence[Adapprox | AdapproxOfPieces], nonfinite: str, device: torch.device
) -> None:
    """Lets the last thing that `optimizer` does before it clips and steps be a check of all gradients on all ranks."""
    prepare = optimizer.prepare_grads

    @torch.no_grad()
    def prepare_grads() -> bool:
        # Of scaled losses, which the scaler has answered.
        overflow = prepare()
        present = [pair for made in found for pair in _gradients(made)]
        bad = are_too_large([grad for _, grad in present], device)
        told = torch.stack([torch.full_like(bad[0], float(overflow)), bad.amax()])
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        overflow, wrong = map(bool, told.tolist())
        if overflow or not wrong:
            return overflow
        if nonfinite == "raise":
            names = [name for (name, _), value in zip(present, bad[1:].tolist(), strict=True) if value]
            raise not_finite(names, " nothing was stepped;")
        for made in found:
            made.skipped_steps += 1
        return True

    optimizer.prepare_grads = prepare_grads


def _gradients(made: Adapprox | AdapproxOfPieces) -> list[tuple[str, Tensor]]:
    if isinstance(made, AdapproxOfPieces):
        return made.gradients()
    groups = [group for group in made.param_groups if group["params"]]
    pairs = [pair for group in groups for pair in zip(group["param_names"], group["params"], strict=True)]
    return [(name, parameter.grad) for name, parameter in pairs if parameter.grad is not None]


def _keep_whole_state(each: Any) -> None:
    """Replaces the methods of `each` that save and load state of two moments."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    in_pieces = isinstance(each.optimizer, AdapproxOfPieces)
    whole_state, load_whole_state = each.state_dict, each.load_state_dict

    def state_dict() -> dict[str, Any]:
        if not in_pieces:
            return whole_state()
        weights = [[p.detach() for p in group["params"]] for group in each.optimizer.param_groups]
        scaler = each.grad_scaler.state_dict() if each.grad_scaler else None
        return {"optimizer": each.optimizer.state_dict(), "weights": weights, "grad_scaler": scaler}

    def load_state_dict(state: dict[str, Any]) -> None:
        state = state.get("adapprox", state)
        if not in_pieces:
            load_whole_state(state)
            return
        each.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for group, saved in zip(each.optimizer.param_groups, state["weights"], strict=True):
                for parameter, weight in zip(group["params"], saved, strict=True):
                    parameter.copy_(weight)
        if each.grad_scaler:
            each.grad_scaler.load_state_dict(state["grad_scaler"])

    def sharded_state_dict(model_sharded_state_dict: Any, is_loading: bool = False, **ignored: Any) -> dict[str, Any]:
        rank, world = dist.get_rank(), dist.get_world_size()
        key = f"optimizer.adapprox.rank_{rank}_of_{world}"
        return {"adapprox": ShardedObject(key, state_dict(), (1,), (0,))}

    each.state_dict, each.load_state_dict = state_dict, load_state_dict
    each.sharded_state_dict = sharded_state_dict
