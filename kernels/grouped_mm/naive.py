"""Reference of the expert feed-forward: expert by expert, any dtype, differentiated by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_mm(x_RN: Tensor, w_eMN: Tensor, offsets_e: Tensor) -> Tensor:
    """Rows of group e (they end at offsets_e[e]) times w_eMN[e] transposed; [R, M]."""
    ends = [0, *offsets_e.tolist()]
    return torch.cat([F.linear(x_RN[ends[i] : ends[i + 1]], w_eMN[i]) for i in range(w_eMN.size(0))])


def grouped_swiglu(x_RD: Tensor, gate_up_e2FD: Tensor, down_eDF: Tensor, offsets_e: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)) of each row's own expert; [R, D]."""
    gate_RF, up_RF = grouped_mm(x_RD, gate_up_e2FD, offsets_e).chunk(2, -1)
    return grouped_mm(F.silu(gate_RF) * up_RF, down_eDF, offsets_e)
