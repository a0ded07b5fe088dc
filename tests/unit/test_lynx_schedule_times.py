"""Simulated times: small cases by hand, then what holds for every schedule and all work."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wastenot.parallel.lynx.memory_curve import Memory
from wastenot.parallel.lynx.pipeline_work import ChunkWork, Message, PipelineWork, RankWork
from wastenot.parallel.lynx.readers import readers
from wastenot.parallel.lynx.schedules import SCHEDULES, build
from wastenot.parallel.lynx.simulate import Simulation, simulate
from wastenot.parallel.lynx.stalls import stall_seconds, stalls
from wastenot.parallel.lynx.where_time_goes import rank_times


def run(name: str, p: int, m: int, v: int | None = None, *, all_ranks: dict | None = None, **more) -> Simulation:
    schedule = build(name, num_ranks=p, num_micro_batches=m, num_chunks=v)
    chunk = ChunkWork(**{"forward_seconds": 1.0, "input_seconds": 1.0, "weight_seconds": 1.0, **more})
    rank = RankWork(chunks=(chunk,) * schedule.num_chunks, optimizer_seconds=0.0)
    return simulate(schedule, PipelineWork(ranks=(rank,) * p, **(all_ranks or {})))


def test_1f1b_by_hand():
    """Forwards of 1 s, backwards of 2, messages of a half."""
    message = Message(seconds=0.5)
    simulation = run("1f1b", 2, 2, output=message, gradient=message)
    assert simulation.start.tolist() == [[0, 1, 5, 8], [1.5, 2.5, 4.5, 5.5]]
    assert simulation.end.tolist() == [[1, 2, 7, 10], [2.5, 4.5, 5.5, 7.5]]
    times = rank_times(simulation)
    assert simulation.seconds == 10
    assert times.warm_up.tolist() == [3, 1.5]
    assert times.steady.tolist() == [0, 0]
    assert times.cool_down.tolist() == [1, 2.5]


def test_1f1b_with_a_slow_rank_waits_in_the_steady_part():
    schedule = build("1f1b", num_ranks=2, num_micro_batches=10)
    fast, slow = (RankWork(chunks=(ChunkWork(forward_seconds=s, input_seconds=s),)) for s in (1.0, 2.0))
    simulation = simulate(schedule, PipelineWork(ranks=(fast, slow)))
    assert simulation.seconds == 1 + 10 * 4 + 1
    # Its units are 2 s longer: before the first backward it is another cause, and so it is after the last forward.
    assert rank_times(simulation).steady.tolist() == [7 * 2, 0]
    [window] = stalls(simulation, 0)
    assert window.seconds == 2
    assert stalls(simulation, 1) == ()


def test_what_a_pass_stands_still_for_and_what_runs_beside_it():
    parts = {
        "forward_exposed_seconds": 0.5,
        "forward_beside_seconds": 1.25,
        "backward_exposed_seconds": 0.25,
        "backward_beside_seconds": 1.0,
        "recompute_seconds": 0.5,
        "backward_hidden_seconds": 0.25,
    }
    simulation = run("1f1b", 1, 2, **parts)
    # Beside outlasts the forward's compute by a quarter.
    assert (simulation.end - simulation.start).tolist() == [[1.75, 2.75] * 2]
    times = rank_times(simulation)
    assert times.compute.tolist() == [6]
    assert times.recompute.tolist() == [1]
    assert times.communication.tolist() == [2]
    assert times.hidden_communication.tolist() == [4]
    assert times.hidden_recompute.tolist() == [0.5]
    assert times.bubble.tolist() == [0]


@pytest.mark.parametrize(
    ("exposed", "speed", "seconds"),
    [(0.0, 1.0, 3.0), (1.0, 1.0, 3.0), (1.0, 0.5, 4.0), (4.0, 1.0, 8.0), (4.0, 0.25, 9.0)],
)
def test_a_pair_hides_the_communication_of_one_under_the_compute_of_the_other(exposed, speed, seconds):
    """Both compute 3 s and communicate 2 x `exposed`; at half the speed the latter costs half of itself."""
    more = {"forward_exposed_seconds": exposed, "backward_exposed_seconds": exposed}
    simulation = run("dualpipev", 2, 8, all_ranks={"pair_speed": speed}, **more)
    first = simulation.schedule.beside_next
    assert first.any()
    assert set((simulation.end - simulation.start)[first].tolist()) == {seconds}


def test_recomputation_ahead_of_the_gradient_uses_the_wait_for_it():
    """The last rank is slow; what fits its neighbour's waits of 2 s costs nothing, the rest shows."""
    schedule = build("1f1b", num_ranks=2, num_micro_batches=10)
    slow = RankWork(chunks=(ChunkWork(forward_seconds=2.0, input_seconds=2.0),))

    def with_early(seconds: float) -> Simulation:
        chunk = ChunkWork(forward_seconds=1.0, input_seconds=1.0, early_recompute_seconds=seconds)
        return simulate(schedule, PipelineWork(ranks=(RankWork(chunks=(chunk,)), slow)))

    assert with_early(2.0).seconds == with_early(0.0).seconds == 42
    times = rank_times(with_early(2.0))
    assert times.recompute[0] + times.hidden_recompute[0] == 20
    assert times.recompute[0] == 0
    assert with_early(3.0).seconds > 42
    # What ran in them does not make the waits shorter.
    assert stall_seconds(with_early(2.0), 0).tolist() == stall_seconds(with_early(0.0), 0).tolist()


