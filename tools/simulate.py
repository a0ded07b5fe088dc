"""`wastenot simulate`: what training a model on a cluster would be like, under every recomputation policy."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from ..launch.errors import UserError
from ..launch.run_folder import write_atomically
from ..parallel.lynx.assess import Answer, assess
from ..parallel.lynx.nearest import suggestion
from ..parallel.lynx.question import Question
from ..parallel.lynx.solution import InfeasibleError
from ..parallel.lynx.solve import SOLVERS
from ..parallel.lynx.trace import write_trace
from .lynx_arguments import add_question_arguments, question_of
from .lynx_compare import USUAL, Policy, compare, in_order
from .lynx_figures import figures_of
from .lynx_input import read_model
from .lynx_json import as_json
from .lynx_page import MARK, make_page
from .lynx_picture import check_picture, draw
from .lynx_refusal import beyond_device, too_small
from .lynx_search import run_search
from .lynx_terminal import show
from .output import check_output, refusals_named, replacing

HELP = "predict step time and memory of a training run, under every recomputation policy"
EXAMPLE = """
wastenot simulate mixtral-8x7b --devices 64 --budget 60GiB
wastenot simulate deepseek-v3 --devices 16384 --skew zipf:0.5 --json
wastenot simulate mixtral-8x7b --devices 64 --pipeline 4 --expert 8 --html policies.html --trace step.json
wastenot simulate mixtral-8x7b --devices 64 --search
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `wastenot simulate`."""
    add_question_arguments(parser)
    parser.add_argument(
        "--policies",
        metavar="NAMES",
        help=f"what is compared, by commas, of {', '.join(SOLVERS)}; default: {','.join(USUAL)}",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="look for the fastest layouts, schedules and micro-batches by memory; what is asked for stays fixed",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page that compares the policies")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw timeline and memory, .png or .svg")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a trace for ui.perfetto.dev")


def run(args: argparse.Namespace) -> int:
    """Answers, compares, writes what is to be written, and prints."""
    _check_outputs(args)
    names = _policies(args.policies)
    question, origin = question_of(args), _origin(args)
    if error := beyond_device(args, question):
        raise error
    if args.search:
        return _search(args, question)
    with _progress(args.json) as follow:
        follow(question.solver)
        answer = _answer(args, question)
        policies = compare(answer, names, follow)
    _write(args, answer, policies, origin)
    figures = figures_of(answer)
    if args.json:
        print(json.dumps(as_json(question, figures, policies, origin), allow_nan=False))
        return 0
    show(question, figures, policies, origin)
    for path in (args.html, args.picture, args.trace):
        if path is not None:
            print(f"written: {path}")
    return 0


def _search(args: argparse.Namespace, question: Question) -> int:
    for name in ("html", "picture", "trace", "policies"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name}: of one layout, and --search is of many; run it again with the one you choose")
    return run_search(args, question)


def _check_outputs(args: argparse.Namespace) -> None:
    """Before the work. Raises UserError where a file cannot be written, or is another one's."""
    if args.html is not None:
        check_output(args.html, MARK.encode(), "a page of simulate", "policies.html")
    if args.picture is not None:
        check_picture(args.picture)
        mark = b"\x89PNG" if args.picture.suffix == ".png" else b"<svg"
        check_output(args.picture, mark, "a picture", "step.png")
    if args.trace is not None:
        check_output(args.trace, b'"traceEvents"', "a trace", "step.json")


def _policies(given: str | None) -> list[str]:
    if given is None:
        return list(USUAL)
    names = [name.strip() for name in given.split(",")]
    for name in names:
        if name not in SOLVERS:
            raise UserError(f"--policies: {name!r} is not known; {suggestion(name, SOLVERS)}")
    return in_order(set(names))


def _answer(args: argparse.Namespace, question: Question) -> Answer:
    try:
        return assess(question)
    except InfeasibleError as error:
        raise too_small(args, question, error) from error
    except ValueError as error:
        raise UserError(str(error)) from error


def _origin(args: argparse.Namespace) -> str:
    """How the layout came about, as `question_of` finds it."""
    if any(getattr(args, name) is not None for name in ("tensor", "expert", "pipeline")):
        return "as asked for"
    own = read_model(args.config).layout
    if own.devices > 1 and args.devices in (None, own.devices):
        return "the run's own"
    return "suggested"


@contextmanager
def _progress(is_quiet: bool) -> Iterator[Callable[[str], None]]:
    """What to tell of the policy that is searched for; shown in a terminal."""
    if is_quiet or not sys.stderr.isatty():
        yield lambda name: None
        return
    with Console(stderr=True).status("") as status:
        yield lambda name: status.update(f"planning: {name}")


def _write(args: argparse.Namespace, answer: Answer, policies: Sequence[Policy], origin: str) -> None:
    """The files that are asked for."""
    if args.html is not None:
        with refusals_named(args.html):
            write_atomically(args.html, make_page(answer.question, policies, origin))
    if args.picture is not None:
        draw(answer.simulation, args.picture, budget_bytes=answer.question.bytes)
    if args.trace is not None:
        with replacing(args.trace) as beside:
            write_trace(answer.simulation, beside)
