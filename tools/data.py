"""`wastenot data`: fetch or read a corpus and write its token shards, ready to train on; or shards as Megatron's."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..launch.config import DataConfig
from ..launch.corpus import prepare, prepare_files
from ..launch.errors import UserError
from ..launch.indexed import find_indexed
from ..launch.shards import read_meta
from ..launch.sources import SOURCES

HELP = "prepare a corpus for training, or export one for Megatron"

EXAMPLE = """\
  wastenot data prepare shakespeare
  wastenot data prepare sotu --tokenizer bpe:4096
  wastenot data prepare notes.txt mail.jsonl --tokenizer bytes --val-fraction 0.1 --json
  wastenot data prepare corpus_text_document.idx --tokenizer tokenizer.json
  wastenot data export data/sotu-bpe4096-7f0c2b6f7d0c corpora/sotu"""

DEFAULTS = DataConfig()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["prepare", "export"])
    parser.add_argument(
        "corpus",
        nargs="+",
        help=f"{', '.join(SOURCES)}, or files: UTF-8 text (one document each), JSONL (a `text` in every line), or one "
        "PREFIX.idx of Megatron's; export: a prepared folder, and the PREFIX to write",
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
    """Does what the arguments say and prints where it is; returns the exit code."""
    if args.action == "export":
        return _export(args)
    named = len(args.corpus) == 1 and (args.corpus[0] in SOURCES or bool(find_indexed(args.corpus[0])))
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


def _export(args: argparse.Namespace) -> int:
    # Here: preparing does not need it.
    from ..launch.indexed_corpus import export_indexed

    if len(args.corpus) != 2:
        raise UserError(f"export takes a prepared folder and a PREFIX, not {len(args.corpus)} names")
    folder, prefix = map(Path, args.corpus)
    written = export_indexed(folder, prefix)
    if args.json:
        print(json.dumps({"prefix": str(prefix), **written}))
        return 0
    for split, counts in written.items():
        print(f"{prefix}-{split}.idx  {counts['documents']:,} documents, {counts['tokens']:,} tokens")
    print(f"  Megatron-LM reads it with  --train-data-path {prefix}-train --valid-data-path {prefix}-val")
    print(f"  its tokenizer              --tokenizer-type HuggingFaceTokenizer --tokenizer-model {folder}")
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
