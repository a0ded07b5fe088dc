"""Router logits of a small model that was really trained: the `replay` case of the `rectify-speed` benchmark."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch

from ...launch.config import DataConfig, LogConfig, LoopConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from ...launch.data import Samples, eval_windows
from ...launch.optimizer import make_optimizer
from ...launch.shards import TokenShards
from ...launch.step import Stepper
from ...moe.config import ModelConfig, MoEConfig, RouterConfig
from ...moe.decoder import build_decoder
from ...moe.skew import save_trace
from ...parallel.gradients import Gradients
from ...parallel.mesh import single
from .machine import use_the_machine

STEPS, BATCH, SEQ_LEN = 200, 8, 128


def configure(top_k: int, experts: int, layers: int, vocab_size: int) -> TrainConfig:
    """A dropless run, small enough to take seconds, at the default weight of the balance loss."""
    moe = MoEConfig(experts=experts, d_expert=128)
    return TrainConfig(
        model=ModelConfig(vocab_size=vocab_size, d_model=128, layers=layers, heads=4, moe=moe),
        router=RouterConfig(top_k=top_k),
        optimizer=OptimizerConfig(lr=2e-3),
        schedule=ScheduleConfig(kind="constant", warmup_steps=20),
        data=DataConfig(seq_len=SEQ_LEN),
        train=LoopConfig(steps=STEPS, batch=BATCH),
        log=LogConfig(dir="unused"),
    )


def recorded(config: TrainConfig, tokens: int, corpus: Path, folder: Path) -> Path:
    """File of the logits for `tokens` held-out tokens, after `config`'s training on `corpus`; made once."""
    recipe = json.dumps([asdict(config), tokens, corpus.name]).encode()
    path = folder / f"trace-{hashlib.blake2b(recipe, digest_size=6).hexdigest()}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        _record(config, tokens, corpus, unfinished)
        unfinished.replace(path)
    return path


def _record(config: TrainConfig, tokens: int, corpus: Path, path: Path) -> None:
    use_the_machine(threads=1)
    mesh = single()
    model = build_decoder(config.model, config.router, mesh, seed=config.train.seed)
    samples = Samples(TokenShards.open(corpus, "train"), config.data.seq_len, config.train.seed)
    optimizer = make_optimizer(model, config.optimizer)
    stepper = Stepper(config, mesh, model, optimizer, Gradients(model, mesh), samples)
    for step in range(config.train.steps):
        stepper.step(step, step * config.train.batch, stop=False)
    inputs, _ = eval_windows(TokenShards.open(corpus, "val"), config.data.seq_len)
    windows = torch.from_numpy(inputs[: -(-tokens // config.data.seq_len)])
    with torch.no_grad():
        save_trace(path, model(windows).routings, tokens)
