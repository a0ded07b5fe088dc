"""The options by which stages are told what text to use, and the text they name."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...launch.calibration import calibration, documents
from ...launch.shards import Split
from ...moe.compress.calibration import Calibration
from ...moe.compress.fingerprint import is_run

SELF = "self"


def add_text_arguments(parser: argparse.ArgumentParser, windows: int) -> None:
    """Adds --data, --windows, --seq-len, --seed and --documents."""
    parser.add_argument(
        "--data",
        metavar="TEXT",
        help="a named corpus, a text or JSONL file, or a prepared folder; `self`: text that the model writes itself, "
        "the least likely fifth of it left out; default: what the run was trained on",
    )
    parser.add_argument("--windows", type=int, default=windows, metavar="N", help="windows of text (%(default)s)")
    parser.add_argument("--seq-len", type=int, metavar="TOKENS", help="of a window; default: the run's, or 2048")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of windows (%(default)s)")
    parser.add_argument(
        "--documents", action="store_true", help="each document of --data in a window of its own, padded"
    )


def text_of(checkpoint: Path, args: argparse.Namespace, split: Split = "train") -> Calibration:
    """The windows that `args` ask for, in the tokens of `checkpoint`. Raises UserError where they cannot be had."""
    for name, value in (("windows", args.windows), ("seq-len", args.seq_len)):
        if value is not None and value < 1:
            raise ValueError(f"--{name}: {value} is too small; use 1 or more")
    # Text to judge by is that of the other split, in windows as they come.
    if args.documents and split == "train":
        if args.data is None:
            raise ValueError("--documents: reads them from a text or JSONL file; name it with --data")
        return documents(checkpoint, args.data, args.windows, args.seq_len)
    data = args.data
    if data == SELF:
        data = str(_written_by(checkpoint, args))
    return calibration(checkpoint, data, split, args.windows, args.seq_len, args.seed)


def _written_by(checkpoint: Path, args: argparse.Namespace) -> Path:
    """A corpus that the run at `checkpoint` wrote."""
    from ...launch.console import RunConsole
    from ...launch.corpus import prepare
    from ...launch.saved_run import open_run
    from ...launch.self_generated import Writing, self_generated

    if not is_run(checkpoint):
        raise ValueError(
            f"--data: self needs a run of ours, which {checkpoint} is not; `wastenot convert from-hf` makes one, or "
            "give text that the model wrote elsewhere"
        )
    saved = open_run(checkpoint)
    tokens = args.windows * (args.seq_len or saved.config.data.seq_len)
    with RunConsole(speaks=True).following("write", tokens) as line:
        return self_generated(saved, prepare(saved.config.data), Writing(tokens=tokens, seed=args.seed), line.portion)
