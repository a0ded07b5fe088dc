"""Ledgers of several ranks as one account, in the words of metrics.jsonl, and the account of a whole run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .ledger import SLOTS, Exchanged, Page
from .load import FIGURES, Load

MOST_ROWS = 4096
"""Rank x layer rows up to which accounts are kept for every rank."""

RATIOS = tuple(f"{name}_ratio" for name in SLOTS if name != "local_rows")


def merge(pages: Sequence[Page], load: Load | None, tokens: int) -> dict[str, Any]:
    """The accounts of all ranks as one, in the words of metrics.jsonl; without slots for a model without experts.

    load: of the experts over all ranks; tokens: of all ranks and steps.
    """
    collectives: dict[str, Exchanged] = {}
    for page in pages:
        for kind, total in page.collectives.items():
            collectives.setdefault(kind, Exchanged()).__iadd__(total)
    merged: dict[str, Any] = {
        "ledger_steps": pages[0].steps,
        "sent_bytes": sum(page.sent_bytes for page in pages),
        "waited_seconds": sum(page.waited_s for page in pages),
        "hidden_seconds": sum(page.hidden_s for page in pages),
        "sent_bytes_by_rank": [page.sent_bytes for page in pages],
        "waited_seconds_by_rank": [page.waited_s for page in pages],
        "collectives": {
            kind: {"calls": t.calls, "bytes": t.num_bytes, "waited_seconds": t.waited_s, "hidden_seconds": t.hidden_s}
            for kind, t in sorted(collectives.items())
        },
    }
    if pages[0].slots:
        merged |= _merge_layers(pages, tokens)
    if load is not None:
        merged["expert_load"] = load.per_layer
        merged |= {f"expert_load_{name}": getattr(load, name) for name in FIGURES}
        merged |= {f"expert_load_{name}_by_layer": load.by_layer[name] for name in FIGURES}
        merged["dead_experts"] = load.dead
    return merged


def _merge_layers(pages: Sequence[Page], tokens: int) -> dict[str, Any]:
    """Slots, bytes and waits by layer, and by rank and layer where that is not too much."""
    slots_GL7 = np.array([page.slots for page in pages], dtype=np.int64)
    layers = range(slots_GL7.shape[1])
    exchanged = [[page.by_layer.get(layer, Exchanged()) for layer in layers] for page in pages]
    by_rank = {
        "slots_by_rank": slots_GL7.tolist(),
        "sent_bytes_by_rank_and_layer": [[total.num_bytes for total in rank] for rank in exchanged],
        "waited_seconds_by_rank_and_layer": [[total.waited_s for total in rank] for rank in exchanged],
    }
    slots = {name: slots_GL7.sum(0)[:, i].tolist() for i, name in enumerate(SLOTS)}
    return {
        "slots": slots,
        "sent_bytes_by_layer": [sum(row) for row in zip(*by_rank["sent_bytes_by_rank_and_layer"], strict=True)],
        "waited_seconds_by_layer": [sum(row) for row in zip(*by_rank["waited_seconds_by_rank_and_layer"], strict=True)],
        **(by_rank if len(pages) * len(layers) <= MOST_ROWS else {}),
        **slot_ratios(slots, tokens),
    }


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


HIDING = ("hidden_seconds", "recompute_hidden_seconds", "recompute_exposed_seconds")
"""Of communication and recomputation, over all ranks; lines of earlier versions have none."""


def sum_up(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The account of a whole run from its lines of metrics (those of training, in order); None where there are none.

    Lines of other worlds than the last one's count in all sums but those by rank, which are then left out. A model
    without experts has neither slots nor load.
    """
    lines = [line for line in lines if "ledger_steps" in line]
    if not lines:
        return None
    collectives: dict[str, dict[str, float]] = {}
    for line in lines:
        for kind, total in line["collectives"].items():
            into = collectives.setdefault(kind, {})
            for key, value in total.items():
                into[key] = into.get(key, 0) + value
    account = {
        "steps": sum(line["ledger_steps"] for line in lines),
        "sent_bytes": sum(line["sent_bytes"] for line in lines),
        "waited_seconds": sum(line["waited_seconds"] for line in lines),
        **{name: sum(line.get(name, 0.0) for line in lines) for name in HIDING},
        "sent_bytes_by_rank": added([line["sent_bytes_by_rank"] for line in lines]),
        "waited_seconds_by_rank": added([line["waited_seconds_by_rank"] for line in lines]),
        "collectives": collectives,
    }
    return account | _sum_up_layers(lines) if "slots" in lines[-1] else account


BY_LAYER = (
    "sent_bytes_by_layer",
    "waited_seconds_by_layer",
    "slots_by_rank",
    "sent_bytes_by_rank_and_layer",
    "waited_seconds_by_rank_and_layer",
)
"""Tables of a line that add up over lines."""


def _sum_up_layers(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    slots = {name: added([line["slots"][name] for line in lines]) for name in SLOTS}
    steps = np.array([line["ledger_steps"] for line in lines], dtype=np.float64)
    # Each line's shares count as much as its choices.
    choices = [sum(line["slots"][name][0] for name in ("kept", "rectified", "dropped")) for line in lines]
    by_layer = zip(*(line["expert_load"] for line in lines), strict=True)
    load = [
        (np.array(choices) @ np.array(layer, dtype=np.float64) / max(1, sum(choices))).tolist() for layer in by_layer
    ]
    figures_N4 = np.array([[line[f"expert_load_{name}"] for name in FIGURES] for line in lines])
    figures = dict(zip(FIGURES, (steps @ figures_N4 / steps.sum()).tolist(), strict=True))
    return {
        "slots": slots,
        **{name: added([line.get(name) for line in lines]) for name in BY_LAYER},
        "expert_load": load,
        "load": {**figures, "dead": sum(layer.count(0) for layer in load)},
    }


def added(tables: Sequence[Any]) -> Any:
    """The sum of nested lists of numbers; None where one is missing or empty, or of another shape."""
    if not all(tables):
        return None
    arrays = [np.asarray(table) for table in tables]
    return sum(arrays[1:], arrays[0]).tolist() if len({array.shape for array in arrays}) == 1 else None
