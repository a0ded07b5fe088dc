"""The waste ledger: what became of token slots and choices, how even the load is, bytes and seconds of exchange.

Counts come from `Routing` values that a forward pass returns, never from hooks: recomputation and accumulation
cannot count anything twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
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
def count_layers(routings: Sequence[Routing]) -> Tensor:
    """int64 [layers, E + 7]: choices per expert before dropping, then the columns `SLOTS`."""
    if not routings:
        return torch.zeros(0, len(SLOTS), dtype=torch.int64)
    return torch.stack([torch.cat([r.load_E, count_slots(r)]) for r in routings])


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

    def collective_left(self, name: str, waited: float | StreamWait) -> None:
        total = self.by_name.setdefault(name, Exchanged())
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
        by_layer: dict[int, int] = {}
        for name, total in self.by_name.items():
            total.settle()
            where, _, kind = name.rpartition(".")
            collectives.setdefault(kind, Exchanged()).__iadd__(total)
            if where.startswith("layer"):
                layer = int(where.removeprefix("layer"))
                by_layer[layer] = by_layer.get(layer, 0) + total.num_bytes
        return Page(
            steps=self.steps,
            slots=[] if self.slots_L7 is None else self.slots_L7.tolist(),
            collectives=collectives,
            sent_bytes_by_layer=by_layer,
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
    sent_bytes_by_layer: dict[int, int]
    """Of collectives that belong to a layer."""

    @property
    def sent_bytes(self) -> int:
        return sum(total.num_bytes for total in self.collectives.values())

    @property
    def waited_s(self) -> float:
        return sum(total.waited_s for total in self.collectives.values())


MOST_ROWS = 4096
"""Rank x layer rows up to which accounts are kept for every rank."""


def merge(pages: Sequence[Page], load_LE: Tensor, tokens: int) -> dict[str, Any]:
    """The accounts of all ranks as one, in the words of metrics.jsonl; without slots for a model without experts.

    load_LE: choices per layer and expert over all ranks; tokens: of all ranks and steps.
    """
    collectives: dict[str, Exchanged] = {}
    for page in pages:
        for kind, total in page.collectives.items():
            collectives.setdefault(kind, Exchanged()).__iadd__(total)
    merged: dict[str, Any] = {
        "ledger_steps": pages[0].steps,
        "sent_bytes": sum(page.sent_bytes for page in pages),
        "waited_seconds": sum(page.waited_s for page in pages),
        "sent_bytes_by_rank": [page.sent_bytes for page in pages],
        "waited_seconds_by_rank": [page.waited_s for page in pages],
        "collectives": {
            kind: {"calls": t.calls, "bytes": t.num_bytes, "waited_seconds": t.waited_s}
            for kind, t in sorted(collectives.items())
        },
    }
    layers = len(pages[0].slots)
    if layers:
        total_L7 = [[sum(page.slots[layer][i] for page in pages) for i in range(len(SLOTS))] for layer in range(layers)]
        merged["slots"] = {name: [row[i] for row in total_L7] for i, name in enumerate(SLOTS)}
        merged["sent_bytes_by_layer"] = [
            sum(page.sent_bytes_by_layer.get(layer, 0) for page in pages) for layer in range(layers)
        ]
        if len(pages) * layers <= MOST_ROWS:
            merged["slots_by_rank"] = [page.slots for page in pages]
        merged |= slot_ratios(merged["slots"], tokens)
        load = load_of(load_LE)
        merged |= {
            "expert_load": load.per_layer,
            "expert_load_max_over_mean": load.max_over_mean,
            "expert_load_cv": load.cv,
            "expert_load_entropy": load.entropy,
            "expert_load_gini": load.gini,
            "dead_experts": load.dead,
        }
    return merged


RATIOS = tuple(f"{name}_ratio" for name in SLOTS if name != "local_rows")


def slot_ratios(slots: Mapping[str, Sequence[int]], tokens: int) -> dict[str, float]:
    """Parts of all choices (kept, filled, rectified, dropped), of all slots (padding) and of `tokens` x layers
    (unserved)."""
    total = {name: sum(slots[name]) for name in SLOTS}
    choices = total["kept"] + total["rectified"] + total["dropped"]
    places = total["kept"] + total["filled"] + total["padding"]
    ratios = {f"{name}_ratio": total[name] / max(1, choices) for name in ("kept", "filled", "rectified", "dropped")}
    ratios["padding_ratio"] = total["padding"] / max(1, places)
    ratios["unserved_ratio"] = total["unserved"] / max(1, tokens * len(slots["kept"]))
    return ratios


@dataclass(frozen=True)
class Load:
    """How evenly experts are used; every figure is the mean over layers, but `dead`."""

    max_over_mean: float
    """The busiest expert's load in units of the mean load."""
    cv: float
    """Standard deviation over mean."""
    entropy: float
    """Of the shares, in units of the even one's: 1 is even, 0 one expert for all."""
    gini: float
    """0 is even, towards 1 is one expert for all."""
    dead: int
    """Experts, over all layers, that nobody chose."""
    per_layer: list[list[float]]
    """Part of the choices that each expert got, layer by layer."""


