"""`bench lynx` on real ranks: every figure is there, and the account of it adds up."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest

from wastenot.launch.config import DataConfig, LoopConfig
from wastenot.moe.config import ModelConfig, MoEConfig
from wastenot.tools.bench import lynx, lynx_contest, lynx_pictures
from wastenot.tools.bench.lynx_trace import spans
from wastenot.tools.bench.report import Report

TINY = replace(
    lynx.BASE,
    model=ModelConfig(vocab_size=257, d_model=32, layers=2, heads=2, moe=MoEConfig(experts=4, d_expert=32)),
    data=DataConfig(seq_len=32),
    train=LoopConfig(batch=2),
)
MOVING = replace(TINY, optimizer=lynx.COMPARED.optimizer)


@pytest.fixture(scope="module")
def found():
    return lynx.launch(partial(lynx_contest.timed, lynx_contest.Contest(base=TINY, parts=(0.6,), rounds=5)), 2, None)


def test_all_policies_take_turns_at_every_budget(found):
    assert {row["policy"] for row in found["rows"]} == {*lynx_contest.POLICIES}
    budgets = {row["budget"] for row in found["rows"] if row["policy"] == "lynx-heu"}
    assert budgets == {"60 %", "selective's"} == found["budgets"].keys()
    for row in found["rows"]:
        assert len(found["seconds"][row["turn"]]) == 5 and row["step_seconds"] > 0
        assert (row["predicted_seconds"] is None) == (row["policy"] == "selective")
    by_policy = {row["policy"]: row for row in found["rows"] if row["budget"] is None}
    peaks = {policy: row["peak_bytes"] for policy, row in by_policy.items()}
    assert peaks["full, kept"] < min(peaks["selective"], peaks["none"])
    assert found["budgets"]["selective's"] == peaks["selective"]
    assert by_policy["full, kept"]["exposed_seconds"] > 0 == by_policy["full, kept"]["hidden_seconds"]
    assert by_policy["full, kept"]["dropped"] > 0 == by_policy["none"]["dropped"]
    for kind in ("forward", "backward", "recomputation", "optimizer", "rows", "gradients"):
        assert found["trace"][kind], kind


def test_report_and_pictures(found, tmp_path):
    rows = lynx.completed(found, lynx.SHOWN)
    report = Report(name="lynx", command="", env={}, rows=rows, goals=lynx.goals(rows), headings=lynx.HEADINGS)
    assert len(json.loads(report.to_json())["goals"]) == 9
    for row in rows:
        if row["policy"] in lynx_contest.SOLVERS:
            assert row["bound"] >= 1 and row["vs_best_lower"] <= row["vs_best"] and row["best_other"] != row["policy"]
    pytest.importorskip("matplotlib")
    assert lynx.draw(report, tmp_path / "lynx.png") == tmp_path / "lynx.png"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lynx-trace.png", "lynx.png"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_of_all_policies_are_compared(ranks):
    found = lynx.launch(partial(lynx_contest.compared, MOVING, 2), ranks, None)
    assert found["steps"] == 2 and found["tensors"] > 2 * 10
    assert all(found["dropped"].values()), "plans drop something"


def row(policy, step_seconds, predicted_seconds, turn=None):
    return {
        "rate": "1gbit",
        "policy": policy,
        "turn": turn or policy,
        "step_seconds": step_seconds,
        "predicted_seconds": predicted_seconds,
    }


def test_only_clear_differences_are_ranked():
    rows = [row("a", 1.0, 1.2), row("b", 1.04, 1.1), row("c", 1.2, 1.15), row("d", 9.9, None), row("e", 1.3, 1.3)]
    assert lynx.misranked(rows) == [("1gbit", "a", "c")]


def test_spans_of_a_trace():
    events = [
        ("aten::mm", 1, 10.0, 12.0),
        ("aten::t", 1, 10.5, 11.0),
        ("autograd::engine::evaluate_function: MmBackward0", 1, 20.0, 30.0),
        ("aten::mm", 1, 21.0, 22.0),
        ("recompute 0.up", 1, 23.0, 25.0),
        ("aten::mm", 1, 23.5, 24.9),
        ("gloo:all_to_all", 7, 19.0, 26.0),
        ("aten::copy_", 7, 22.0, 23.0),
        ("aten::mm", 1, 26.0, 27.0),
        ("aten::mm", 1, 27.1, 28.0),
        ("Optimizer.step#AdamW.step", 1, 40.0, 45.0),
        ("aten::_fused_adamw_", 1, 41.0, 44.0),
    ]
    assert spans(events) == {
        "forward": [(0.0, 2.0)],
        "rows": [(9.0, 16.0)],
        "backward": [(11.0, 12.0), (16.0, 18.0)],
        "recomputation": [(13.5, 14.9)],
        "optimizer": [(31.0, 34.0)],
    }


def test_rates_as_tc_writes_them():
    assert [lynx_pictures.bits_per_second(rate) for rate in lynx.RATES] == [1e8, 3e8, 1e9, 3e9, 1e10]
