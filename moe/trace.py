"""Recorded router logits on disk, one array per MoE layer, for `kind: replay`. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

RECORDS = "`wastenot eval RUN --trace FILE` records one"


def write_trace(path: Path | str, logits: Sequence[np.ndarray]) -> None:
    """Writes the router logits of one forward pass: [T, E] of each MoE layer, in order; kept in fp32."""
    save_file({f"layer{i}": np.ascontiguousarray(layer, dtype=np.float32) for i, layer in enumerate(logits)}, path)


def read_trace(path: Path | str, experts: Mapping[int, int]) -> list[np.ndarray]:
    """What `write_trace` wrote; MoE layer i of a model replays array i, and from the first again where there are fewer.

    experts: MoE layer -> how many it has. Raises ValueError where `path` is no trace, or one of other numbers.
    """
    try:
        arrays = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"trace: {path} cannot be read ({error}); {RECORDS}") from None
    layers = [arrays.get(f"layer{i}") for i in range(len(arrays))]
    good = [layer for layer in layers if layer is not None and layer.ndim == 2 and layer.size]
    if not good or len(good) < len(layers):
        raise ValueError(f"trace: {path} holds no router logits; {RECORDS}")
    for layer, wanted in experts.items():
        found = good[layer % len(good)].shape[1]
        if found != wanted:
            raise ValueError(f"trace: {path} is of {found} experts, the model has {wanted}; use {found}")
    return good
