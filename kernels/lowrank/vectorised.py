"""The second moment block by block: each is built where a cache holds it; the whole is kept only where it is small."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 2**20
"""Elements of a block on a CPU: the few tensors made of it stay in the last cache; smaller ones start more often."""


class Share(NamedTuple):
    """What one gradient has of a tile's matrices."""

    number: int
    """Of the gradient."""
    inside: slice
    """Which of the tile's matrices they are, ..."""
    own: slice
    """... and which of the gradient's."""


class Tile(NamedTuple):
    """Some rows of one matrix, or all rows of some matrices."""

    matrices: slice
    rows: slice
    shares: list[Share]
    moment_brn: Tensor
    """Second moment, clamped."""
    grad_brn: Tensor

    @property
    def where(self) -> tuple[slice, slice]:
        return self.matrices, self.rows


Visit = Callable[[Tile], None]


class SecondMoment:
    """V of b matrices, as an operator.

    Args:
        q_bmk, u_bnk: factors of the last step, in the dtype of the computation.
        grads: gradients [b_i, m, n] of any floating dtype, whose b_i sum to b.
        beta2: decay.
        clamp: whether negative entries of the product count as zero. Without it, products need no entry of it.
        tile: most elements that exist at once, but for one row: V is kept whole where it is no larger.
    """

    def __init__(
        self,
        q_bmk: Tensor,
        u_bnk: Tensor,
        grads: Sequence[Tensor],
        beta2: float,
        clamp: bool = True,
        tile: int = 2**22,
    ) -> None:
        self.q_bmk, self.u_bkn, self.grads = q_bmk * beta2, u_bnk.transpose(1, 2), grads
        self.newest, self.clamp = 1 - beta2, clamp
        b, m, n = q_bmk.size(0), q_bmk.size(1), u_bnk.size(1)
        self.shape = (b, m, n)
        self._ends = list(accumulate(grad.size(0) for grad in grads))
        block = min(tile, _BLOCK) if q_bmk.device.type == "cpu" else tile
        self._matrices = max(1, min(b, block // max(1, m * n)))
        self._rows = m if m * n <= block else max(1, block // max(1, n))
        self._kept: list[Tensor] | None = [] if b * m * n <= tile else None

    @property
    def is_kept(self) -> bool:
        """Whether the whole is in memory after the first pass."""
        return self._kept is not None

    def tiles(self) -> Iterator[Tile]:
        """All of V, in order. It is clamped here in any case: its square root is asked for."""
        kept = list(self._kept or ())
        for number, (matrices, rows) in enumerate(self._blocks()):
            shares = _shares(self._ends, matrices)
            grad_brn = self._grad(shares, rows)
            if number < len(kept):
                moment_brn = kept[number]
            else:
                moment_brn = torch.bmm(self.q_bmk[matrices, rows], self.u_bkn[matrices]).clamp_(min=0)
                moment_brn.addcmul_(grad_brn, grad_brn, value=self.newest)
                if self._kept is not None:
                    self._kept.append(moment_brn)
            yield Tile(matrices, rows, shares, moment_brn, grad_brn)

    def times(self, x_bnc: Tensor, visit: Visit | None = None) -> Tensor:
        """V X; [b, m, c]. `visit` sees every tile, in the same pass."""
        y_bmc = x_bnc.new_empty(*self.shape[:2], x_bnc.size(2))
        for (matrices, rows), v_brn in self._products(visit):
            y_bmc[matrices, rows] = torch.bmm(v_brn, x_bnc[matrices])
        return y_bmc if self.clamp else y_bmc.baddbmm_(self.q_bmk, torch.bmm(self.u_bkn, x_bnc))

    def transposed_times(self, y_bmc: Tensor, visit: Visit | None = None) -> Tensor:
        """V^T Y; [b, n, c]. `visit` sees every tile, in the same pass."""
        # Y^T V, as the faster one.
        x_bcn = y_bmc.new_zeros(self.shape[0], y_bmc.size(2), self.shape[2])
        y_bcm = y_bmc.transpose(1, 2).contiguous()
        for (matrices, rows), v_brn in self._products(visit):
            x_bcn[matrices].baddbmm_(y_bcm[matrices, :, rows], v_brn)
        if not self.clamp:
            x_bcn.baddbmm_(torch.bmm(y_bcm, self.q_bmk), self.u_bkn)
        return x_bcn.transpose(1, 2).contiguous()

    def _products(self, visit: Visit | None) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
        """Tiles of what is multiplied entry by entry: V, or without a clamp the newest square alone."""
        if self.clamp or visit is not None:
            for tile in self.tiles():
                yield tile.where, tile.moment_brn if self.clamp else tile.grad_brn.square().mul_(self.newest)
                if visit is not None:
                    visit(tile)
            return
        for matrices, rows in self._blocks():
            grad_brn = self._grad(_shares(self._ends, matrices), rows)
            yield (matrices, rows), grad_brn.square().mul_(self.newest)

    def _blocks(self) -> Iterator[tuple[slice, slice]]:
        b, m, _ = self.shape
        for first in range(0, b, self._matrices):
            for start in range(0, m, max(1, self._rows)):
                yield slice(first, min(b, first + self._matrices)), slice(start, min(m, start + self._rows))

    def _grad(self, shares: list[Share], rows: slice) -> Tensor:
        parts = [self.grads[share.number][share.own, rows].to(self.q_bmk.dtype) for share in shares]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _shares(ends: Sequence[int], matrices: slice) -> list[Share]:
    """Of parts that end before these matrices, those that have any of `matrices`."""
    shares = []
    number, start = bisect_right(ends, matrices.start), matrices.start
    while start < matrices.stop:
        first, stop = ends[number - 1] if number else 0, min(matrices.stop, ends[number])
        inside = slice(start - matrices.start, stop - matrices.start)
        shares.append(Share(number, inside, slice(start - first, stop - first)))
        number, start = number + 1, stop
    return shares
