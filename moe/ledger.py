"""What a run wasted: token slots, expert imbalance, bytes and seconds of communication."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .routing import Routing


@dataclass
class Exchanged:
    """Totals of one kind of collective on this rank."""

    calls: int = 0
    num_bytes: int = 0
    waited_s: float = 0.0


@dataclass
class Ledger:
    """Counts collectives as a `parallel.events.Recorder`, per kind, since the last `take`."""

    kinds: dict[str, Exchanged] = field(default_factory=dict)

    def collective_entered(self, name: str, num_bytes: int) -> None:
        kind = self.kinds.setdefault(name, Exchanged())
        kind.calls += 1
        kind.num_bytes += num_bytes

    def collective_left(self, name: str, waited_s: float) -> None:
        self.kinds.setdefault(name, Exchanged()).waited_s += waited_s

    def take(self) -> dict[str, Exchanged]:
        """The totals since the last call."""
        kinds, self.kinds = self.kinds, {}
        return kinds


def count_choices(routings: Sequence[Routing]) -> Tensor:
    """int64 [layers, E + 2]: choices per expert before dropping, then choices made, then choices kept."""
    rows = [torch.cat([r.load_E, torch.stack([r.load_E.sum(), r.num_kept])]) for r in routings]
    return torch.stack(rows) if rows else torch.zeros(0, 2, dtype=torch.int64)


@dataclass(frozen=True)
class LoadReport:
    """How evenly the experts were used, from counts over all ranks."""

    max_over_mean: float
    """Mean over layers of the busiest expert's load in units of the mean load."""
    dead: int
    """Experts, over all layers, that nobody chose."""
    dropped_ratio: float
    """Part of all choices that found no slot."""
    per_layer: list[list[float]]
    """Part of the choices that each expert got, layer by layer."""


def report_load(counts: Tensor) -> LoadReport | None:
    """Reads the sum over ranks of `count_choices`; None for a model without experts."""
    if counts.size(0) == 0:
        return None
    load_LE = counts[:, :-2].double()
    share_LE = load_LE / load_LE.sum(1, keepdim=True).clamp(min=1)
    made, kept = counts[:, -2].sum().item(), counts[:, -1].sum().item()
    return LoadReport(
        max_over_mean=(share_LE.amax(1) * share_LE.size(1)).mean().item(),
        dead=int((load_LE == 0).sum()),
        dropped_ratio=1 - kept / max(made, 1),
        per_layer=share_LE.tolist(),
    )
