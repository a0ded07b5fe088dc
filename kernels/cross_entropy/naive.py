"""Reference of the output layer's loss: all logits at once, differentiated by autograd."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Sum over tokens of -log softmax(hidden weight^T)[target]; targets of -100 count nothing."""
    logits_TV = F.linear(hidden_TD, weight_VD)
    if logits_TV.dtype.itemsize < 4:
        logits_TV = logits_TV.float()
    return F.cross_entropy(logits_TV, targets_T, reduction="sum", ignore_index=-100)
