"""The same training under every layout: EP x DP against one process, step by step."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from spawned import run_ranks

from wastenot.launch.config import DataConfig, LogConfig, LoopConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from wastenot.launch.layout_rules import world_rules
from wastenot.launch.optimizer import make_optimizer
from wastenot.launch.precision import weight_dtype
from wastenot.launch.step import Stepper
from wastenot.moe.config import EmulateConfig, ModelConfig, MoEConfig, RectifyConfig, RouterConfig
from wastenot.moe.decoder import build_decoder
from wastenot.parallel.config import ParallelConfig
from wastenot.parallel.gradients import Gradients
from wastenot.parallel.mesh import make_mesh, single
from wastenot.tools.random_tokens import RandomTokens

FULL = os.environ.get("WASTENOT_GRID") == "full"
LAYOUTS = [(2, 1), (1, 2), (2, 2), (4, 1)]
STEPS = 30 if FULL else 5


def config(router: RouterConfig, precision: str, **moe) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(
            vocab_size=61,
            d_model=32,
            layers=2,
            heads=4,
            kv_heads=2,
            qk_norm="head",
            init_std=0.1,
            moe=MoEConfig(experts=8, d_expert=24, shared_experts=1, **moe),
        ),
        router=router,
        optimizer=OptimizerConfig(lr=1e-3),
        schedule=ScheduleConfig(warmup_steps=2),
        data=DataConfig(seq_len=16),
        train=LoopConfig(steps=STEPS, batch=16, accumulate=2, precision=precision),  # pyright: ignore[reportArgumentType]
        log=LogConfig(debug=True),
    )


def train(rank: int, world: int, settings: TrainConfig, expert: int, piece_bytes: int = 0) -> list[tuple[float, float]]:
    """Losses and gradient norms of a few steps on this rank's part of the mesh."""
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]
    mesh = single() if world == 1 else make_mesh(ParallelConfig(expert=expert), "cpu")
    dtype = weight_dtype(settings.train.precision)
    model = build_decoder(settings.model, settings.router, mesh, dtype=dtype, piece_bytes=piece_bytes)
    windows = RandomTokens(settings.model.vocab_size, settings.data.seq_len)
    # Small buckets, so that several are in flight at once.
    gradients = Gradients(model, mesh, bucket_bytes=20_000)
    stepper = Stepper(settings, mesh, model, make_optimizer(model, settings.optimizer), gradients, windows)  # pyright: ignore[reportArgumentType]
    results = [stepper.step(i, i * settings.train.batch, stop=False) for i in range(settings.train.steps)]
    assert all(result.applied for result in results)
    return [(result.loss, result.grad_norm) for result in results]


DROPLESS = RouterConfig(top_k=2, balance_over="global", z_loss=1e-3)
CAPACITY = RouterConfig(top_k=2, capacity_factor=0.8, emulate=EmulateConfig(sources=4, owners=4), z_loss=1e-3)
RECTIFIED = replace(CAPACITY, rectify=RectifyConfig(intra=True, fill=True))
CASES = {
    "dropless": (DROPLESS, {}),
    "dropless with bias": (replace(DROPLESS, bias_update=0.01, score="sigmoid"), {}),
    "capacity": (CAPACITY, {}),
    "capacity, padded": (CAPACITY, {"dispatch": "padded"}),
    "top-1, capacity, padded": (replace(CAPACITY, top_k=1, capacity_factor=1.0), {"dispatch": "padded"}),
    "rectified": (RECTIFIED, {}),
    "rectified, padded, bounded": (
        replace(RECTIFIED, rectify=replace(RECTIFIED.rectify, capacity=0.5, select="all")),
        {"dispatch": "padded"},
    ),
    "top-1, rectified": (replace(RECTIFIED, top_k=1, emulate=EmulateConfig(sources=4, owners=2)), {}),
}


def layouts_of(settings: TrainConfig) -> list[tuple[int, int]]:
    """The layouts that may run it: in padded dispatch stand-ins cannot travel to emulated owners elsewhere."""

    def fits(expert: int, data: int) -> bool:
        there = replace(settings, parallel=ParallelConfig(expert=expert, data=expert * data))
        return not world_rules(there, expert * data)

    found = [(expert, data) for expert, data in LAYOUTS if fits(expert, data)]
    assert len(found) >= 3
    return found


@pytest.mark.parametrize("name", CASES)
def test_fp64_training_is_the_same_under_every_layout(name):
    router, moe = CASES[name]
    settings = config(router, "fp64", **moe)
    alone = train(0, 1, settings, 1)
    for expert, data in layouts_of(settings):
        for losses in run_ranks(expert * data, train, settings, expert):
            np.testing.assert_allclose(losses, alone, rtol=1e-9, atol=0, err_msg=f"EP={expert} DP={data}")


@pytest.mark.parametrize("name", ["dropless", "capacity", "capacity, padded", "rectified"])
def test_fp32_training_is_the_same_under_every_layout(name):
    router, moe = CASES[name]
    settings = config(router, "fp32", **moe)
    alone = np.array(train(0, 1, settings, 1))
    for expert, data in LAYOUTS:
        for losses in run_ranks(expert * data, train, settings, expert):
            there = np.array(losses)
            np.testing.assert_allclose(there[:, 0], alone[:, 0], rtol=1e-5, err_msg=f"loss, EP={expert} DP={data}")
            np.testing.assert_allclose(there[:, 1], alone[:, 1], rtol=1e-4, err_msg=f"norm, EP={expert} DP={data}")


def test_cutting_the_exchange_changes_no_bit():
    settings = config(DROPLESS, "fp32")
    whole = run_ranks(2, train, settings, 2, 0)
    cut = run_ranks(2, train, settings, 2, 512)
    assert whole == cut


def test_the_same_run_twice_is_equal_bit_for_bit():
    settings = config(CAPACITY, "fp32")
    assert run_ranks(4, train, settings, 2) == run_ranks(4, train, settings, 2)


def test_accumulation_equals_one_large_batch():
    settings = config(DROPLESS, "fp64")
    whole = replace(settings, train=replace(settings.train, accumulate=1), router=replace(DROPLESS, balance_loss=0.0))
    parts = replace(whole, train=replace(whole.train, accumulate=4))
    np.testing.assert_allclose(train(0, 1, parts, 1), train(0, 1, whole, 1), rtol=1e-12)


def test_bf16_trains_close_to_fp32():
    low = np.array(train(0, 1, config(DROPLESS, "bf16"), 1))
    high = np.array(train(0, 1, config(DROPLESS, "fp32"), 1))
    np.testing.assert_allclose(low[:, 0], high[:, 0], rtol=5e-3)
    assert not np.array_equal(low, high)


def expert_nobody_chooses(rank: int, world: int) -> float:
    """Skewed to a few experts of rank 0: the other rank's experts see no token, nothing hangs."""
    settings = config(RouterConfig(kind="skewed", skew=30.0, top_k=1, balance_loss=0.0), "fp32")
    return train(rank, world, settings, world)[-1][0]


def test_experts_without_tokens_never_hang():
    losses = run_ranks(4, expert_nobody_chooses)
    assert len(set(losses)) == 1
