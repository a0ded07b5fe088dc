"""Gaussian numbers as a function of their place: the same on every rank, device and cut of a matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Odd constants of a 64-bit mixer (splitmix64), as the signed integers that torch has.
_STEP, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685


def gaussian(shape: tuple[int, int], seed: int, device: torch.device, dtype: torch.dtype, first_row: int = 0) -> Tensor:
    """Entry (i, j) is drawn by (seed, first_row + i, j) alone; a part of a larger matrix equals that part of it."""
    rows, columns = shape
    row_r1 = torch.arange(first_row, first_row + rows, device=device).unsqueeze(1)
    bits = _mix(_mix(row_r1 + seed * 1_000_003) + torch.arange(columns, device=device))
    # The upper and the lower half make a radius and an angle (Box-Muller).
    radius = ((bits >> 32 & 0xFFFFFFFF).double() + 1) * 2.0**-32
    angle = (bits & 0xFFFFFFFF).double() * (2 * math.pi * 2.0**-32)
    return (radius.log_().mul_(-2).sqrt_() * angle.cos_()).to(dtype)


def _mix(x: Tensor) -> Tensor:
    x = x * _STEP
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * _FIRST
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * _SECOND
    return x ^ (x >> 31 & 0x1FFFFFFFF)
