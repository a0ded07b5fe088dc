"""The waste ledger of one rank: what became of token slots and choices, bytes and seconds of exchange.

Counts come from `Routing` values that a forward pass returns, never from hooks: recomputation and accumulation
cannot count anything twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..parallel.stopwatch import StreamWait
from .routing import DROPPED, FILLED, KEPT, RECTIFIED, Routing, StandIns

SLOTS = ("kept", "filled", "rectified", "dropped", "padding", "local_rows", "unserved")
"""Columns of a count, per layer and rank (METHODS R(f)).

kept, rectified, dropped: what became of the router's top_k choices; filled: fill-in choices that got a slot; padding:
slots nobody took; local_rows: rows computed for stand-ins; unserved: tokens that no expert saw.
"""


@torch.no_grad()
def count_slots(routing: Routing) -> Tensor:
    """int64 [7]: the columns `SLOTS` of one routing, without host synchronisation."""
    k, stand_ins = routing.top_k, routing.stand_ins
    has_slot_TK = routing.slots_TK >= 0
    kept, taken = has_slot_TK[:, :k].sum(), routing.counts_BE.sum()
    lost = routing.num_tokens * k - kept
    bare_T = ~has_slot_TK.any(1)
    rectified = local_rows = torch.zeros_like(kept)
    if stand_ins is not None:
        stood_in_T = stand_ins.expert_T >= 0
        rectified = (~has_slot_TK[:, :k] & stood_in_T.unsqueeze(1)).sum()
        local_rows = stand_ins.counts_BE.sum()
        bare_T = bare_T & ~stood_in_T
    slots = taken if routing.capacity is None else routing.counts_BE.numel() * routing.capacity
    return torch.stack([kept, taken - kept, rectified, lost - rectified, slots - taken, local_rows, bare_T.sum()])


@torch.no_grad()
def count_layers(routings: Sequence[Routing], experts: int | None = None) -> Tensor:
    """int64 [layers, E + 7]: choices per expert before dropping, then the columns `SLOTS`.

    E is `experts`, or those of the fullest of these layers: the others have zeros for experts that they lack.
    """
    if not routings:
        return torch.zeros(0, len(SLOTS), dtype=torch.int64)
    width = max(r.num_experts for r in routings) if experts is None else experts
    return torch.stack([torch.cat([F.pad(r.load_E, (0, width - r.num_experts)), count_slots(r)]) for r in routings])


def check_identities(routing: Routing) -> None:
    """Raises AssertionError where `routing` contradicts itself or METHODS R(f); for debugging, it asks the device."""
    T = routing.num_tokens
    E, B, k = routing.num_experts, routing.num_blocks, routing.top_k
    kinds_TK = routing.kinds_TK
    count: dict[str, int] = dict(zip(SLOTS, count_slots(routing).tolist(), strict=True))
    kinds = {"kept": KEPT, "filled": FILLED, "rectified": RECTIFIED, "dropped": DROPPED}
    found = {name: int((kinds_TK == kind).sum()) for name, kind in kinds.items()}
    for name, number in found.items():
        assert count[name] == number, f"{name}: {count[name]} counted, {number} choices"
    assert count["kept"] + count["rectified"] + count["dropped"] == T * k, count
    has_slot_TK = routing.slots_TK >= 0
    block_T = routing.block_T
    cells_BE = torch.zeros(B, E, dtype=torch.int64, device=kinds_TK.device)
    queue_TK = block_T.unsqueeze(1) * E + routing.experts_TK
    cells_BE.view(-1).index_add_(0, queue_TK[has_slot_TK], torch.ones_like(queue_TK[has_slot_TK]))
    assert cells_BE.equal(routing.counts_BE), "counts_BE disagrees with the slots"
    places = torch.stack([queue_TK[has_slot_TK], routing.slots_TK[has_slot_TK]], 1)
    assert places.unique(dim=0).size(0) == places.size(0), "two choices share a slot"
    if routing.capacity is not None:
        assert count["kept"] + count["filled"] + count["padding"] == B * E * routing.capacity, count
        assert not bool((routing.slots_TK >= routing.capacity).any()), "a slot lies beyond the capacity"
    assert bool(routing.weights_TK.isfinite().all()), "a combine weight is not finite"
    assert not bool(routing.weights_TK[~has_slot_TK].any()), "a choice without a slot has a weight"
    if routing.stand_ins is not None:
        _check_stand_ins(routing, routing.stand_ins, block_T)


def _check_stand_ins(routing: Routing, stand_ins: StandIns, block_T: Tensor) -> None:
    has_row_T, expert_T = stand_ins.slots_T >= 0, stand_ins.expert_T
    queue_T = block_T * routing.num_experts + expert_T
    cells_BE = torch.zeros_like(stand_ins.counts_BE)
    cells_BE.view(-1).index_add_(0, queue_T[has_row_T], torch.ones_like(queue_T[has_row_T]))
    assert cells_BE.equal(stand_ins.counts_BE), "counts_BE disagrees with the rows of stand-ins"
    places = torch.stack([queue_T[has_row_T], stand_ins.slots_T[has_row_T]], 1)
    assert places.unique(dim=0).size(0) == places.size(0), "two stand-ins share a row"
    holds_TK = (routing.slots_TK >= 0) & (routing.experts_TK == expert_T.unsqueeze(1))
    served_once_T = has_row_T ^ holds_TK.any(1)
    assert bool(served_once_T[expert_T >= 0].all()), "a stand-in neither has a row nor holds the token, or both"
    if stand_ins.bound is not None:
        assert not bool((cells_BE.sum(1) > stand_ins.bound).any()), "more rows of stand-ins than the bound"
    assert bool(stand_ins.weight_T.isfinite().all()), "a stand-in's weight is not finite"
    assert not bool(stand_ins.weight_T[~has_row_T].any()), "a stand-in without a row has a weight of its own"


@dataclass
class Exchanged:
    """Totals of one kind of collective on this rank."""

    calls: int = 0
    num_bytes: int = 0
    waited_s: float = 0.0
    hidden_s: float = 0.0
    """Travelling while the rank did other things; on CPUs, elsewhere it is not known."""
    on_device: list[StreamWait] = field(default_factory=list)
    """Waits that are not in `waited_s` yet."""

    def settle(self) -> None:
        """Asks the device for its waits."""
        self.waited_s += sum(wait.seconds() for wait in self.on_device)
        self.on_device.clear()

    def __iadd__(self, other: Exchanged) -> Exchanged:
        self.calls += other.calls
        self.num_bytes += other.num_bytes
        self.waited_s += other.waited_s
        self.hidden_s += other.hidden_s
        return self


@dataclass
class Ledger:
    """What this rank did since the last `clear`: collectives as a `parallel.events.Recorder`, and slots by `add`."""

    by_name: dict[str, Exchanged] = field(default_factory=dict)
    """Collectives by full name, say `layer3.dispatch`."""
    slots_L7: Tensor | None = None
    """int64: columns `SLOTS` per layer."""
    steps: int = 0

    def collective_entered(self, name: str, num_bytes: int) -> None:
        total = self.by_name.setdefault(name, Exchanged())
        total.calls += 1
        total.num_bytes += num_bytes

    def collective_left(self, name: str, waited: float | StreamWait, hidden: float = 0.0) -> None:
        total = self.by_name.setdefault(name, Exchanged())
        total.hidden_s += hidden
        if isinstance(waited, StreamWait):
            total.on_device.append(waited)
        else:
            total.waited_s += waited

    def add(self, counts: Tensor) -> None:
        """Adds one step's `count_layers` of this rank."""
        slots_L7 = counts[:, -len(SLOTS) :]
        self.slots_L7 = slots_L7.clone() if self.slots_L7 is None else self.slots_L7 + slots_L7
        self.steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Counts no collective meanwhile: evaluating is not training."""
        kept, self.by_name = self.by_name, {}
        try:
            yield
        finally:
            self.by_name = kept

    def page(self) -> Page:
        """What was counted since the last `clear`, as plain numbers."""
        collectives: dict[str, Exchanged] = {}
        by_layer: dict[int, Exchanged] = {}
        for name, total in self.by_name.items():
            total.settle()
            where, _, kind = name.rpartition(".")
            collectives.setdefault(kind, Exchanged()).__iadd__(total)
            if where.startswith("layer"):
                by_layer.setdefault(int(where.removeprefix("layer")), Exchanged()).__iadd__(total)
        return Page(
            steps=self.steps,
            slots=[] if self.slots_L7 is None else self.slots_L7.tolist(),
            collectives=collectives,
            by_layer=by_layer,
        )

    def clear(self) -> None:
        self.by_name, self.slots_L7, self.steps = {}, None, 0


@dataclass(frozen=True)
class Page:
    """One rank's account of some steps."""

    steps: int
    slots: list[list[int]]
    """Columns `SLOTS` per layer."""
    collectives: dict[str, Exchanged]
    """By kind, layers taken together."""
    by_layer: dict[int, Exchanged]
    """Collectives that belong to a layer, all kinds taken together."""

    @property
    def sent_bytes(self) -> int:
        return sum(total.num_bytes for total in self.collectives.values())

    @property
    def hidden_s(self) -> float:
        return sum(total.hidden_s for total in self.collectives.values())

    @property
    def waited_s(self) -> float:
        return sum(total.waited_s for total in self.collectives.values())
