"""Which tokens a step trains on and an evaluation sees: pure functions of a seed and a position. Torch-free.

`Samples` is an endless sequence of training windows; a run's place in it is one integer, so a resumed run and a run
on another number of ranks read the same data in the same order. `eval_windows` covers a split exactly once.
"""

from __future__ import annotations

import numpy as np

from .errors import UserError
from .shards import TokenShards

__all__ = ["IGNORED", "Samples", "TokenShards", "eval_windows"]

IGNORED = -100
"""Target that no loss counts; torch's cross_entropy skips it by default."""

# Rounds of the Feistel network; four make a pseudo-random permutation (Luby and Rackoff), the rest is margin for
# the tiny blocks that small corpora give.
ROUNDS = 6


class Samples:
    """Windows of `seq_len` + 1 tokens, shuffled anew in every epoch.

    The stream is read as a ring. Epoch e starts cutting at its own offset and has floor(num_tokens / seq_len) windows;
    neighbours share one token, the last target of the one being the first input of the other. Sample number i is
    window p_e(i mod n) of epoch e = i div n, with p_e a keyed permutation that is computed, not stored: any sample
    costs the same, and the order does not depend on a library's random generator.
    """

    def __init__(self, shards: TokenShards, seq_len: int, seed: int) -> None:
        """Raises UserError where the split is shorter than one window."""
        if shards.num_tokens < seq_len + 1:
            raise UserError(
                f"{shards.folder}: the {shards.split} split has {shards.num_tokens} tokens, fewer than one window of "
                f"data.seq_len + 1 = {seq_len + 1}; use seq_len: {max(2, shards.num_tokens - 1)} or less, or more text"
            )
        self.shards = shards
        self.seq_len = seq_len
        self.seed = seed
        self.windows_per_epoch = shards.num_tokens // seq_len

    def take(self, first: int, count: int) -> np.ndarray:
        """Samples [first, first + count) as int64 [count, seq_len + 1]; epochs follow each other without end."""
        starts = self.starts(np.arange(first, first + count, dtype=np.uint64))
        windows = [self.shards.read(int(start), self.seq_len + 1) for start in starts]
        return np.stack(windows) if windows else np.empty((0, self.seq_len + 1), np.int64)

    def starts(self, samples: np.ndarray) -> np.ndarray:
        """Position of the first token of each sample: uint64 [n] to uint64 [n]."""
        epoch, within = np.divmod(samples, np.uint64(self.windows_per_epoch))
        key = _mix(_mix(np.uint64(self.seed)) ^ epoch)
        offset = _mix(key) % np.uint64(self.shards.num_tokens)
        window = _permute(within, self.windows_per_epoch, key)
        return (offset + window * np.uint64(self.seq_len)) % np.uint64(self.shards.num_tokens)


def eval_windows(shards: TokenShards, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """The whole split cut into windows: inputs and targets, both int64 [n, seq_len].

    Every token is a target exactly once, the first one after an end token. Targets that are end tokens, and the
    padding of the last window, are IGNORED: summed over all targets, loss / ln 2 / num_text_bytes is bits per byte.
    """
    tokens = shards.read(0, shards.num_tokens)
    num_windows = -(-len(tokens) // seq_len)
    padded = np.full(num_windows * seq_len, shards.end_token, np.int64)
    padded[: len(tokens)] = tokens
    inputs = np.concatenate([[shards.end_token], padded[:-1]])
    targets = np.where(padded == shards.end_token, IGNORED, padded)
    return inputs.reshape(num_windows, seq_len), targets.reshape(num_windows, seq_len)


def _mix(value: np.ndarray | np.uint64) -> np.ndarray:
    """The splitmix64 finalizer: a fixed bijection of 64-bit words whose output bits each depend on all input bits."""
    word = np.atleast_1d(np.asarray(value, np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def _permute(values: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Images of `values` [n], all below `size`, under the permutations of 0..size-1 that `key` [n] selects.

    A balanced Feistel network permutes the next power of four; values that leave the range walk its cycle until they
    are back, which keeps it a permutation.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    round_keys = [_mix(key ^ np.uint64(number + 1)) for number in range(ROUNDS)]

    def shuffle(words: np.ndarray, which: np.ndarray) -> np.ndarray:
        left, right = words >> half, words & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key[which]) & mask)
        return (left << half) | right

    images = values.copy()
    outside = np.arange(len(values))
    while len(outside):
        images[outside] = shuffle(images[outside], outside)
        outside = outside[images[outside] >= size]
    return images
