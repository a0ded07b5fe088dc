"""Training on the ranks there are against training in one process: the second half of `wastenot doctor --selftest`.

A tiny model takes a few fp64 steps under each kind of parallelism that the ranks allow, and every rank takes the same
steps alone. The numbers must agree to rounding, whatever the links, devices and libraries between the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..launch.config import DataConfig, LoopConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from ..launch.engines.decoder import stages_of
from ..launch.optimizer import make_optimizer
from ..launch.precision import weight_dtype
from ..launch.step import make_stepper
from ..moe.config import ModelConfig, MoEConfig, RouterConfig
from ..moe.decoder import build_decoder
from ..parallel.config import ParallelConfig
from ..parallel.events import Recorder
from ..parallel.gradients import Gradients
from ..parallel.mesh import Mesh, make_mesh, single
from .random_tokens import RandomTokens

STEPS = 2
BOUND = 1e-9
"""Largest relative difference of a loss or gradient norm."""

_WIDEST = 8
"""Most ranks that one axis spans: the others are data-parallel."""


def layouts(world: int) -> Iterator[ParallelConfig]:
    """Each axis alone, and experts folded over others where the ranks are even in number."""
    degree = max(n for n in range(1, min(world, _WIDEST) + 1) if world % n == 0)
    if degree == 1:
        yield ParallelConfig()
        return
    yield ParallelConfig(expert=degree)
    yield ParallelConfig(shard=degree)
    yield ParallelConfig(tensor=degree)
    yield ParallelConfig(pipeline=degree)
    if world % 4 == 0:
        yield ParallelConfig(tensor=2, expert=4)
        yield ParallelConfig(pipeline=2, shard=2, expert=2)


def name_of(layout: ParallelConfig) -> str:
    """Say `training, tensor 2, expert 4`."""
    axes = ("pipeline", "shard", "tensor", "expert")
    return ", ".join(["training", *(f"{axis} {n}" for axis in axes if (n := getattr(layout, axis)) > 1)])


def largest_difference(layout: ParallelConfig, world: int, device: torch.device, recorder: Recorder) -> float:
    """Of losses and gradient norms, relative to those of one process; NaN where one of them is no number."""
    config = _config(layout, world)
    together = _train(config, make_mesh(layout, device, recorder))
    alone = _train(replace(config, parallel=ParallelConfig()), single(device))
    return float(np.max(np.abs(together - alone) / np.abs(alone)))


def _config(layout: ParallelConfig, world: int) -> TrainConfig:
    """A model of sizes that `layout` divides, on as few sequences as every rank can share."""
    degree = math.lcm(layout.pipeline, layout.shard, layout.tensor, layout.expert)
    return TrainConfig(
        model=ModelConfig(
            vocab_size=64,
            d_model=8 * degree,
            layers=max(2, layout.pipeline),
            heads=degree,
            moe=MoEConfig(experts=2 * degree, d_expert=4 * degree, shared_experts=1),
        ),
        router=RouterConfig(balance_over="global"),
        parallel=layout,
        optimizer=OptimizerConfig(lr=1e-3),
        schedule=ScheduleConfig(warmup_steps=1),
        data=DataConfig(seq_len=2 * degree),
        train=LoopConfig(
            steps=STEPS, batch=world * degree, accumulate=degree, precision="fp64", eval_batch=world * degree
        ),
        kernels="reference",
    )


def _train(config: TrainConfig, mesh: Mesh) -> np.ndarray:
    """Losses and gradient norms [steps, 2]."""
    model = build_decoder(
        config.model,
        config.router,
        mesh,
        dtype=weight_dtype(config.train.precision),
        backend=config.kernels,
        stages=stages_of(config, mesh),
    )
    optimizer, gradients = make_optimizer(model, config.optimizer), Gradients(model, mesh, 20_000)
    samples: Any = RandomTokens(config.model.vocab_size, config.data.seq_len)
    stepper = make_stepper(config, mesh, model, optimizer, gradients, samples)
    results = [stepper.step(step, step * config.train.batch, stop=False) for step in range(STEPS)]
    return np.array([(result.loss, result.grad_norm) for result in results])
