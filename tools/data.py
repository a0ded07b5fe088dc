"""`wastenot data prepare`: fetch or read a corpus and write its token shards, ready to train on."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..launch.config import DataConfig
from ..launch.corpus import prepare, prepare_files
from ..launch.errors import UserError
from ..launch.shards import read_meta
from ..launch.sources import SOURCES

HELP = "prepare a corpus for training"

EXAMPLE = """\
  wastenot data prepare shakespeare
  wastenot data prepare sotu --tokenizer bpe:4096
  wastenot data prepare notes.txt mail.jsonl --tokenizer bytes --val-fraction 0.1 --json"""

DEFAULTS = DataConfig()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["prepare"])
    parser.add_argument(
        "corpus",
        nargs="+",
        help=f"{', '.join(SOURCES)}, or files: UTF-8 text (one document each) or JSONL (a `text` in every line)",
    )
    parser.add_argument(
        "--tokenizer", default=DEFAULTS.tokenizer, help="bytes, bpe:N or a tokenizer.json (%(default)s)"
    )
    parser.add_argument(
        "--val-fraction", type=float, default=DEFAULTS.val_fraction, help="held out of every text (%(default)s)"
    )
    parser.add_argument("--dir", default=DEFAULTS.dir, help="where corpora are kept (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object: meta.json and the folder")


def run(args: argparse.Namespace) -> int:
    """Prepares what the arguments say and prints where it is; returns the exit code."""
    named = len(args.corpus) == 1 and args.corpus[0] in SOURCES
    try:
        config = DataConfig(
            corpus=args.corpus[0], tokenizer=args.tokenizer, dir=args.dir, val_fraction=args.val_fraction
        )
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    folder = prepare(config) if named else prepare_files(args.corpus, config)
    meta = read_meta(folder)
    print(json.dumps({"folder": str(folder), **meta}, indent=2) if args.json else _summary(str(folder), meta))
    return 0


def _summary(folder: str, meta: dict[str, Any]) -> str:
    tokenizer = meta["tokenizer"]
    lines = [folder, f"  origin     {meta['origin']}", f"  licence    {meta['licence']}"]
    lines.append(f"  tokenizer  {tokenizer['kind']}, {tokenizer['vocab_size']:,} tokens")
    if not tokenizer["lossless"]:
        lines.append("             does not give back the text it was given: bits per byte will flatter the model")
    for name, split in meta["splits"].items():
        rate = split["text_bytes"] / split["tokens"]
        lines.append(
            f"  {name:<9}  {split['tokens']:,} tokens, {split['text_bytes']:,} bytes of text ({rate:.2f} a token), "
            f"{split['documents']:,} documents"
        )
    figures = ", ".join(f"{bits:.3f} from {order}" for order, bits in meta["ngram_bits_per_byte"].items())
    lines.append(f"  n-grams    bits per byte of val by preceding bytes: {figures}")
    lines.append(f"  train on it with  -s data.corpus={folder}")
    return "\n".join(lines)
