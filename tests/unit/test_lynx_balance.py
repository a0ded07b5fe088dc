"""The cut of layers into stages: equal where that is best, and away from the stage that has more to do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from wastenot.parallel.lynx.assess import assess
from wastenot.parallel.lynx.balance import balanced
from wastenot.parallel.lynx.cluster import read_cluster
from wastenot.parallel.lynx.layout import Layout
from wastenot.parallel.lynx.question import Question
from wastenot.tools.lynx_input import read_model


@pytest.fixture(scope="module")
def question() -> Question:
    given = read_model("mixtral-8x7b")
    return Question(
        shape=replace(given.shape, layers=16),
        layout=Layout(expert=8, pipeline=4, data=8, micro_batches=8, zero=1),
        cluster=read_cluster("h100-nvlink8-ib"),
        optimizer=given.optimizer,
        solver="greedy",
        budget=40 * 2**30,
    )


def test_equal_stages_stay_equal(question):
    assert balanced(question).cut == (4, 4, 4, 4)


def test_layers_leave_the_stage_with_a_large_output_layer(question):
    heavy = replace(question, shape=replace(question.shape, vocab=400_000), budget=70 * 2**30)
    found = balanced(heavy)
    assert found.cut is not None and sum(found.cut) == 16
    assert found.cut[-1] < 4 and max(found.cut) == 5
    assert assess(found).step_seconds < 0.95 * assess(heavy).step_seconds


def test_several_stages_on_a_rank_are_refused(question):
    layout = replace(question.layout, chunks=2)
    with pytest.raises(ValueError, match="--balance: interleaved has several stages on a rank; use 1f1b"):
        balanced(replace(question, layout=layout, schedule="interleaved"))
