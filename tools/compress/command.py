"""`wastenot compress STAGE …`: each stage is a module of this folder, imported only when it runs."""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util

from ...launch.errors import UserError
from ...launch.exits import OK
from ..cli import make_parser

HELP = "make a trained model smaller: layer, block and expert drop, slimming, recovery, export"
EXAMPLE = """
wastenot compress auto runs/deep --drop-layers 4
wastenot compress profile runs/deep profiles/deep
wastenot compress plan --help
"""

STAGES = ("profile", "plan", "apply", "recover", "export", "verify", "report", "auto")
"""In the order of the work; `auto` does all of it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `wastenot compress`."""
    there = [stage for stage in STAGES if _is_there(stage)]
    parser.add_argument("stage", metavar="STAGE", help=f"one of {', '.join(there)}; each has its own --help")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help="its arguments")


def run(args: argparse.Namespace) -> int:
    """Runs one stage."""
    there = [stage for stage in STAGES if _is_there(stage)]
    if args.stage not in there:
        close = difflib.get_close_matches(args.stage, there, n=1)
        hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(there)}"
        raise UserError(f"{args.stage!r} is no stage of compress; {hint}")
    stage = importlib.import_module(_module(args.stage))
    parser = make_parser(f"compress {args.stage}", stage.HELP, stage.EXAMPLE)
    stage.add_arguments(parser)
    try:
        parser.parse_args(args.words, namespace=args)
    except SystemExit as end:
        # argparse has printed the help.
        return end.code if isinstance(end.code, int) else OK
    try:
        return stage.run(args)
    except UserError:
        raise
    except ValueError as error:
        # The library below knows no users; what it refuses is what they gave it.
        raise UserError(str(error)) from error
    except (PermissionError, NotADirectoryError, IsADirectoryError, FileNotFoundError) as error:
        raise UserError(f"{error.filename}: cannot be read or written ({error.strerror}); name another") from error


def _module(stage: str) -> str:
    return f"wastenot.tools.compress.{stage}"


def _is_there(stage: str) -> bool:
    return importlib.util.find_spec(_module(stage)) is not None
