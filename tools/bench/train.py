"""Benchmark `train`: tokens/s on CPU of forward, backward and optimizer step, against other implementations.

Same weights, same batch, same optimizer, all contenders taking turns. A contender is timed only after its
first loss and gradient norm agree with the reference's: no number comes from a model that computes something else.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from ...launch.errors import UserError
from .cases import Case, cases
from .interleave import Timings, interleave
from .machine import use_the_machine
from .outside import outside_share
from .peers.roster import ENTRIES, OURS, REFERENCE, Contender, Entry, LeftOut, start
from .report import Goal, Report, Row, at_least, at_most, environment

LOSS_TOLERANCE = 1e-4
"""Largest relative difference of the first batch's loss ..."""
NORM_TOLERANCE = 1e-3
"""... and of its gradient norm."""
HEADINGS = {
    "case": "case",
    "contender": "contender",
    "tokens_per_second": "tokens/s",
    "wastenot_speedup": "wastenot is x times as fast",
    "outside_share": "outside products",
    "loss_difference": "loss differs by",
    "why_not": "",
}
GOAL_RATIO = 1.0
GOAL_OUTSIDE = 0.25


@dataclass(frozen=True)
class Checked:
    """A contender after its first batch."""

    entry: Entry
    contender: Contender | None
    """None where it was left out or disagreed."""
    why_not: str
    loss: float | None
    loss_difference: float | None
    norm_difference: float | None


def run(*, quick: bool, command: str, say: Callable[[str], None]) -> Report:
    """Every contender at every case. Raises UserError without transformers, which is the reference."""
    use_the_machine()
    rows: list[Row] = []
    goals: list[Goal] = []
    for case in cases(quick):
        case_rows, case_goals = run_case(
            case,
            ENTRIES,
            rounds=9 if quick else 21,
            warmup=2,
            budget_s=100 if quick else 600,
            say=lambda text, case=case: say(f"{case.name}: {text}"),
        )
        rows += case_rows
        goals += case_goals
        gc.collect()
    packages = [entry.distribution for entry in ENTRIES if entry.distribution]
    notes = [
        "fp32 on CPU with every core; every contender allocates memory as wastenot's trainer does",
        "megatron-core runs through a CPU shim, in a process of its own",
        "transformers' batched_mm is not a contender: it copies the expert matrices once per routed token",
    ]
    if quick:
        notes.append("quick: left out the wide case; fine-grained takes 4 experts per token instead of 8; fewer rounds")
    return Report(
        name="train",
        command=command,
        env=environment(dict.fromkeys(packages)),
        rows=rows,
        goals=goals,
        notes=notes,
        headings=HEADINGS,
    )


def run_case(
    case: Case,
    entries: tuple[Entry, ...],
    *,
    rounds: int,
    warmup: int,
    say: Callable[[str], None],
    budget_s: float = math.inf,
) -> tuple[list[Row], list[Goal]]:
    """Rows of all `entries` and the goals of one case. Raises UserError where the reference cannot run."""
    with ExitStack() as release:
        checked = _check(case, entries, release, say)
        running = {it.entry.name: it.contender for it in checked if it.contender is not None}
        timings = interleave(
            {name: contender.run for name, contender in running.items()},
            rounds=rounds,
            warmup=warmup,
            budget_s=budget_s,
            say=say,
        )
        say("profiling")
        outside = {
            it.entry.name: outside_share(it.contender.run) for it in checked if it.contender and it.entry.in_profile
        }
    rows = [_row(case, it, timings, outside) for it in checked]
    return rows, _goals(case, checked, timings, outside)


def _check(case: Case, entries: tuple[Entry, ...], release: ExitStack, say: Callable[[str], None]) -> list[Checked]:
    # The reference goes first: the others are held against it.
    ordered = sorted(entries, key=lambda entry: entry.name != REFERENCE)
    expected: tuple[float, float] | None = None
    checked: dict[str, Checked] = {}
    for entry in ordered:
        say(f"building {entry.name}")
        try:
            contender = start(entry, case)
        except LeftOut as reason:
            if expected is None:
                raise UserError(f"bench train: {entry.name} is the reference, and it cannot run: {reason}") from None
            checked[entry.name] = Checked(entry, None, f"left out: {reason}", None, None, None)
            continue
        release.callback(contender.close)
        loss, norm = contender.probe()
        expected = expected or (loss, norm)
        loss_difference = abs(loss - expected[0]) / expected[0]
        norm_difference = abs(norm - expected[1]) / expected[1]
        # Written so that a NaN disagrees.
        agrees = loss_difference <= LOSS_TOLERANCE and norm_difference <= NORM_TOLERANCE
        why_not = "" if agrees else "not timed: it computes something else than the reference"
        checked[entry.name] = Checked(
            entry, contender if agrees else None, why_not, loss, loss_difference, norm_difference
        )
    return [checked[entry.name] for entry in entries]


def _row(case: Case, it: Checked, timings: Timings, outside: Mapping[str, float]) -> Row:
    name = it.entry.name
    row: dict[str, Any] = {
        "case": case.name,
        "contender": name,
        "rounds": None,
        "tokens_per_second": None,
        "seconds_per_step": None,
        "wastenot_speedup": None,
        "wastenot_speedup_quartiles": None,
        "outside_share": outside.get(name),
        "loss": it.loss,
        "loss_difference": it.loss_difference,
        "grad_norm_difference": it.norm_difference,
        "why_not": it.why_not or None,
    }
    if it.contender is None:
        return row
    row["rounds"] = len(timings.seconds[name])
    row["seconds_per_step"] = timings.median(name)
    row["tokens_per_second"] = case.num_tokens / timings.median(name)
    if OURS in timings.seconds and name != OURS:
        row["wastenot_speedup"] = timings.ratio(OURS, name)
        row["wastenot_speedup_quartiles"] = timings.ratio_quartiles(OURS, name)
    return row


def _goals(case: Case, checked: list[Checked], timings: Timings, outside: Mapping[str, float]) -> list[Goal]:
    peers = [it for it in checked if it.entry.name != OURS]
    ratios = {
        it.entry.name: timings.ratio(OURS, it.entry.name)
        for it in peers
        if OURS in timings.seconds and it.contender is not None
    }
    best = min(ratios, key=lambda name: ratios[name], default=None)
    return [
        at_least(
            f"{case.name}: speed of wastenot relative to the best peer" + (f" ({best})" if best else ""),
            ratios[best] if best else None,
            GOAL_RATIO,
        ),
        at_least(f"{case.name}: peers measured, of {len(peers)}", len(ratios), len(peers)),
        at_most(
            f"{case.name}: part of wastenot's step outside matrix products and attention",
            outside.get(OURS),
            GOAL_OUTSIDE,
        ),
    ]
