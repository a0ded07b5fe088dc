"""The legal value nearest to one that is not: what error messages of the planner end with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggestion(found: str, known: Iterable[str]) -> str:
    """`did you mean X?` where something known looks like `found` or begins with it, else all that is known."""
    names = sorted(known)
    folded = {name.lower(): name for name in names}
    close = difflib.get_close_matches(found.lower(), folded, n=1, cutoff=0.6)
    close = close or [name for name in folded if found and name.startswith(found.lower())]
    return f"did you mean {folded[close[0]]}?" if close else f"known: {', '.join(names)}"


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` (at least 1) nearest to `wanted`; the smaller one of two."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(d - wanted), d))


def nearest_multiple(number: int, step: int) -> int:
    """The positive multiple of `step` nearest to `number`."""
    return max(1, round(number / step)) * step


def refuse_other_than(value: str, known: Iterable[str], where: str) -> None:
    """Raises ValueError where `value` is none of `known`."""
    names = list(known)
    if value not in names:
        raise ValueError(f"{where}: {value!r} is not known; {suggestion(str(value), names)}")


def refuse_unknown_keys(found: Iterable[object], known: Iterable[str], where: str) -> None:
    """Raises ValueError at the first key in `found` that is none of `known`."""
    names = list(known)
    for key in found:
        if key not in names:
            raise ValueError(f"{where}: unknown key {key!r}; {suggestion(str(key), names)}")
