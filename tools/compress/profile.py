"""`wastenot compress profile`: what every layer of a checkpoint does to a text."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from ...launch import env
from ...launch.console import RunConsole
from ...launch.local import run_ranks
from ...launch.streamed import open_streamed
from ...launch.units import parse_size
from ...moe.compress.criteria import coverage
from ...moe.compress.profile import COSTS, Profile, ProfileConfig, predicted_bytes, profile
from ...parallel.config import ParallelConfig
from ...parallel.mesh import make_mesh
from ..report.formats import size as format_bytes
from .text_arguments import add_text_arguments, text_of

HELP = "score every layer, block and expert of a checkpoint on a text, layer by layer"
EXAMPLE = """
wastenot compress profile runs/deep profiles/deep
wastenot compress profile mixtral/ profiles/mixtral --data c4.jsonl --windows 128 --nproc 8 --expert 8
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `wastenot compress profile`."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a run, or a Hugging Face folder")
    parser.add_argument("folder", metavar="PROFILE", type=Path, help="the folder to write; an unfinished one goes on")
    add_text_arguments(parser, windows=128)
    parser.add_argument(
        "--window",
        type=int,
        default=4,
        metavar="BLOCKS",
        help="longest run of blocks that is scored "
        "together; so many copies of the residual stream are held (%(default)s)",
    )
    parser.add_argument("--hessians", action="store_true", help="also what --slim sparsegpt needs")
    parser.add_argument("--batch", type=int, default=4, metavar="WINDOWS", help="computed at a time (%(default)s)")
    parser.add_argument("--max-memory", metavar="SIZE", help="refuse to start where a rank needs more, as in 8GiB")
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="local ranks (%(default)s)")
    parser.add_argument("--expert", type=int, default=1, metavar="N", help="ranks that share the experts (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Profiles on local ranks, or as one of the ranks that a launcher started."""
    rank = env.detect(os.environ)
    if rank.launcher == "none" and args.nproc > 1:
        return run_ranks(["compress", "profile", *args.words], args.nproc, module="wastenot.tools.cli")
    text = text_of(args.checkpoint, args)
    config = ProfileConfig(window=args.window, hessians=args.hessians, batch=args.batch)
    parallel = ParallelConfig(expert=args.expert)
    device = env.pick_device(rank)
    env.start(rank, parallel, device)
    try:
        mesh = make_mesh(parallel, device)
        model = open_streamed(args.checkpoint, device)
        needed = predicted_bytes(model, text, config, mesh)
        console = RunConsole(speaks=rank.rank == 0)
        console.say(f"profile: {text.num_tokens:,} tokens of {text.name}; {format_bytes(needed)} on a rank")
        if args.max_memory is not None and needed > parse_size(args.max_memory):
            raise ValueError(
                f"--max-memory: {args.max_memory} is less than the {format_bytes(needed)} that a rank needs; use more "
                "ranks, fewer --windows, or a smaller --window or --batch"
            )
        with console.following("profile", model.shape.layers) as line:
            done = profile(model, text, args.folder, config, mesh, line.portion)
    finally:
        env.stop()
    if rank.rank == 0:
        figures = _figures(args, done)
        print(json.dumps(figures, indent=2) if args.json else _told(figures))
    return 0


def _figures(args: argparse.Namespace, done: Profile) -> dict[str, Any]:
    got = coverage(done)
    return {
        "profile": str(args.folder),
        "fingerprint": done.fingerprint,
        "checkpoint": str(args.checkpoint),
        "base": done.base,
        "calibration": dict(done.calibration),
        "layers": done.shape.layers,
        "moe_layers": len(got),
        "least_tokens_of_an_expert": min((min(counts) for counts in got.values()), default=None),
        "experts_without_tokens": sum(counts.count(0) for counts in got.values()),
        **json.loads((args.folder / COSTS).read_text()),
    }


def _told(figures: dict[str, Any]) -> str:
    starved = figures["experts_without_tokens"]
    lines = [
        f"{figures['profile']}: {figures['layers']} layers, {figures['calibration']['tokens']:,} tokens, "
        f"{figures['seconds']:.1f} s, {format_bytes(figures['peak_bytes'])} at most"
    ]
    if starved:
        lines.append(f"  {starved} experts got no token: their scores say nothing; use more text")
    return "\n".join(lines)
