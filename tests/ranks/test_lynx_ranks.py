"""Recomputation by a plan changes no bit of training, whatever is dropped and wherever it is computed again."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from spawned import run_ranks
from test_recompute_ranks import ALONE, CASES, LAYOUTS, PRECISIONS, model_of, settings_of, train

from wastenot.launch.config import TrainConfig
from wastenot.launch.peak_memory import peak_bytes
from wastenot.moe.config import RouterConfig
from wastenot.moe.decoder import Decoder
from wastenot.parallel.config import ParallelConfig
from wastenot.parallel.mesh import make_mesh, single
from wastenot.parallel.recomputation import Pass, Recomputation, Schedule

FULL = os.environ.get("WASTENOT_GRID") == "full"
STEPS = 20
NEVER_DROPPED = {"router"}
SENDING = {"query and key", "query and key norm", "up", "shared up"}
"""With tensor ranks, in these models: nor are those."""
ATTENTION = {
    "norm 1",
    "query and key",
    "value",
    "query and key norm",
    "rotary",
    "attention",
    "projection",
    "residual 1",
}
SENT = {"permute", "expert down"}
UNREAD = {"down", "shared down", "unsort rows", "weighted sum", *SENT}
"""Outputs that no backward reads, where experts are on other ranks."""
PLANNED = {
    **{name: LAYOUTS[name] for name in ("EP2", "EP2 x DP2", "TP2 x EP2", "1f1b", "interleaved", "zb-h1", "dualpipev")},
    "gpipe": ParallelConfig(pipeline=2, expert=2, schedule="gpipe"),
}


def hear(owner: type, name: str, note: Callable[..., object]) -> None:
    """From here on every call of that method in this process is noted too."""
    method = getattr(owner, name)

    def noted(self: Any, *args: Any, **how: Any) -> Any:
        note(*args, **how)
        return method(self, *args, **how)

    setattr(owner, name, noted)


def parts(name: str) -> tuple[int, str]:
    """Layer, and operator or window."""
    layer, part = name.split(".")
    return int(layer), part


@dataclass
class Plans:
    """Another schedule for every step, of what the layers of this rank have asked for; the first keeps everything."""

    settings: TrainConfig
    seed: int
    operators: set[str] = field(default_factory=set)
    windows: set[str] = field(default_factory=set)
    """Of backward."""
    forward_windows: set[str] = field(default_factory=set)
    schedules: list[Schedule] = field(default_factory=list)
    computed: list[list[str]] = field(default_factory=list)
    """What was computed again in each step."""

    def __post_init__(self) -> None:
        hear(Recomputation, "segment", lambda name, *args, **how: self.operators.add(name))
        hear(Recomputation, "window", self._asked)
        hear(Pass, "computed", lambda name, *args: self.computed[-1].append(name))

    def _asked(self, name: str, forward: bool = False) -> None:
        (self.forward_windows if forward else self.windows).add(name)

    def __call__(self, model: Decoder, step: int) -> None:
        kinds = self.on_demand, self.in_own_windows, self.anywhere
        self.schedules.append(kinds[step % 3](step) if step else Schedule())
        self.computed.append([])
        model.recomputation.schedule = self.schedules[-1]
        model.recomputation.debug = self.settings.log.debug

    @property
    def droppable(self) -> list[str]:
        """Operators that a plan may drop."""
        never = NEVER_DROPPED | (SENDING if self.settings.parallel.tensor > 1 else set())
        return sorted(name for name in self.operators if parts(name)[1] not in never)

    def on_demand(self, step: int) -> Schedule:
        return Schedule(frozenset(self.droppable))

    def in_own_windows(self, step: int) -> Schedule:
        """Attention is computed while gradients leave the experts, all else while they come; dense layers have what
        tensor ranks exchange."""
        windows: dict[str, tuple[str, ...]] = {}
        for name in self.droppable:
            layer, operator = parts(name)
            exchange = "dispatch" if operator in ATTENTION else "combine"
            for window in (f"{layer}.{exchange} gradient", f"{layer}.feed-forward reduce-scatter gradient"):
                if window in self.windows:
                    windows[window] = (*windows.get(window, ()), name)
        return Schedule(frozenset(self.droppable), windows)

    def anywhere(self, step: int) -> Schedule:
        draw = random.Random(self.seed * STEPS + step)
        dropped = [name for name in self.droppable if draw.random() < 0.7]
        windows: dict[str, tuple[str, ...]] = {}
        for name in dropped:
            # In the backward of its layer or of one that runs before it; or in a forward, of another pass.
            before = [window for window in self.windows if parts(window)[0] >= parts(name)[0]]
            window = draw.choice(["", *sorted(before), *sorted(self.forward_windows)])
            if window:
                windows[window] = (*windows.get(window, ()), name)
        return Schedule(frozenset(dropped), windows)


def compare(rank: int, world: int, of_each: dict[str, TrainConfig]) -> None:
    """Asserts that numbers are the same bits, and that the same travels in the same order."""
    for name, settings in of_each.items():
        plain, entered = train(settings, "none")
        # What a rank plans concerns no other: each has plans of its own.
        plans = Plans(settings, seed=rank)
        other, entered_again = train(settings, "lynx", plans)
        assert entered_again == entered
        assert other.keys() == plain.keys()
        for key, tensor in plain.items():
            assert other[key].equal(tensor), (name, key)
        check_plans(plans, name, world)


def check_plans(plans: Plans, name: str, world: int) -> None:
    """Asserts that the plans were carried out."""
    assert not plans.computed[0]
    assert all(plans.computed[1:])
    for schedule, computed in zip(plans.schedules, plans.computed, strict=True):
        assert schedule.dropped.issuperset(computed)
        assert (plans.windows | plans.forward_windows).issuperset(schedule.windows)
        # Once in a pass, of which a step has one for each micro-batch; stand-ins have operators of their own.
        assert max(map(computed.count, computed), default=0) <= 2 * plans.settings.train.accumulate
    layout = plans.settings.parallel
    # A stage of dense layers alone has none.
    if plans.windows:
        assert len(plans.schedules[1].windows) >= 2
        assert any(set(schedule.windows) & plans.forward_windows for schedule in plans.schedules)
    # Rows that do not travel, as those of stand-ins, are read: by experts, and by the gradient of their weights.
    unread = UNREAD - (SENT if "dropless" not in name or layout.expert == 1 else set())
    for schedule, computed in list(zip(plans.schedules, plans.computed, strict=True))[3::3]:
        assert not schedule.windows
        again = set(computed)
        assert not [each for each in again if parts(each)[1] in unread]
        # What tensor ranks bring back is kept, and nobody reads what it was made of.
        kept_from = UNREAD | ({"projection"} if layout.tensor > 1 else set())
        read = {each for each in plans.droppable if parts(each)[1] not in kept_from}
        assert again.issuperset(read), read - again


def cases_of(layout: ParallelConfig, turn: int) -> dict[str, TrainConfig]:
    """Every case, in another precision each, by `turn` in other ones; of those one for a pipeline, which takes long."""
    found = {}
    for number, case in enumerate(CASES):
        if not FULL and layout.pipeline > 1 and number != turn % len(CASES):
            continue
        settings = settings_of(case, layout, PRECISIONS[(number + turn) % len(PRECISIONS)])
        found[case] = replace(settings, train=replace(settings.train, steps=STEPS))
    return found


def test_no_bit_changes_on_one_rank():
    run_ranks(1, compare, cases_of(ALONE, turn=2))


@pytest.mark.parametrize("name", PLANNED)
def test_no_bit_changes_and_nothing_is_sent_again(name):
    layout = PLANNED[name]
    run_ranks(layout.world(), compare, cases_of(layout, turn=list(PLANNED).index(name)), timeout=120)


def test_ranks_without_tokens_take_part_as_the_others():
    """Skewed to a few experts of one rank: the others have nothing to compute again for."""
    router = RouterConfig(kind="skewed", skew=30.0, top_k=1, balance_loss=0.0)
    of_each = {}
    for layout in (ParallelConfig(expert=4), PLANNED["zb-h1"]):
        settings = settings_of("dropless", layout, "fp32")
        of_each[f"dropless {layout}"] = replace(settings, router=router, train=replace(settings.train, steps=6))
    run_ranks(4, compare, of_each, timeout=120)


def peaks(rank: int, world: int, settings: TrainConfig) -> tuple[int, int]:
    """Most bytes of a forward and backward at once, with everything kept, and with everything dropped."""
    tokens_BS = torch.randint(61, (8, 64))
    layout = settings.parallel
    model = model_of(settings, "lynx", make_mesh(layout, "cpu") if world > 1 else single())
    plans = Plans(settings, seed=0)

    def peak() -> int:
        return peak_bytes(lambda: model.loss_sum(model(tokens_BS).hidden_BSD, tokens_BS).backward())

    plans(model, 0)
    # What it takes once is there at the second time.
    peak()
    kept = peak()
    model.recomputation.schedule = plans.on_demand(1)
    return kept, peak()


@pytest.mark.parametrize("layout", [ALONE, PLANNED["EP2"], PLANNED["TP2 x EP2"]], ids=["alone", "EP2", "TP2 x EP2"])
def test_memory_is_let_go_of(layout):
    settings = settings_of("dropless", layout, "fp32")
    assert settings.model.moe is not None
    moe = replace(settings.model.moe, d_expert=64)
    settings = replace(settings, model=replace(settings.model, layers=6, moe=moe))
    for kept, dropped in run_ranks(layout.world(), peaks, settings):
        # Tensor ranks keep what they would have to send again.
        assert dropped < (0.65 if layout.tensor > 1 else 0.5) * kept
