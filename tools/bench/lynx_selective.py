"""torch's selective activation checkpointing, as a peer: matrix products and attention are kept, the rest is not."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ...moe.decoder import Block, Decoder
from ...moe.layer import MoELayer

_ATEN = torch.ops.aten
_KEPT = (
    _ATEN.mm.default,
    _ATEN.bmm.default,
    _ATEN._grouped_mm.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
)


def keep_products(model: Decoder) -> None:
    """Attention and experts of `model` compute again what is no product: the parts of a layer that send nothing."""
    for block in model.blocks:
        assert isinstance(block, Block)
        _checkpoint(block.attention)
        if block.ffn is not None:
            _checkpoint(block.ffn.experts if isinstance(block.ffn, MoELayer) else block.ffn)


def _checkpoint(module: nn.Module) -> None:
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    whole = module.forward
    module.forward = partial(checkpoint, whole, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
