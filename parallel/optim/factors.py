"""The factors of one parameter as optimizer state: made, read, and stored at their rank (METHODS A5, A8)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from .shards import Shards, as_part, cut_along, is_cut, local


def is_stack(parameter: Tensor) -> bool:
    """Whether it is a stack of matrices [E, m, n], each with factors of its own."""
    return parameter.dim() == 3


def matrix_size(parameter: Tensor) -> tuple[int, int] | None:
    """Rows and columns of the (global) matrices of a parameter; None where it is none.

    More than three dims count as rows by the product of the others; such DTensors are none.
    """
    if parameter.dim() < 2 or (parameter.dim() > 3 and isinstance(parameter, DTensor)):
        return None
    if parameter.dim() > 3:
        # Only where rows can be seen without a copy.
        rows = parameter.size(0)
        return (rows, parameter.numel() // max(1, rows)) if parameter.is_contiguous() else None
    return parameter.size(-2), parameter.size(-1)


def as_matrices(tensor: Tensor) -> Tensor:
    """This rank's part as [b, m, n]; a view."""
    part = local(tensor)
    if part.dim() == 3:
        return part
    return part.flatten(1).unsqueeze(0) if part.dim() > 2 else part.unsqueeze(0)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: fp32, or fp64 for it."""
    return torch.promote_types(dtype, torch.float32)


def new_factors(parameter: Tensor, shards: Shards) -> dict[str, Tensor]:
    """State of a second moment of zeros: rank 1."""
    part = as_matrices(parameter)
    b, m, n = part.shape
    dtype, device = wide(part.dtype), part.device
    zeros = torch.zeros(b, dtype=dtype, device=device)
    state: dict[str, Tensor] = {}
    store_factors(
        state,
        parameter,
        shards,
        zeros.new_zeros(b, m, 1),
        zeros.new_zeros(b, n, 1),
        torch.ones(b, dtype=torch.int64, device=device),
        zeros,
    )
    return state


def read_factors(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """This rank's Q [b, m, k] and U [b, n, k]."""
    q, u = local(state["Q"]), local(state["U"])
    return (q, u) if q.dim() == 3 else (q.unsqueeze(0), u.unsqueeze(0))


def store_factors(
    state: dict[str, Tensor],
    parameter: Tensor,
    shards: Shards,
    q_bmk: Tensor,
    u_bnk: Tensor,
    rank_b: Tensor,
    xi_b: Tensor,
) -> None:
    """Puts factors, ranks and errors into `state`, without the dim of matrices where there is one matrix."""
    found = {"Q": q_bmk, "U": u_bnk, "rank": rank_b, "xi": xi_b}
    if not is_stack(parameter):
        found = {key: value.squeeze(0) for key, value in found.items()}
    for key, value in found.items():
        state[key] = _placed(value.contiguous(), parameter, shards, key) if isinstance(parameter, DTensor) else value


def placements_of(parameter: DTensor, key: str) -> list[Placement]:
    """How state under `key` that factors of whole matrices bring lies over the ranks of `parameter`."""
    mesh = parameter.device_mesh
    placements: list[Placement] = [Replicate()] * mesh.ndim
    for dim, placement in enumerate(parameter.placements):
        if not is_cut(placement) or mesh.size(dim) == 1:
            continue
        kind = placement.dim - parameter.dim()
        if kind < -2:
            placements[dim] = cut_along(placement, 0)
        elif (kind, key) in ((-2, "Q"), (-1, "U")):
            placements[dim] = cut_along(placement, parameter.dim() - 2)
    return placements


def _placed(part: Tensor, parameter: DTensor, shards: Shards, key: str) -> DTensor:
    """State as a DTensor over the parameter's mesh, so that checkpoints know whose part it is.

    Where shards count as matrices of their own, what would be equal on all ranks is stacked along its first dim.
    """
    mesh = parameter.device_mesh
    placements = placements_of(parameter, key)
    shape, num_stacked = list(part.shape), 1
    for dim, placement in enumerate(placements):
        cut = parameter.placements[dim]
        if is_cut(placement) and is_cut(cut):
            shape[placement.dim] = parameter.size(cut.dim)
        elif is_cut(cut) and mesh.size(dim) > 1 and not shards.exact:
            placements[dim] = Shard(0)
            num_stacked *= mesh.size(dim)
    if num_stacked > 1:
        if not shape:
            part, shape = part.unsqueeze(0), [1]
        shape[0] *= num_stacked
    return as_part(part, shape, parameter, placements)
