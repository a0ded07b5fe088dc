"""Benchmark `adapprox-speed-gpu`: a step on a CUDA device against torch's fused AdamW, and the memory it moves.

Each optimizer has parameters of its own and runs alone; rounds of ten steps between CUDA events, one of which searches
for the rank.
"""

from __future__ import annotations

import gc
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...launch.optimizer_state import state_bytes
from ...parallel.optim import Adapprox
from .adapprox_check import check
from .adapprox_speed_cases import Shapes, largest_rank, made_parameters
from .machine import needs_cuda
from .report import Goal, Report, Row, at_most, environment

CYCLE, ROUNDS, QUICK_ROUNDS = 10, 5, 2
BUDGET_S = 5.0
"""Of one optimizer: slow ones have fewer rounds."""
BASE = "AdamW fused"
OF_STEP = 2.0
"""Times fused AdamW's step at rank 16: the goal, as on a CPU."""
CASES = (
    Shapes("experts 32 x 7168 x 2048", ((32, 7168, 2048),)),
    Shapes("one matrix 2048 x 768", ((2048, 768),)),
)
LARGE = CASES[0]
HEADINGS = {
    "case": "parameters",
    "contender": "optimizer",
    "rank": "rank",
    "ms": "ms per step",
    "ratio": "x AdamW fused",
    "of_copy": "of a copy's bandwidth",
    "state_bytes": "bytes of state",
    "peak_bytes": "more at peak",
}
NOTES = (
    "rounds of ten steps between CUDA events, each optimizer alone; of a copy's bandwidth: the fewest bytes that "
    "such a step moves (gradients twice, once more for each further round, weights and first moment there and back) "
    "over its time",
    "more at peak: allocated at once within a step, beyond weights, gradients and state",
)
_DECAY = 0.1


@dataclass(frozen=True)
class Contender:
    """An optimizer, and the fewest bytes a step of it moves for each parameter."""

    name: str
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    bytes_moved: int


def contenders(largest: int) -> list[Contender]:
    """All of them; `largest` is the rank of a quarter of the smaller side."""

    def adapprox(name: str, bytes_moved: int, rank: int, **options: Any) -> Contender:
        def make(parameters: list[nn.Parameter]) -> Adapprox:
            return Adapprox(
                parameters, weight_decay=_DECAY, max_rank=rank, rank_threshold=0.0, rank_every=CYCLE, **options
            )

        return Contender(name, make, bytes_moved)

    def adamw(name: str, **options: Any) -> Contender:
        return Contender(name, lambda p: torch.optim.AdamW(p, weight_decay=_DECAY, **options), 7 * 4)

    # The gradient twice, weights and first moment there and back.
    found = [adamw(BASE, fused=True), adamw("AdamW foreach", foreach=True)]
    found += [adapprox(f"warm, rank {rank}", 6 * 4, rank) for rank in (1, 4, 16, 64)]
    found += [adapprox("warm, rank 16, int8", 4 * 4 + 2, 16, momentum="int8")]
    found += [adapprox("warm, rank 16, none", 4 * 4, 16, momentum="none")]
    found += [adapprox("gaussian, rank 16", 14 * 4, 16, start="gaussian")]
    found += [adapprox("warm, rank 16, without kernels", 6 * 4, 16, backend="torch")]
    found += [adapprox(f"warm, default rank {largest}", 6 * 4, largest)]
    return found


def run(*, quick: bool, command: str, say: Callable[[str], None]) -> Report:
    """Every optimizer on every case; UserError where there is no CUDA device."""
    needs_cuda("adapprox-speed-gpu")
    check("cuda")
    copied = copy_bandwidth()
    rows: list[Row] = []
    for case in CASES:
        rows += measure_case(case, QUICK_ROUNDS if quick else ROUNDS, copied, say)
    notes = [*NOTES]
    if quick:
        notes.append(f"quick: {QUICK_ROUNDS} rounds instead of {ROUNDS}; no case is left out")
    return Report(
        name="adapprox-speed-gpu",
        command=command,
        env=environment(["triton"])
        | {"device": f"cuda: {torch.cuda.get_device_name()}", "copy_bytes_per_second": copied},
        rows=rows,
        goals=goals(rows),
        notes=notes,
        headings=HEADINGS,
    )


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of a gigabyte on the device."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / statistics.median(_seconds(lambda: target.copy_(source)) for _ in range(7))


def measure_case(case: Shapes, rounds: int, copied: float, say: Callable[[str], None]) -> list[Row]:
    """One row per optimizer."""
    rows: list[Row] = []
    for contender in contenders(largest_rank(case)):
        say(f"{case.name} on {torch.cuda.get_device_name()}: {contender.name}")
        rows.append(_row(case, contender, rounds, copied))
        gc.collect()
        torch.cuda.empty_cache()
    base = rows[0]["ms"]
    return [{**row, "ratio": row["ms"] / base} for row in rows]


def _row(case: Shapes, contender: Contender, rounds: int, copied: float) -> dict[str, Any]:
    parameters = made_parameters(case, "cuda")
    optimizer = contender.make(parameters)

    def cycle() -> None:
        for _ in range(CYCLE):
            optimizer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The first steps find the rank.
        optimizer.step()
        rounds = min(rounds, max(1, int(BUDGET_S / _seconds(cycle))))
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        seconds = statistics.median(_seconds(cycle) for _ in range(rounds)) / CYCLE
        peak = torch.cuda.max_memory_allocated() - held
    numbers = sum(p.numel() for p in parameters)
    row: dict[str, Any] = {
        "case": case.name,
        "contender": contender.name,
        "parameters": numbers,
        "ms": 1e3 * seconds,
        "of_copy": contender.bytes_moved * numbers / copied / seconds,
        "state_bytes": state_bytes(optimizer),
        "peak_bytes": peak,
    }
    if isinstance(optimizer, Adapprox):
        row["rank"] = statistics.fmean(rank for each in optimizer.report() for rank in each.ranks)
    return row


def _seconds(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def goals(rows: Sequence[Row]) -> list[Goal]:
    """A step at rank 16 on the large experts."""
    found = {row["contender"]: row["ratio"] for row in rows if row["case"] == LARGE.name}
    return [at_most(f"{LARGE.name}: step at rank 16, warm, times AdamW fused", found["warm, rank 16"], OF_STEP)]
