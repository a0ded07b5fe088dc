"""Megatron-Core as the engine of whole runs, on real gloo ranks: the losses are those of the native engine.

Megatron runs through `megatron_cpu_shim.py`, which patches its process for good: all runs are in ranks of their own.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from spawned import run_ranks

ROOT = Path(__file__).parents[2]


def train(rank: int, world: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """One rank of a run; what it measured."""
    from wastenot.launch.console import RunConsole
    from wastenot.launch.corpus import prepare
    from wastenot.launch.env import Rank
    from wastenot.launch.metrics import read_metrics
    from wastenot.launch.settings import parse_config
    from wastenot.launch.trainer import Trainer
    from wastenot.launch.watchdog import Watchdog
    from wastenot.moe.ledger import Ledger
    from wastenot.parallel.events import Recorders
    from wastenot.parallel.mesh import make_mesh

    config = parse_config(settings, "test")
    ledger, watchdog = Ledger(), Watchdog(Rank(rank=rank, world=world), None, 600.0)
    mesh = make_mesh(config.parallel, "cpu", Recorders(ledger, watchdog))
    trainer = Trainer(
        config,
        mesh,
        prepare(config.data, progress=False),
        console=RunConsole(speaks=False),
        ledger=ledger,
        watchdog=watchdog,
    )
    trainer.run()
    return list(read_metrics(Path(config.log.dir))) if rank == 0 else []
