"""`wastenot compress plan`: what goes, decided by the scores of a profile, or searched for within a budget."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from ...launch.console import RunConsole
from ...launch.errors import UserError
from ...launch.streamed import open_streamed
from ...launch.units import parse_size
from ...moe.compress.calibration import Calibration
from ...moe.compress.choose import (
    Protect,
    drop_blocks,
    drop_experts,
    drop_layers,
    empty_plan,
    iterate,
    place_experts,
)
from ...moe.compress.cost import bytes_of, parameters_of, seconds_of, time_layers
from ...moe.compress.criteria import EXPERT_CRITERIA
from ...moe.compress.evaluate import Evaluator
from ...moe.compress.plan import DropPlan, Method, Pattern, Quantize, Shape, Slim, write_plan
from ...moe.compress.profile import Profile, measure, read_profile
from ...moe.compress.search import KINDS, Options, Step, Target, search
from ...moe.compress.streamed import StreamedModel
from .text_arguments import add_text_arguments, text_of

HELP = "decide what goes: by the scores of a profile, or searched for within a budget"
EXAMPLE = """
wastenot compress plan profiles/deep plan.yaml --drop-layers 4
wastenot compress plan profiles/deep plan.yaml --drop-blocks 2 --consecutive --keep-experts 6 --criterion reap
wastenot compress plan profiles/deep plan.yaml --checkpoint runs/deep --target params=6M
"""

_TARGETS = ("bytes", "params", "step-time", "kl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `wastenot compress plan`."""
    parser.add_argument("profile", metavar="PROFILE", type=Path, help="what `compress profile` wrote")
    parser.add_argument("plan", metavar="PLAN", type=Path, help="the YAML file to write")
    add_choice_arguments(parser)
    parser.add_argument("--checkpoint", type=Path, help="the checkpoint, for --iterative, --target and --ranks")
    add_text_arguments(parser, windows=32)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_choice_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `plan` and `auto` share: the drops asked for, or the budget."""
    drops = parser.add_argument_group("what goes")
    drops.add_argument("--drop-layers", type=int, default=0, metavar="N", help="MoE layers (norm, router, experts)")
    drops.add_argument("--drop-blocks", type=int, default=0, metavar="N", help="whole blocks")
    drops.add_argument("--consecutive", action="store_true", help="blocks that are neighbours, scored together")
    drops.add_argument("--iterative", action="store_true", help="one at a time, each scored after those before it")
    drops.add_argument("--keep-experts", type=int, metavar="N", help="experts left in each layer")
    drops.add_argument("--criterion", choices=EXPERT_CRITERIA, default="mass", help="worth of an expert (%(default)s)")
    drops.add_argument("--scope", choices=("layer", "global"), default="layer", help="N in each layer, or on average")
    drops.add_argument("--multiple-of", type=int, default=1, metavar="N", help="experts left in a layer divide by N")
    drops.add_argument(
        "--skip", action="store_true", help="routers keep the rows of dropped experts, whose part is lost"
    )
    drops.add_argument("--slim", choices=get_args(Method), help="zeros among the weights of experts")
    drops.add_argument("--pattern", choices=get_args(Pattern), default="unstructured", help="(%(default)s)")
    drops.add_argument("--sparsity", type=float, default=0.5, help="part of zeros (%(default)s)")
    drops.add_argument("--bits", type=int, choices=(4, 8), help="of weights")
    drops.add_argument("--group", type=int, default=32, help="weights that share a scale (%(default)s)")
    drops.add_argument("--protect", default="0,0", metavar="FIRST,LAST", help="so many layers stay whole (%(default)s)")
    drops.add_argument("--ranks", type=int, default=1, metavar="N", help="order experts so that N ranks share the load")
    budget = parser.add_argument_group("or a budget")
    budget.add_argument(
        "--target",
        metavar="WHAT=MOST",
        help=f"{', '.join(_TARGETS)}: bytes=20GiB, step-time=0.7 (of "
        "the whole model's), kl=0.1 (nats; the least parameters for that)",
    )
    budget.add_argument("--kinds", default=",".join(KINDS), help="drops to try (%(default)s)")
    budget.add_argument("--candidates", type=int, default=3, metavar="N", help="of each kind and step (%(default)s)")
    budget.add_argument("--unequal", action="store_true", help="layers may keep different numbers of experts")


def run(args: argparse.Namespace) -> int:
    """Writes the plan."""
    profile = read_profile(args.profile)
    console = RunConsole(speaks=True)
    needs = args.iterative or args.target or args.ranks > 1
    model, text = None, None
    if needs:
        if args.checkpoint is None:
            raise UserError("--checkpoint: --iterative, --target and --ranks score again; name the checkpoint")
        model = open_streamed(args.checkpoint)
        if model.fingerprint != profile.base:
            raise UserError(f"{args.profile}: is a profile of another checkpoint than {args.checkpoint}; profile that")
        text = text_of(args.checkpoint, args, "val")
    plan, steps = choose(args, profile, model, text, console)
    write_plan(plan, args.plan)
    figures = _figures(args, plan, steps)
    print(json.dumps(figures, indent=2) if args.json else _told(figures, steps))
    return 0


def choose(
    args: argparse.Namespace,
    profile: Profile,
    model: StreamedModel | None,
    text: Calibration | None,
    console: RunConsole,
) -> tuple[DropPlan, list[Step]]:
    """The plan that `args` ask for, and the steps of its search, if there was one.

    `model` and `text` (held out) are there where `args` score again.
    """
    protect = _protect(args.protect)
    plan = empty_plan(profile)
    if args.skip:
        plan = replace(plan, semantics="skip")
    # Before any search: a budget of bytes is one of the bytes that are left.
    if args.slim:
        plan = replace(plan, slim=Slim(method=args.slim, pattern=args.pattern, sparsity=args.sparsity))
    if args.bits:
        plan = replace(plan, quantize=Quantize(bits=args.bits, group=args.group))

    def rescore(plan: DropPlan) -> Profile:
        assert model is not None and text is not None
        return measure(model, text, profile.config, plan=plan)

    def several(count: int, drop: Callable[[DropPlan, Profile, int], DropPlan]) -> None:
        nonlocal plan
        if count and args.iterative:
            plan = iterate(plan, count, lambda plan, scored: drop(plan, scored, 1), rescore)
        elif count:
            plan = drop(plan, profile, count)

    steps: list[Step] = []
    if args.target is not None:
        if args.drop_layers or args.drop_blocks or args.keep_experts is not None:
            raise UserError("--target: finds out what goes; leave --drop-layers, --drop-blocks and --keep-experts out")
        assert model is not None and text is not None
        steps = _search(args, plan, model, text, rescore, protect, console)
        plan = steps[-1].plan
    mode = "consecutive" if args.consecutive else "discrete"
    if args.consecutive and args.iterative:
        raise UserError("--consecutive: neighbours go together, and not one at a time; leave --iterative out")
    several(args.drop_blocks, lambda plan, scored, n: drop_blocks(plan, scored, n, mode, protect))
    several(args.drop_layers, lambda plan, scored, n: drop_layers(plan, scored, n, protect))
    if args.keep_experts is not None:
        plan = drop_experts(plan, profile, args.keep_experts, args.criterion, args.scope, args.multiple_of, protect)
    if args.ranks > 1:
        plan = place_experts(plan, rescore(plan), args.ranks)
    if plan == empty_plan(profile):
        raise UserError(
            "nothing is to go: give --drop-layers, --drop-blocks, --keep-experts, --slim, --bits or --target"
        )
    return plan, steps


def check_counts(args: argparse.Namespace, shape: Shape) -> None:
    """Raises UserError where no profile could let a model of `shape` lose what `args` ask for."""
    moe_layers = shape.moe_layers
    for name, asked, most in (
        ("drop-layers", args.drop_layers, len(moe_layers)),
        ("drop-blocks", args.drop_blocks, shape.layers - 1),
    ):
        if not 0 <= asked <= most:
            raise UserError(f"--{name}: {asked} cannot go; use 0 to {most}")
    fullest = max(shape.experts)
    if args.keep_experts is not None and not shape.top_k <= args.keep_experts <= fullest:
        nearest = min(max(args.keep_experts, shape.top_k), fullest)
        raise UserError(
            f"--keep-experts: {args.keep_experts} of {fullest} cannot be left where the router chooses {shape.top_k}; "
            f"use {nearest}"
        )


def _search(
    args: argparse.Namespace,
    plan: DropPlan,
    model: StreamedModel,
    text: Calibration,
    rescore: Callable[[DropPlan], Profile],
    protect: Protect,
    console: RunConsole,
) -> list[Step]:
    kinds = tuple(args.kinds.split(","))
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UserError(f"--kinds: {unknown[0]!r} is none; use some of {', '.join(KINDS)}")
    judge = Evaluator(model, text)
    target = _target(args.target, plan, model, text)
    options = Options(
        kinds=kinds,
        each=args.candidates,
        criterion=args.criterion,
        experts_step=args.multiple_of,
        uniform=not args.unequal,
        protect=protect,
    )
    steps: list[Step] = []
    for step in search(plan, judge, rescore, target, options):
        steps.append(step)
        left = step.plan
        console.say(
            f"plan: {len(left.survivors)} blocks, {sum(map(bool, left.result.experts))} MoE layers, "
            f"{sum(left.result.experts)} experts; {target.name} {step.cost:,.4g}, KL {step.quality.kl:.4f}"
        )
    return steps


def _target(given: str, plan: DropPlan, model: StreamedModel, text: Calibration) -> Target:
    name, _, value = given.partition("=")
    if name not in _TARGETS or not value:
        raise UserError(f"--target: {given!r} is not WHAT=MOST; WHAT is one of {', '.join(_TARGETS)}, as in params=6M")
    if name in ("bytes", "params"):
        cost = bytes_of if name == "bytes" else parameters_of
        return Target(name, lambda plan: cost(plan, model), most=float(parse_size(value)))
    try:
        number = float(value)
    except ValueError:
        raise UserError(f"--target: {value!r} is no number, as in {name}=0.5") from None
    if name == "kl":
        return Target(name, lambda plan: parameters_of(plan, model), kl=number)
    if not 0 < number < 1:
        raise UserError(f"--target: {value} is outside (0, 1); step-time is a part of the whole model's, as in 0.7")
    seconds = time_layers(model, text)
    return Target(name, lambda plan: seconds_of(plan, seconds), most=number * seconds_of(plan, seconds))


def _protect(given: str) -> Protect:
    parts = given.split(",")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise UserError(f"--protect: {given!r} is not FIRST,LAST; use for example 1,1")
    return Protect(first=int(parts[0]), last=int(parts[1]))


def _figures(args: argparse.Namespace, plan: DropPlan, steps: list[Step]) -> dict[str, Any]:
    return {
        "plan": str(args.plan),
        "hash": plan.hash,
        "blocks": list(plan.blocks),
        "layers": list(plan.layers),
        "experts": {str(layer): list(gone) for layer, gone in plan.experts.items()},
        "criteria": dict(plan.criteria),
        "blocks_left": len(plan.survivors),
        "experts_left": sum(plan.result.experts),
        "search": [
            {
                "hash": step.plan.hash,
                "cost": step.cost,
                "kl": step.quality.kl,
                "loss": step.quality.loss,
                "tried": step.tried,
            }
            for step in steps
        ],
    }


def _told(figures: dict[str, Any], steps: list[Step]) -> str:
    gone = {"blocks": figures["blocks"], "MoE layers": figures["layers"]}
    said = [f"{name} {', '.join(map(str, which))}" for name, which in gone.items() if which]
    if figures["experts"]:
        said.append(f"{sum(map(len, figures['experts'].values()))} experts of {len(figures['experts'])} layers")
    lines = [f"{figures['plan']}: {'; '.join(said) + ' go' if said else 'all stays'}, plan {figures['hash']}"]
    if steps:
        lines.append(f"  KL {steps[-1].quality.kl:.4f} nats per token from the whole model, on held-out text")
    return "\n".join(lines)
