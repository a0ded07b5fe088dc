"""What a solver answers, and the error where nothing fits."""

from __future__ import annotations

from dataclasses import dataclass

from .problem import Assignment, Outcome


class InfeasibleError(ValueError):
    """No assignment that the solver may choose fits in the stage's budget."""

    def __init__(self, smallest: int, budget: int, *, is_exact: bool, note: str = "") -> None:
        """`smallest`: bytes of the smallest budget that fits; `is_exact`: whether there is provably no smaller one."""
        least = "the smallest that fits is" if is_exact else "it fits in"
        super().__init__(f"budget: {budget} bytes are too few; {least} {smallest} bytes{note and '; '}{note}")
        self.smallest = smallest
        self.is_exact = is_exact


@dataclass(frozen=True, kw_only=True)
class Solution:
    """One solver's assignment for one stage."""

    assignment: Assignment
    solver: str
    outcome: Outcome
    """By `evaluate`, in bytes and seconds per unit."""
    bound: float | None = None
    """Seconds of exposed recomputation that no assignment can be below; None: the solver proves nothing."""
    search_seconds: float
    """Wall-clock time of the search."""
    note: str = ""
    """What a reader should know, such as that a time limit ended the search."""

    @property
    def gap(self) -> float | None:
        """Part of the exposed seconds that may be too much: 0 is optimal. None where nothing is proven."""
        if self.bound is None:
            return None
        exposed = self.outcome.exposed
        return max(0.0, exposed - self.bound) / exposed if exposed > 0.0 else 0.0