@pytest.mark.parametrize("send", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("size", [(4, 64), (8, 128)], ids=str)
def test_a_stall_is_as_much_recomputation_as_costs_nothing(size, send):
    """Slow messages leave 1F1B waits in some units and none in others; their mean hides, but for the ends of a step."""
    p, m = size
    message = Message(seconds=send)
    schedule = build("1f1b", num_ranks=p, num_micro_batches=m)
    chunk = ChunkWork(forward_seconds=1.0, input_seconds=2.0, output=message, gradient=message)
    before = simulate(schedule, PipelineWork(ranks=(RankWork(chunks=(chunk,)),) * p))
    rooms = [sum(window.room for window in stalls(before, rank)) for rank in range(p)]
    assert rooms[0] > 0
    assert rooms == sorted(rooms, reverse=True)
    ranks = (RankWork(chunks=(dataclasses.replace(chunk, early_recompute_seconds=room),)) for room in rooms)
    after = simulate(schedule, PipelineWork(ranks=tuple(ranks)))
    # Without waits to hide in, the first rank would take m times its room longer.
    assert after.seconds - before.seconds < 0.01 * m * rooms[0]


def test_gpipe_has_no_stall_in_every_unit():
    assert stalls(run("gpipe", 4, 8), 0) == ()


REDUCTION = [
    # Beside the last backward of 2 s: 3 s end a second after it, and a tail at the earliest half a second after it.
    (True, 3.0, 0.0, 1.0),
    (True, 1.0, 0.0, 0.0),
    (True, 1.0, 0.5, 0.5),
    (False, 3.0, 0.0, 3.0),
]


@pytest.mark.parametrize(("beside", "seconds", "tail", "exposed"), REDUCTION)
def test_gradients_are_reduced_beside_the_last_backward_or_after_it(beside, seconds, tail, exposed):
    more = {"reduce_seconds": seconds, "reduce_tail_seconds": tail}
    simulation = run("1f1b", 1, 4, all_ranks={"reduce_beside_backward": beside}, **more)
    assert simulation.seconds == 12 + exposed
    assert rank_times(simulation).reduce.tolist() == [exposed]


def test_a_reduction_waits_for_the_passes_own_communication():
    """2 s of compute, then 1 of communication: a reduction of 3 beside it ends a second after."""
    simulation = run("1f1b", 1, 1, backward_exposed_seconds=1.0, reduce_seconds=3.0)
    assert simulation.end[0].tolist() == [1, 4]
    assert simulation.reduce[0, 0].tolist() == [1, 5]


def test_reductions_of_two_chunks_follow_each_other():
    simulation = run("interleaved", 1, 2, reduce_seconds=5.0)
    # The last chunk's last backward is from 8 to 10, the first chunk's from 10 to 12.
    assert simulation.reduce[0].tolist() == [[13, 18], [8, 13]]


def test_optimizers_wait_for_all_ranks_where_they_must():
    schedule = build("1f1b", num_ranks=2, num_micro_batches=2)
    rank = RankWork(chunks=(ChunkWork(forward_seconds=1.0, input_seconds=1.0),), optimizer_seconds=0.5)
    work = PipelineWork(ranks=(rank, rank))
    assert simulate(schedule, work).optimizer.tolist() == [[6, 6.5], [6, 6.5]]
    alone = simulate(schedule, dataclasses.replace(work, optimizer_waits_for_all=False))
    assert alone.optimizer.tolist() == [[6, 6.5], [5, 5.5]]
    assert rank_times(alone).total.tolist() == [6.5, 6.5]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"forward_seconds": -1.0}, "forward_seconds: -1.0; use a finite number, 0 or more"),
        ({"input_seconds": float("nan")}, "input_seconds: nan"),
        ({"forward_hidden_seconds": 2.0, "forward_exposed_seconds": 1.0}, "2.0 under 1.0 of communication"),
        ({"activation_bytes": 3, "weight_bytes": 4}, "weight_bytes: 4 of 3"),
        ({"reduce_seconds": 1.0, "reduce_tail_seconds": 2.0}, "2.0 of 1.0 reduce_seconds"),
    ],
)
def test_work_that_cannot_be_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        ChunkWork(**{"forward_seconds": 1.0, "input_seconds": 1.0, **wrong})


