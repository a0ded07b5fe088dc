"""`wastenot plan`: decides what every rank keeps and recomputes, writes it as a file, and says why."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..launch.errors import UserError
from ..launch.run_folder import write_atomically
from ..parallel.lynx.assess import assess
from ..parallel.lynx.explain import Explanation, explain
from ..parallel.lynx.plain import to_plain
from ..parallel.lynx.plan import Plan, plan_of, read_plan, write_plan
from ..parallel.lynx.solution import InfeasibleError
from ..parallel.lynx.units import show_bytes
from .lynx_arguments import add_question_arguments, question_of
from .lynx_refusal import beyond_device, too_small
from .output import check_output, refusals_named

HELP = "plan recomputation inside communication windows, or explain a plan"
EXAMPLE = """
wastenot plan mixtral-8x7b --devices 64 --pipeline 4 --expert 8 --budget 50GiB -o plan.yaml
wastenot plan explain plan.yaml 'expert up'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `wastenot plan`; those of `plan explain` are read by `run`."""
    add_question_arguments(parser)
    parser.add_argument("more", nargs="*", metavar="…", help="after `explain`: the plan's file and the operator")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the plan to FILE")
    parser.add_argument("--rank", type=int, metavar="N", help="explain: of this pipeline rank")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Plans, or explains a plan."""
    if args.config == "explain":
        if len(args.more) != 2:
            raise UserError(
                "plan explain: give the plan's file and an operator, as in: wastenot plan explain p.yaml qkv"
            )
        return _explain(*args.more, rank=args.rank, as_json=args.json)
    if args.more:
        raise UserError(f"plan: {args.more[0]!r} is one argument too many; see `wastenot plan --help`")
    if args.output is not None:
        check_output(args.output, b"recomputation plan by `wastenot plan`", "a plan", "plan.yaml")
    question = question_of(args)
    if (refusal := beyond_device(args, question)) is not None:
        raise refusal
    try:
        plan = plan_of(assess(question))
    except InfeasibleError as error:
        raise too_small(args, question, error) from error
    except ValueError as error:
        raise UserError(str(error)) from error
    if args.output is not None:
        with refusals_named(args.output):
            write_atomically(args.output, write_plan(plan))
    if args.json:
        print(json.dumps(_as_json(plan), allow_nan=False))
    else:
        _show(plan, args.output)
    return 0


def _as_json(plan: Plan) -> dict[str, Any]:
    return {
        "hash": plan.hash,
        "solver": plan.solver,
        "predicted": dict(plan.predicted),
        "policies": to_plain(plan.policies),
        "stages": to_plain(plan.stages),
    }


def _show(plan: Plan, output: Path | None) -> None:
    console = Console()
    table = Table(title=f"plan {plan.hash} by {plan.solver}")
    for heading in ("rank", "layers", "in flight", "hidden ms", "exposed ms", "peak", "gap", "search s"):
        table.add_column(heading, justify="right" if heading != "layers" else "left")
    for stage in plan.stages:
        layers = ", ".join(f"{stage.layers.count(name)} x {name}" for name in dict.fromkeys(stage.layers))
        rank = str(stage.rank) if len({each.chunk for each in plan.stages}) == 1 else f"{stage.rank}.{stage.chunk}"
        gap = "" if stage.gap is None else f"{100 * stage.gap:.1f} %"
        table.add_row(
            rank, layers, str(stage.in_flight), f"{1e3 * stage.hidden:.2f}", f"{1e3 * stage.exposed:.2f}",
            show_bytes(stage.peak), gap, f"{stage.search_seconds:.2f}",
        )  # fmt: skip
    console.print(table)
    for name, policy in plan.policies.items():
        console.print(f"[bold]{name}[/bold]: " + _in_words(policy), highlight=False)
    for note in dict.fromkeys(stage.note for stage in plan.stages if stage.note):
        console.print(f"note: {note}", markup=False, highlight=False)
    step, tokens, mfu, peak = (
        plan.predicted[key] for key in ("step_seconds", "tokens_per_second_per_device", "mfu", "peak_bytes")
    )
    console.print(
        f"predicted: {step:.3f} s a step, {tokens:,.0f} tokens/s on a device, MFU {100 * mfu:.1f} %, "
        f"{show_bytes(peak)} at most",
        highlight=False,
    )
    if output is not None:
        console.print(f"written: {output}", markup=False, highlight=False)


def _in_words(policy: Any) -> str:
    by_word: dict[str, list[str]] = {}
    for operator, word in policy.items():
        by_word.setdefault(word, []).append(operator)
    return "; ".join(f"{word}: {', '.join(operators)}" for word, operators in by_word.items())


def _explain(path: str, operator: str, *, rank: int | None, as_json: bool) -> int:
    try:
        found = explain(read_plan(path), operator, rank)
    except ValueError as error:
        raise UserError(str(error)) from error
    if as_json:
        json.dump(to_plain(found), sys.stdout)
        print()
    else:
        _show_explanation(found)
    return 0


def _show_explanation(found: Explanation) -> None:
    console = Console()
    console.print(
        f"[bold]{found.operator}[/bold] on rank {found.rank}, {len(found.layers)} layers: [bold]{found.word}[/bold]. "
        f"{1e3 * found.seconds:.3g} ms to compute, {show_bytes(found.bytes)} to keep for each of {found.in_flight} "
        f"micro-batches in flight. It reads {', '.join(found.inputs) or 'nothing'}; read by "
        f"{', '.join(found.read_by) or 'nobody'}.",
        highlight=False,
    )
    console.print(f"Because {found.reason}.", markup=False, highlight=False)
    table = Table(title=f"in all {len(found.layers)} layers at once; budget {show_bytes(found.budget)}")
    for heading in ("instead", "exposed ms", "peak", "why not"):
        table.add_column(heading, justify="left" if heading in ("instead", "why not") else "right")
    for way in found.alternatives:
        exposed = "" if way.exposed is None else f"{1e3 * way.exposed:.3f}"
        peak = "" if way.peak is None else show_bytes(way.peak)
        word = f"[bold]{way.word}[/bold] (planned)" if way.is_planned else way.word
        table.add_row(word, exposed, peak, way.why_not)
    console.print(table)
