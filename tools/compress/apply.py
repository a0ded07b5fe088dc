"""`wastenot compress apply`: a checkpoint and a plan make a checkpoint, without building the model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...launch.compressed_run import apply_plan
from ...launch.console import RunConsole
from ...launch.errors import UserError
from ...launch.units import parse_size
from ...moe.compress.apply import Applied
from ...moe.compress.change import weight_change
from ...moe.compress.plan import DropPlan, read_plan
from ...moe.compress.profile import read_profile

HELP = "write what a plan leaves of a checkpoint, as a checkpoint of the same kind"
EXAMPLE = """
wastenot compress apply runs/deep plan.yaml runs/shallow
wastenot compress apply models/Mixtral-8x7B-v0.1 plan.yaml models/mixtral-small --shard-size 4GiB
"""

_LISTED = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `wastenot compress apply`."""
    parser.add_argument("source", metavar="SOURCE", type=Path, help="a run, or a folder of safetensors")
    parser.add_argument("plan", metavar="PLAN", type=Path, help="what `compress plan` wrote, for that checkpoint")
    parser.add_argument("target", metavar="TARGET", type=Path, help="the folder to write; must not exist, or be empty")
    parser.add_argument(
        "--profile", metavar="PROFILE", type=Path, help="the plan's, where weights are slimmed or rounded by it"
    )
    parser.add_argument(
        "--shard-size", default="2GiB", metavar="SIZE", help="of a file, which memory holds (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Applies the plan and says what is left. A target that a killed process began is continued."""
    try:
        shard_bytes = parse_size(args.shard_size)
    except ValueError as error:
        raise UserError(f"--shard-size: {error}") from error
    try:
        plan = read_plan(args.plan)
        change = weight_change(plan, None if args.profile is None else read_profile(args.profile))
        with RunConsole(speaks=True).following("apply", 1) as line:
            done = apply_plan(
                args.source, args.target, plan, transform=change, shard_bytes=shard_bytes, progress=line.portion
            )
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"{args.target}: cannot be written ({error.strerror or error}); name another folder") from error
    starved = {} if change is None else {layer: sorted(few) for layer, few in sorted(change.starved.items())}
    print(json.dumps(_figures(done, plan, starved), indent=2) if args.json else _told(done, plan, starved))
    return 0


def _figures(done: Applied, plan: DropPlan, starved: Mapping[int, list[int]]) -> dict[str, Any]:
    return {
        "target": str(done.target),
        "plan": plan.hash,
        "base": plan.base,
        "fingerprint": done.fingerprint,
        "layers": done.shape.layers,
        "experts": list(done.shape.experts),
        "dense": list(done.shape.dense),
        "bytes_before": done.bytes_before,
        "bytes": done.bytes_after,
        "files": done.files,
        "files_reused": done.reused,
        "state_left_out": list(done.state_left_out),
        "notes": list(done.notes),
        "starved_experts": {str(layer): few for layer, few in starved.items()},
    }


def _told(done: Applied, plan: DropPlan, starved: Mapping[int, list[int]]) -> str:
    before = plan.shape
    lines = [
        f"{done.target}: {done.shape.layers} of {before.layers} blocks, {len(done.shape.moe_layers)} of "
        f"{len(before.moe_layers)} MoE layers, {sum(done.shape.experts)} of {sum(before.experts)} experts",
        f"  {done.bytes_after:,} of {done.bytes_before:,} bytes, fingerprint {done.fingerprint}",
    ]
    if done.reused:
        lines.append(f"  {done.reused} of {done.files} files were there already")
    if left := done.state_left_out:
        more = f" and {len(left) - _LISTED} more" if len(left) > _LISTED else ""
        lines.append(
            f"  optimizer state that does not fit what is left stays behind: {', '.join(left[:_LISTED])}{more}"
        )
    lines += [f"  {note}" for note in done.notes]
    if starved:
        count = sum(map(len, starved.values()))
        lines.append(f"  {count} experts saw few tokens, and were judged by those of their layer too; profile on more")
    return "\n".join(lines)
