"""The simulation comes to the bubbles and the activations in flight that are published, none of them fitted.

Sources: GPipe and 1F1B, Megatron-LM (arXiv 2104.04473, section 2.2.1); interleaved, the same (2.2.2), its memory
Korthikanti et al. (2205.05198, section 4.2.3); ZB-H1, Qi et al. (2401.10241, table 2); DualPipeV, the table in
DeepSeek's repository DualPipe. Times are whole numbers, so equal means equal.
"""

from __future__ import annotations

import numpy as np
import pytest

from wastenot.parallel.lynx.memory_curve import Memory
from wastenot.parallel.lynx.pipeline_work import ChunkWork, Message, PipelineWork, RankWork
from wastenot.parallel.lynx.schedules import build
from wastenot.parallel.lynx.simulate import Simulation, simulate
from wastenot.parallel.lynx.where_time_goes import rank_times

SIZES = [(1, 1), (1, 6), (2, 2), (2, 9), (3, 12), (4, 4), (4, 20), (5, 25), (8, 8), (8, 64), (16, 48)]
"""Ranks and micro-batches."""
F_I_W = [(1, 1, 1), (2, 2, 1), (2, 3, 1), (3, 2, 2), (7, 5, 3), (4, 4, 4)]
"""Seconds of a chunk's forward, and of its gradients of input and weights."""


def run(name: str, p: int, m: int, v: int | None = None, seconds=(1, 1, 1), **more) -> Simulation:
    schedule = build(name, num_ranks=p, num_micro_batches=m, num_chunks=v)
    forward, of_input, weight = map(float, seconds)
    chunk = ChunkWork(forward_seconds=forward, input_seconds=of_input, weight_seconds=weight, **more)
    rank = RankWork(chunks=(chunk,) * schedule.num_chunks)
    return simulate(schedule, PipelineWork(ranks=(rank,) * p))


