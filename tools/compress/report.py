"""`wastenot compress report FOLDER`: the page about a compression, and its headline figures for machines."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .page.folder import read_compression
from .page.header import figures
from .page.page import FILE_NAME, write_page

HELP = "write a page about a compression: what went and why, what is kept, how fast it is, what was not measured"
EXAMPLE = """
wastenot compress report runs/deep-small
wastenot compress report runs/deep-small -o deep.html --bench compress.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `wastenot compress report`."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what `compress auto` left, or parts of it")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help=f"the page; default: {FILE_NAME} in the folder"
    )
    parser.add_argument(
        "--bench", type=Path, metavar="FILE.json", help="what `bench compress --json` printed: other compressions"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object with the headline figures")


def run(args: argparse.Namespace) -> int:
    """Writes the page and says where it is; what is no compression ends in UserError."""
    compression = read_compression(args.folder, args.bench)
    output = args.output or args.folder / FILE_NAME
    write_page(compression, output)
    print(json.dumps({"report": str(output), **figures(compression)}, indent=2) if args.json else output)
    return 0
