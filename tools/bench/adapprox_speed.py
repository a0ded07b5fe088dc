"""Benchmark `adapprox-speed`: what a step of Adapprox takes, against AdamW on the same parameters.

By shape and rank, and in a whole training step. Ranks are held by max_rank with rank_threshold=0, so that a row says
what that rank costs; ten steps make a round, one of which searches for the rank.
"""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...launch.optimizer_state import state_bytes
from ...launch.profiling import cpu_profile
from ...moe.config import ModelConfig, MoEConfig
from ...moe.decoder import build_decoder
from ...parallel.mesh import single
from ...parallel.optim import Adapprox
from .adapprox_check import check
from .adapprox_speed_cases import Shapes, largest_rank, made_parameters
from .cases import Case, make_batch
from .interleave import Timings, interleave
from .machine import use_the_machine
from .report import Goal, Report, Row, at_most, environment

CYCLE = 10
"""Steps between searches for the rank, and of a round."""
BASE = "AdamW foreach"
WARM_RANKS = (1, 4, 16)
OF_STEP, OF_TRAINING = 2.0, 1.06
"""Times AdamW's optimizer step at rank 16, and times a training step with it: the goals."""

HEADINGS = {
    "case": "parameters",
    "contender": "optimizer",
    "rank": "rank",
    "ms": "ms per step",
    "ratio": "x AdamW foreach",
    "ratio_quartiles": "quartiles",
    "factor_share": "in factors",
    "state_bytes": "bytes of state",
    "tokens": "tokens",
}

NOTES = (
    "Adapprox keeps its first moment in fp32; weight decay is on for all; gradients stay the same from step to step",
    "in factors: part of the time of a step's operators that matrix products and orthonormalisation take",
    "training: forward and backward of one step, measured once a round for all, and then each optimizer's step on its "
    "own copy of weights and moments",
)


CASES = (
    Shapes("one matrix 2048 x 768", ((2048, 768),)),
    Shapes("experts 4 x 2048 x 768", ((4, 2048, 768),)),
    Shapes("experts 64 x 256 x 128", ((64, 256, 128),)),
    Shapes(
        "a layer of GPT-2 117M",
        ((768, 2304), (2304,), (768, 768), (768,), (768, 3072), (3072,), (3072, 768), (768,), *[(768,)] * 4),
    ),
    Shapes("40 matrices 256 x 256", ((256, 256),) * 40),
)

TRAINING = Case(
    name="5.5 M parameters",
    model=ModelConfig(
        vocab_size=2048, d_model=256, layers=3, heads=4, kv_heads=2, moe=MoEConfig(experts=8, d_expert=256)
    ),
    top_k=2,
    batch=64,
    seq_len=256,
)


def run(*, quick: bool, command: str, say: Callable[[str], None]) -> Report:
    """Every optimizer on every case, and in training; raises where Adapprox's steps are wrong."""
    check()
    use_the_machine()
    rows: list[Row] = []
    goals: list[Goal] = []
    for case in CASES:
        found = measure(case, rounds=5 if quick else 21, budget_s=15 if quick else 90, say=say)
        rows += found
        goals += _goals(case, found)
        gc.collect()
    training = measure_training(rounds=3 if quick else 9, say=say)
    rows.append(training)
    metric = f"training step of {TRAINING.num_tokens} tokens, {TRAINING.name}: times that with AdamW"
    goals.append(at_most(metric, training["ratio"], OF_TRAINING))
    notes = [*NOTES]
    if quick:
        notes.append("quick: left out rounds, no case: 5 of each instead of 21, 3 of training instead of 9")
    return Report(
        name="adapprox-speed",
        command=command,
        env=environment(),
        rows=rows,
        goals=goals,
        notes=notes,
        headings=HEADINGS,
    )


def contenders(parameters: Callable[[], list[nn.Parameter]], largest: int) -> dict[str, torch.optim.Optimizer]:
    """All optimizers, each on parameters of its own; `largest` is the rank of a quarter of the smaller side."""
    decay = 0.1

    def adapprox(rank: int, **options: Any) -> Adapprox:
        return Adapprox(
            parameters(), weight_decay=decay, max_rank=rank, rank_threshold=0.0, rank_every=CYCLE, **options
        )

    found: dict[str, torch.optim.Optimizer] = {
        BASE: torch.optim.AdamW(parameters(), weight_decay=decay, foreach=True),
        "AdamW fused": torch.optim.AdamW(parameters(), weight_decay=decay, fused=True),
    }
    found |= {f"warm, rank {rank}": adapprox(rank) for rank in WARM_RANKS}
    found |= {f"warm, rank 16, {momentum}": adapprox(16, momentum=momentum) for momentum in ("int8", "none")}
    found["gaussian, rank 16"] = adapprox(16, start="gaussian")
    found[f"warm, default rank {largest}"] = adapprox(largest)
    return found


