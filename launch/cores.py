"""How many cores this process may keep busy: affinity, hyperthreads and container quota considered."""

from __future__ import annotations

import os
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")


def physical_cores() -> frozenset[int]:
    """One number for each physical core this process may run on (its first hyperthread)."""
    if not hasattr(os, "sched_getaffinity"):
        return frozenset(range(os.cpu_count() or 1))
    return frozenset(_first_sibling(cpu) for cpu in os.sched_getaffinity(0))


def quota() -> float:
    """Cores' worth of time the container grants; infinite outside one. Reads cgroup v2, then v1."""
    for limit, period in (("cpu.max", None), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = (_CGROUP / limit).read_text().split()
            if period is not None:
                words += (_CGROUP / period).read_text().split()
        except OSError:
            continue
        if words[0] not in ("max", "-1"):
            return int(words[0]) / int(words[1])
    return float("inf")


def threads(mine: frozenset[int], sharing: int) -> int:
    """Threads for one of `sharing` ranks that run on the cores `mine`; at least 1."""
    return max(1, int(min(len(mine), quota()) // sharing))


def _first_sibling(cpu: int) -> int:
    try:
        siblings = (_TOPOLOGY / f"cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return cpu
    return int(siblings.replace("-", ",").split(",")[0])
