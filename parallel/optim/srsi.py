"""Streamlined randomized subspace iteration, batched: A ~ Q U^T (METHODS A1, A6; arXiv 2403.14958, algorithm 1).

The first k columns of a subspace iteration do not depend on the columns after them: each orthonormalisation only takes
away what stands before. So one call serves matrices of different ranks, and every smaller rank of each; and
oversampled columns that are cut off at the end, as the paper has them, change nothing: none are computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .noise import gaussian

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor, in place, over the ranks that hold other parts of a matrix."""


def keep(tensor: Tensor) -> Tensor:
    """The sum over one rank."""
    return tensor


class Operator(Protocol):
    """b matrices [m, n] that are only multiplied with; or this rank's rows or columns of them."""

    def times(self, x_bnc: Tensor) -> Tensor:
        """A X; [b, m, c]."""
        ...

    def transposed_times(self, y_bmc: Tensor) -> Tensor:
        """A^T Y; [b, n, c]."""
        ...


def srsi(
    a: Operator,
    start_bnc: Tensor,
    rounds: int,
    *,
    over_rows: Reduce = keep,
    over_columns: Reduce = keep,
    first_row: int = 0,
    first_column: int = 0,
) -> tuple[Tensor, Tensor]:
    """Q [b, m, c] with orthonormal columns and U = A^T Q [b, n, c], after `rounds` from the columns of `start_bnc`.

    `over_rows` and `over_columns` sum over the ranks that hold other rows or columns of the same matrices; `first_row`
    and `first_column` are the global indices of this rank's first ones.
    """
    u_bnc = start_bnc
    for round_ in range(rounds):
        if round_:
            # Columns of U are as long as singular values: powers of them would leave fp32.
            u_bnc = orthonormal(u_bnc, over_columns, first_column)
        q_bmc = orthonormal(over_columns(a.times(u_bnc)), over_rows, first_row)
        u_bnc = over_rows(a.transposed_times(q_bmc))
    return q_bmc, u_bnc  # pyright: ignore[reportPossiblyUnboundVariable]


def orthonormal(y_bmc: Tensor, over_rows: Reduce = keep, first_row: int = 0) -> Tensor:
    """Orthonormal columns, of which the first j span what the first j of `y_bmc` span, for every j.

    Cholesky QR with Gram matrices in fp64, twice where once could show in fp32. Columns that depend on those before
    them become random ones that do not. c is at most m.
    """
    q_bmc, good_b, is_enough = _cholesky_qr(y_bmc, over_rows)
    if y_bmc.dtype == torch.float32 and is_enough:
        return q_bmc
    short_b = good_b < y_bmc.size(2)
    if bool(short_b.any()):
        q_bmc[short_b] = _completed(y_bmc[short_b].double(), over_rows, first_row).to(y_bmc.dtype)
    return _cholesky_qr(q_bmc, over_rows)[0]


def _completed(y_bmc: Tensor, over_rows: Reduce, first_row: int) -> Tensor:
    """Orthonormal columns of matrices of which some columns depend on those before them; fp64.

    Raises FloatingPointError for entries that are no numbers.
    """
    m, c = y_bmc.shape[1:]
    q_bmc, good_b, _ = _cholesky_qr(y_bmc, over_rows)
    column_c = torch.arange(c, device=y_bmc.device)
    noise_1mc = gaussian((m, c), 0, y_bmc.device, torch.float64, first_row).unsqueeze(0)
    # Every turn makes at least one more column independent, most often all.
    for _ in range(c):
        if not bool((good_b < c).any()):
            return q_bmc
        is_good_b1c = column_c < good_b.view(-1, 1, 1)
        span_bmc = q_bmc * is_good_b1c
        noise_bmc = _outside(_outside(noise_1mc, span_bmc, over_rows), span_bmc, over_rows)
        rest_bmc = _outside(q_bmc, span_bmc, over_rows)
        # A column of zeros has no direction either.
        is_noise_b1c = _lengths(rest_bmc, over_rows) <= 2 * _LEAST_PIVOT * _lengths(q_bmc, over_rows)
        is_noise_b1c |= column_c == good_b.view(-1, 1, 1)
        rest_bmc = torch.where(is_noise_b1c, noise_bmc, rest_bmc)
        q_bmc, good_b, _ = _cholesky_qr(torch.where(is_good_b1c, q_bmc, rest_bmc), over_rows)
    if bool((good_b < c).any()):
        raise FloatingPointError("a second moment is not finite: gradients, or factors that were loaded, are not")
    return q_bmc


