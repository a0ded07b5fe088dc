"""Which parameters learn (`train.only`): the others have no gradient and no optimizer state, and never change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import nn

from ..moe.decoder import Block, Decoder
from ..moe.feedforward import SwiGLU
from ..moe.layer import MoELayer
from ..moe.norm import CutRMSNorm, RMSNorm


def freeze(model: Decoder, only: Literal["all", "router", "norms", "stub"]) -> None:
    """Leaves gradients to those parameters of `model` that `only` names; before its optimizer and its first forward.

    Before, since FSDP2 asks a weight whether it learns when it first gathers it.
    """
    if only == "all":
        return
    model.requires_grad_(False)
    for module in _learning(model, only):
        module.requires_grad_(True)


def _learning(model: Decoder, only: str) -> Iterator[nn.Module]:
    if only == "norms":
        yield from (module for module in model.modules() if isinstance(module, RMSNorm | CutRMSNorm))
        return
    for block in (module for module in model.modules() if isinstance(module, Block)):
        if only == "router" and isinstance(block.ffn, MoELayer):
            yield block.ffn.router
        elif only == "stub" and isinstance(block.ffn, SwiGLU):
            yield block.ffn
