"""Benchmark `kernels`: the MoE layer alone, forward and backward, against other implementations and against its floor.

Same weights, same tokens, same routing, all contenders taking turns on the CPU. The floor is what nobody who uses
torch's grouped products can be below: those products of the experts alone, on rows that are in order already. A
contender is timed only after its output and all its gradients agree with a reference in fp64.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from .interleave import Timings, interleave
from .layer_cases import LayerCase, layer_cases
from .layer_floor import Floor
from .layer_reference import reference
from .layer_step import PASSES, Pass, Probed
from .machine import use_the_machine
from .peers.layers import LAYERS, LayerContender, start_layer
from .peers.roster import OURS, Entry, LeftOut
from .report import Goal, Report, Row, at_least, environment

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
"""Largest relative difference of output or a gradient, as norms: some ten times what rounding makes in fp32, and
twice in bf16, where one wrong token of 1,024 makes 3e-2."""

FLOOR = "floor"
WORDS: Mapping[Pass, str] = {"forward": "forward", "both": "forward and backward"}
GOAL_MEDIAN = 1.5
"""Times as fast as the median peer, ..."""
GOAL_FLOOR = 1.15
"""... or within so many times the floor's time."""

HEADINGS = {
    "case": "case",
    "contender": "contender",
    "forward_ms": "forward ms",
    "forward_wastenot_speedup": "wastenot is x times as fast",
    "forward_over_floor": "x floor",
    "both_ms": "forward + backward ms",
    "both_wastenot_speedup": "wastenot is x times as fast",
    "both_over_floor": "x floor",
    "saved_mb": "MB saved for backward",
    "peak_mb": "MB at peak",
    "difference": "differs by",
    "why_not": "",
}

NOTES = (
    "the layer alone: gate, dispatch, experts, combine; dropless top-k of a softmax, weights divided by their sum; "
    "weights, tokens and gradients in the dtype of the case; all allocate memory as wastenot's trainer does",
    "wastenot runs what kernels: auto takes on a CPU, vectorised PyTorch",
    "forward is that of training, which keeps what backward needs",
    "floor: the experts' matrix products alone (two forward, four more backward), each of all experts in one call of "
    "torch's grouped_mm, on rows that are in order already; the gate's product is not among them",
    "differs by: the largest relative difference, as norms, of output and gradients from a reference in fp64",
    "MB saved for backward: storages that autograd keeps, weights left out; MB at peak: most alive at once in forward "
    "and backward beyond weights and tokens, gradients of the weights included",
    "megatron-core runs through a CPU shim, in a process of its own, with its sequential experts",
    "torchtitan's experts multiply in bf16 only: it has no fp32 rows",
)


@dataclass(frozen=True)
class Checked:
    """A contender after it was held against the reference."""

    entry: Entry
    contender: LayerContender | None
    """None where it was left out or disagreed."""
    probed: Probed | None
    why_not: str


def run(*, quick: bool, command: str, say: Callable[[str], None]) -> Report:
    """Every contender at every case."""
    use_the_machine()
    rows: list[Row] = []
    goals: list[Goal] = []
    for case in layer_cases():
        case_rows, case_goals = run_case(
            case,
            LAYERS,
            rounds=9 if quick else 41,
            warmup=1 if quick else 2,
            budget_s=6 if quick else 40,
            say=lambda text, case=case: say(f"{case}: {text}"),
        )
        rows += case_rows
        goals += case_goals
        gc.collect()
    notes = [*NOTES]
    if quick:
        notes.append("quick: left out rounds, no case: 9 of each pass instead of 41, fewer where they take long")
    packages = [entry.distribution for entry in LAYERS if entry.distribution]
    return Report(
        name="kernels",
        command=command,
        env=environment(dict.fromkeys(packages)),
        rows=rows,
        goals=goals,
        notes=notes,
        headings=HEADINGS,
    )


