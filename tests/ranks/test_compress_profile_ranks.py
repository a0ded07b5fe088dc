"""A profile, the plans made of it and their judgement are the same for every number of ranks (METHODS C5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from spawned import run_ranks

from wastenot.launch.config import DataConfig, LogConfig, TrainConfig
from wastenot.launch.saved_run import write_run
from wastenot.launch.streamed import open_streamed
from wastenot.launch.tokenizer import byte_tokenizer
from wastenot.moe.compress.calibration import Calibration, padded
from wastenot.moe.compress.choose import drop_blocks, drop_experts, drop_layers, empty_plan, place_experts
from wastenot.moe.compress.criteria import EXPERT_CRITERIA, block_scores, coverage, expert_scores, layer_scores
from wastenot.moe.compress.evaluate import Evaluator
from wastenot.moe.compress.plan import DropPlan
from wastenot.moe.compress.profile import Profile, ProfileConfig, measure, profile, read_profile
from wastenot.moe.config import ModelConfig, MoEConfig, RouterConfig
from wastenot.moe.decoder import build_decoder
from wastenot.parallel.config import ParallelConfig
from wastenot.parallel.mesh import Mesh, make_mesh, single

MODEL = ModelConfig(
    vocab_size=257, d_model=32, layers=5, heads=4, init_std=0.2, moe=MoEConfig(experts=8, d_expert=24, first_dense=1)
)
LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2))
"""Ranks of experts, ranks of data."""


def text() -> Calibration:
    """Windows of unlike lengths, fewer than some layouts have places for."""
    draw = torch.Generator().manual_seed(1)
    lengths = (11, 3, 16, 7, 16, 1, 9)
    return padded([torch.randint(0, 256, (n,), generator=draw).tolist() for n in lengths], 16, "random")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("native") / "run"
    router = RouterConfig(top_k=2)
    config = TrainConfig(
        model=MODEL, router=router, data=DataConfig(tokenizer="bytes", seq_len=16), log=LogConfig(dir=str(folder))
    )
    write_run(config, build_decoder(MODEL, router, single(), seed=2), byte_tokenizer(), "a test")
    return folder


CONFIG = ProfileConfig(window=3, hessians=True, batch=2)


def plans(found: Profile) -> list[DropPlan]:
    """One of each kind."""
    start = empty_plan(found)
    return [
        drop_layers(start, found, 2),
        drop_blocks(start, found, 2),
        drop_blocks(start, found, 2, "consecutive"),
        *(drop_experts(start, found, 6, criterion) for criterion in EXPERT_CRITERIA),
        drop_experts(start, found, 5, "reap", "global"),
        drop_experts(drop_layers(start, found, 1), found, 6, "msan", "global", multiple_of=2),
        place_experts(drop_experts(start, found, 6), found, 2),
    ]


def compute(mesh: Mesh, run: Path, folder: Path) -> dict[str, Any]:
    model = open_streamed(run)
    found = profile(model, text(), folder, CONFIG, mesh)
    made = plans(found)
    judge = Evaluator(model, text(), mesh, batch=2)
    # Experts that two ranks cannot share evenly are judged by one.
    quality = [judge.quality(plan) for plan in made if not any(left % 2 for left in plan.result.experts)]
    under = measure(model, text(), CONFIG, mesh, plan=made[0])
    return {
        "fingerprint": found.fingerprint,
        "hashes": [plan.hash for plan in made],
        "coverage": coverage(found),
        "scores": [layer_scores(found), block_scores(found, 2), *_by_expert(found), layer_scores(under)],
        "quality": [(each.loss, each.kl, each.tokens) for each in quality],
    }


def _by_expert(found: Profile) -> list[list[float]]:
    return [scores for criterion in EXPERT_CRITERIA for scores in expert_scores(found, criterion).values()]


def on_ranks(rank: int, world: int, expert: int, run: Path, folder: Path) -> dict[str, Any]:
    return compute(make_mesh(ParallelConfig(expert=expert), "cpu"), run, folder)


@pytest.fixture(scope="module")
def by_layout(run, tmp_path_factory) -> dict[tuple[int, int], tuple[dict[str, Any], Path]]:
    found = {}
    for expert, data in LAYOUTS:
        folder = tmp_path_factory.mktemp("profiles") / f"{expert}-{data}"
        if expert * data == 1:
            results = [compute(single(), run, folder)]
        else:
            results = run_ranks(expert * data, on_ranks, expert, run, folder)
        assert all(result == results[0] for result in results)
        found[expert, data] = results[0], folder
    return found


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_every_layout_decides_alike(layout, by_layout):
    one, other = by_layout[1, 1][0], by_layout[layout][0]
    assert other["fingerprint"] == one["fingerprint"]
    assert other["hashes"] == one["hashes"]
    # Products of fp32 differ in their last bits with how many rows they have.
    assert other["coverage"] == one["coverage"]
    for mine, theirs in zip(one["scores"], other["scores"], strict=True):
        assert theirs == pytest.approx(mine, rel=1e-5)
    for mine, theirs in zip(one["quality"], other["quality"], strict=True):
        assert theirs == pytest.approx(mine, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_d5_sums_are_those_of_one_process(layout, by_layout):
    """Defect D5: roots, means and per-rank Hessians do not add up over ranks."""
    one, other = (read_profile(by_layout[each][1]) for each in ((1, 1), layout))
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            torch.testing.assert_close(theirs[name], value, rtol=1e-5, atol=1e-7)
    for layer in (1, 4):
        for expert in range(8):
            for which in ("hessian_in_DD", "hessian_hidden_FF"):
                mine, theirs = one.hessian(layer, expert, which), other.hessian(layer, expert, which)
                torch.testing.assert_close(theirs, mine, rtol=1e-5, atol=1e-5)
    # A test of sums needs tokens of every kind.
    assert sum(coverage(one)[1]) == 2 * text().num_tokens


def test_all_ranks_leave_the_same_files(by_layout):
    names = [{path.name for path in folder.iterdir()} for _, folder in by_layout.values()]
    assert all(each == names[0] for each in names)
    assert not [name for name in names[0] if name.startswith((".", "state-", "unfinished"))]
