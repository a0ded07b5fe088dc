"""Errors about budgets: one line, with a budget that does."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace

from ..launch.errors import UserError
from ..parallel.lynx.assess import assess
from ..parallel.lynx.question import Question
from ..parallel.lynx.solution import InfeasibleError
from .lynx_arguments import question_of

_TRIES = 8
"""A larger budget may suggest another layout, which needs another one."""


def too_small(args: argparse.Namespace, question: Question, error: InfeasibleError) -> UserError:
    """What to tell of `error`, which the `question` that `args` ask ended in."""
    least, is_least = error.smallest, error.is_exact
    for _ in range(_TRIES):
        again = argparse.Namespace(**{**vars(args), "budget": _rounded_up(least)})
        try:
            assess(question_of(again))
            break
        except InfeasibleError as other:
            least, is_least = other.smallest, False
    memory = question.cluster.device.memory
    given = f"the {_rounded_down(memory)} of a device are" if args.budget is None else f"{args.budget} is"
    smallest = "the smallest that fits" if is_least else "the smallest known to fit"
    ways = _ways(question)
    text = f"--budget: {given} too small with --solver {question.solver}; {smallest} is {_rounded_up(least)}"
    if least > memory:
        text += f", more than the {_rounded_down(memory)} of a device" * (args.budget is not None)
        ways += [] if question.layout.zero else ["--zero 1"]
        ways += ["a longer --pipeline", "more --devices"]
    return UserError(f"{text}; use {' or '.join(ways)}" if ways else text)


def _ways(question: Question) -> list[str]:
    """Arguments with which the same budget is enough."""
    found = []
    for what, change in (("--solver heu-mix", {"solver": "heu-mix"}), ("--replay", {"replay": True})):
        other = replace(question, **change)
        if other != question:
            try:
                assess(other)
                found.append(what)
            except InfeasibleError:
                pass
    return found


def beyond_device(args: argparse.Namespace, question: Question) -> UserError | None:
    """What to tell of a budget that a device does not have; None: it has it."""
    device = question.cluster.device
    if question.bytes <= device.memory:
        return None
    return UserError(
        f"--budget: {args.budget} is more than the {_rounded_down(device.memory)} of {device.name}; use at most those, "
        "or a cluster file with more"
    )


def _rounded_up(num_bytes: float) -> str:
    unit, name = (2**30, "GiB") if num_bytes >= 2**30 else (2**20, "MiB")
    return f"{math.ceil(10 * num_bytes / unit) / 10:.1f}{name}"


def _rounded_down(num_bytes: float) -> str:
    return f"{math.floor(10 * num_bytes / 2**30) / 10:.1f}GiB"