def load_of(load_LE: Tensor) -> Load:
    """Reads choices per layer and expert."""
    load_LE = load_LE.double().cpu()
    E = load_LE.size(1)
    share_LE = load_LE / load_LE.sum(1, keepdim=True).clamp(min=1)
    plogp_LE = torch.where(share_LE > 0, share_LE * share_LE.clamp(min=1e-300).log(), torch.zeros_like(share_LE))
    return Load(
        max_over_mean=(share_LE.amax(1) * E).mean().item(),
        cv=(share_LE.std(1, correction=0) * E).mean().item(),
        entropy=(-plogp_LE.sum(1) / math.log(E)).mean().item() if E > 1 else 1.0,
        gini=gini(share_LE).mean().item(),
        dead=int((load_LE == 0).sum()),
        per_layer=share_LE.tolist(),
    )


def gini(load_LE: Tensor) -> Tensor:
    """Gini coefficient of each row of non-negative loads [..., E]; 0 where a row is all zero."""
    E = load_LE.size(-1)
    ordered = load_LE.double().sort(-1).values
    rank_E = torch.arange(1, E + 1, dtype=torch.float64, device=load_LE.device)
    total = ordered.sum(-1)
    uneven = ((2 * rank_E - E - 1) * ordered).sum(-1) / (E * total.clamp(min=1e-300))
    return torch.where(total > 0, uneven, torch.zeros_like(uneven))


def sum_up(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The account of a whole run from its lines of metrics (those of training, in order); None without slots.

    Lines of other worlds than the last one's count in all sums but those by rank, which are then left out.
    """
    lines = [line for line in lines if "slots" in line]
    if not lines:
        return None
    layers = range(len(lines[-1]["slots"]["kept"]))
    collectives: dict[str, dict[str, float]] = {}
    for line in lines:
        for kind, total in line["collectives"].items():
            into = collectives.setdefault(kind, dict.fromkeys(total, 0))
            for key, value in total.items():
                into[key] += value
    slots = {name: [sum(line["slots"][name][layer] for line in lines) for layer in layers] for name in SLOTS}
    by_rank = [line.get("slots_by_rank") for line in lines]
    worlds = {None if ranks is None else len(ranks) for ranks in by_rank}
    # Each line's shares count as much as its choices.
    weight = [sum(line["slots"][name][0] for name in ("kept", "rectified", "dropped")) for line in lines]
    load_LE = sum(
        torch.tensor(line["expert_load"], dtype=torch.float64) * w for line, w in zip(lines, weight, strict=True)
    )
    assert isinstance(load_LE, Tensor)
    load = load_of(load_LE)
    return {
        "steps": sum(line["ledger_steps"] for line in lines),
        "slots": slots,
        "slots_by_rank": _added(by_rank) if len(worlds) == 1 and None not in worlds else None,
        "collectives": collectives,
        "sent_bytes": sum(line["sent_bytes"] for line in lines),
        "sent_bytes_by_layer": [sum(line["sent_bytes_by_layer"][layer] for line in lines) for layer in layers],
        "waited_seconds": sum(line["waited_seconds"] for line in lines),
        "expert_load": load.per_layer,
        "load": {
            "max_over_mean": load.max_over_mean,
            "cv": load.cv,
            "entropy": load.entropy,
            "gini": load.gini,
            "dead": load.dead,
        },
    }


def _added(tables: Sequence[Any]) -> Any:
    """The sum of equally nested lists of numbers."""
    return torch.tensor(tables, dtype=torch.int64).sum(0).tolist()
