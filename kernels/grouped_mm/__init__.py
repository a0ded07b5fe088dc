"""The expert feed-forward over rows grouped by expert."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import Backend, implementation
from . import naive, vectorised

__all__ = ["grouped_swiglu"]


def grouped_swiglu(
    x_RD: Tensor,
    gate_up_e2FD: Tensor,
    down_eDF: Tensor,
    offsets_e: Tensor,
    backend: Backend = "auto",
    call: vectorised.Call | None = None,
) -> Tensor:
    """down(silu(gate(x)) * up(x)) with each row's own expert; [R, D], differentiable in all three.

    Args:
        x_RD: rows sorted by expert, dtype of the weights.
        gate_up_e2FD: gate rows above up rows, per expert.
        down_eDF: down projections.
        offsets_e: int32, the row after the last of each expert; offsets_e[-1] == R. Empty groups are fine.
        call: call(name, function, *args) -> function(*args), in which `expert up`, `expert activation` and `expert
            down` are computed, each from its arguments; in one where the implementation has one.
    Raises:
        ValueError: `backend` names an implementation that cannot take these dtypes or widths.
    """
    found = implementation(backend, x_RD.device)
    can = {
        "triton": x_RD.dtype in (torch.float32, torch.bfloat16, torch.float16),
        "torch": vectorised.supported(x_RD, gate_up_e2FD, down_eDF),
        "reference": True,
    }
    if backend == "auto":
        # On CUDA torch has products of its own for bf16 alone.
        order = ("torch", "triton") if x_RD.dtype == torch.bfloat16 else ("triton", "torch")
        usable = order if found == "triton" else ("torch",)
        found = next((name for name in usable if can[name]), "reference")
    if not can[found]:
        raise ValueError(
            f"kernels: {found} cannot group {x_RD.dtype} products of widths {tuple(gate_up_e2FD.shape[1:])}; use fp32 "
            "or bf16 with widths of whole 16 bytes, or kernels: reference"
        )
    if found == "triton":
        from . import kernel

        whole = kernel.grouped_swiglu
    elif found == "torch":
        return vectorised.grouped_swiglu(x_RD, gate_up_e2FD, down_eDF, offsets_e, call)
    else:
        whole = naive.grouped_swiglu
    if call is None:
        return whole(x_RD, gate_up_e2FD, down_eDF, offsets_e)
    return call("expert up", whole, x_RD, gate_up_e2FD, down_eDF, offsets_e)
