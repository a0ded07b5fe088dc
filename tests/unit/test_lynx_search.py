"""The search: nothing legal is missed, nothing on the front is beaten, and what is left out has a reason."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product

import pytest

from wastenot.parallel.lynx.assess import assess
from wastenot.parallel.lynx.cluster import read_cluster
from wastenot.parallel.lynx.layout import Layout
from wastenot.parallel.lynx.question import Question
from wastenot.parallel.lynx.search import Point, Space, front, search
from wastenot.tools.lynx_input import read_model

SPACE = Space(
    devices=8,
    global_batch=32,
    tensor=(1, 2),
    expert=(1, 4, 8),
    pipeline=(1, 2, 3),
    micro_batch=(1, 2),
    schedules=("1f1b", "zb-h1"),
    solvers=("greedy",),
)


@pytest.fixture(scope="module")
def question() -> Question:
    given = read_model("mixtral-8x7b")
    return Question(
        shape=replace(given.shape, layers=4),
        layout=Layout(zero=1),
        cluster=read_cluster("h100-nvlink8-ib"),
        optimizer=given.optimizer,
        budget=40 * 2**30,
    )


def test_the_front_is_that_of_all_candidates(question):
    """Planned one by one, without bounds."""
    found = search(question, SPACE)
    points = []
    for tensor, expert, pipeline, micro_batch, schedule in product(
        SPACE.tensor, SPACE.expert, SPACE.pipeline, SPACE.micro_batch, SPACE.schedules
    ):
        data, rest = divmod(SPACE.devices, tensor * pipeline)
        if rest or SPACE.global_batch % (data * micro_batch):
            continue
        try:
            layout = replace(
                question.layout, tensor=tensor, expert=expert, pipeline=pipeline, data=data, micro_batch=micro_batch,
                micro_batches=SPACE.global_batch // (data * micro_batch), sequence_parallel=tensor > 1,
            )  # fmt: skip
            answer = assess(replace(question, layout=layout, schedule=schedule, solver="greedy"))
        except ValueError:
            continue
        # Schedules of two stages may be one but for the order of sums.
        points.append((round(answer.tokens_per_second_per_device, 6), max(answer.peak_bytes)))
    best = [p for p in points if not any(q != p and q[0] >= p[0] and q[1] <= p[1] for q in points)]
    assert {(round(p.tokens_per_second_per_device, 6), p.peak_bytes) for p in found.front} == set(best)
    assert len(best) > 1
    speeds = [point.tokens_per_second_per_device for point in found.front]
    memory = [point.peak_bytes for point in found.front]
    assert speeds == sorted(speeds, reverse=True) and memory == sorted(memory, reverse=True)
    assert found.planned + found.bounded >= len(found.front)
    assert found.refused["devices: no multiple of tensor x pipeline"] == 2 * 3 * 2 * 2
    assert any(re.match(r"layout.expert: \d+ does not divide the \d+ ranks", reason) for reason in found.refused)


def test_points_that_are_beaten_in_one_only_stay(question):
    def point(speed: float, peak: int) -> Point:
        return Point(question=question, tokens_per_second_per_device=speed, peak_bytes=peak, step_seconds=1.0, mfu=0.5)

    best, less, worse, equal = point(2.0, 5), point(1.0, 3), point(1.0, 4), point(2.0, 5)
    assert front([worse, less, equal, best]) == (best, less)


def test_where_nothing_fits_reasons_are_named(question):
    with pytest.raises(ValueError, match=r"search: nothing fits 8 devices: .*memory"):
        search(replace(question, budget=5 * 2**30), SPACE)
