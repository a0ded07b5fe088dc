"""Cells of the quality benchmarks: one run each, in a process of its own, kept once it is finished."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...launch.config import TrainConfig
from ...launch.data import Samples
from ...launch.memory import keep_freed_memory
from ...launch.optimizer import make_optimizer
from ...launch.shards import TokenShards
from ...launch.step import Stepper
from ...moe.decoder import Decoder
from ...parallel.gradients import Gradients
from ...parallel.mesh import single


def kept(path: Path, recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was kept at `path`, if it was made by `recipe`; otherwise it is to be made again."""
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    return result if result.get("recipe") == recipe else None


def use_one_thread() -> None:
    """Sets up this process for one run whose bits repeat."""
    torch.set_num_threads(1)
    keep_freed_memory()
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def make_stepper(model: Decoder, config: TrainConfig, corpus: Path) -> Stepper:
    """Steps of `model` on the training part of `corpus`, as the trainer takes them on one rank."""
    samples = Samples(TokenShards.open(corpus, "train"), config.data.seq_len, config.train.seed)
    optimizer = make_optimizer(model, config.optimizer)
    return Stepper(config, single(), model, optimizer, Gradients(model, single(), 2**25), samples)
