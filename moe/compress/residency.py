"""How much memory this process holds while it works, as the operating system counts it."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def peak_of(work: Callable[[], object]) -> int:
    """Bytes that `work` adds to this process's resident memory at most.

    Where the kernel cannot forget an earlier peak (not Linux), what is above that one.
    """
    before = _high_water() if not _forget_peak() else _status("VmRSS")
    work()
    return max(0, _high_water() - before)


def _forget_peak() -> bool:
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _high_water() -> int:
    try:
        return _status("VmHWM")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
