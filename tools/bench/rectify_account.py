"""What `rectify-speed` knows of a method beside its time: bytes, slots, rows, memory, the cost of the ledger."""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...launch.metrics import MetricsWriter
from ...launch.step import StepResult
from ...moe.accounts import merge, slot_ratios
from ...moe.ledger import SLOTS, Ledger, count_layers
from ...moe.load import Loads, gini
from ...moe.routing import Routing
from ...parallel.collectives import all_reduce, gather_to_root
from ...parallel.events import Recorders
from ...parallel.expert import local_experts
from ...parallel.mesh import Mesh
from .interleave import Timings
from .rectify_contest import Case

REPEATS = 20
"""Of the ledger's work in `ledger_seconds`."""


def rows_computed(routings: Sequence[Routing], padded: bool, mesh: Mesh) -> Tensor:
    """Rows that this rank's experts compute, empty slots and stand-ins included; int64 [layers]. All ranks call it."""
    held = local_experts(routings[0].num_experts, mesh.expert)
    sent_LE = torch.stack([routing.counts_BE.sum(0) for routing in routings])
    if padded:
        sent_LE = torch.full_like(sent_LE, routings[0].capacity or 0)
    all_reduce(sent_LE, mesh.world, "rows", Recorders())
    stand_ins = [0 if r.stand_ins is None else int(r.stand_ins.counts_BE.sum()) for r in routings]
    return sent_LE[:, held.start : held.stop].sum(1) + torch.tensor(stand_ins)


def ledger_seconds(routings: Sequence[Routing], counts: Tensor, calls: int, every: int, mesh: Mesh) -> float:
    """What a step pays for its account on this rank: counts, events of `calls` collectives, its part of a page.

    counts: those of a step, as `StepResult` has them; every: steps between pages, which rank 0 writes. All ranks call
    it, and do at the same time what they do at the same time in training.
    """
    with tempfile.TemporaryDirectory(prefix="wastenot-ledger-") as folder:
        metrics = MetricsWriter(Path(folder), tensorboard=True)
        try:
            return _ledger_seconds(routings, counts, calls, every, mesh, metrics)
        finally:
            metrics.close()


def _ledger_seconds(
    routings: Sequence[Routing], counts: Tensor, calls: int, every: int, mesh: Mesh, metrics: MetricsWriter
) -> float:
    ledger, loads = Ledger(), Loads()
    counting: list[float] = []
    paging: list[float] = []
    for _ in range(REPEATS):
        fresh = [replace(routing) for routing in routings]  # without what the last round has computed already
        dist.barrier()
        begin = time.perf_counter()
        for number in range(calls):
            name = f"layer{number % len(fresh)}.dispatch"
            ledger.collective_entered(name, 1)
            ledger.collective_left(name, 0.0)
        ledger.add(count_layers(fresh))
        loads.add(counts[:, : -len(SLOTS)])
        counting.append(time.perf_counter() - begin)
        dist.barrier()
        begin = time.perf_counter()
        pages = gather_to_root(ledger.page(), mesh.world, "ledger", Recorders())
        if pages is not None:
            metrics.write(step=0, **merge(pages, loads.read(), int(counts.sum())))
        paging.append(time.perf_counter() - begin)
        ledger.clear()
        loads = Loads()
    return statistics.median(counting) + statistics.median(paging) / every


def peak_resident_bytes() -> int:
    """Most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_row(
    case: Case, method: str, first: StepResult, by_rank: Sequence[Mapping[str, Any]], timings: Timings
) -> dict[str, Any]:
    """One method at one case. Bytes, slots and rows are sums over ranks; of times and memory it is the largest."""
    layers = range(len(first.counts))
    slots = {
        name: [sum(rank["slots"][layer][i] for rank in by_rank) for layer in layers] for i, name in enumerate(SLOTS)
    }
    choices_LE = first.counts[:, : -len(SLOTS)]
    rows_RL = torch.tensor([rank["expert_rows"] for rank in by_rank], dtype=torch.float64)
    seconds = timings.median(method)

    def most(name: str) -> float:
        return max(rank[name] for rank in by_rank)

    on_a_link = by_rank[0]["kernel_bytes"] is not None
    return {
        **asdict(case),
        "world": len(by_rank),
        "gini": gini(choices_LE).mean().item(),
        "method": method,
        "rounds": len(timings.seconds[method]),
        "step_seconds": seconds,
        "vs_vanilla": timings.ratio("vanilla", method),
        "vs_vanilla_quartiles": timings.ratio_quartiles("vanilla", method),
        "vs_dropless": timings.ratio("dropless", method),
        "processor_seconds": most("processor_s"),
        "waited_seconds": most("waited_s"),
        "sent_bytes": sum(rank["sent_bytes"][0] for rank in by_rank),
        "kernel_bytes": sum(rank["kernel_bytes"] for rank in by_rank) if on_a_link else None,
        "slots": {name: sum(slots[name]) for name in SLOTS},
        **slot_ratios(slots, int(choices_LE[0].sum()) // case.top_k),
        "expert_rows": int(rows_RL.sum()),
        "expert_rows_max_over_mean": (rows_RL.amax(0) / rows_RL.mean(0)).mean().item(),
        "saved_bytes": most("saved_bytes"),
        "peak_resident_bytes": most("peak_resident_bytes"),
        "ledger_seconds": most("ledger_s"),
        "ledger_part": most("ledger_s") / seconds,
        "first_loss": first.loss,
    }
