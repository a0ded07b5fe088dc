"""Traces follow the Trace Event Format, stay small on request, and pictures can be drawn of whatever ran."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from wastenot.launch.errors import UserError
from wastenot.parallel.lynx.pipeline_work import ChunkWork, Message, PipelineWork, RankWork
from wastenot.parallel.lynx.schedules import SCHEDULES, build
from wastenot.parallel.lynx.simulate import Simulation, simulate
from wastenot.parallel.lynx.timeline import end_of, timeline
from wastenot.parallel.lynx.trace import spread, trace, write_trace
from wastenot.parallel.lynx.where_time_goes import rank_times
from wastenot.tools.lynx_picture import COLOURS, draw


def ran(name: str, p: int = 4, m: int = 8) -> Simulation:
    schedule = build(name, num_ranks=p, num_micro_batches=m)
    chunk = ChunkWork(
        forward_seconds=0.010,
        input_seconds=0.011,
        weight_seconds=0.009,
        forward_exposed_seconds=0.004,
        backward_exposed_seconds=0.004,
        forward_beside_seconds=0.002,
        recompute_seconds=0.002,
        early_recompute_seconds=0.001,
        backward_hidden_seconds=0.003,
        activation_bytes=3 << 30,
        output=Message(seconds=0.001, bytes=1 << 20),
        gradient=Message(seconds=0.001, bytes=1 << 20),
        reduce_seconds=0.02,
    )
    rank = RankWork(chunks=(chunk,) * schedule.num_chunks, static_bytes=20 << 30, optimizer_seconds=0.006)
    return simulate(schedule, PipelineWork(ranks=(rank,) * p))


NEEDED = {
    "X": {"name", "cat", "pid", "tid", "ts", "dur"},
    "M": {"name", "pid", "args"},
    "C": {"name", "pid", "ts", "args"},
}
"""Keys of each phase of event: complete, metadata, counter."""


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_event_has_the_keys_of_its_phase(name, tmp_path):
    path = tmp_path / "trace.json"
    write_trace(ran(name), path)
    written = json.loads(path.read_text())
    assert set(written) == {"traceEvents", "displayTimeUnit", "otherData"}
    for event in written["traceEvents"]:
        assert NEEDED[event["ph"]] <= set(event)
        assert isinstance(event["pid"], int) and isinstance(event["name"], str)
        if event["ph"] != "M":
            assert event["ts"] >= 0 and event.get("dur", 0) >= 0
        if event["ph"] == "C":
            assert event["args"]["bytes"] >= 20 << 30
    processes = [event for event in written["traceEvents"] if event["name"] == "process_name"]
    assert [event["args"]["name"] for event in processes] == [f"rank {rank}" for rank in range(4)]
    named = {(e["pid"], e["tid"]) for e in written["traceEvents"] if e["name"] == "thread_name"}
    assert {(e["pid"], e["tid"]) for e in written["traceEvents"] if e["ph"] == "X"} == named


@pytest.mark.parametrize("name", SCHEDULES)
def test_events_of_a_thread_follow_or_contain_each_other(name):
    """Otherwise viewers draw them wrong."""
    threads: dict = {}
    for event in trace(ran(name))["traceEvents"]:
        if event["ph"] == "X":
            threads.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    for spans in threads.values():
        spans.sort(key=lambda span: (span[0], -span[1]))
        open_until: list[float] = []
        for start, end in spans:
            # Microseconds, of sums of seconds.
            while open_until and open_until[-1] <= start + 1e-6:
                open_until.pop()
            assert not open_until or end <= open_until[-1] + 1e-6
            open_until.append(end)


@pytest.mark.parametrize("name", SCHEDULES)
def test_blocks_take_the_time_that_the_account_says(name):
    simulation, times = ran(name), rank_times(ran(name))
    for rank in range(4):
        blocks = timeline(simulation, rank)

        def seconds(*what: str, of=blocks) -> float:
            return sum(block.end - block.start for block in of if block.what in what and block.row < 0)

        if name != "dualpipev":
            passes = seconds("forward", "backward", "input gradient", "weight gradient")
            assert passes == pytest.approx(times.compute[rank])
            assert seconds("recomputation") == pytest.approx(times.recompute[rank])
        assert seconds("hidden recomputation") == pytest.approx(times.hidden_recompute[rank])
        assert seconds("communication") == pytest.approx(times.communication[rank])
        assert seconds("hidden communication") == pytest.approx(times.hidden_communication[rank])
        assert seconds("optimizer") == pytest.approx(times.optimizer[rank])
        assert all(first.start <= second.start for first, second in pairwise(blocks))


def test_a_trace_is_as_small_as_asked_for():
    simulation = ran("1f1b", 16, 256)
    whole = trace(simulation, num_ranks=16, num_micro_batches=256)
    few = trace(simulation, num_ranks=4, num_micro_batches=8)
    assert few["otherData"]["ranks_written"] == [0, 5, 10, 15]
    assert {event["pid"] for event in few["traceEvents"]} == {0, 5, 10, 15}
    assert len(json.dumps(few)) < 0.06 * len(json.dumps(whole))
    until = end_of(simulation, 8)
    assert max(event.get("ts", 0) for event in few["traceEvents"]) <= 1e6 * until
    # Whatever runs until then is there, of later micro-batches too.
    first = [block for block in timeline(simulation, 15) if block.start < until]
    assert len([e for e in few["traceEvents"] if e["pid"] == 15 and e["ph"] == "X" and e["tid"] < 3]) == len(first)
    # At most: a thousand ranks write no more than 32.
    assert len(trace(ran("1f1b", 40, 2))["otherData"]["ranks_written"]) == 32
    with pytest.raises(ValueError, match="num_ranks: 0; use 1 or more"):
        trace(simulation, num_ranks=0)


def test_spread_has_both_ends():
    assert spread(5, 9) == [0, 1, 2, 3, 4]
    assert spread(100, 3) == [0, 50, 99]
    assert spread(7, 1) == [0]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_has_a_picture(name, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra `viz`")
    path = tmp_path / "timeline.png"
    draw(ran(name), path, budget_bytes=40 << 30)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]


def test_small_and_cut_ones_have_one_too(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra `viz`")
    draw(ran("1f1b", 1, 1), tmp_path / "small.png")
    draw(ran("1f1b", 12, 100), tmp_path / "cut.svg", num_ranks=3, num_micro_batches=4)
    text = (tmp_path / "cut.svg").read_text()
    assert "the step goes on to" in text and "rank 6" in text and "rank 5" not in text
    with pytest.raises(UserError, match=r"a picture is a \.png or an \.svg"):
        draw(ran("1f1b", 1, 1), tmp_path / "picture.jpg")


def test_every_block_has_a_colour():
    simulation = ran("dualpipev")
    there = {block.what for rank in range(4) for block in timeline(simulation, rank)}
    assert there <= set(COLOURS)
