"""How kernels that stream rows cut them: a bounded table, and what a launch takes from it.

The cut depends on shapes and dtypes alone, never on a measurement: sums are cut with it, and a run must repeat to the
last bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """A piece of a row, and the warps that work on it."""

    block: int
    warps: int


ROW_TILES = (Tile(64, 1), Tile(256, 1), Tile(1024, 4))
"""All that are ever launched; at 1,024 two-byte values each thread moves 16 bytes at a time."""


COPY_TILES = (*ROW_TILES, Tile(2048, 4))
"""For kernels that only move values: a thread has 16 bytes on their way more than once."""


def row_tile(width: int, tiles: tuple[Tile, ...] = ROW_TILES) -> Tile:
    """The smallest of `tiles` that holds a row of `width` values, or the largest, which then runs several times."""
    return next((tile for tile in tiles if width <= tile.block), tiles[-1])


def grid_of(rows: int, width: int, tile: Tile) -> tuple[int, int]:
    """A program for every tile of every row."""
    return rows, pieces(width, tile.block)


def pieces(size: int, piece: int) -> int:
    """How many pieces `size` makes, the last one perhaps not full."""
    return -(-size // piece)


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below `size` (at least 1)."""
    return 1 << (size - 1).bit_length()


def accumulator(*tensors: Tensor) -> tl.dtype:
    """What sums of products of `tensors` are kept in: fp32, or fp64 where any of them is."""
    return tl.float64 if any(t.dtype == torch.float64 for t in tensors) else tl.float32


def dense_rows(x_RD: Tensor) -> Tensor:
    """`x_RD` with neighbouring values of a row side by side in memory; rows may lie apart."""
    return x_RD if x_RD.stride(-1) == 1 else x_RD.contiguous()
