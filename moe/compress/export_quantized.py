"""Weights in few bits as stock transformers reads them: the `pack-quantized` layout of compressed-tensors.

transformers 5.23 with compressed-tensors 0.20, measured on tiny models of all families on a CPU: logits are those of
the weights that the codes stand for, to the bit, and no tensor is missing or left over. It forms whole weights as it
loads (experts) or first computes (linear layers): files are small, the model in memory is not. torchao 0.18 is no
alternative there: its 4-bit layouts refuse a CPU, and of models with all experts in one tensor it leaves these whole,
without a word. vLLM reads the layout too; not run.

Codes and scales are those of quantize.py; only names and packing differ: 8 or 4 codes in an int32, the first in the
lowest bits, each moved up by half the range.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .quantize import codes_of

__all__ = ["packed_tensors", "quantization_config"]


def packed_tensors(name: str, q: Tensor, scale: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """What stands for the weight `name` [O, I]. `dtype`: of the model, and of scales, whose dtype experts get.

    Raises ValueError where the inputs do not fill whole int32.
    """
    codes, bits = codes_of(q), 8 if q.dtype == torch.int8 else 4
    in_one = 32 // bits
    if codes.size(-1) % in_one:
        raise ValueError(f"{name}: {codes.size(-1)} inputs fill no whole int32 of {in_one} codes; leave it in bf16")
    moved = (codes.long() + (1 << bits - 1)).unflatten(-1, (-1, in_one))
    word = (moved << torch.arange(in_one, device=q.device) * bits).sum(-1)
    return {
        f"{name}_packed": torch.where(word >= 1 << 31, word - (1 << 32), word).int(),
        f"{name}_scale": scale.to(dtype),
        f"{name}_shape": torch.tensor(codes.shape),
    }


def quantization_config(bits: int, group: int, ignore: Iterable[str]) -> dict[str, Any]:
    """What config.json says. group: 0 for one scale a row; ignore: linear modules that are whole, and the output layer,
    which is whole wherever its weight is."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if group else "channel",
        "group_size": group or None,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": sorted({"lm_head", *ignore}),
    }
