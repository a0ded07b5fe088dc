"""torch's profiler on the CPU, without the lines that it prints when it starts and stops."""

from __future__ import annotations

import os

from torch.profiler import ProfilerActivity, profile


def cpu_profile(*, memory: bool = False) -> profile:
    """A profiler to enter; with `memory` it also records allocations."""
    # Read when the profiler first starts.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    return profile(activities=[ProfilerActivity.CPU], profile_memory=memory)
