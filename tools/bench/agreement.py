"""Whether a contender computes what the reference computes: the first batch's loss and gradient norm."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...launch.errors import UserError
from .cases import Case
from .peers.roster import ENTRIES, REFERENCE, LeftOut, start

FirstStep = tuple[float, float]
"""Loss and gradient norm of the first batch."""

TOLERANCES: dict[str, FirstStep] = {"fp32": (1e-4, 1e-3), "bf16": (1e-3, 2e-2)}
"""Largest relative differences from the reference in fp32; in bf16 a token near a tie may choose other experts."""
DISAGREES = "not timed: it computes something else than the reference"


@dataclass(frozen=True)
class Difference:
    """How far, relatively, a contender's first step is from the reference's."""

    loss: float
    norm: float
    agrees: bool


def expected_of(case: Case, bench: str) -> FirstStep:
    """What the reference computes of `case` in fp32. Raises UserError, for benchmark `bench`, where it cannot run."""
    entry = next(entry for entry in ENTRIES if entry.name == REFERENCE)
    try:
        return start(entry, replace(case, dtype="fp32")).probe()
    except LeftOut as reason:
        raise UserError(f"bench {bench}: {entry.name} is the reference, and it cannot run: {reason}") from None


def compare(found: FirstStep, expected: FirstStep, dtype: str) -> Difference:
    """Of `found`, computed in `dtype`."""
    loss, norm = (abs(ours - theirs) / theirs for ours, theirs in zip(found, expected, strict=True))
    most_loss, most_norm = TOLERANCES[dtype]
    # Written so that a NaN disagrees.
    return Difference(loss, norm, loss <= most_loss and norm <= most_norm)
