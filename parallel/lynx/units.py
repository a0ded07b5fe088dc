"""Quantities with units: `80GiB`, `450GB/s`, `989.4TFLOP/s`, `3us`. A number alone is refused where a unit matters."""

from __future__ import annotations

import re
from typing import Literal

Unit = Literal["B", "B/s", "FLOP/s", "s"]

_PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}

_FACTORS: dict[Unit, dict[str, float]] = {
    "B": {f"{prefix}B": factor for prefix, factor in (_PREFIXES | _BINARY).items()},
    "B/s": {f"{prefix}B/s": factor for prefix, factor in (_PREFIXES | _BINARY).items()},
    "FLOP/s": {f"{prefix}FLOP/s": factor for prefix, factor in _PREFIXES.items()},
    "s": _SECONDS,
}
_EXAMPLE: dict[Unit, str] = {"B": "GiB", "B/s": "GB/s", "FLOP/s": "TFLOP/s", "s": "us"}
_PATTERN = re.compile(r"([-+]?(?:\d[\d_]*(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)\s*(.*)")


def parse_quantity(value: object, unit: Unit, where: str) -> float:
    """What `value` is in `unit`s.

    Raises ValueError naming `where` for a missing or foreign unit, for what is no number, and for what is not positive.
    """
    match = _PATTERN.fullmatch(str(value).strip())
    if match is None or isinstance(value, bool):
        raise ValueError(f"{where}: {value!r} is no quantity; write for example 80{_EXAMPLE[unit]}")
    factors, given = _FACTORS[unit], match[2].strip()
    number = float(match[1].replace("_", ""))
    if not given:
        raise ValueError(f"{where}: {value} has no unit; write for example {value}{_EXAMPLE[unit]}")
    # Capitals count for bytes alone: nobody writes millibytes, but ms and Ms differ.
    folded = factors if unit == "s" else {name.lower(): factor for name, factor in factors.items()}
    key = given if unit == "s" else given.lower()
    if key not in folded:
        raise ValueError(
            f"{where}: {value!r} is not in {unit}; use one of {', '.join(factors)}, for example "
            f"{match[1]}{_EXAMPLE[unit]}"
        )
    if number <= 0:
        raise ValueError(f"{where}: {value} is not positive; write for example 1{_EXAMPLE[unit]}")
    return number * folded[key]


def show_bytes(number: float) -> str:
    """In the largest binary unit that leaves at least 1, with three digits: `79.2 GiB`."""
    size, names = float(number), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while abs(size) >= 1024 and len(names) > 1:
        size /= 1024
        names.pop(0)
    return f"{size:.3g} {names[0]}" if abs(size) < 100 else f"{size:.0f} {names[0]}"


def show_quantity(number: float, unit: Unit) -> str:
    """`number` as `parse_quantity` reads it, exact to the last digit of a float."""
    if unit == "s":
        return f"{number * 1e6!r}us" if parse_quantity(f"{number * 1e6!r}us", "s", "") == number else f"{number!r}s"
    return f"{int(number)}{unit}" if number == int(number) else f"{number!r}{unit}"
