"""Sizes with units: `8GiB`, `1.5M`, `25MiB`, `10k`."""

from __future__ import annotations

import re
from decimal import Decimal

DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
FACTORS = DECIMAL | BINARY

PATTERN = re.compile(r"([-+]?(?:\d[\d_]*(?:\.\d*)?|\.\d+)(?:e[-+]?\d{1,2})?)\s*([kmgt]?i?)b?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """The whole number that `text` means: k, M, G, T are powers of 1000; Ki, Mi, Gi, Ti of 1024.

    A final B says nothing; upper and lower case are the same. Raises ValueError where `text` is no number or
    no whole one.
    """
    match = PATTERN.fullmatch(text.strip())
    factor = FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not a whole number or a size such as 25MiB, 1.5M or 10k")
    number = Decimal(match[1].replace("_", "")) * factor
    if number != int(number):
        raise ValueError(
            f"{text!r} is {number.normalize():f}, not a whole number; use {int(number)} or {int(number) + 1}"
        )
    return int(number)
