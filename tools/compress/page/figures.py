"""Numbers of a compression as people read them, beside those of `tools/report/formats.py`."""

from __future__ import annotations

from ...report.formats import NONE


def divergence(kl: float | None) -> str:
    """0.0123, and what is less than a thousandth in two digits: 2.3e-06"""
    if kl is None:
        return NONE
    return f"{kl:.4f}" if kl == 0 or abs(kl) >= 1e-3 else f"{kl:.1e}"


def times(ratio: float | None) -> str:
    """1.23 ×"""
    return NONE if ratio is None else f"{ratio:.2f} ×"
