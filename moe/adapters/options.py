"""Numbers of another project's configuration, whose options have several names and may be missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def read_number(options: Mapping[str, Any], problems: list[str], names: tuple[str, ...], default: Any = None) -> Any:
    """The first of `names` that says a number; 1, and a problem, where one is none, or none is there and no default."""
    for name in names:
        value = options.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
        if value is not None:
            problems.append(f"{name}: {value!r} is not a number")
            return 1
    if default is None:
        problems.append(f"{names[0]}: missing")
        return 1
    return default
