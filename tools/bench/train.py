"""Benchmark `train`: tokens/s on CPU of forward, backward and optimizer step, against other implementations.

Same weights, same batch, same optimizer, all contenders taking turns, in fp32 and in bf16 over fp32 weights. A
contender is timed only after its first loss and gradient norm agree with those of the reference in fp32: no number
comes from a model that computes something else.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from .agreement import DISAGREES, Difference, compare, expected_of
from .cases import Case, cases, in_both_dtypes
from .interleave import Timings, interleave
from .machine import bf16_notes, use_the_machine
from .outside import outside_share
from .peers.roster import ENTRIES, OURS, Contender, Entry, LeftOut, start
from .report import Goal, Report, Row, at_least, at_most, environment

HEADINGS = {
    "case": "case",
    "dtype": "dtype",
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
    difference: Difference | None


def run(*, quick: bool, command: str, say: Callable[[str], None]) -> Report:
    """Every contender at every case. Raises UserError without transformers, which is the reference."""
    use_the_machine()
    rows: list[Row] = []
    goals: list[Goal] = []
    for case in in_both_dtypes(cases(quick)):
        case_rows, case_goals = run_case(
            case,
            ENTRIES,
            rounds=9 if quick else 21,
            warmup=2,
            budget_s=20 if quick else 90,
            say=lambda text, case=case: say(f"{case}: {text}"),
        )
        rows += case_rows
        goals += case_goals
        gc.collect()
    packages = [entry.distribution for entry in ENTRIES if entry.distribution]
    notes = [
        "CPU with every core; every contender allocates memory as wastenot's trainer does",
        *bf16_notes(),
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
    expected = expected_of(case, "train")
    checked: list[Checked] = []
    for entry in entries:
        say(f"building {entry.name}")
        try:
            contender = start(entry, case)
        except LeftOut as reason:
            checked.append(Checked(entry, None, f"left out: {reason}", None, None))
            continue
        release.callback(contender.close)
        found = contender.probe()
        difference = compare(found, expected, case.dtype)
        agrees = difference.agrees
        checked.append(Checked(entry, contender if agrees else None, "" if agrees else DISAGREES, found[0], difference))
    return checked


def _row(case: Case, it: Checked, timings: Timings, outside: Mapping[str, float]) -> Row:
    name = it.entry.name
    row: dict[str, Any] = {
        "case": case.name,
        "dtype": case.dtype,
        "contender": name,
        "rounds": None,
        "tokens_per_second": None,
        "seconds_per_step": None,
        "wastenot_speedup": None,
        "wastenot_speedup_quartiles": None,
        "outside_share": outside.get(name),
        "loss": it.loss,
        "loss_difference": it.difference and it.difference.loss,
        "grad_norm_difference": it.difference and it.difference.norm,
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
            f"{case}: speed of wastenot relative to the best peer" + (f" ({best})" if best else ""),
            ratios[best] if best else None,
            GOAL_RATIO,
        ),
        at_least(f"{case}: peers measured, of {len(peers)}", len(ratios), len(peers)),
        at_most(
            f"{case}: part of wastenot's step outside matrix products and attention",
            outside.get(OURS),
            GOAL_OUTSIDE,
        ),
    ]
