"""The benchmarks that need a CUDA device: what they measure and the bars they are held against, on tiny shapes."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from wastenot.launch.errors import UserError
from wastenot.tools.bench import adapprox_speed_gpu, registry
from wastenot.tools.bench.kernels_gpu import Shape, goals, rows_of

pytestmark = pytest.mark.usefixtures("one_thread")


def wall(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def test_rows_of_a_tiny_layer_wherever_it_runs():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = rows_of(Shape(tokens=32, d_model=16, experts=4, d_expert=8, top_k=2), device, wall)
    assert [row["what"] for row in rows] == [
        "copy", "dispatch", "combine", "dispatch backward", "combine backward",
        "layer, forward", "layer, both", "route",
    ]  # fmt: skip
    assert all(row["ms"] > 0 for row in rows)
    assert rows[0]["of_copy"] == 1
    # 32 tokens read once, 64 rows written, with the index of each.
    assert rows[1]["bytes_per_second"] * rows[1]["ms"] / 1e3 == pytest.approx((32 + 64) * 2 * 16 + 8 * 64)
    assert len(goals(rows)) == 4 + 1, "no published time for this size"


def test_bars_by_hand():
    rows = [
        {"tokens": 8192, "what": name, "of_copy": 0.9, "ms": ms}
        for name, ms in [("copy", 1.0), ("dispatch", 1.0), ("combine", 1.0), ("dispatch backward", 1.0),
                         ("combine backward", 1.0), ("layer, forward", 2.0), ("layer, both", 9.9), ("route", 0.11)]
    ]  # fmt: skip
    met = {goal.metric: goal.met for goal in goals(rows)}
    assert met == {
        **{f"8192 tokens: bandwidth of {name} relative to a copy's": True
           for name in ("dispatch", "combine", "dispatch backward", "combine backward")},
        "8192 tokens: layer, forward, ms": True,
        "8192 tokens: layer, both, ms": False,
        "8192 tokens: part of the forward pass that routing takes": False,
    }  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no CUDA device")
@pytest.mark.parametrize("name", ["kernels-gpu", "adapprox-speed-gpu"])
def test_without_a_device_they_say_so(name):
    with pytest.raises(UserError, match=f"bench {name}: needs a CUDA device"):
        registry.load(name).run(quick=True, command="", say=lambda text: None)


def test_the_goal_is_that_of_experts_at_rank_16():
    ratios = {"AdamW fused": 1.0, "warm, rank 16": 2.5}
    rows = [
        {"case": case.name, "contender": name, "ratio": ratio * factor}
        for case, factor in zip(adapprox_speed_gpu.CASES, (1, 10), strict=True)
        for name, ratio in ratios.items()
    ]
    [goal] = adapprox_speed_gpu.goals(rows)
    assert (goal.value, goal.met, goal.goal) == (2.5, False, "<= 2")


def test_contenders_have_a_step_to_take():
    for contender in adapprox_speed_gpu.contenders(8):
        parameter = torch.nn.Parameter(torch.ones(40, 36))
        parameter.grad = torch.ones(40, 36)
        contender.make([parameter]).step()
        assert parameter.max() < 1 and contender.bytes_moved > 0, contender.name
