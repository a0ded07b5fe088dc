"""Reference of the gate's logits: everything widened, differentiated by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gate(x_TD: Tensor, weight_ED: Tensor, blocks: int) -> Tensor:
    """x weight^T in fp32, or wider where the weight is; a product for each of `blocks` equal parts of the tokens."""
    wide = torch.promote_types(weight_ED.dtype, torch.float32)
    x_TD, weight_ED = x_TD.to(wide), weight_ED.to(wide)
    if blocks == 1:
        return F.linear(x_TD, weight_ED)
    return torch.cat([F.linear(block, weight_ED) for block in x_TD.chunk(blocks)])
