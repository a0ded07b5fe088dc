"""Runs that DeepSpeed trains: the numbers of the native engine, its own checkpoints, and what they become."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from real_runs import finish, log_dir, losses, start, summary
from spawned import run_ranks

from wastenot.launch.config import TrainConfig
from wastenot.launch.console import RunConsole
from wastenot.launch.corpus import prepare
from wastenot.launch.engines import deepspeed_checkpoints as checkpoints
from wastenot.launch.env import Rank
from wastenot.launch.run_folder import RunFolder
from wastenot.launch.saved_run import open_run
from wastenot.launch.settings import load_config
from wastenot.launch.trainer import Trainer
from wastenot.launch.watchdog import Watchdog
from wastenot.moe.ledger import Ledger
from wastenot.parallel.events import Recorders
from wastenot.parallel.mesh import make_mesh
from wastenot.tools.cli import main

pytest.importorskip("deepspeed")

SHARED, COPIED = {"expert": 2, "piece_bytes": 0}, {"expert": 1, "data": 2, "piece_bytes": 0}


def train_all(rank: int, world: int, runs: list[Path]) -> None:
    """Runs as `wastenot train` makes them, one after the other on ranks that are there."""
    # DeepSpeed's own imports and calls; runs from the command line print none of them.
    warnings.simplefilter("ignore")
    for path in runs:
        config = load_config(path)
        ledger, watchdog = Ledger(), Watchdog(Rank(rank=rank, world=world, local_rank=rank, local_world=world), None, 60.0)
        mesh = make_mesh(config.parallel, "cpu", Recorders(ledger, watchdog))
        console = RunConsole(speaks=False)
        trainer = Trainer(config, mesh, prepare(config.data), console=console, ledger=ledger, watchdog=watchdog)
        trainer.run()


@pytest.fixture(scope="module")
def run(made):
    """Writes the configuration of a short run: run(engine, zero, **changes) -> path of the YAML file."""

    def write(engine: str = "native", zero: int = 0, **changes: object) -> Path:
        given = {name: changes.pop(name, {}) for name in ("train", "checkpoint")}
        train = {"steps": 8, "eval_every": 0, "sample_tokens": 2, **given["train"]}
        path = made(train=train, checkpoint={"every": 0, **given["checkpoint"]}, deepspeed={"zero": zero}, **changes)
        settings = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump({**settings, "engine": engine}))
        return path

    return write


COPIED = {"expert": 1, "data": 2}


def test_x(run):
    import time
    bf = {"precision": "bf16", "accumulate": 2}
    configs = [run(), *(run("deepspeed", z) for z in (0, 1,2)), run(parallel=COPIED), run("deepspeed", 3, parallel=COPIED),
       run(train=bf), run("deepspeed", 0, train=bf),run("deepspeed", 1, train=bf),run("deepspeed", 2, train=bf), run(parallel=COPIED, train=bf, model={"tie_embeddings": True}), run("deepspeed", 3, parallel=COPIED, train=bf, model={"tie_embeddings": True})]
    t=time.time()
    run_ranks(2, train_all, configs, timeout=300)
    print(time.time()-t)
    for a, b in ((0,1),(0,2),(0,3),(4,5),(6,7),(6,8),(6,9),(10,11)):
        x, y = losses(configs[a]), losses(configs[b])
        print(a,b,len(x),len(y), max(abs(p-q)/q for s in x for p,q in zip(y[s],x[s])), summary(configs[a])["val_loss"]-summary(configs[b])["val_loss"])