def run_case(
    case: LayerCase,
    entries: tuple[Entry, ...],
    *,
    rounds: int,
    warmup: int,
    say: Callable[[str], None],
    budget_s: float = math.inf,
) -> tuple[list[Row], list[Goal]]:
    """Rows of all `entries` and of the floor, and the goals of one case; `budget_s` is that of each pass."""
    with ExitStack() as release:
        checked = _check(case, entries, release, say)
        running = {it.entry.name: it.contender.run for it in checked if it.contender is not None}
        running[FLOOR] = Floor(case).run
        timings: dict[Pass, Timings] = {
            what: interleave(
                {name: partial(work, what) for name, work in running.items()},
                rounds=rounds,
                warmup=warmup,
                budget_s=budget_s,
                say=lambda text, what=what: say(f"{WORDS[what]}: {text}"),
            )
            for what in PASSES
        }
    where = {"case": str(case), **asdict(case)}
    rows: list[Row] = [{**where, **_row(it, timings)} for it in checked]
    rows.append({**where, "contender": FLOOR, **_times(FLOOR, timings)})
    return rows, make_goals(case, entries, timings)


def _check(
    case: LayerCase, entries: tuple[Entry, ...], release: ExitStack, say: Callable[[str], None]
) -> list[Checked]:
    say("computing the reference")
    expected = reference(case)
    checked: list[Checked] = []
    for entry in entries:
        say(f"building {entry.name}")
        try:
            contender = start_layer(entry, case, expected)
        except LeftOut as reason:
            checked.append(Checked(entry, None, None, f"left out: {reason}"))
            continue
        release.callback(contender.close)
        probed = contender.probe()
        # Written so that a NaN disagrees.
        agrees = all(difference <= TOLERANCE[case.dtype] for difference in probed.differences.values())
        why_not = "" if agrees else "not timed: it computes something else than the reference"
        checked.append(Checked(entry, contender if agrees else None, probed, why_not))
    return checked


def _row(it: Checked, timings: Mapping[Pass, Timings]) -> Row:
    row: dict[str, Any] = {"contender": it.entry.name, **_times(it.entry.name, timings)}
    if it.probed is not None:
        row |= asdict(it.probed)
        # Of a tensor: its maximum keeps a NaN.
        row["difference"] = torch.tensor([*it.probed.differences.values()]).max().item()
        row["saved_mb"], row["peak_mb"] = it.probed.saved_bytes / 1e6, it.probed.peak_bytes / 1e6
    return {**row, "why_not": it.why_not or None}


def _times(name: str, timings: Mapping[Pass, Timings]) -> dict[str, Any]:
    """What is known of the speed of `name`; nothing where it did not run."""
    known: dict[str, Any] = {}
    for what, timing in timings.items():
        if name not in timing.seconds:
            continue
        known[f"{what}_rounds"] = len(timing.seconds[name])
        known[f"{what}_ms"] = 1e3 * timing.median(name)
        known[f"{what}_over_floor"] = timing.ratio(FLOOR, name)
        if OURS in timing.seconds and name != OURS:
            known[f"{what}_wastenot_speedup"] = timing.ratio(OURS, name)
            known[f"{what}_wastenot_speedup_quartiles"] = timing.ratio_quartiles(OURS, name)
    return known


def make_goals(case: LayerCase, entries: Sequence[Entry], timings: Mapping[Pass, Timings]) -> list[Goal]:
    """The bars of one case: two for each pass, and that every peer was there that computes in its dtype."""
    peers = [entry.name for entry in entries if entry.name != OURS and case.dtype in entry.dtypes]
    measured = [name for name in peers if name in timings["forward"].seconds]
    found: list[Goal] = []
    for what, timing in timings.items():
        where = f"{case}, {WORDS[what]}: speed of wastenot relative to"
        best = easier = None
        who = ""
        if measured and OURS in timing.seconds:
            speed = {name: timing.ratio(OURS, name) for name in measured}
            who = min(speed, key=lambda name: speed[name])
            best = speed[who]
            easier = max(statistics.median(speed.values()) / GOAL_MEDIAN, GOAL_FLOOR * timing.ratio(OURS, FLOOR))
        found += [
            at_least(f"{where} the best peer" + (f" ({who})" if who else ""), best, 1.0),
            at_least(f"{where} the easier of {GOAL_MEDIAN:g} x median peer, floor / {GOAL_FLOOR:g}", easier, 1.0),
        ]
    return [*found, at_least(f"{case}: peers measured, of {len(peers)}", len(measured), len(peers))]