@pytest.mark.parametrize("seconds", F_I_W, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_gpipe_and_1f1b_wait_p_minus_1_of_m_plus_p_minus_1(name, size, seconds):
    p, m = size
    simulation = run(name, p, m, seconds=seconds)
    assert simulation.seconds == (m + p - 1) * sum(seconds)
    bubble = rank_times(simulation).bubble
    assert (bubble == (p - 1) * sum(seconds)).all()
    assert (bubble / simulation.seconds == (p - 1) / (m + p - 1)).all()


@pytest.mark.parametrize("seconds", F_I_W, ids=str)
@pytest.mark.parametrize("v", [2, 3, 4])
@pytest.mark.parametrize("size", [(p, m) for p, m in SIZES if m % p == 0], ids=str)
def test_interleaved_waits_p_minus_1_of_v_m_plus_p_minus_1(size, v, seconds):
    p, m = size
    simulation = run("interleaved", p, m, v, seconds)
    bubble = rank_times(simulation).bubble
    # (p - 1)(t_f + t_b) / v, where t_f and t_b are of all v chunks.
    assert (bubble == (p - 1) * sum(seconds)).all()
    assert (bubble / simulation.seconds == (p - 1) / (v * m + p - 1)).all()


@pytest.mark.parametrize("seconds", F_I_W, ids=str)
@pytest.mark.parametrize("size", [(p, m) for p, m in SIZES if m >= p], ids=str)
def test_zb_h1_waits_p_minus_1_times_f_plus_i_minus_w(size, seconds):
    (p, m), (f, i, w) = size, seconds
    assert w <= min(f, i)
    simulation = run("zb-h1", p, m, seconds=seconds)
    assert (rank_times(simulation).bubble == (p - 1) * (f + i - w)).all()
    assert simulation.seconds == m * (f + i + w) + (p - 1) * (f + i - w)


@pytest.mark.parametrize("seconds", [(1, 1, 2), (1, 2, 2), (4, 1, 2), (2, 3, 4)], ids=str)
def test_zb_h1_has_no_more_to_fill_than_the_shorter_pass_is_long(seconds):
    """Where the published formula would go on falling: a bubble is not filled beyond the pass that waits in it."""
    f, i, w = seconds
    bubble = rank_times(run("zb-h1", 5, 20, seconds=seconds)).bubble
    assert (bubble == 4 * (f + i - min(f, i, w))).all()


@pytest.mark.parametrize("exposed", [0, 1, 3])
@pytest.mark.parametrize("seconds", [(3, 3, 1), (3, 3, 3)], ids=str)
@pytest.mark.parametrize("size", [(p, m) for p, m in SIZES if m >= 2 * p], ids=str)
def test_dualpipev_waits_half_the_stages_minus_1_times_fb_plus_b_minus_3w(size, seconds, exposed):
    """The rank that waits longest; F and I as long as each other, W no longer, which the table leaves unsaid."""
    (p, m), (f, i, w) = size, seconds
    more = {"forward_exposed_seconds": float(exposed), "backward_exposed_seconds": float(exposed)}
    simulation = run("dualpipev", p, m, seconds=seconds, **more)
    f_beside_b = max(f + i + w, 2 * exposed)
    b = i + w + exposed
    assert rank_times(simulation).bubble.max() == (2 * p / 2 - 1) * (f_beside_b + b - 3 * w)


def peaks(name: str, p: int, m: int, v: int | None = None, **more) -> list[int]:
    memory = Memory(run(name, p, m, v, activation_bytes=10, **more))
    if not more:
        assert (memory.peak_bytes == 10 * memory.unfinished).all()
    return memory.peak_bytes.tolist()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gpipe_keeps_all_micro_batches(size):
    p, m = size
    assert peaks("gpipe", p, m) == [10 * m] * p


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_1f1b_keeps_as_many_as_ranks_from_here_on(size):
    p, m = size
    assert peaks("1f1b", p, m) == [10 * min(m, p - s) for s in range(p)]


@pytest.mark.parametrize("v", [2, 3, 4])
@pytest.mark.parametrize("p", [1, 2, 4, 8])
def test_interleaved_keeps_1_plus_p_minus_1_over_p_v_times_a_models_layers(p, v):
    """On the first rank, in layers L of the model's, of which a chunk has L / (p v)."""
    layers = 10 * p * v
    assert peaks("interleaved", p, 4 * p, v)[0] == layers * (1 + (p - 1) / (p * v))


@pytest.mark.parametrize("size", [(p, m) for p, m in SIZES if m >= p], ids=str)
def test_zb_h1_keeps_no_more_than_1f1b_on_its_first_rank(size):
    p, m = size
    simulation = run("zb-h1", p, m, activation_bytes=10, weight_bytes=4)
    memory = Memory(simulation)
    assert memory.in_flight.tolist() == [p - s for s in range(p)]
    assert memory.unfinished.tolist() == [p] * p
    # p - s between forward and input gradient, s before their weight gradient.
    assert memory.peak_bytes.tolist() == [10 * (p - s) + 4 * s for s in range(p)]
    assert memory.peak_bytes.max() == max(peaks("1f1b", p, m))


@pytest.mark.parametrize("size", [(p, m) for p, m in SIZES if m >= 2 * p], ids=str)
def test_dualpipev_keeps_as_many_chunks_as_stages_and_one(size):
    p, m = size
    assert peaks("dualpipev", p, m) == [10 * (2 * p + 1)] * p


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-h1"])
def test_one_micro_batch_goes_down_and_back(name):
    message = Message(seconds=0.25)
    for p in (1, 2, 5):
        simulation = run(name, p, 1, seconds=(1, 2, 0), output=message, gradient=message)
        assert simulation.seconds == 3 * p + 2 * (p - 1) * 0.25


@pytest.mark.parametrize("size", [(2, 8), (4, 16), (8, 40)], ids=str)
def test_slow_messages_cost_gpipe_only_its_ramps(size):
    """Ranks are busy between; a step is (m + p - 1)(t_f + t_b) and 2 (p - 1) messages, where none is above a pass."""
    p, m = size
    message = Message(seconds=0.5)
    simulation = run("gpipe", p, m, seconds=(1, 1, 0), output=message, gradient=message)
    assert simulation.seconds == (m + p - 1) * 2 + 2 * (p - 1) * 0.5


def test_a_slow_link_takes_one_message_after_another():
    """Two ranks, forwards of 1 s, messages of 5 s: the last of 4 arrives after 1 + 4 x 5 s."""
    simulation = run("gpipe", 2, 4, seconds=(1, 1, 0), output=Message(seconds=5.0))
    assert simulation.arrival[1, :4].tolist() == [6.0, 11.0, 16.0, 21.0]
    assert simulation.seconds == 21 + 1 + 4 + 1
    assert np.isneginf(simulation.arrival[0, :4]).all()
