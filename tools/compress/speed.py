"""How fast models read and write text: side by side, in turns, so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ...moe.attention import KVCache
from ...moe.decoder import Decoder


@dataclass(frozen=True)
class Speed:
    """Medians over rounds."""

    prefill: float
    """Tokens/s of one prompt read at once."""
    decode: float
    """Tokens/s written one by one after it, keys and values cached."""


Contender = Callable[[], tuple[float, float]]
"""Does one round; returns seconds of the prompt, and of one written token (their median)."""


def compare(contenders: Mapping[str, Contender], prompt: int, rounds: int = 5) -> dict[str, Speed]:
    """The speed of each, measured in turns after one round to warm up; `prompt` tokens are read."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, contender in contenders.items():
            found = contender()
            if turn:
                seconds[name].append(found)
    return {
        name: Speed(
            prefill=prompt / statistics.median(reading for reading, _ in taken),
            decode=1 / statistics.median(writing for _, writing in taken),
        )
        for name, taken in seconds.items()
    }


def of_decoder(model: Decoder, prompt: int, written: int = 16) -> Contender:
    """A model of ours: one prompt of `prompt` tokens, then `written` more. What it writes does not matter."""
    tokens_1S = torch.arange(prompt).remainder(model.config.vocab_size).unsqueeze(0)

    @torch.no_grad()
    def work() -> tuple[float, float]:
        dtype = next(model.parameters()).dtype
        cache = KVCache.empty(
            model.config, torch.zeros(1, dtype=torch.int64), prompt + written, dtype, model.stages.held
        )
        start = time.perf_counter()
        hidden = model(tokens_1S, cache).hidden_BSD[:, -1:]
        token = model.logits(hidden).argmax(-1)
        reading = time.perf_counter() - start
        writing = []
        for _ in range(written):
            start = time.perf_counter()
            token = model.logits(model(token, cache).hidden_BSD).argmax(-1)
            writing.append(time.perf_counter() - start)
        return reading, statistics.median(writing)

    return work
