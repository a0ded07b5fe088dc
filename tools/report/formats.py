"""Numbers as people read them; a dash where there is none."""

from __future__ import annotations

NONE = "–"
SPACE = "\u00a0"
"""Between a number and its unit, where no line breaks."""


def count(value: float | None) -> str:
    """12,345"""
    return NONE if value is None else f"{value:,.0f}"


def short(value: float | None) -> str:
    """12.3 M, and in full what is less than a million"""
    if value is None:
        return NONE
    for factor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(value) >= factor:
            return f"{value / factor:,.1f}{SPACE}{unit}"
    return count(value)


def decimals(value: float | None, places: int = 3) -> str:
    """1.234"""
    return NONE if value is None else f"{value:,.{places}f}"


def percent(part: float | None, places: int = 1) -> str:
    """12.3 %; a part that is not nothing never reads as nothing, one that is not all never as all."""
    if part is None:
        return NONE
    least = 10**-places
    if 0 < part * 100 < least / 2:
        return f"<{SPACE}{least:.{places}f}{SPACE}%"
    if 100 - least / 2 <= part * 100 < 100:
        return f">{SPACE}{100 - least:.{places}f}{SPACE}%"
    return f"{part * 100:.{places}f}{SPACE}%"


def size(num_bytes: float | None) -> str:
    """12.3 MiB"""
    if num_bytes is None:
        return NONE
    value, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:,.{0 if unit == 'B' else 1}f}{SPACE}{unit}"


def duration(seconds: float | None) -> str:
    """1 h 02 min, 3 min 04 s, 5.6 s"""
    if seconds is None:
        return NONE
    if seconds < 59.95:
        return f"{seconds:.1f}{SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{SPACE}min{SPACE}{rest:02d}{SPACE}s"
    return f"{minutes // 60}{SPACE}h{SPACE}{minutes % 60:02d}{SPACE}min"


def brief(seconds: float | None) -> str:
    """1.23 s, 45.6 ms, 789 µs: three digits of what is less than minutes"""
    if seconds is None:
        return NONE
    # Less is rounding.
    if seconds < 1e-12:
        return f"0{SPACE}s"
    factor, unit = next(((f, u) for f, u in ((1.0, "s"), (1e3, "ms")) if seconds * f >= 0.9995), (1e6, "µs"))
    value = seconds * factor
    return f"{value:,.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}{SPACE}{unit}"
