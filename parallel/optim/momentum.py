"""The first moment in fp32, bf16, int8 or not at all (METHODS A7)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .factors import wide
from .shards import as_part, local, shards_of

Momentum = Literal["fp32", "bf16", "int8", "none"]

_BLOCK = 128
"""Entries of a row that share a scale."""
_CODES = 127


def new_momentum(like: Tensor, kind: Momentum, as_matrix: bool = False) -> dict[str, Tensor]:
    """State of a first moment of zeros, shaped as `like` [..., n], by name.

    as_matrix: a parameter of more than three dims is read and written as [m, all others].
    """
    if kind == "none":
        return {}
    if kind == "int8":
        return {"exp_avg": torch.zeros_like(like, dtype=torch.int8), "exp_avg_scale": _new_scales(like, as_matrix)}
    return {"exp_avg": torch.zeros_like(like, dtype=torch.bfloat16 if kind == "bf16" else wide(like.dtype))}


def _new_scales(like: Tensor, as_matrix: bool) -> Tensor:
    """One for each block of a row; blocks do not reach over the columns of other ranks."""
    part = local(like)
    if as_matrix and part.dim() > 3:
        part = part.flatten(1)
    num_blocks = -(-part.size(-1) // _BLOCK) if part.dim() else 1
    scales = torch.zeros((*part.shape[:-1], num_blocks), dtype=torch.float32, device=part.device)
    if not isinstance(like, DTensor):
        return scales
    all_blocks = shards_of(like, True).over_columns(torch.tensor(num_blocks, device=part.device))
    return as_part(scales, (*like.shape[:-1], int(all_blocks.item())), like, like.placements)


def read(state: dict[str, Tensor], rows: slice, dtype: torch.dtype) -> Tensor:
    """Rows [..., r, n] of the moment in `dtype`: a view of the state where it has that dtype."""
    stored = state["exp_avg"][..., rows, :]
    if "exp_avg_scale" not in state:
        return stored.to(dtype)
    # The codes are roots: entries far below their block's largest keep their relative size.
    root = stored.to(dtype).div_(_CODES)
    scale = state["exp_avg_scale"][..., rows, :].to(dtype).repeat_interleave(_BLOCK, -1)[..., : stored.size(-1)]
    return root.mul_(root.abs()).mul_(scale)


def write(state: dict[str, Tensor], rows: slice, value: Tensor) -> None:
    """Stores rows [..., r, n] that `read` gave and that have changed since."""
    stored = state["exp_avg"][..., rows, :]
    if "exp_avg_scale" not in state:
        if value.data_ptr() != stored.data_ptr() or value.dtype != stored.dtype:
            stored.copy_(value)
        return
    short = -value.size(-1) % _BLOCK
    num_blocks = (value.size(-1) + short) // _BLOCK
    blocks = torch.nn.functional.pad(value, (0, short)).unflatten(-1, (num_blocks, _BLOCK))
    scale = blocks.abs().amax(-1)
    state["exp_avg_scale"][..., rows, :] = scale
    part = blocks / scale.masked_fill(scale == 0, 1).unsqueeze(-1)
    codes = part.abs().sqrt_().mul_(_CODES).round_().copysign_(part)
    stored.copy_(codes.flatten(-2)[..., : value.size(-1)])
