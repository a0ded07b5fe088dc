"""`wastenot eval RUN`: how well a trained model predicts held-out text."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..launch.console import RunConsole
from ..launch.corpus import prepare
from ..launch.errors import UserError
from ..launch.evaluate import evaluate
from ..launch.saved_run import SavedRun, open_run
from ..launch.shards import TokenShards, read_meta
from ..launch.sources import SOURCES
from ..launch.tokenizer import FILE_NAME
from ..moe.routing import Routing
from ..moe.skew import save_trace

HELP = "measure a trained model on held-out text, beside n-gram models of it"
EXAMPLE = "wastenot eval runs/quickstart --checkpoint 500 --data sotu"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `wastenot eval`."""
    parser.add_argument("run", metavar="RUN", help="the log.dir of a training run")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="step of the checkpoint; default: the newest")
    parser.add_argument(
        "--data",
        metavar="CORPUS",
        help=f"{', '.join(SOURCES)}, a text or JSONL file, or a prepared folder; default: what it was trained on",
    )
    parser.add_argument(
        "--trace", metavar="FILE", help="record the router logits of the first batch, for router.kind: replay"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Loads the run, evaluates it on all of the held-out split, prints the figures."""
    saved = open_run(args.run, args.checkpoint)
    if args.trace is not None:
        check_trace(saved, Path(args.trace))
    folder = held_out(saved, args.data)
    first: list[tuple[Sequence[Routing], int]] = []

    def keep_first(routings: Sequence[Routing], tokens: int) -> None:
        if not first:
            first.append((routings, tokens))

    console = RunConsole(speaks=True)
    with console.following("evaluate", 1) as line:
        result = evaluate(
            saved.model,
            TokenShards.open(folder, "val"),
            saved.mesh,
            seq_len=saved.config.data.seq_len,
            batch=saved.config.train.eval_batch,
            precision=saved.config.train.precision,
            progress=line.portion,
            routed=keep_first,
        )
    if args.trace is not None:
        save_trace(args.trace, *first[0])
    figures: dict[str, Any] = {
        "run": args.run,
        "step": saved.step,
        "data": str(folder),
        "tokens": result.tokens,
        "val_loss": result.loss,
        "val_bits_per_byte": result.bits_per_byte,
    }
    for order, bits in read_meta(folder)["ngram_bits_per_byte"].items():
        figures[f"order{order}_bits_per_byte"] = bits
    print(json.dumps(figures, indent=2) if args.json else _table(figures))
    return 0


def check_trace(saved: SavedRun, file: Path) -> None:
    """Raises UserError where `file` cannot take a trace of `saved`: before the time is spent."""
    if not saved.config.model.expert_counts:
        raise UserError(f"--trace: {saved.folder.path} has no experts and routes nothing; leave --trace out")
    if file.is_dir() or not file.parent.is_dir():
        reason = "is a folder" if file.is_dir() else f"lies in {file.parent}, which does not exist"
        raise UserError(f"--trace: {file} {reason}; give a file in a folder that exists")


def held_out(saved: SavedRun, data: str | None) -> Path:
    """The prepared folder to evaluate on: `data`, or the run's own; in the tokens of the run's tokenizer.

    Raises UserError where `data` is unknown or was prepared with another tokenizer.
    """
    own = saved.folder.tokenizer / FILE_NAME
    config = saved.config.data
    if data is not None:
        config = replace(config, corpus=data, tokenizer=str(own))
    folder = prepare(config)
    if (folder / FILE_NAME).read_bytes() != own.read_bytes():
        raise UserError(
            f"{folder} was prepared with another tokenizer than {saved.folder.path} was trained with; prepare its "
            f"texts with --tokenizer {own}"
        )
    return folder


def _table(figures: dict[str, Any]) -> str:
    lines = [
        f"{figures['run']} at step {figures['step']}, on {figures['tokens']:,} held-out tokens of {figures['data']}",
        f"  loss            {figures['val_loss']:.4f} nats per token",
        f"  bits per byte   {figures['val_bits_per_byte']:.4f}",
    ]
    lines.append("  bits per byte of Witten-Bell models fitted on the training split, by preceding bytes:")
    for name, bits in figures.items():
        if name.startswith("order"):
            order = name.removeprefix("order").removesuffix("_bits_per_byte")
            lines.append(f"  {order:>13}   {bits:.4f}")
    return "\n".join(lines)
