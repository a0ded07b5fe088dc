"""Interpolated Witten-Bell byte models: the figure that a trained model's bits per byte stand beside.

The model of order k predicts a byte x from the k bytes h before it by

    P_k(x | h) = (c(h x) + T(h) P_{k-1}(x | h')) / (c(h) + T(h))

where c counts occurrences in the training texts, T(h) is the number of different bytes seen after h, h' is h
without its oldest byte, and the recursion ends at the uniform 1/256. A context never seen leaves P_{k-1} as it is.
Contexts end at the start of a text: its first bytes are predicted by the shorter orders.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MAX_ORDER = 7
"""A context and the byte after it share one 64-bit key."""


def witten_bell_bits_per_byte(train: Sequence[bytes], val: Sequence[bytes], order: int) -> float:
    """Bits per byte of the `val` texts under a model with `order` bytes of context, fitted on the `train` texts.

    Raises ValueError where `order` is outside 0..MAX_ORDER or a split holds no byte.
    """
    return witten_bell_curve(train, val, order)[order]


def witten_bell_curve(train: Sequence[bytes], val: Sequence[bytes], order: int) -> list[float]:
    """Bits per byte of every order from 0 to `order`, in one pass; arguments as `witten_bell_bits_per_byte`."""
    if not 0 <= order <= MAX_ORDER:
        raise ValueError(f"order: {order} is outside 0..{MAX_ORDER}")
    if not any(train) or not any(val):
        raise ValueError("an n-gram model needs at least one training byte and one byte to predict")
    seen = _Grams(train)
    asked = _Grams(val)
    probability = np.full(len(asked.keys), 1 / 256)
    curve = []
    for length in range(order + 1):
        seen.lengthen_to(length)
        asked.lengthen_to(length)
        inside = asked.depth >= length
        probability[inside] = _interpolate(seen.keys[seen.depth >= length], asked.keys[inside], probability[inside])
        curve.append(float(-np.log2(probability).mean()))
    return curve


class _Grams:
    """Every byte of some texts as a key: the byte itself lowest, above it the bytes before it, the nearest first."""

    def __init__(self, texts: Sequence[bytes]) -> None:
        self.bytes = np.frombuffer(b"".join(texts), np.uint8)
        self.keys = self.bytes.astype(np.uint64)
        lengths = np.array([len(text) for text in texts])
        starts = np.cumsum(lengths) - lengths
        self.depth = np.arange(len(self.bytes)) - np.repeat(starts, lengths)
        """Bytes of the same text that stand before each byte; keys reach further back only where it allows."""

    def lengthen_to(self, length: int) -> None:
        """Adds the byte `length` places back; call with 0, 1, 2, ... in turn."""
        if length:
            self.keys[length:] |= self.bytes[:-length].astype(np.uint64) << np.uint64(8 * length)


def _interpolate(seen: np.ndarray, asked: np.ndarray, shorter: np.ndarray) -> np.ndarray:
    """P_k of each key in `asked` [n], given the training keys `seen` [m] and P_{k-1} as `shorter` [n]."""
    if not len(seen):
        return shorter
    grams, gram_counts = np.unique(seen, return_counts=True)
    # Keys sort by context first, so the grams of one context are neighbours.
    contexts, first = np.unique(grams >> np.uint64(8), return_index=True)
    context_counts = np.add.reduceat(gram_counts, first)
    followers = np.diff(first, append=len(grams))

    count = _look_up(asked, grams, gram_counts)
    total = _look_up(asked >> np.uint64(8), contexts, context_counts)
    novel = _look_up(asked >> np.uint64(8), contexts, followers)
    known = total > 0
    return np.where(known, (count + novel * shorter) / np.where(known, total + novel, 1), shorter)


def _look_up(asked: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values of the sorted `keys` for each key asked, 0 where there is none."""
    place = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[place] == asked, values[place], 0)
