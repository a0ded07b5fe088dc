"""What a plan puts into a window runs between the start of that exchange and the wait for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from spawned import run_ranks
from test_parallel_parity import config
from test_recompute_ranks import model_of
from torch.profiler import record_function

from wastenot.launch.config import TrainConfig
from wastenot.launch.profiling import cpu_profile
from wastenot.moe.config import RouterConfig
from wastenot.moe.decoder import Decoder
from wastenot.parallel.config import ParallelConfig
from wastenot.parallel.mesh import make_mesh
from wastenot.parallel.recomputation import Pass, Schedule

EXPERTS = {
    "1.combine gradient": ("1.sort rows", "1.expert up", "1.expert activation"),
    "1.dispatch gradient": ("1.norm 1", "1.query and key", "1.value", "1.rotary", "1.attention", "0.sort rows"),
    "0.combine gradient": ("0.expert up", "0.expert activation"),
    "0.dispatch gradient": ("0.norm 1", "0.query and key", "0.value", "0.rotary", "0.attention"),
}
TENSOR_RANKS = {
    "1.dispatch gradient": ("1.norm 1", "1.rotary"),
    "1.attention reduce-scatter gradient": ("1.attention",),
    "1.attention gather again": ("0.sort rows",),
    "1.attention gather gradient": ("0.expert up",),
    "0.attention reduce-scatter gradient": ("0.norm 1", "0.rotary", "0.attention"),
}
FORWARD = {"0.dispatch": ("0.expert up",), "0.combine": ("0.expert activation",), "1.combine": ("1.attention",)}
"""Of the pass before."""
PLANS = {
    "experts": (ParallelConfig(expert=2), EXPERTS),
    "tensor ranks": (ParallelConfig(tensor=2, expert=2), TENSOR_RANKS),
    "forward": (ParallelConfig(expert=2), FORWARD),
}


class Starts:
    """Marks in the profiler's timeline where each exchange is about to start."""

    def collective_entered(self, name: str, num_bytes: int) -> None:
        with record_function(f"start {name}"):
            pass

    def collective_left(self, name: str, waited: float, hidden: float = 0.0) -> None:
        pass


@dataclass(frozen=True)
class Range:
    """Of the timeline of the thread that computes."""

    name: str
    start: float
    end: float


def settings_of(layout: ParallelConfig) -> TrainConfig:
    """Two layers of experts without shared ones, which backward needs while gradients are on their way."""
    settings = config(RouterConfig(top_k=2), "fp32")
    assert settings.model.moe is not None
    model = replace(settings.model, moe=replace(settings.model.moe, shared_experts=0))
    return replace(settings, model=model, parallel=layout)


def two_passes(model: Decoder) -> None:
    """Two forwards, then their backwards."""
    tokens_BS = torch.randint(61, (8, 16))
    losses = [model.loss_sum(model(tokens_BS).hidden_BSD, tokens_BS) for _ in range(2)]
    for loss in losses:
        loss.backward()


def timeline(rank: int, world: int, layout: ParallelConfig, schedule: Schedule) -> list[Range]:
    """Of two passes, in order of time."""
    model = model_of(settings_of(layout), "lynx", make_mesh(layout, "cpu", Starts()))
    model.recomputation.schedule = schedule
    with cpu_profile() as trace:
        two_passes(model)
    found = [Range(event.name, event.time_range.start, event.time_range.end) for event in trace.events()]
    return sorted(found, key=lambda each: each.start)


def collective_of(window: str) -> str:
    """What travels during the window."""
    layer, name = window.split(".")
    if name.startswith(("dispatch", "combine")):
        return f"layer{layer}.{name.replace(' ', '-')}"
    tensor = {"reduce-scatter gradient": "tensor-scatter-gradient", "gather again": "tensor-gather-again"}
    return tensor.get(name.removeprefix("attention "), "tensor-gather-gradient")


def inside(events: list[Range], what: Range, collective: str) -> bool:
    """Whether it runs while such a collective is on its way: after its launch, and before the wait for it."""
    starts = [event for event in events if event.name == f"start {collective}"]
    waits = [event for event in events if event.name == f"wait {collective}"]
    launches = [event for event in events if event.name.startswith("c10d::")]
    assert starts
    for start, wait in zip(starts, waits, strict=True):
        assert start.end <= wait.start
        if (
            any(start.end <= launch.start and launch.end <= what.start for launch in launches)
            and what.end <= wait.start
        ):
            return True
    return False


@pytest.mark.parametrize("name", PLANS)
def test_what_is_planned_is_computed_while_its_window_is_open(name):
    layout, windows = PLANS[name]
    schedule = Schedule(frozenset(each for names in windows.values() for each in names), windows)
    for events in run_ranks(2, timeline, layout, schedule):
        computed = [event for event in events if event.name.startswith("recompute ")]
        planned = sorted(f"recompute {each}" for each in schedule.dropped)
        # Nobody waits while the first pass runs forward, and the second one has no forward that follows.
        assert sorted(event.name for event in computed) == sorted(planned * 2)
        hidden = computed[: len(planned)] if name == "forward" else computed
        for event in hidden:
            [window] = [key for key, names in windows.items() if event.name.removeprefix("recompute ") in names]
            assert inside(events, event, collective_of(window)), (event, window)


@pytest.mark.parametrize("name", ["experts", "tensor ranks"])
def test_on_demand_nothing_is_computed_in_a_window(name):
    layout, windows = PLANS[name]
    schedule = Schedule(frozenset(each for names in windows.values() for each in names))
    collectives = {collective_of(window) for window in windows}
    for events in run_ranks(2, timeline, layout, schedule):
        computed = [event for event in events if event.name.startswith("recompute ")]
        assert len(computed) == 2 * len(schedule.dropped)
        for event in computed:
            assert not any(inside(events, event, collective) for collective in collectives), event


def beside_a_late_rank(rank: int, world: int, folder: str) -> tuple[int, int]:
    """How often recomputation was hidden, and exposed, on rank 0, before whose last segment rank 1 sends nothing."""
    store = dist.FileStore(f"{folder}/late", world)
    window = "1.combine gradient"

    class Late(Starts):
        def collective_entered(self, name: str, num_bytes: int) -> None:
            if rank == 1 and name == collective_of(window):
                store.wait(["computed"])

    layout = ParallelConfig(expert=world)
    model = model_of(settings_of(layout), "lynx", make_mesh(layout, "cpu", Late()))
    names = EXPERTS[window]
    if rank == 0:
        model.recomputation.schedule = Schedule(frozenset(names), {window: names})
    tokens_BS = torch.randint(61, (8, 16))
    loss = model.loss_sum(model(tokens_BS).hidden_BSD, tokens_BS)
    computed = Pass.computed

    def tell(self: Pass, name: str, *how: Any) -> None:
        computed(self, name, *how)
        if name == names[-1]:
            store.set("computed", "")

    with patch.object(Pass, "computed", tell):
        loss.backward()
    return len(model.recomputation.spent.hidden), len(model.recomputation.spent.exposed)


def test_a_rank_computes_before_another_has_sent_anything(tmp_path):
    of_first, of_late = run_ranks(2, beside_a_late_rank, str(tmp_path), timeout=30)
    assert of_first == (len(EXPERTS["1.combine gradient"]), 0)
    assert of_late == (0, 0)
