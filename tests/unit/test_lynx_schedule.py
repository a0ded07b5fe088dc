"""Every schedule does all work once, in an order that ends; where torch has the same schedule, in torch's order."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
from torch.distributed.pipelining import schedules as torchs

from wastenot.parallel.lynx.schedule import BACKWARD, FORWARD, NOTHING
from wastenot.parallel.lynx.schedules import SCHEDULES, build
from wastenot.parallel.lynx.schedules.check import problems

SIZES = [(1, 1), (1, 5), (2, 2), (2, 7), (3, 9), (4, 4), (4, 3), (4, 12), (5, 20), (8, 8), (8, 40)]
"""Ranks and micro-batches."""
LEGAL = {"interleaved": lambda p, m: m % p == 0, "dualpipev": lambda p, m: m >= 2 * p}


def sizes_of(name: str) -> list[tuple[int, int]]:
    """Those of SIZES that a schedule has."""
    return [size for size in SIZES if name not in LEGAL or LEGAL[name](*size)]


def built(name: str, size: tuple[int, int], num_chunks: int | None = None):
    return build(name, num_ranks=size[0], num_micro_batches=size[1], num_chunks=num_chunks)


@pytest.mark.parametrize(("name", "size"), [(name, size) for name in SCHEDULES for size in sizes_of(name)], ids=str)
def test_all_work_is_done_once_in_an_order_that_ends(name, size):
    assert problems(built(name, size)) == []


@pytest.mark.parametrize("num_chunks", [2, 3, 4])
@pytest.mark.parametrize("size", [(1, 3), (2, 4), (3, 9), (4, 4), (8, 24)], ids=str)
def test_interleaved_does_so_with_any_number_of_chunks(size, num_chunks):
    assert problems(built("interleaved", size, num_chunks)) == []


def text_of(schedule, rank: int) -> list[str]:
    """As torch writes actions, without its waits."""
    stages = schedule.stages[rank]
    return [f"{stages[a.chunk]}{a.kind}{a.micro_batch}" for a in schedule.actions(rank)]


def torch_text(actions) -> list[str]:
    found = []
    for action in actions:
        if action is not None and action.computation_type != torchs.REDUCE_GRAD:
            found += torch_text(action.sub_actions) if action.sub_actions else [str(action)]
    return found


def what_torch_runs(torch_class, num_ranks: int, num_micro_batches: int, rank: int) -> list[str]:
    """Calls of a stage by the schedule itself: its list for printing counts from 1 on the last rank (torch 2.13)."""
    stage, calls = MagicMock(stage_index=rank), []
    stage.get_fwd_recv_ops.return_value = stage.get_fwd_send_ops.return_value = []
    stage.get_bwd_recv_ops.return_value = stage.get_bwd_send_ops.return_value = []
    stage.forward_one_chunk.side_effect = lambda i, *_, **__: calls.append(f"{rank}F{i}")
    stage.backward_one_chunk.side_effect = lambda i, *_, **__: calls.append(f"{rank}B{i}")
    runs = MagicMock(_stage=stage, _num_stages=num_ranks, _n_microbatches=num_micro_batches)
    runs._check_inputs.return_value = [()] * num_micro_batches, [{}] * num_micro_batches
    torch_class._step_microbatches(runs)
    return calls


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("name", "torch_class"), [("gpipe", torchs.ScheduleGPipe), ("1f1b", torchs.Schedule1F1B)])
def test_orders_are_torchs(name, torch_class, size):
    ours = built(name, size)
    for rank in range(size[0]):
        assert text_of(ours, rank) == what_torch_runs(torch_class, *size, rank)


TORCHS = [
    ("interleaved", torchs.ScheduleInterleaved1F1B, 2),
    ("interleaved", torchs.ScheduleInterleaved1F1B, 3),
    ("zb-h1", torchs.ScheduleInterleavedZeroBubble, 1),
    ("dualpipev", torchs.ScheduleDualPipeV, 2),
]


@pytest.mark.parametrize(
    ("name", "torch_class", "num_chunks", "size"), [(*each, size) for each in TORCHS for size in sizes_of(each[0])]
)
def test_orders_with_chunks_are_torchs(name, torch_class, num_chunks, size):
    num_ranks, num_micro_batches = size
    ours = built(name, size, num_chunks)
    stand_in = SimpleNamespace(
        pp_group_size=num_ranks,
        n_local_stages=num_chunks,
        _n_microbatches=num_micro_batches,
        microbatches_per_round=num_micro_batches // max(1, num_micro_batches // num_ranks),
    )
    for rank in range(num_ranks):
        theirs = torch_class._calculate_single_rank_operations(stand_in, rank)
        assert text_of(ours, rank) == torch_text(theirs)


@pytest.mark.parametrize("size", [(1, 4), (2, 4), (4, 10), (8, 40)], ids=str)
def test_dualpipev_puts_what_torch_does_beside_each_other(size):
    num_ranks, num_micro_batches = size
    ours = built("dualpipev", size)
    stand_in = SimpleNamespace(pp_group_size=num_ranks, _n_microbatches=num_micro_batches)
    for rank in range(num_ranks):
        theirs = torchs.ScheduleDualPipeV._calculate_single_rank_operations(stand_in, rank)
        firsts = [str(action.sub_actions[0]) for action in theirs if action.sub_actions]
        texts = text_of(ours, rank)
        assert [texts[i] for i in np.flatnonzero(ours.beside_next[rank])] == firsts


@pytest.mark.parametrize(
    ("name", "sizes", "says"),
    [
        ("1f1c", {}, "'1f1c' is none; use gpipe, 1f1b, "),
        ("1f1b", {"num_ranks": 0}, "0 ranks; use 1 or more"),
        ("gpipe", {"num_micro_batches": 0}, "0 micro-batches; use 1 or more"),
        ("zb-h1", {"num_chunks": 2}, "2 chunks per rank; it has 1"),
        ("interleaved", {"num_chunks": 1}, "use 2 or more, or the schedule `1f1b`"),
        ("interleaved", {"num_micro_batches": 9}, "a multiple of 4, the nearest is 8"),
        ("interleaved", {"num_micro_batches": 11}, "a multiple of 4, the nearest is 12"),
        ("interleaved", {"num_micro_batches": 1}, "a multiple of 4, the nearest is 4"),
        ("dualpipev", {"num_micro_batches": 7}, "7 micro-batches for 8 stages; use 8 or more"),
        ("dualpipev", {"num_chunks": 3}, "it has 2: use 2"),
    ],
)
def test_sizes_that_are_not_legal_name_one_that_is(name, sizes, says):
    with pytest.raises(ValueError, match=says):
        build(name, **{"num_ranks": 4, "num_micro_batches": 8, **sizes})


def test_a_wait_in_a_circle_is_found():
    good = build("1f1b", num_ranks=2, num_micro_batches=2)
    kinds = good.kinds.copy()
    # The last rank wants a gradient of micro-batch 0 before it made its forward.
    kinds[1, :2] = BACKWARD, FORWARD
    assert problems(replace(good, kinds=kinds)) == ["1f1b waits for ever: rank 0 with B0.0, rank 1 with B0.0"]


def test_work_that_is_missing_or_doubled_is_found():
    good = build("gpipe", num_ranks=2, num_micro_batches=2)
    micro_batches = good.micro_batches.copy()
    micro_batches[0, 1] = 0
    found = problems(replace(good, micro_batches=micro_batches))
    assert found == ["rank 0: F0.0 is there 2 times", "rank 0: F1.0 is there 0 times"]


def test_a_weight_gradient_before_its_input_gradient_is_found():
    good = build("zb-h1", num_ranks=1, num_micro_batches=1)
    kinds = good.kinds[:, [0, 2, 1]]
    assert problems(replace(good, kinds=kinds)) == ["rank 0: W0.0 comes before I0.0"]


def test_ranks_with_fewer_actions_are_padded():
    schedule = build("dualpipev", num_ranks=4, num_micro_batches=8)
    most = schedule.kinds.shape[1]
    assert len(set(schedule.num_actions.tolist())) > 1
    for rank, number in enumerate(schedule.num_actions.tolist()):
        assert len(schedule.actions(rank)) == number
        assert (schedule.kinds[rank, number:] == NOTHING).all() and number <= most


def test_simulating_needs_no_torch():
    code = (
        "import sys; from wastenot.parallel.lynx import schedules, simulate, memory_curve, stalls, timeline, trace, "
        "where_time_goes; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
