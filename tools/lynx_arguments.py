"""Arguments that `simulate`, `plan` and `profile` share, and the question they make."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..launch.errors import UserError
from ..parallel.lynx.balance import balanced
from ..parallel.lynx.calibration import calibrated, read_calibration
from ..parallel.lynx.cluster import read_cluster
from ..parallel.lynx.layout import Layout, data_over, with_global_batch
from ..parallel.lynx.nearest import suggestion
from ..parallel.lynx.question import Question
from ..parallel.lynx.routing_skew import parse_skew
from ..parallel.lynx.schedules import SCHEDULES, USUAL_CHUNKS
from ..parallel.lynx.solve import SOLVERS
from ..parallel.lynx.suggest import suggested_layout
from ..parallel.lynx.units import parse_quantity
from .lynx_input import read_model

_DEVICES = 8
"""Where none are asked for: one node."""
_DEGREES = ("tensor", "expert", "pipeline")
_LAYOUT = ("tensor", "expert", "pipeline", "chunks", "seq_len", "micro_batch", "micro_batches", "zero")
_MEANINGS: Mapping[str, str] = {
    "tensor": "tensor-parallel ranks (sequence parallelism comes with them)",
    "expert": "expert-parallel ranks",
    "pipeline": "pipeline stages",
    "chunks": "virtual stages per rank; 2 for interleaved and dualpipev",
    "seq_len": "tokens of a sequence",
    "micro_batch": "sequences of a micro-batch",
    "micro_batches": "micro-batches per step and data-parallel rank",
    "zero": "what data parallelism cuts: 0 nothing, 1 optimizer state, 3 weights and gradients too",
}


_PLAIN: Mapping[str, Any] = {
    "budget": None,
    "schedule": None,
    "solver": None,
    "replay": False,
    "balance": False,
    "optimizer": None,
    "calibration": None,
    "time_limit": 60.0,
}
"""What plans depend on, where nothing is said."""


def add_question_arguments(parser: argparse.ArgumentParser) -> None:
    """The work, and what plans and steps depend on beside it."""
    add_work_arguments(parser)
    parser.add_argument("--budget", metavar="SIZE", help="memory of a device, as in 60GiB; default: all of it")
    parser.add_argument("--schedule", metavar="NAME", help=f"{', '.join(SCHEDULES)}; default: the run's, or 1f1b")
    parser.add_argument("--solver", metavar="NAME", help=f"{', '.join(SOLVERS)}; default: heu-mix")
    parser.add_argument("--replay", action="store_true", help="collectives may be replayed in recomputation")
    parser.add_argument(
        "--balance", action="store_true", help="cut layers into stages by their time with recomputation, not evenly"
    )
    parser.add_argument("--optimizer", metavar="NAME", help="default: the run's, or adamw")
    parser.add_argument("--calibration", metavar="FILE", help="measured times, from `wastenot profile`")
    parser.add_argument("--time-limit", type=float, metavar="S", help="of the search for a stage's plan (%(default)s)")


def add_work_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG, the cluster, the layout and the routing; `question_of` finds the rest plain."""
    parser.set_defaults(**_PLAIN)
    parser.add_argument(
        "config", metavar="CONFIG", help="a run's YAML, a model's config.json or YAML, or a model that comes along"
    )
    parser.add_argument("--devices", type=int, metavar="N", help="how many; default: what the layout asks for, or 8")
    parser.add_argument(
        "--cluster", default="h100-nvlink8-ib", metavar="NAME", help="a file, or one that comes along (%(default)s)"
    )
    parser.add_argument("--skew", metavar="SKEW", help="routing: uniform, zipf:1.2, or a file with a histogram")
    for name in _LAYOUT:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=_MEANINGS[name])
    parser.add_argument("--global-batch", type=int, metavar="N", help="sequences per step, instead of --micro-batches")
    parser.add_argument("--capacity-factor", type=float, metavar="F", help="slots per expert; default: dropless")
    parser.add_argument("--merged-dispatch", action="store_true", help="a token goes to another node once (DeepEP)")