def _outside(y_bmc: Tensor, span_bmc: Tensor, over_rows: Reduce) -> Tensor:
    """What of `y_bmc` is orthogonal to the columns of `span_bmc`, which are orthonormal or zero."""
    return y_bmc - span_bmc @ over_rows(span_bmc.mT @ y_bmc)


def _lengths(y_bmc: Tensor, over_rows: Reduce) -> Tensor:
    return over_rows(y_bmc.square().sum(1, keepdim=True)).sqrt_()


def _cholesky_qr(y_bmc: Tensor, over_rows: Reduce) -> tuple[Tensor, Tensor, bool]:
    """Y R^-1 with R^T R = Y^T Y for the leading columns that are independent, those after them as they are.

    In the dtype of Y; computed in fp64, some rows at a time. Also returns how many these are, int64 [b], and whether
    all pivots, of columns of unit length, are large enough that fp32 shows no error.
    """
    b, c = y_bmc.size(0), y_bmc.size(2)
    gram_bcc = y_bmc.new_zeros(b, c, c, dtype=torch.float64)
    rows = max(1, _ENTRIES // max(1, b * c))
    for part_brc in y_bmc.split(rows, 1):
        wide_brc = part_brc.double()
        gram_bcc.baddbmm_(wide_brc.mT, wide_brc)
    gram_bcc = over_rows(gram_bcc)
    length_bc = gram_bcc.diagonal(dim1=1, dim2=2).sqrt()
    length_bc = length_bc.masked_fill(length_bc == 0, 1)
    # As of columns of unit length: their sizes may be far apart.
    lower_bcc, info_b = torch.linalg.cholesky_ex(gram_bcc / (length_bc.unsqueeze(1) * length_bc.unsqueeze(2)))
    # A pivot of rounding noise is none.
    pivot_bc = lower_bcc.diagonal(dim1=1, dim2=2)
    if bool(((pivot_bc > _ENOUGH) & (info_b == 0).unsqueeze(1)).all()):
        good_b = torch.full_like(info_b, c, dtype=torch.int64)
        return _divided(y_bmc, lower_bcc.mT * length_bc.unsqueeze(1), rows), good_b, True
    column_c = torch.arange(c, device=y_bmc.device)
    good_bc = pivot_bc > _LEAST_PIVOT
    good_bc &= (info_b == 0).unsqueeze(1) | (column_c < info_b.unsqueeze(1) - 1)
    good_b = good_bc.cumprod(1).sum(1)
    is_good_bc = column_c < good_b.unsqueeze(1)
    both_bcc = is_good_bc.unsqueeze(1) & is_good_bc.unsqueeze(2)
    identity_cc = torch.eye(c, dtype=torch.float64, device=y_bmc.device)
    upper_bcc = torch.where(both_bcc, lower_bcc.mT * length_bc.unsqueeze(1), identity_cc)
    return _divided(y_bmc, upper_bcc, rows), good_b, False


def _divided(y_bmc: Tensor, upper_bcc: Tensor, rows: int) -> Tensor:
    """Y R^-1 in the dtype of Y, `rows` at a time in that of R."""
    q_bmc = torch.empty_like(y_bmc)
    for part_brc, out_brc in zip(y_bmc.split(rows, 1), q_bmc.split(rows, 1), strict=True):
        out_brc.copy_(torch.linalg.solve_triangular(upper_bcc, part_brc.double(), upper=True, left=False))
    return q_bmc


_ENTRIES = 2**20
"""In fp64 at once."""
_ENOUGH = 1e-3
"""With larger pivots a Gram matrix in fp64 leaves errors of 1e-10."""
_LEAST_PIVOT = 1e-7
"""Of unit columns: below it the rounding of fp32 entries is all that is left."""