def test_work_for_another_pipeline_is_refused():
    rank = RankWork(chunks=(ChunkWork(forward_seconds=1.0, input_seconds=1.0),))
    with pytest.raises(ValueError, match="has 2 ranks with 1 chunks, but there is work for 3 ranks with 1"):
        simulate(build("1f1b", num_ranks=2, num_micro_batches=2), PipelineWork(ranks=(rank,) * 3))
    with pytest.raises(ValueError, match="pair_speed: 0"):
        PipelineWork(ranks=(rank,), pair_speed=0)


SECONDS = st.integers(0, 8).map(lambda eighths: eighths / 8)
BYTES = st.integers(0, 9)


@st.composite
def chunks(draw) -> ChunkWork:
    exposed = [draw(SECONDS), draw(SECONDS)]
    activation, reduce = draw(BYTES), draw(SECONDS)
    return ChunkWork(
        forward_seconds=draw(SECONDS),
        input_seconds=draw(SECONDS),
        weight_seconds=draw(SECONDS),
        forward_exposed_seconds=exposed[0],
        backward_exposed_seconds=exposed[1],
        forward_beside_seconds=draw(SECONDS),
        backward_beside_seconds=draw(SECONDS),
        recompute_seconds=draw(SECONDS),
        early_recompute_seconds=draw(SECONDS),
        forward_hidden_seconds=exposed[0] / 2,
        backward_hidden_seconds=exposed[1],
        activation_bytes=activation,
        weight_bytes=draw(st.integers(0, activation)),
        forward_bytes=draw(BYTES),
        early_bytes=draw(BYTES),
        backward_bytes=draw(BYTES),
        output=Message(seconds=draw(SECONDS), bytes=draw(BYTES)),
        gradient=Message(seconds=draw(SECONDS), bytes=draw(BYTES)),
        reduce_seconds=reduce,
        reduce_tail_seconds=reduce / 4,
    )


@st.composite
def simulations(draw) -> Simulation:
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    p = draw(st.integers(1, 5))
    m = draw(st.integers(1, 8))
    m = m * p if name == "interleaved" else m + 2 * p if name == "dualpipev" else m
    schedule = build(name, num_ranks=p, num_micro_batches=m)
    of_rank = st.tuples(*[chunks()] * schedule.num_chunks)
    ranks = tuple(
        RankWork(chunks=draw(of_rank), static_bytes=draw(BYTES), optimizer_seconds=draw(SECONDS)) for _ in range(p)
    )
    work = PipelineWork(
        ranks=ranks,
        pair_speed=draw(st.sampled_from([1.0, 0.5])),
        reduce_beside_backward=draw(st.booleans()),
        optimizer_waits_for_all=draw(st.booleans()),
    )
    return simulate(schedule, work)


def by_hand(simulation: Simulation) -> tuple[list[list[float]], list[list[float]]]:
    """Start and end of every action, one after the other as soon as what each reads is there, without arrays."""
    schedule, of_pass = simulation.schedule, simulation.passes
    actions = [schedule.actions(rank) for rank in range(schedule.num_ranks)]
    last, made, sent_until = schedule.num_stages - 1, {}, {}
    start, end = [[] for _ in actions], [[] for _ in actions]
    while any(len(start[rank]) < len(actions[rank]) for rank in range(len(actions))):
        for rank, done in enumerate(map(len, start)):
            many = 2 if done < len(actions[rank]) and schedule.beside_next[rank, done] else 1
            unit = range(done, min(done + many, len(actions[rank])))
            reads = []
            for step in unit:
                kind, micro_batch, chunk = actions[rank][step]
                stage = int(schedule.stages[rank, chunk])
                if kind == "F" and stage > 0:
                    reads.append(("F", micro_batch, stage - 1))
                elif kind in "BI":
                    reads.append(("G", micro_batch, stage + 1) if stage < last else ("F", micro_batch, stage))
            if not unit or any(each not in made for each in reads):
                continue
            code = of_pass.codes[rank, done]
            arrived = max((made[each] for each in reads), default=-np.inf) - of_pass.parts.early[code]
            began = max(end[rank][-1] if end[rank] else 0.0, arrived)
            for step in unit:
                kind, micro_batch, chunk = actions[rank][step]
                stage = int(schedule.stages[rank, chunk])
                start[rank].append(began)
                end[rank].append(began + of_pass.parts.total[code])
                if kind == "W":
                    continue
                to = stage + 1 if kind == "F" else stage - 1
                what = "F" if kind == "F" else "G"
                made[what, micro_batch, stage] = end[rank][-1]
                if 0 <= to <= last and schedule.rank_of_stage[to] != rank:
                    of_chunk = simulation.work.ranks[rank].chunks[chunk]
                    message = of_chunk.output if kind == "F" else of_chunk.gradient
                    # One link each way, whichever chunk it is that sends.
                    back = (what == "G") != (schedule.placement == "v" and chunk == 1)
                    arrives = max(end[rank][-1], sent_until.get((rank, back), 0.0)) + message.seconds
                    sent_until[rank, back] = made[what, micro_batch, stage] = arrives
    return start, end


