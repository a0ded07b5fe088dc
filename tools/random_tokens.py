"""Samples without a corpus, for self-tests and benchmarks: what is drawn depends on its number alone."""

from __future__ import annotations

import numpy as np


class RandomTokens:
    """Evenly drawn tokens, by which a fresh router's load is even; stands where `launch.data.Samples` would."""

    def __init__(self, vocab_size: int, seq_len: int) -> None:
        self.vocab_size, self.seq_len = vocab_size, seq_len

    def take(self, first: int, count: int) -> np.ndarray:
        """Samples [first, first + count) as int64 [count, seq_len + 1]; number i is drawn from seed i."""
        size = self.seq_len + 1
        draws = (np.random.default_rng(i).integers(self.vocab_size, size=size) for i in range(first, first + count))
        return np.stack(list(draws))
