"""How far factors are from the true average of squares, on request: that average whole, only to measure by."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .factors import as_matrices, read_factors, wide
from .shards import Shards, as_part, local


def new_true_moment(parameter: Tensor, xi: Tensor) -> dict[str, Tensor]:
    """State of an average of zeros, shaped as `parameter`, and of the error of its factors, shaped as `xi`."""
    return {"exp_avg_sq": torch.zeros_like(parameter, dtype=wide(parameter.dtype)), "true_xi": torch.zeros_like(xi)}


def average_squares(parameter: Tensor, state: dict[str, Tensor], beta2: float) -> None:
    """V = beta2 V + (1 - beta2) G^2, whole."""
    assert parameter.grad is not None
    moment = local(state["exp_avg_sq"])
    grad = local(parameter.grad).to(moment.dtype)
    moment.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)


def measure_true_error(state: dict[str, Tensor], shards: Shards, tile: int) -> None:
    """Writes |V - Q U^T| / |V| (Frobenius norms) of each matrix as `true_xi`; 0 where V is; `tile` entries at once."""
    (q_bmk, u_bnk), v_bmn = read_factors(state), as_matrices(state["exp_avg_sq"])
    b, _, n = v_bmn.shape
    sums_2b = v_bmn.new_zeros(2, b, dtype=torch.float64)
    rows = max(1, tile // max(1, b * n))
    for v_brn, q_brk in zip(v_bmn.split(rows, 1), q_bmk.split(rows, 1), strict=True):
        wide_brn = v_brn.double()
        sums_2b[0] += (wide_brn - q_brk @ u_bnk.mT).square_().sum((1, 2))
        sums_2b[1] += wide_brn.square().sum((1, 2))
    left_b, whole_b = shards.over_matrix(sums_2b)
    error_b = (left_b / whole_b.masked_fill(whole_b == 0, 1)).sqrt_().masked_fill_(whole_b == 0, 0)
    old = state["true_xi"]
    error = error_b.to(old.dtype).view_as(local(old))
    state["true_xi"] = as_part(error, old.shape, old, old.placements) if isinstance(old, DTensor) else error
