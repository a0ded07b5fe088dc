"""The contenders of the benchmarks of rectification, and what makes their figures mean something."""

from __future__ import annotations

from typing import Literal

from ...moe.config import RectifyConfig

Method = Literal["vanilla", "IR", "FR", "both", "dropless"]
METHODS: tuple[Method, ...] = ("vanilla", "IR", "FR", "both", "dropless")

LOSS_TOLERANCE, NORM_TOLERANCE = 1e-5, 1e-4
"""Largest relative differences between two ways to compute the same first step."""


class DisagreementError(RuntimeError):
    """A method does not do what it must: its figures would mean nothing."""


def rectify_of(method: Method) -> RectifyConfig:
    """What `method` rectifies."""
    return RectifyConfig(intra=method in ("IR", "both"), fill=method in ("FR", "both"))


def check_first_step(what: str, found: tuple[float, float], expected: tuple[float, float]) -> None:
    """Raises DisagreementError unless (loss, gradient norm) are those `expected`."""
    names, bounds = ("loss", "gradient norm"), (LOSS_TOLERANCE, NORM_TOLERANCE)
    for name, here, there, bound in zip(names, found, expected, bounds, strict=True):
        # Written so that a NaN disagrees.
        if not abs(here - there) <= bound * abs(there):
            raise DisagreementError(f"{what}: {name} is {here!r}, and {there!r} where it is computed otherwise")