def measure(case: Shapes, rounds: int, budget_s: float, say: Callable[[str], None]) -> list[Row]:
    """Rows of one case."""

    optimizers = contenders(lambda: made_parameters(case, "cpu"), largest_rank(case))

    def cycle(optimizer: torch.optim.Optimizer) -> float:
        start = time.perf_counter()
        for _ in range(CYCLE):
            optimizer.step()
        return (time.perf_counter() - start) / CYCLE

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The first steps find the rank.
        for optimizer in optimizers.values():
            optimizer.step()
        timings = interleave(
            {name: lambda optimizer=optimizer: cycle(optimizer) for name, optimizer in optimizers.items()},
            rounds=rounds,
            warmup=1,
            budget_s=budget_s,
            say=lambda text: say(f"{case.name}: {text}"),
        )
        return [_row(case, name, optimizer, timings) for name, optimizer in optimizers.items()]


def _row(case: Shapes, name: str, optimizer: torch.optim.Optimizer, timings: Timings) -> Row:
    row: Row = {
        "case": case.name,
        "parameters": sum(p.numel() for group in optimizer.param_groups for p in group["params"]),
        "contender": name,
        "ms": 1e3 * timings.median(name),
        # How many times as fast AdamW was.
        "ratio": timings.ratio(BASE, name),
        "ratio_quartiles": timings.ratio_quartiles(BASE, name),
        "state_bytes": state_bytes(optimizer),
    }
    if isinstance(optimizer, Adapprox):
        row["rank"] = statistics.fmean(rank for each in optimizer.report() for rank in each.ranks)
        row["factor_share"] = factor_share(optimizer)
    return row


_FACTORS = ("bmm", "cholesky", "linalg")


def factor_share(optimizer: torch.optim.Optimizer) -> float:
    """Part of the operators' own time in a cycle that goes into products and orthonormalisation."""
    with cpu_profile() as trace:
        for _ in range(CYCLE):
            optimizer.step()
    events = [event for event in trace.key_averages() if event.key.startswith("aten::")]
    spent = {event.key.removeprefix("aten::"): event.self_cpu_time_total for event in events}
    factors = sum(us for key, us in spent.items() if any(name in key for name in _FACTORS))
    return factors / max(1, sum(spent.values()))


def _goals(case: Shapes, rows: Sequence[Mapping[str, Any]]) -> list[Goal]:
    [row] = [row for row in rows if row["contender"] == "warm, rank 16"]
    return [at_most(f"{case.name}: optimizer step at rank 16, warm, times AdamW foreach", row["ratio"], OF_STEP)]


def measure_training(rounds: int, say: Callable[[str], None]) -> Row:
    """One training step with Adapprox as it comes, over that with AdamW."""
    model = build_decoder(TRAINING.model, TRAINING.router, single(), seed=0).train()
    inputs_BS, targets_BS = make_batch(TRAINING)
    own = [p for p in model.parameters() if p.requires_grad]
    copies = [nn.Parameter(p.detach().clone()) for p in own]
    adamw = torch.optim.AdamW(copies, weight_decay=0.1, foreach=True)
    adapprox = Adapprox(own, weight_decay=0.1)
    shared: list[float] = []
    seconds: dict[str, list[float]] = {"adamw": [], "adapprox": []}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(rounds + 1):
            say(f"training: round {number} of {rounds}")
            start = time.perf_counter()
            for part in range(4):
                some = slice(part * TRAINING.batch // 4, (part + 1) * TRAINING.batch // 4)
                loss = model.loss_sum(model(inputs_BS[some]).hidden_BSD, targets_BS[some]) / targets_BS.numel()
                loss.backward()
            took = time.perf_counter() - start
            for copy, p in zip(copies, own, strict=True):
                copy.grad = p.grad
            times = {}
            for name, optimizer in (("adamw", adamw), ("adapprox", adapprox)):
                start = time.perf_counter()
                for _ in range(CYCLE):
                    optimizer.step()
                times[name] = (time.perf_counter() - start) / CYCLE
            adapprox.zero_grad()
            if number:
                shared.append(took)
                for name, value in times.items():
                    seconds[name].append(value)
    ratios = [
        (both + ours) / (both + theirs)
        for both, ours, theirs in zip(shared, seconds["adapprox"], seconds["adamw"], strict=True)
    ]
    return {
        "case": f"training, {TRAINING.name}",
        "contender": "Adapprox as it comes",
        "parameters": sum(p.numel() for p in own),
        "tokens": TRAINING.num_tokens,
        "rank": statistics.fmean(rank for each in adapprox.report() for rank in each.ranks),
        "ms": 1e3 * (statistics.median(shared) + statistics.median(seconds["adapprox"])),
        "adapprox_ms": 1e3 * statistics.median(seconds["adapprox"]),
        "adamw_ms": 1e3 * statistics.median(seconds["adamw"]),
        "ratio": statistics.median(ratios),
    }
