"""Memory over a simulated step: a curve by hand, and a plan's own account of its peak."""

from __future__ import annotations

import pytest

from wastenot.parallel.lynx.memory_curve import Memory
from wastenot.parallel.lynx.pipeline_work import ChunkWork, Message, PipelineWork, RankWork
from wastenot.parallel.lynx.schedules import build
from wastenot.parallel.lynx.simulate import simulate


def memory_of(name: str, p: int, m: int, static_bytes: int = 100, **more) -> Memory:
    schedule = build(name, num_ranks=p, num_micro_batches=m)
    chunk = ChunkWork(**{"forward_seconds": 1.0, "input_seconds": 1.0, "weight_seconds": 1.0, **more})
    rank = RankWork(chunks=(chunk,) * schedule.num_chunks, static_bytes=static_bytes)
    return Memory(simulate(schedule, PipelineWork(ranks=(rank,) * p)))


def points(memory: Memory, rank: int) -> list[tuple[float, int]]:
    curve = memory.curve(rank)
    return list(zip(curve.seconds.tolist(), curve.bytes.tolist(), strict=True))


def test_a_curve_by_hand():
    """Two micro-batches on one rank: forward of 1 s, backward of 2."""
    memory = memory_of("1f1b", 1, 2, activation_bytes=10, forward_bytes=3, early_bytes=5, backward_bytes=7)
    unit = [(0, 118), (1, 115), (1, 122), (3, 100)]
    assert points(memory, 0) == unit + [(3 + seconds, num_bytes) for seconds, num_bytes in unit]
    assert memory.peak_bytes.tolist() == [122]


def test_what_weight_gradients_need_stays_for_them():
    memory = memory_of("zb-h1", 1, 1, activation_bytes=10, weight_bytes=4, backward_bytes=2)
    assert points(memory, 0) == [(0, 110), (1, 110), (1, 112), (2, 104), (2, 104), (3, 100)]


def test_messages_are_held_on_both_sides():
    """8 bytes take 2 s: from 1 on, at both; the receiver reads them as they come."""
    memory = memory_of("gpipe", 2, 1, activation_bytes=10, output=Message(seconds=2.0, bytes=8))
    assert points(memory, 0)[:3] == [(0, 110), (1, 110), (1, 118)]
    assert (3, 110) in points(memory, 0)
    assert points(memory, 1)[:3] == [(1, 108), (3, 100), (3, 110)]


@pytest.mark.parametrize("name", ["1f1b", "zb-h1"])
def test_the_peak_is_that_of_a_planners_unit(name):
    """L4: static, kept for the micro-batches in flight, and what the unit holds at most beside."""
    more = {} if name == "1f1b" else {"weight_bytes": 0}
    memory = memory_of(name, 4, 12, activation_bytes=10, early_bytes=3, backward_bytes=4, **more)
    assert memory.peak_bytes.tolist() == [100 + 10 * in_flight + 3 + 4 for in_flight in (4, 3, 2, 1)]
    assert memory.in_flight.tolist() == [4, 3, 2, 1]


def test_a_pair_holds_what_both_hold():
    memory = memory_of("dualpipev", 2, 8, activation_bytes=10, forward_bytes=3, early_bytes=5, backward_bytes=7)
    first = memory.simulation.schedule.beside_next
    assert first.any()
    # 2 p + 1 chunks, of which the pair's forward made one.
    assert memory.peak_bytes.tolist() == [100 + 10 * 5 + 3 + 5 + 7] * 2
