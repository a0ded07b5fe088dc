"""What moments that start at zero lack in the first steps."""

from __future__ import annotations

from typing import Any


def bias(group: dict[str, Any], steps: int) -> tuple[float, float]:
    """c1 and c2: the parts of themselves that the moments are after so many steps; 1 where that is not corrected."""
    if not group["bias_correction"]:
        return 1.0, 1.0
    beta1, beta2 = group["betas"]
    return 1.0 if group["momentum"] == "none" else 1 - beta1**steps, 1 - beta2**steps
