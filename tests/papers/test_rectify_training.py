"""Training with rectification stays finite and repeats itself bit for bit, whatever the setting."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import pytest

from wastenot.launch.config import (
    DataConfig,
    LogConfig,
    LoopConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from wastenot.launch.optimizer import make_optimizer
from wastenot.launch.step import Stepper, StepResult
from wastenot.moe.config import EmulateConfig, ModelConfig, MoEConfig, RectifyConfig, RouterConfig
from wastenot.moe.decoder import Decoder, build_decoder
from wastenot.moe.ledger import SLOTS
from wastenot.parallel.gradients import Gradients
from wastenot.parallel.mesh import single
from wastenot.tools.random_tokens import RandomTokens

FULL = os.environ.get("WASTENOT_GRID") == "full"
STEPS = 500 if FULL else 25
RANKS = EmulateConfig(sources=2, owners=2)
INTRA = RectifyConfig(intra=True)
FILL = RectifyConfig(fill=True)
BOTH = RectifyConfig(intra=True, fill=True)
TOP_1 = RouterConfig(top_k=1, capacity_factor=1.0, emulate=RANKS)
TOP_2 = RouterConfig(top_k=2, capacity_factor=0.5, emulate=RANKS)
GRID = {
    "top-1, stand-ins": (replace(TOP_1, rectify=INTRA), "ragged"),
    "top-1, filled": (replace(TOP_1, rectify=FILL), "padded"),
    "top-1, both": (replace(TOP_1, rectify=BOTH), "ragged"),
    "top-1, no slot": (replace(TOP_1, rectify=INTRA, capacity_factor=0.0), "padded"),
    "top-2, stand-ins": (replace(TOP_2, rectify=INTRA), "ragged"),
    "top-2, both": (replace(TOP_2, rectify=BOTH, z_loss=1e-3), "ragged"),
    "top-2, both, bounded": (replace(TOP_2, rectify=replace(BOTH, capacity=0.25)), "padded"),
    "only tokens that lost all": (replace(TOP_2, rectify=replace(BOTH, select="all"), priority="position"), "ragged"),
    "two fill ranks, groups": (
        replace(TOP_2, rectify=replace(BOTH, fill_ranks=2), capacity_factor=1.0, groups=2, top_groups=2),
        "padded",
    ),
    "sigmoid, bias": (replace(TOP_2, rectify=BOTH, score="sigmoid", bias_update=0.01, scale=2.5), "ragged"),
    "gradient of the denominator": (replace(TOP_2, rectify=BOTH, detach=False, balance_over="sequence"), "ragged"),
    "plain weights, jitter": (replace(TOP_2, rectify=BOTH, normalize="none", jitter=0.1, emulate=None), "ragged"),
}


def train(router: RouterConfig, dispatch: str) -> tuple[list[StepResult], Decoder]:
    config = TrainConfig(
        model=ModelConfig(
            vocab_size=31,
            d_model=16,
            layers=1,
            heads=2,
            init_std=0.1,
            moe=MoEConfig(experts=4, d_expert=8, dispatch=dispatch),  # pyright: ignore[reportArgumentType]
        ),
        router=router,
        optimizer=OptimizerConfig(lr=1e-2),
        schedule=ScheduleConfig(warmup_steps=2),
        data=DataConfig(seq_len=8),
        train=LoopConfig(steps=STEPS, batch=4),
        log=LogConfig(debug=True),
    )
    model = build_decoder(config.model, router, single())
    optimizer = make_optimizer(model, config.optimizer)
    stepper = Stepper(config, single(), model, optimizer, Gradients(model, single(), 2**20), RandomTokens(31, 8))  # pyright: ignore[reportArgumentType]
    return [stepper.step(step, 4 * step, stop=False) for step in range(STEPS)], model


@pytest.mark.parametrize("name", GRID)
def test_training_is_finite_and_repeats_bit_for_bit(name):
    """Every step also checks the identities of its routings (log.debug)."""
    router, dispatch = GRID[name]
    results, model = train(router, dispatch)
    again, twin = train(router, dispatch)
    assert all(result.applied for result in results)
    assert all(math.isfinite(result.loss) and math.isfinite(result.grad_norm) for result in results)
    assert [(r.loss, r.grad_norm) for r in results] == [(r.loss, r.grad_norm) for r in again]
    assert all(here.counts.equal(there.counts) for here, there in zip(results, again, strict=True))
    assert all(weight.isfinite().all() for weight in model.parameters())
    assert all(here.equal(there) for here, there in zip(model.parameters(), twin.parameters(), strict=True))
    counts = dict(zip(SLOTS, sum(result.counts for result in results)[0, -len(SLOTS) :].tolist(), strict=True))
    assert counts["rectified"] > 0 or not router.rectify.intra, "nothing was rectified"
    assert counts["filled"] > 0 or not router.rectify.fill, "nothing was filled"
