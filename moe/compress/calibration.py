"""The text that a model is profiled and judged on: windows of token ids, and which of them count."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Calibration", "packed", "padded"]


@dataclass(frozen=True)
class Calibration:
    """N windows of S tokens."""

    tokens_NS: Tensor
    """int64."""
    mask_NS: Tensor
    """bool: false where a window is padded. Padding stands behind the text, and counts in no statistic."""
    name: str
    """For people: where the text is from."""

    def __post_init__(self) -> None:
        tokens_NS, mask_NS = self.tokens_NS, self.mask_NS
        if tokens_NS.dim() != 2 or tokens_NS.shape != mask_NS.shape or not mask_NS.any():
            shapes = f"{list(tokens_NS.shape)} and {list(mask_NS.shape)}"
            raise ValueError(f"calibration: {shapes} are no windows [N, S] with their mask; give one window at least")
        if (mask_NS[:, 1:] & ~mask_NS[:, :-1]).any():
            raise ValueError("calibration: padding stands before text, which would attend to it; pad at the end")

    @property
    def num_tokens(self) -> int:
        """Those that count."""
        return int(self.mask_NS.sum())

    @property
    def fingerprint(self) -> str:
        """Of the tokens and the mask."""
        digest = hashlib.sha256(str(list(self.tokens_NS.shape)).encode())
        digest.update(self.tokens_NS.cpu().contiguous().numpy().tobytes())
        digest.update(self.mask_NS.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def first(self, windows: int) -> Calibration:
        """The first so many windows."""
        return Calibration(self.tokens_NS[:windows], self.mask_NS[:windows], f"{self.name}, the first {windows}")

    def share(self, rank: int, ranks: int, batch: int) -> Calibration:
        """The windows of one of `ranks`: as many for each, a multiple of `batch`; what is added is padding."""
        count = -(-len(self.tokens_NS) // (ranks * batch)) * batch
        mine = slice(rank * count, (rank + 1) * count)
        tokens_NS, mask_NS = self.tokens_NS[mine], self.mask_NS[mine]
        rows = (count - len(tokens_NS), self.tokens_NS.size(1))
        share = object.__new__(Calibration)
        # Not checked: the last ranks' may be padding alone.
        object.__setattr__(share, "tokens_NS", torch.cat([tokens_NS, tokens_NS.new_zeros(rows)]))
        object.__setattr__(share, "mask_NS", torch.cat([mask_NS, mask_NS.new_zeros(rows)]))
        object.__setattr__(share, "name", self.name)
        return share


def packed(tokens: Sequence[int] | Tensor, seq_len: int, windows: int, name: str) -> Calibration:
    """Consecutive windows of one stream of tokens; what is left behind the last whole one is left out.

    Raises ValueError where there are fewer than `seq_len` tokens.
    """
    stream = torch.as_tensor(tokens, dtype=torch.int64)
    count = min(windows, len(stream) // seq_len)
    if count == 0:
        raise ValueError(f"{name}: {len(stream)} tokens are less than one window of {seq_len}; use shorter windows")
    tokens_NS = stream[: count * seq_len].view(count, seq_len)
    return Calibration(tokens_NS, torch.ones_like(tokens_NS, dtype=torch.bool), name)


def padded(documents: Sequence[Sequence[int]], seq_len: int, name: str) -> Calibration:
    """One window for each document that has tokens: its beginning, padded at the end."""
    rows = [list(document[:seq_len]) for document in documents if len(document)]
    if not rows:
        raise ValueError(f"{name}: holds no text")
    tokens_NS = torch.tensor([row + [0] * (seq_len - len(row)) for row in rows], dtype=torch.int64)
    lengths_N1 = torch.tensor([[len(row)] for row in rows])
    return Calibration(tokens_NS, torch.arange(seq_len)[None] < lengths_N1, name)
