"""The second moment tile by tile: what is built of it fits a cache, and its whole is never in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """Some rows of all matrices."""

    rows: slice
    moment_brn: Tensor
    """Scaled second moment."""
    grad_brn: Tensor


Visit = Callable[[Tile], None]


class SecondMoment:
    """scale * V of b matrices, as an operator.

    Args:
        q_bmk, u_bnk: factors of the last step, in the dtype of the computation.
        grads: gradients [b_i, m, n] of any floating dtype, whose b_i sum to b.
        beta2: decay.
        scale: factor on everything, so that squares of squares neither overflow nor vanish.
        clamp: whether negative entries of the product count as zero. Without it, products need no entry of it.
        tile: most elements that are built at once; whole rows, at least one.
    """

    def __init__(
        self,
        q_bmk: Tensor,
        u_bnk: Tensor,
        grads: Sequence[Tensor],
        beta2: float,
        scale: float = 1.0,
        clamp: bool = True,
        tile: int = 2**18,
    ) -> None:
        self.q_bmk, self.u_bkn, self.grads = q_bmk, u_bnk.transpose(1, 2), grads
        self.beta2, self.scale, self.clamp = beta2, scale, clamp
        b, m, n = q_bmk.size(0), q_bmk.size(1), u_bnk.size(1)
        self.shape = (b, m, n)
        self._rows = max(1, min(m, tile // max(1, b * n)))
        self._whole: Tile | None = None

    def tiles(self) -> Iterator[Tile]:
        """All rows, in order. V is clamped here in any case: its square root is asked for."""
        m = self.shape[1]
        if self._rows < m:
            for start in range(0, m, self._rows):
                yield self._build(slice(start, min(m, start + self._rows)))
            return
        if self._whole is None:
            self._whole = self._build(slice(0, m))
        yield self._whole

    def times(self, x_bnc: Tensor, visit: Visit | None = None) -> Tensor:
        """V X; [b, m, c]. `visit` sees every tile, in the same pass."""
        b, m, _ = self.shape
        y_bmc = x_bnc.new_empty(b, m, x_bnc.size(2))
        for rows, v_brn in self._products(visit):
            y_bmc[:, rows] = torch.bmm(v_brn, x_bnc)
        return y_bmc if self.clamp else self._add(y_bmc, self.q_bmk, self.u_bkn, x_bnc)

    def transposed_times(self, y_bmc: Tensor, visit: Visit | None = None) -> Tensor:
        """V^T Y; [b, n, c]. `visit` sees every tile, in the same pass."""
        b, _, n = self.shape
        x_bnc = y_bmc.new_zeros(b, n, y_bmc.size(2))
        for rows, v_brn in self._products(visit):
            x_bnc.baddbmm_(v_brn.transpose(1, 2), y_bmc[:, rows])
        return x_bnc if self.clamp else self._add(x_bnc, self.u_bkn.transpose(1, 2), self.q_bmk.transpose(1, 2), y_bmc)

    def _products(self, visit: Visit | None) -> Iterator[tuple[slice, Tensor]]:
        """Tiles of what is multiplied entry by entry: V, or without a clamp the newest square alone."""
        newest = (1 - self.beta2) * self.scale
        if self.clamp or visit is not None:
            for tile in self.tiles():
                yield tile.rows, tile.moment_brn if self.clamp else tile.grad_brn.square().mul_(newest)
                if visit is not None:
                    visit(tile)
            return
        for start in range(0, self.shape[1], self._rows):
            rows = slice(start, min(self.shape[1], start + self._rows))
            yield rows, self._grad(rows).square().mul_(newest)

    def _add(self, out: Tensor, left: Tensor, right: Tensor, x: Tensor) -> Tensor:
        return out.baddbmm_(left, torch.bmm(right, x), alpha=self.beta2 * self.scale)

    def _build(self, rows: slice) -> Tile:
        grad_brn = self._grad(rows)
        # beta = 0: what the output held is not read.
        v_brn = torch.baddbmm(
            torch.empty_like(grad_brn), self.q_bmk[:, rows], self.u_bkn, beta=0, alpha=self.beta2 * self.scale
        )
        v_brn.clamp_(min=0).addcmul_(grad_brn, grad_brn, value=(1 - self.beta2) * self.scale)
        return Tile(rows, v_brn, grad_brn)

    def _grad(self, rows: slice) -> Tensor:
        parts = [grad[:, rows].to(self.q_bmk.dtype) for grad in self.grads]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
