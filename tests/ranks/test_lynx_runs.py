"""`recompute.mode: lynx` in whole runs: plans, budgets, the account, resuming; and no loss that depends on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from real_runs import finish, log_dir, losses, start

from wastenot.launch.metrics import read_metrics

MIB = 2**20
RUN: dict[str, Any] = {
    "model": {"d_model": 64, "layers": 2, "heads": 2, "moe": {"experts": 4, "d_expert": 128}},
    "router": {"top_k": 2},
    "parallel": {"expert": 2, "piece_bytes": 0},
    "schedule": {"warmup_steps": 2},
    "data": {"tokenizer": "bytes", "seq_len": 128},
    "train": {"steps": 10, "batch": 16, "sample_tokens": 0, "eval_every": 0},
    "checkpoint": {"every": 0},
    "log": {"every": 1, "tensorboard": False},
}


def run(made, *arguments: str, expected: int = 0, **options: Any) -> tuple[Path, str]:
    """Its configuration, and what it printed."""
    config = made({**RUN, **options})
    return config, finish(start(config, *arguments), expected)


def planned(config: Path) -> list[dict[str, Any]]:
    """Lines of metrics that a plan was in force for."""
    return [line for line in read_metrics(log_dir(config)) if "planned_step_seconds" in line]
