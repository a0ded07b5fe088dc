"""Proof that a checkpoint holds what was saved: a sum for every expert and tensor, and no weight that is no number."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .manifest import Chunk, Manifest

_WEIGHTS = "model."
"""How the names of weights begin, which must be finite."""


def sums_of(tensor: Tensor) -> tuple[int, ...]:
    """CRC-32 of the bytes of `tensor`, in host memory; of a stack of matrices [e, ...], experts, one for each."""
    return tuple(
        zlib.crc32(part.contiguous().reshape(-1).view(torch.uint8).numpy().data) if part.numel() else 0
        for part in _matrices(tensor)
    )


def check_finite(name: str, tensor: Tensor, first: int = 0) -> None:
    """Raises ValueError where `name` is a weight with an entry that is NaN or infinite; of a stack it says of which
    expert, `first` being the number of the first one here."""
    if not name.startswith(_WEIGHTS) or not tensor.is_floating_point():
        return
    for number, part in enumerate(_matrices(tensor), first):
        if not bool(part.isfinite().all()):
            raise ValueError(f"{name}{f', expert {number},' if tensor.dim() > 2 else ''} is not finite")


def check_sums(path: Path, name: str, chunk: Chunk, stored: Tensor) -> None:
    """Raises ValueError where `stored` is not what was saved, so far as the manifest says what that was."""
    found = sums_of(stored)
    if not chunk.sums or found == chunk.sums:
        return
    where = f"{path} is damaged: {name} in {chunk.file}"
    if stored.dim() <= 2 or len(found) != len(chunk.sums):
        raise ValueError(f"{where} has other bytes than were saved")
    number = next(i for i, (here, there) in enumerate(zip(found, chunk.sums, strict=True)) if here != there)
    raise ValueError(f"{where}: expert {chunk.offset[0] + number} has other bytes than were saved")


def verify_shards(
    path: Path, manifest: Manifest, progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Reads all of the checkpoint at `path`: raises ValueError where a byte is not the one that was saved, or a weight
    is not finite. What is missing is `check_complete`'s to find. `progress` hears (tensors read, tensors in all)."""
    inside = [(name, chunk) for name, entry in manifest.tensors.items() for chunk in entry.chunks]
    for done, (name, chunk) in enumerate(sorted(inside, key=lambda each: each[1].file)):
        try:
            with safe_open(path / chunk.file, framework="pt") as shard:
                stored = shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged: {chunk.file} is unreadable: {error}") from error
        check_sums(path, name, chunk, stored)
        check_finite(name, stored, chunk.offset[0] if chunk.offset else 0)
        progress(done + 1, len(inside))


def _matrices(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.unbind(0) if tensor.dim() > 2 else (tensor,)
