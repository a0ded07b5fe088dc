"""Models whose layers differ train the same under every layout, go on bit for bit, and run as users start them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from real_runs import finish, log_dir, losses, start, summary
from spawned import run_ranks
from test_parallel_parity import CASES, config
from test_pipeline_ranks import go_on, stepper_of
from test_recompute_ranks import compare

from wastenot.launch.config import TrainConfig
from wastenot.launch.layout_rules import LAYOUT_RULES
from wastenot.launch.metrics import read_metrics
from wastenot.moe.config import EmulateConfig, MoEConfig, RouterConfig
from wastenot.moe.ledger import SLOTS
from wastenot.parallel.config import ParallelConfig
from wastenot.parallel.mesh import make_mesh
from wastenot.tools.cli import main

COUNTS, DENSE = (8, 0, 0, 4, 6, 0), (1,)
"""Experts of each layer; the second is dense, the third and the last only attend."""
ALONE = ParallelConfig()
LAYOUTS = {
    "EP2": ParallelConfig(expert=2),
    "DP2": ParallelConfig(data=2),
    "TP2": ParallelConfig(tensor=2),
    "PP2": ParallelConfig(pipeline=2),
    "FSDP2": ParallelConfig(shard=2),
    "FSDP2 x EP2": ParallelConfig(shard=2, expert=2),
    "PP2 x EP2": ParallelConfig(pipeline=2, expert=2),
    "TP2 x FSDP2 x EP2": ParallelConfig(tensor=2, shard=2, expert=2),
    "interleaved": ParallelConfig(pipeline=2, schedule="interleaved"),
}
ROUTERS = {
    "dropless": CASES["dropless with bias"][0],
    "rectified": replace(CASES["rectified"][0], top_k=1, emulate=EmulateConfig(sources=2, owners=2)),
}


def settings_of(router: str, layout: ParallelConfig, precision: str = "fp64", **moe: Any) -> TrainConfig:
    """Three steps of four micro-batches, clipped, identities checked."""
    settings = config(ROUTERS[router], precision)
    shape = {"experts": 8, "d_expert": 24, "shared_experts": 1, "per_layer": COUNTS, "dense": DENSE}
    found = replace(
        settings,
        model=replace(settings.model, layers=len(COUNTS), moe=MoEConfig(**(shape | moe))),
        parallel=layout,
        optimizer=replace(settings.optimizer, clip_norm=0.1),
        train=replace(settings.train, steps=3, accumulate=4),
    )
    assert not [violation for rule in LAYOUT_RULES for violation in rule(found)]
    return found


@dataclass(frozen=True)
class Told:
    """What one rank says of a training run."""

    numbers: list[list[float]]
    """Loss, gradient norm and router losses of every step."""
    counts: list[list[list[int]]]
    layers: set[str]
    """That it holds something of."""


def train(settings: TrainConfig) -> Told:
    stepper = stepper_of(settings, make_mesh(settings.parallel, "cpu"))
    results = [stepper.step(i, i * settings.train.batch, stop=False) for i in range(settings.train.steps)]
    assert all(result.applied for result in results)
    return Told(
        [[r.loss, r.grad_norm, *r.auxiliary.values()] for r in results],
        [result.counts.tolist() for result in results],
        {name.split(".")[1] for name, _ in stepper.model.named_parameters() if name.startswith("blocks.")},
    )


def train_each(rank: int, world: int, of_each: dict[str, TrainConfig]) -> dict[str, Told]:
    return {name: train(settings) for name, settings in of_each.items()}


def assert_trains_as_alone(expected: Told, of_each: dict[str, TrainConfig]) -> None:
    """Under all those layouts, to 1e-12."""
    for world in {settings.parallel.world() for settings in of_each.values()}:
        here = {name: settings for name, settings in of_each.items() if settings.parallel.world() == world}
        ranks = run_ranks(world, train_each, here, timeout=240)
        for name in here:
            assert set.union(*(rank[name].layers for rank in ranks)) == expected.layers
            for rank in ranks:
                np.testing.assert_allclose(rank[name].numbers, expected.numbers, rtol=1e-12, atol=0, err_msg=name)
                assert rank[name].counts == expected.counts, name


@pytest.mark.parametrize("router", ROUTERS)
def test_fp64_training_is_that_of_one_process(router):
    expected = train(settings_of(router, ALONE))
    loads = [layer[: -len(SLOTS)] for layer in expected.counts[0]]
    assert [len(load) for load in loads] == [8, 8, 8]
    assert all(loads[0]) and all(loads[1][:4]) and all(loads[2][:6]), "every expert learns"
    assert not any(loads[1][4:]) and not any(loads[2][6:]), "those that a layer lacks get nothing"
    can = {name: at for name, at in LAYOUTS.items() if at.tensor == 1 or ROUTERS[router].emulate is None}
    assert_trains_as_alone(expected, {name: settings_of(router, layout) for name, layout in can.items()})


@pytest.mark.parametrize("name", ["alone", "FSDP2 x EP2", "PP2 x EP2"])
def test_recomputation_changes_no_bit(name):
    layout = LAYOUTS.get(name, ALONE)
    of_each = {
        "fp32": settings_of("dropless", layout, "fp32"),
        "bf16": settings_of("rectified", layout, "bf16", dispatch="padded" if layout is ALONE else "ragged"),
    }
    run_ranks(layout.world(), compare, of_each, timeout=120)


@pytest.mark.parametrize("layout", ["EP2", "FSDP2 x EP2", "PP2 x EP2"])
def test_training_goes_on_bit_for_bit_and_under_other_layouts(layout, tmp_path):
    settings = settings_of("dropless", LAYOUTS[layout])
    world = settings.parallel.world()
    whole = run_ranks(world, go_on, settings, None, 0, 4, tmp_path / "whole")[0]
    half = run_ranks(world, go_on, settings, None, 0, 2, tmp_path / "half")[0]
    path = tmp_path / "half" / "step-00000002"
    assert half + run_ranks(world, go_on, settings, path, 2, 4, tmp_path / "rest")[0] == whole
    alone = go_on(0, 1, replace(settings, parallel=ALONE), path, 2, 4, tmp_path / "alone")
    np.testing.assert_allclose(half + alone, whole, rtol=1e-12)


@pytest.mark.parametrize("dense", [(0, 1, 2), (1,), ()], ids=["dense", "one dense", "attention alone"])
def test_models_whose_layers_lost_all_experts_train(dense):
    def of(layout: ParallelConfig) -> TrainConfig:
        found = settings_of("dropless", layout, per_layer=(0,) * 6, dense=dense)
        return replace(found, router=RouterConfig(top_k=2))

    expected = train(of(ALONE))
    assert expected.counts == [[]] * 3
    assert_trains_as_alone(expected, {name: of(LAYOUTS[name]) for name in ("DP2", "TP2", "PP2", "FSDP2")})


UNLIKE = {
    "model": {"d_model": 32, "layers": 5, "heads": 2}
    | {"moe": {"experts": 6, "d_expert": 32, "per_layer": [4, 0, 6, 0, 2], "dense": [3]}},
    "router": {"top_k": 1, "capacity_factor": 1.0, "rectify": {"intra": True, "fill": True}},
    "train": {"steps": 12, "batch": 8, "sample_tokens": 8, "eval_every": 5},
}


def test_a_run_is_accounted_for_reported_evaluated_and_goes_on(made, capsys, tmp_path):
    config = made(**UNLIKE)
    finish(start(config))
    folder, found = log_dir(config), summary(config)
    assert found["steps"] == 12 and found["sample"] and found["picture"]
    ledger = json.loads((folder / "ledger.json").read_text())
    for layer, experts in enumerate((4, 6, 2)):
        slots = {name: ledger["slots"][name][layer] for name in SLOTS}
        # 12 steps on two ranks of 128 tokens each, whose slots are as many rounded up.
        assert slots["kept"] + slots["rectified"] + slots["dropped"] == 12 * 256
        assert slots["kept"] + slots["filled"] + slots["padding"] == 12 * 2 * experts * -(-128 // experts)
        assert len(ledger["expert_load"][layer]) == experts
    assert ledger["load"]["dead"] == sum(layer.count(0) for layer in ledger["expert_load"])
    lines = [line for line in read_metrics(folder) if "loss" in line]
    assert [list(map(len, line["expert_load"])) for line in lines] == [[4, 6, 2]] * 12
    page = tmp_path / "report.html"
    assert main(["report", str(folder), "--output", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "broken" not in text.partition("<body")[2]
    assert "2 to 6 experts" in text and "layer 4" in text
    assert main(["eval", str(folder), "--trace", str(tmp_path / "trace"), "--json"]) == 0
    assert main(["generate", str(folder), "--prompt", "the", "--tokens", "4", "--json"]) == 0
    assert main(["slots", str(folder), "--ranks", "2", "--output", str(tmp_path / "slots.png"), "--json"]) == 0
    capsys.readouterr()
    assert main(["convert", "to-hf", str(folder), str(tmp_path / "hf")]) == 2
    assert "`wastenot compress export` writes such models" in capsys.readouterr().err
    forced = {"top_k": 1, "balance_loss": 0, "jitter": 0, "kind": "replay", "trace": str(tmp_path / "trace")}
    replayed = made(**(UNLIKE | {"router": forced}))
    finish(start(replayed))
    assert summary(replayed)["steps"] == 12
    resumed = made(**UNLIKE, checkpoint={"resume": str(folder)})
    assert "resumed from" in finish(start(resumed, "-s", "train.steps=16"))
    assert list(losses(resumed)) == [13, 14, 15, 16]
