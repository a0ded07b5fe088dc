"""Takes turns: each round runs every contender once, so that what disturbs one disturbs all."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

FEWEST_ROUNDS = 5


@dataclass(frozen=True)
class Timings:
    """Seconds of each contender, one number per round, rounds aligned."""

    seconds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        """Median seconds of one round of `name`."""
        return statistics.median(self.seconds[name])

    def ratios(self, name: str, base: str) -> list[float]:
        """Per round, how many times as fast as `base` the contender `name` was."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return [theirs / ours for ours, theirs in pairs]

    def ratio(self, name: str, base: str) -> float:
        """Median over the rounds of `ratios`: noise that lasts longer than a round cancels within it."""
        return statistics.median(self.ratios(name, base))

    def ratio_quartiles(self, name: str, base: str) -> list[float] | None:
        """First and third quartile of `ratios`; None for a single round."""
        ratios = self.ratios(name, base)
        if len(ratios) < 2:
            return None
        first, _, third = statistics.quantiles(ratios, n=4, method="inclusive")
        return [round(first, 4), round(third, 4)]

    def ratio_lower(self, name: str, base: str) -> float | None:
        """What the median of `ratios` exceeds with 95 % confidence (sign test); None for fewer than five rounds."""
        ratios = sorted(self.ratios(name, base))
        # So many rounds or fewer fall below the true median in 5 % of all runs at most.
        total, below = 0.0, -1
        while below + 1 < len(ratios) and total + math.comb(len(ratios), below + 1) / 2 ** len(ratios) <= 0.05:
            below += 1
            total += math.comb(len(ratios), below) / 2 ** len(ratios)
        return None if below < 0 else ratios[below]


def interleave(
    contenders: Mapping[str, Callable[[], float]],
    *,
    rounds: int,
    warmup: int,
    budget_s: float = math.inf,
    say: Callable[[str], None] = lambda text: None,
    seed: int = 0,
) -> Timings:
    """Runs `warmup + rounds` rounds and keeps all but the first `warmup`.

    On a slow machine it stops early: once the contenders have worked for `budget_s` seconds and at least
    FEWEST_ROUNDS rounds are kept.

    `contenders` maps a name to a function that does its work once and returns the seconds it took. Their
    order is drawn anew each round, so that nobody always runs in the cache (or the spinning threads) of the same
    other. Raises ValueError for rounds < 1 or warmup < 0.
    """
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds: {rounds} and warmup: {warmup} measure nothing; use 1 or more, 0 or more")
    draw = random.Random(seed)
    order = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    spent = 0.0
    for number in range(warmup + rounds):
        if spent > budget_s and number - warmup >= FEWEST_ROUNDS:
            say(f"stopped after {number - warmup} rounds: this machine is slow")
            break
        draw.shuffle(order)
        for name in order:
            took = contenders[name]()
            spent += took
            if number >= warmup:
                seconds[name].append(took)
        say(f"round {number + 1} of {warmup + rounds}" + (" (warm-up)" if number < warmup else ""))
    return Timings(seconds)
