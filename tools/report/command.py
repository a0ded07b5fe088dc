"""`wastenot report RUN [RUN ...]`: the page, and its headline figures for machines."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .headline import read_entries
from .page import FILE_NAME, write_page

HELP = "write a page about runs: losses, slot usage, expert load, the ledger of what was wasted"
EXAMPLE = """
wastenot report runs/quickstart
wastenot report runs/first runs/second --output comparison.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `wastenot report`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the log.dir of a training run, ended or not")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"the page; default: {FILE_NAME} in the run's folder, or in this one where there are several runs",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object with the headline figures")


def run(args: argparse.Namespace) -> int:
    """Writes the page and says where it is; what is no run ends in UserError."""
    entries = read_entries(args.runs)
    output = args.output or (args.runs[0] / FILE_NAME if len(args.runs) == 1 else Path(FILE_NAME))
    write_page(entries, output)
    if args.json:
        print(json.dumps({"report": str(output), "runs": [entry.as_json() for entry in entries]}, indent=2))
    else:
        print(output)
    return 0
