"""The learning rate of every step."""

from __future__ import annotations

import math

from .config import ScheduleConfig


def learning_rate(peak: float, schedule: ScheduleConfig, step: int, steps: int) -> float:
    """Learning rate of step `step` (from 0) of `steps`: linear warm-up, then what `schedule.kind` says."""
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    floor = peak * schedule.min_lr_ratio
    if schedule.kind == "constant":
        return peak
    if schedule.kind == "cosine":
        done = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    decay_steps = max(1, int(schedule.decay_ratio * steps))
    left = steps - step
    return peak if left > decay_steps else floor + (peak - floor) * left / decay_steps
