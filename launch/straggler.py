"""Which rank keeps the others waiting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CLEARLY = 0.15
"""Of the time: the least that the others wait longer before a rank is called slow."""
LEAST_STEPS, LEAST_SECONDS = 10, 5.0
"""Over which that must be so: single steps differ for many reasons."""


@dataclass(frozen=True)
class Straggler:
    """A rank that the others wait for."""

    rank: int
    part: float
    """Of the time: what every other rank waits longer than it."""

    def describe(self) -> str:
        return (
            f"rank {self.rank} keeps the others waiting for {100 * self.part:.0f} % of the time: its device is slow or "
            "shared, or its experts are chosen more often (`wastenot report` shows both)"
        )


def straggler(waited_s: Sequence[float], seconds: float, steps: int) -> Straggler | None:
    """The rank that waits clearly less in collectives than all others, by `waited_s` of each over `steps` steps.

    In lockstep all ranks take equally long; who comes last waits least. Two slow ranks hide each other from this.
    """
    if len(waited_s) < 2 or steps < LEAST_STEPS or seconds < LEAST_SECONDS:
        return None
    least, next_least = sorted(waited_s)[:2]
    part = (next_least - least) / seconds
    return Straggler(list(waited_s).index(least), part) if part >= CLEARLY else None
