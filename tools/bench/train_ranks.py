"""Benchmark `train-ranks`: tokens/s of a training step on one core and on two ranks with a core each, against others.

The model and the tokens per rank stay the same (weak scaling). wastenot takes turns with one peer after the other, each
in processes of its own: what all together need is more than most machines have. Each is timed only after its first
loss and gradient norm agree with the reference's on one rank. Two processes that never talk, each on its core, show how
far two cores of this machine scale at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from ...launch import cores
from ...launch.errors import UserError
from .agreement import DISAGREES, Difference, FirstStep, compare, expected_of
from .cases import Case, cases, in_both_dtypes
from .interleave import Timings, interleave
from .machine import bf16_notes, use_the_machine
from .peers.remote import Ranks
from .peers.roster import ENTRIES, OURS, Entry, LeftOut, check_installed, make_rank
from .report import Goal, Report, Row, at_least, environment

WORLD = 2
HEADINGS = {
    "case": "case",
    "dtype": "dtype",
    "contender": "contender",
    "tokens_per_second_1_rank": "1 rank",
    "wastenot_speedup_1_rank": "x",
    "tokens_per_second_2_ranks": "2 ranks",
    "wastenot_speedup_2_ranks": "x",
    "scaling": "scaling",
    "scaling_without_communication": "apart",
    "strong_scaling": "strong",
    "why_not": "",
}
GOAL_RATIO = 1.0
AIM_RATIO = 1.1
GOAL_SCALING = 0.9


@dataclass(frozen=True)
class Way:
    """One way in which a contender runs."""

    name: str
    processes: int
    together: bool = True
    """As ranks of one world; else each a world of its own."""
    parts: int = 1
    """Into which the batch of one rank is cut for each of them."""

    def batch(self, case: Case) -> int:
        """Sequences over all ranks that train together, where `case` is that of one rank."""
        return case.batch // self.parts * (self.processes if self.together else 1)


ONE = Way("1 rank", 1)
TWO = Way("2 ranks", WORLD)
APART = Way("2 processes", WORLD, together=False)
"""Each as ONE, at the same time."""
HALVES = Way("2 ranks, half the batch each", WORLD, parts=2)


@dataclass
class Checked:
    """A contender and the ways in which it runs, after its first batches."""

    entry: Entry
    why_not: str = ""
    loss: float | None = None
    """Of the batch of two ranks."""
    difference: Difference | None = None
    """Of that loss, and of the gradient norm; of another of its ways where that is why it was not timed."""
    timings: Timings = field(default_factory=lambda: Timings({}))
    """Of its ways, and of those of wastenot that took turns with them."""


def run(*, quick: bool, command: str, say: Callable[[str], None]) -> Report:
    """Every contender at every case. Raises UserError without a second core or transformers, which is the reference."""
    own = sorted(cores.physical_cores())
    if len(own) < WORLD:
        raise UserError(f"bench train-ranks: needs {WORLD} cores of its own, and may use {len(own)}")
    use_the_machine()
    rows: list[Row] = []
    goals: list[Goal] = []
    some = [replace(case, batch=case.batch // 2) for case in cases(quick)[:1]] if quick else cases(quick)[:2]
    for case in in_both_dtypes(some):
        case_rows, case_goals = run_case(
            case,
            ENTRIES,
            own[:WORLD],
            rounds=11 if quick else 21,
            warmup=1,
            budget_s=10 if quick else 25,
            say=lambda text, case=case: say(f"{case}: {text}"),
        )
        rows += case_rows
        goals += case_goals
    packages = [entry.distribution for entry in ENTRIES if entry.distribution]
    tokens = some[0].num_tokens
    notes = [
        f"{tokens} tokens per rank and one thread per rank, pinned with gloo's threads to a core of its own; loopback",
        "2 ranks: wastenot, deepspeed and megatron-core share the experts (expert parallel), transformers copies them "
        "(DistributedDataParallel)",
        "a step of wastenot is its trainer's: it also measures the gradient norm and accounts for the load of the "
        "experts, on any number of ranks; the peers' is forward, backward, reduction and AdamW",
        "tokens/s; x: how many times as fast wastenot is; scaling: tokens/s on 2 ranks over twice those on 1; apart: "
        "that of two processes at once which share nothing but the machine; strong: the batch of 1 rank over 2",
        f"wastenot aims at {AIM_RATIO:g} times the best peer; megatron-core runs through a CPU shim",
        *bf16_notes(),
    ]
    if quick:
        notes.append("quick: left out the fine-grained case; half the tokens; fewer rounds")
    return Report(
        name="train-ranks",
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
    own: list[int],
    *,
    rounds: int,
    warmup: int,
    say: Callable[[str], None],
    budget_s: float = math.inf,
) -> tuple[list[Row], list[Goal]]:
    """Rows of all `entries` and the goals of one case, whose batch is that of one rank; `own` are two cores.

    Raises UserError where the reference cannot run, RuntimeError where a contender fails.
    """
    batches = {way.batch(case) for way in (ONE, TWO, APART, HALVES)}
    expected = {batch: expected_of(replace(case, batch=batch), "train-ranks") for batch in sorted(batches)}

    found: list[Checked] = []
    ours: dict[str, Callable[[], float]] = {}
    with ExitStack() as until_all:
        for entry in sorted(entries, key=lambda entry: entry.name != OURS):
            with ExitStack() as until_next:
                release = until_all if entry.name == OURS else until_next
                it, running = _check(case, entry, own, expected, release, say)
                if running:
                    turns = ours | running
                    it.timings = interleave(turns, rounds=rounds, warmup=warmup, budget_s=budget_s, say=say)
                if entry.name == OURS and running:
                    ours = {name: running[name] for name in (key(OURS, ONE), key(OURS, TWO))}
                found.append(it)
    return [row_of(case, it) for it in found], goals_of(case, found)


def key(name: str, way: Way) -> str:
    """What the timings call the contender `name` when it runs in this way."""
    return f"{name}: {way.name}"


def row_of(case: Case, it: Checked) -> Row:
    """What was measured of one contender; `case` is that of one rank."""
    name, timings = it.entry.name, it.timings
    one, two = key(name, ONE), key(name, TWO)
    row: dict[str, Any] = {
        "case": case.name,
        "dtype": case.dtype,
        "contender": name,
        "tokens_per_rank": case.num_tokens,
        "loss": it.loss,
        "loss_difference": it.difference and it.difference.loss,
        "grad_norm_difference": it.difference and it.difference.norm,
        "why_not": it.why_not or None,
    }
    if it.why_not:
        return row
    row |= {
        "rounds": len(timings.seconds[one]),
        "tokens_per_second_1_rank": case.num_tokens / timings.median(one),
        "tokens_per_second_2_ranks": WORLD * case.num_tokens / timings.median(two),
        "scaling": timings.ratio(two, one),
        "scaling_quartiles": timings.ratio_quartiles(two, one),
    }
    if name == OURS:
        apart = key(name, APART)
        row["scaling_without_communication"] = timings.ratio(apart, one)
        row["scaling_of_possible"] = timings.ratio(two, apart)
        row["scaling_of_possible_quartiles"] = timings.ratio_quartiles(two, apart)
        row["strong_scaling"] = timings.ratio(key(name, HALVES), one) / WORLD
    elif key(OURS, TWO) in timings.seconds:
        row["wastenot_speedup_1_rank"] = timings.ratio(key(OURS, ONE), one)
        row["wastenot_speedup_2_ranks"] = timings.ratio(key(OURS, TWO), two)
        row["wastenot_speedup_2_ranks_quartiles"] = timings.ratio_quartiles(key(OURS, TWO), two)
    return row


def goals_of(case: Case, checked: list[Checked]) -> list[Goal]:
    """What the benchmark stands for at `case`."""
    ran = {it.entry.name: it.timings for it in checked if not it.why_not}
    ours = ran.pop(OURS, None)
    ratios = {
        name: timings.ratio(key(OURS, TWO), key(name, TWO))
        for name, timings in ran.items()
        if key(OURS, TWO) in timings.seconds
    }
    best = min(ratios, key=lambda name: ratios[name], default=None)
    peers = sum(it.entry.name != OURS for it in checked)
    return [
        at_least(
            f"{case}: speed of wastenot on 2 ranks relative to the best peer" + (f" ({best})" if best else ""),
            ratios[best] if best else None,
            GOAL_RATIO,
        ),
        at_least(f"{case}: peers measured, of {peers}", len(ran), peers),
        at_least(
            f"{case}: scaling of wastenot from 1 to 2 ranks",
            ours.ratio(key(OURS, TWO), key(OURS, ONE)) if ours else None,
            GOAL_SCALING,
        ),
    ]


def _check(
    case: Case,
    entry: Entry,
    own: list[int],
    expected: dict[int, FirstStep],
    release: ExitStack,
    say: Callable[[str], None],
) -> tuple[Checked, dict[str, Callable[[], float]]]:
    """Starts `entry`, until `release`, in all its ways: those to be timed, none unless all agree with `expected`."""
    say(f"building {entry.name}")
    try:
        check_installed(entry)
    except LeftOut as reason:
        return Checked(entry, f"left out: {reason}"), {}
    checked = Checked(entry)
    started: dict[str, Callable[[], float]] = {}
    for way in (ONE, TWO, APART, HALVES) if entry.name == OURS else (ONE, TWO):
        batch = way.batch(case)
        shared = replace(case, batch=batch)
        ranks = Ranks(entry.module, make_rank, entry, shared, cores=own[: way.processes], together=way.together)
        release.callback(ranks.close)
        found = ranks.probe()
        difference = compare(found, expected[batch], case.dtype)
        if way == TWO or not difference.agrees:
            checked.loss, checked.difference = found[0], difference
        if not difference.agrees:
            checked.why_not = f"{DISAGREES} ({way.name})"
            return checked, {}
        started[key(entry.name, way)] = ranks.run
    return checked, started