@settings(max_examples=150, deadline=None)
@given(simulations())
def test_everything_starts_as_soon_as_it_can(simulation):
    start, end = by_hand(simulation)
    for rank, many in enumerate(simulation.schedule.num_actions.tolist()):
        assert simulation.start[rank, :many].tolist() == start[rank]
        assert simulation.end[rank, :many].tolist() == end[rank]
        assert (simulation.end[rank, many:] == end[rank][-1]).all()
        assert (simulation.start[rank, many:] == end[rank][-1]).all()


@settings(max_examples=150, deadline=None)
@given(simulations())
def test_nothing_starts_before_what_it_needs(simulation):
    schedule, of_pass = simulation.schedule, simulation.passes
    read_by = readers(schedule)
    made = np.nonzero(read_by >= 0)
    reader = np.divmod(read_by[made], schedule.kinds.shape[1])
    # A backward ahead of its gradient only recomputes until that is there.
    ahead = np.where(of_pass.second | schedule.beside_next, 0.0, of_pass.parts.early[of_pass.codes])
    sent = of_pass.send_seconds[of_pass.codes[made]]
    assert (simulation.start[reader] + ahead[reader] >= simulation.end[made] + sent).all()
    assert (simulation.optimizer[:, 0] >= simulation.end.max(axis=1)).all()
    assert (simulation.optimizer[:, 0] >= simulation.reduce[:, :, 1].max(axis=1)).all()


@settings(max_examples=150, deadline=None)
@given(simulations())
def test_a_ranks_time_adds_up_to_the_steps(simulation):
    times = rank_times(simulation)
    assert times.total == pytest.approx(np.full(simulation.schedule.num_ranks, simulation.seconds))
    for field in dataclasses.fields(times):
        assert (getattr(times, field.name) >= -1e-9).all()


@settings(max_examples=150, deadline=None)
@given(simulations())
def test_a_step_is_no_shorter_than_the_busiest_rank_nor_than_one_micro_batchs_way(simulation):
    times = rank_times(simulation)
    busy = times.compute + times.recompute + times.communication + times.reduce + times.optimizer
    assert simulation.seconds >= busy.max() - 1e-9
    way, last = 0.0, simulation.schedule.num_stages - 1
    for stage, rank in enumerate(simulation.schedule.rank_of_stage.tolist()):
        chunk = simulation.work.ranks[rank].chunks[stage // simulation.schedule.num_ranks]
        way += chunk.forward_seconds + chunk.forward_exposed_seconds
        way += chunk.recompute_seconds + chunk.input_seconds + chunk.backward_exposed_seconds
        neighbours = simulation.schedule.rank_of_stage
        way += chunk.output.seconds if stage < last and neighbours[stage + 1] != rank else 0.0
        way += chunk.gradient.seconds if stage > 0 and neighbours[stage - 1] != rank else 0.0
    assert simulation.seconds >= way - 1e-9


@settings(max_examples=150, deadline=None)
@given(simulations())
def test_memory_is_never_below_static_and_ends_there(simulation):
    memory = Memory(simulation)
    for rank, work in enumerate(simulation.work.ranks):
        curve = memory.curve(rank)
        assert (np.diff(curve.seconds) >= 0).all()
        assert (curve.bytes >= work.static_bytes).all()
        assert curve.bytes[-1] == work.static_bytes
        assert memory.peak_bytes[rank] == max(curve.bytes.max(), work.static_bytes)
    assert (memory.in_flight <= memory.unfinished).all()


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 5), st.integers(1, 6), st.data())
def test_more_micro_batches_never_lower_the_throughput(name, p, m, data):
    seconds = st.tuples(*[SECONDS.filter(bool)] * 3)
    each = data.draw(st.lists(seconds, min_size=p, max_size=p))
    if name == "dualpipev":
        m += 2 * p - 1

    def step(m: int) -> float:
        schedule = build(name, num_ranks=p, num_micro_batches=m)
        ranks = (
            RankWork(chunks=(ChunkWork(forward_seconds=f, input_seconds=i, weight_seconds=w),) * schedule.num_chunks)
            for f, i, w in each
        )
        return simulate(schedule, PipelineWork(ranks=tuple(ranks))).seconds

    more = p if name == "interleaved" else 1
    m = m * p if name == "interleaved" else m
    assert step(m + more) / (m + more) <= step(m) / m * (1 + 1e-12)
