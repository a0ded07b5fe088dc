"""`wastenot bench NAME`: runs one benchmark and prints its report."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from . import registry

HELP = "measure wastenot against its goals and its peers"
EXAMPLE = "wastenot bench train --quick --json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `wastenot bench`."""
    listing = "; ".join(f"{name}: {what}" for name, what in registry.BENCHMARKS.items())
    parser.add_argument("name", choices=list(registry.BENCHMARKS), metavar="NAME", help=listing)
    parser.add_argument("--quick", action="store_true", help="at most 10 minutes on 2 cores; says what it leaves out")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="also write the JSON object to FILE, and a picture beside it where the benchmark has one",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark `args.name`; missed goals are reported, not an error."""
    progress = Console(stderr=True)
    benchmark = registry.load(args.name)
    with _standard_output_kept_clean():
        report = benchmark.run(
            quick=args.quick,
            command=_command(args),
            say=lambda text: progress.print(f"bench {args.name}: {text}", markup=False, highlight=False, style="dim"),
        )
    if args.output:
        report.write(args.output)
        draw = getattr(benchmark, "draw", None)
        picture = draw(report, args.output.with_suffix(".png")) if draw else None
        if picture is not None:
            progress.print(f"bench {args.name}: {picture}", markup=False, highlight=False, style="dim")
    if args.json:
        print(report.to_json())
    else:
        report.show(Console())
    return 0


def _command(args: argparse.Namespace) -> str:
    words = ["wastenot", "bench", args.name]
    words += ["--quick"] * args.quick + ["--json"] * args.json
    words += ["--output", str(args.output)] if args.output else []
    return shlex.join(words)


@contextlib.contextmanager
def _standard_output_kept_clean() -> Iterator[None]:
    """Sends what libraries and child processes print to standard error, so that the report stands alone."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
