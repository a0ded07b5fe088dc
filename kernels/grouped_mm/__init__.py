"""The expert feed-forward over rows grouped by expert."""

from __future__ import annotations

from torch import Tensor

from ..backend import Backend, is_reference
from . import naive, vectorised

__all__ = ["grouped_swiglu"]


def grouped_swiglu(
    x_RD: Tensor, gate_up_e2FD: Tensor, down_eDF: Tensor, offsets_e: Tensor, backend: Backend = "auto"
) -> Tensor:
    """down(silu(gate(x)) * up(x)) with each row's own expert; [R, D], differentiable in all three.

    Args:
        x_RD: rows sorted by expert, dtype of the weights.
        gate_up_e2FD: gate rows above up rows, per expert.
        down_eDF: down projections.
        offsets_e: int32, the row after the last of each expert; offsets_e[-1] == R. Empty groups are fine.
    Raises:
        ValueError: `backend` is `torch` and torch's grouped_mm cannot take these dtypes or widths.
    """
    fits = vectorised.supported(x_RD, gate_up_e2FD, down_eDF)
    if is_reference(backend) or (backend == "auto" and not fits):
        return naive.grouped_swiglu(x_RD, gate_up_e2FD, down_eDF, offsets_e)
    if not fits:
        raise ValueError(
            f"kernels: torch cannot group {x_RD.dtype} products of widths {tuple(gate_up_e2FD.shape[1:])}; use fp32 "
            "or bf16 with widths of whole 16 bytes, or kernels: reference"
        )
    return vectorised.grouped_swiglu(x_RD, gate_up_e2FD, down_eDF, offsets_e)
