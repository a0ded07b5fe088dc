"""The gate's logits: tokens times the router's matrix, in fp32 whatever the model computes in."""

from __future__ import annotations

from torch import Tensor

from ..backend import Backend, implementation
from . import naive, vectorised

__all__ = ["gate"]


def gate(x_TD: Tensor, weight_ED: Tensor, blocks: int = 1, backend: Backend = "auto") -> Tensor:
    """The product x weight^T in fp32, or wider where the weight is; [T, E], differentiable in both.

    Tokens are multiplied in `blocks` equal parts, each as if it were alone: products of other shapes may differ in the
    last bit. On CUDA tokens in bf16 go through tensor cores and lose nothing there: see `vectorised`.
    """
    found = implementation(backend, x_TD.device)
    if found == "reference" or not vectorised.supported(x_TD, weight_ED):
        return naive.gate(x_TD, weight_ED, blocks)
    if found == "triton":
        from . import kernel

        return kernel.gate(x_TD, weight_ED, blocks)
    # A CPU has no units that would be faster than its fp32 ones.
    return (naive if x_TD.device.type == "cpu" else vectorised).gate(x_TD, weight_ED, blocks)
