"""`bench layout-memory` counts what is there, compares it rightly, and asks the planner about the same run."""

from dataclasses import replace

import pytest
import torch
import yaml

from wastenot.launch.layout_rules import world_rules
from wastenot.launch.peak_memory import actual_changes, peak_bytes
from wastenot.launch.settings import dump_config, parse_config
from wastenot.parallel.config import ParallelConfig
from wastenot.parallel.mesh import single
from wastenot.tools.bench import layout_memory, parity
from wastenot.tools.bench.layout_memory import PARTS, Case
from wastenot.tools.bench.layout_memory_ranks import bytes_of

MEASURED = {"weights": 100, "gradients": 100, "optimizer": 200, "step": 400}


def test_freed_blocks_go_and_reused_ones_were_freed_unseen():
    assert list(actual_changes([(0, 10), (0, -10), (0, 20)])) == [10, -10, 20]
    # Bytes 5 to 15 of a block at 0 to 10 and one at 10 to 20: both are gone.
    assert list(actual_changes([(0, 10), (10, 10), (5, 10), (30, 1)])) == [10, 10, -10, 1]
    # One that was there before anyone looked.
    assert list(actual_changes([(7, -3), (8, 4)])) == [-3, 4]


def test_the_peak_counts_what_lives_at_once():
    def work():
        first = torch.empty(2**20, dtype=torch.uint8)
        del first
        both = torch.empty(2**20, dtype=torch.uint8), torch.empty(2**19, dtype=torch.uint8)
        del both

    assert peak_bytes(work) == 2**20 + 2**19


def test_errors_are_parts_of_what_was_measured():
    found = layout_memory.errors(MEASURED, {"weights": 110, "gradients": 100, "optimizer": 200, "step": 310})
    assert found["weights_error"] == pytest.approx(0.1)
    assert found["static_error"] == pytest.approx(0.025)
    assert found["step_error"] == pytest.approx(-0.225)
    assert found["total_error"] == pytest.approx(-0.1)


def test_the_worst_rank_is_shown_whichever_way_it_is_wrong():
    less = {**MEASURED, "step": 200}
    row = layout_memory.compare(Case(layout=ParallelConfig(data=2)), [MEASURED, MEASURED], [{**MEASURED}, less])
    assert row["rank"] == 1 and row["layout"] == "DP2" and row["ranks"] == 2
    assert row["total_error"] == -0.25 and row["static_error"] == 0
    assert [rank["total_error"] for rank in row["by_rank"]] == [0, -0.25]


@pytest.mark.parametrize(("step", "weights", "met"), [(400, 100, [True, True]), (600, 120, [False, False])])
def test_goals_are_missed_where_any_rank_is_far_off(step, weights, met):
    case = Case(layout=ParallelConfig(data=1), optimizer="adapprox")
    estimated = {**MEASURED, "step": step, "weights": weights}
    goals = layout_memory.goals([layout_memory.compare(case, [MEASURED], [estimated])])
    assert [goal.met for goal in goals] == met


def test_every_run_is_a_legal_configuration():
    assert {case.layout for case in layout_memory.cases(quick=False)} == set(parity.LAYOUTS)
    assert {case.layout.world() for case in layout_memory.cases(quick=True)} == {1, 2}
    for case in layout_memory.cases(quick=False):
        config = layout_memory.configure(case)
        assert parse_config(yaml.safe_load(dump_config(config)), "here") == config
        assert not world_rules(config, case.layout.world())
        assert len(layout_memory.estimate(config)) == case.layout.world()


@pytest.mark.parametrize(("precision", "most"), [("fp32", 0.05), ("bf16", 0.12)])
def test_one_rank_holds_what_the_planner_says(precision, most):
    """The benchmark's model on fewer tokens, in this process. In bf16 each product casts its input anew, unplanned."""
    config = layout_memory.configure(Case(layout=ParallelConfig(data=1), precision=precision))
    config = replace(config, data=replace(config.data, seq_len=128), train=replace(config.train, batch=4, accumulate=2))
    found = layout_memory.errors(bytes_of(config, single()), layout_memory.estimate(config)[0])
    assert all(abs(found[f"{part}_error"]) < (most if part == "step" else 0.001) for part in PARTS), found