def question_of(args: argparse.Namespace) -> Question:
    """What is asked. Raises UserError, one line, for what cannot be."""
    try:
        return _question(args)
    except (ValueError, OSError) as error:
        raise error if isinstance(error, UserError) else UserError(str(error)) from error


def _question(args: argparse.Namespace) -> Question:
    given = read_model(args.config)
    schedule, solver = args.schedule or given.schedule, args.solver or "heu-mix"
    for what, value, known in (("schedule", schedule, SCHEDULES), ("solver", solver, SOLVERS)):
        if value not in known:
            raise ValueError(f"--{what}: {value!r} is not known; {suggestion(value, known)}")
    if args.time_limit <= 0:
        raise ValueError(f"--time-limit: {args.time_limit:g} is no time; use seconds, for example 60")
    cluster = read_cluster(args.cluster)
    calibration = None if args.calibration is None else read_calibration(args.calibration)
    if calibration is not None:
        cluster = calibrated(cluster, calibration)
    budget = int(cluster.device.memory) if args.budget is None else int(parse_quantity(args.budget, "B", "--budget"))
    optimizer = given.optimizer if args.optimizer is None else replace(given.optimizer, name=args.optimizer)
    question = Question(
        shape=given.shape,
        layout=given.layout,
        cluster=cluster,
        optimizer=optimizer,
        skew=given.skew if args.skew is None else parse_skew(args.skew),
        schedule=schedule,
        solver=solver,
        budget=budget,
        replay=args.replay,
        calibration=calibration,
        time_limit=args.time_limit,
    )
    layout = _layout(args, question)
    if args.global_batch is not None:
        layout = with_global_batch(layout, args.global_batch)
    is_runs = given.cut is not None and len(given.cut) == layout.pipeline * layout.chunks
    question = replace(question, layout=layout, cut=given.cut if is_runs else None)
    return balanced(question) if args.balance else question


def _layout(args: argparse.Namespace, question: Question) -> Layout:
    """The layout that is asked for; where no degree is, the run's own, or the one suggested for so many devices."""
    asked: dict[str, Any] = {name: value for name in _LAYOUT if (value := getattr(args, name)) is not None}
    if args.capacity_factor is not None:
        asked["capacity_factor"] = args.capacity_factor
    if args.merged_dispatch:
        asked["merged_dispatch"] = True
    own = question.layout
    if args.devices not in (None, own.devices):
        # Not that run: its model, on other devices.
        own = Layout(seq_len=own.seq_len)
    if own.devices == 1 and not any(name in asked for name in _DEGREES):
        rest = {name: value for name, value in asked.items() if name not in ("chunks", "zero")}
        layout = suggested_layout(replace(question, layout=replace(own, **rest)), args.devices or _DEVICES)
        asked = {name: asked[name] for name in ("chunks", "zero") if name in asked}
    else:
        tensor, pipeline = asked.get("tensor", own.tensor), asked.get("pipeline", own.pipeline)
        if args.devices is not None:
            asked["data"] = data_over(args.devices, tensor, pipeline)
        elif own.devices == 1:
            asked["data"] = max(1, asked.get("expert", 1) // tensor)
        if own.devices == 1:
            asked.setdefault("micro_batches", 8 if pipeline == 1 else 4 * pipeline)
            asked.setdefault("zero", 1 if asked["data"] > 1 else 0)
        layout = own
    zero, data = asked.get("zero", layout.zero), asked.get("data", layout.data)
    if layout.shard and (zero != 3 or data % layout.shard):
        asked["shard"] = 0
    if layout.chunks > 1 and (asked.get("pipeline", layout.pipeline) == 1 or question.schedule not in USUAL_CHUNKS):
        asked.setdefault("chunks", 1)
    if asked.get("tensor", 1) > 1:
        asked["sequence_parallel"] = True
    if asked.get("pipeline", layout.pipeline) > 1 and question.schedule in USUAL_CHUNKS:
        asked.setdefault("chunks", USUAL_CHUNKS[question.schedule])
    # At once: a layout refuses a degree that does not go with another.
    return replace(layout, **asked)
