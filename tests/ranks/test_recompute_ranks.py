"""Recomputation changes no bit of training, under any layout, and lets go of memory as it says."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from spawned import run_ranks
from test_parallel_parity import CASES, RandomWindows, config

from wastenot.launch.config import TrainConfig
from wastenot.launch.optimizer import make_optimizer
from wastenot.launch.precision import weight_dtype
from wastenot.launch.step import make_stepper
from wastenot.launch.trainer import stages_of
from wastenot.moe.config import RouterConfig
from wastenot.moe.decoder import build_decoder
from wastenot.parallel.config import ParallelConfig, RecomputeConfig
from wastenot.parallel.gradients import Gradients
from wastenot.parallel.mesh import make_mesh, single

MODES = ("none", "selective", "full")
NOISY = {**CASES, "noisy": (replace(CASES["rectified"][0], emulate=None, jitter=0.3, bias_update=0.01), {}), "noisy padded": (replace(CASES["rectified"][0], emulate=None, jitter=0.3), {"dispatch": "padded"}), "dense first": (replace(CASES["dropless"][0], jitter=0.1), {"first_dense": 1})}


@dataclass
class Heard:
    """Every collective that this rank entered, in order."""

    entered: list[tuple[str, int]] = field(default_factory=list)

    def collective_entered(self, name: str, num_bytes: int) -> None:
        self.entered.append((name, num_bytes))

    def collective_left(self, name: str, waited: Any) -> None:
        pass


def settings_of(case: str, layout: ParallelConfig, precision: str = "fp64", **model: Any) -> TrainConfig:
    router, moe = NOISY[case]
    settings = config(router, precision, **moe)
    accumulate = 2 if layout.pipeline == 1 else 4
    return replace(
        settings,
        model=replace(settings.model, **{"qk_norm": "full", "layers": layout.num_stages if layout.pipeline > 1 else 2, **model}),
        parallel=layout,
        train=replace(settings.train, steps=3, accumulate=accumulate),
    )


def train(settings: TrainConfig, mode: str) -> tuple[dict[str, Any], Heard]:
    """All that a few steps come to on this rank."""
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]
    heard = Heard()
    layout, recompute = settings.parallel, RecomputeConfig(mode=mode)  # pyright: ignore[reportArgumentType]
    mesh = make_mesh(layout, "cpu", heard) if layout.world() > 1 else single(recorder=heard)
    model = build_decoder(
        settings.model,
        settings.router,
        mesh,
        dtype=weight_dtype(settings.train.precision),
        stages=stages_of(settings, mesh),
        recompute=recompute,
    )
    windows = RandomWindows(settings.model.vocab_size, settings.data.seq_len)
    gradients = Gradients(model, mesh, bucket_bytes=20_000)
    optimizer = make_optimizer(model, settings.optimizer)
    stepper = make_stepper(settings, mesh, model, optimizer, gradients, windows)  # pyright: ignore[reportArgumentType]
    found: dict[str, Any] = {}
    for step in range(settings.train.steps):
        result = stepper.step(step, step * settings.train.batch, stop=False)
        assert result.applied
        found[f"step {step}"] = torch.tensor([result.loss, result.grad_norm, *result.auxiliary.values()])
        found[f"counts {step}"] = result.counts
        found[f"own counts {step}"] = result.local_counts
    for name, tensor in model.state_dict(keep_vars=True).items():
        found[name] = local(tensor.detach())
        if tensor.grad is not None:
            found[f"{name}, gradient"] = local(tensor.grad)
    return {name: tensor.clone() for name, tensor in found.items()}, heard


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def compare(rank: int, world: int, of_each: dict[str, TrainConfig]) -> dict[str, dict[str, list]]:
    """What each mode makes travel; their numbers are the same bits."""
    travels = {}
    for name, settings in of_each.items():
        found, heard = zip(*(train(settings, mode) for mode in MODES), strict=True)
        plain, *others = found
        assert any(key.endswith("gradient") for key in plain)
        for mode, other in zip(MODES[1:], others, strict=True):
            assert other.keys() == plain.keys()
            for key, tensor in plain.items():
                assert other[key].equal(tensor), (name, mode, key)
        travels[name] = {mode: each.entered for mode, each in zip(MODES, heard, strict=True)}
    return travels
