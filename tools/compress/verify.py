"""`wastenot compress verify`: whether stock transformers loads an export whole and computes the right thing with it."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ...launch.errors import UserError
from ...launch.saved_run import open_run
from ...moe.attention import KVCache
from ...moe.compress.fingerprint import is_run
from ...moe.compress.verify import Verified, verify
from ...moe.decoder import Decoder

HELP = "load an export with stock transformers, and compare with what it was made from"
EXAMPLE = """
wastenot compress verify exported --against models/Mixtral-8x7B-v0.1
wastenot compress verify exported --against runs/smaller
wastenot compress verify exported --python old-transformers/bin/python
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `wastenot compress verify`."""
    parser.add_argument("exported", metavar="EXPORTED", type=Path, help="what `compress export` wrote")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="SOURCE",
        help="the stock folder that was compressed, with what was dropped bypassed; or the run that was exported",
    )
    parser.add_argument(
        "--python", default=sys.executable, metavar="FILE", help="another interpreter, to try its transformers"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Verifies and says what was found; UserError where the export is not what it should be."""
    try:
        if args.against is not None and is_run(args.against):
            model = open_run(args.against).model
            found = verify(args.exported, logits_of=lambda tokens_BS: _logits(model, tokens_BS), python=args.python)
        else:
            found = verify(args.exported, against=args.against, python=args.python)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    if found.problems:
        raise UserError(f"{found.folder}: {'; '.join(found.problems)}")
    print(json.dumps(asdict(found), indent=2) if args.json else _told(found))
    return 0


@torch.no_grad()
def _logits(model: Decoder, tokens_BS: Tensor) -> Tensor:
    """[B, S, V] in fp32, without a capacity: stock models have none."""
    model = model.float()
    B, S = tokens_BS.shape
    padding_B = torch.zeros(B, dtype=torch.int64)
    # With a cache nothing is dropped.
    cache = KVCache.empty(model.config, padding_B, S, torch.float32)
    return model(tokens_BS, cache).hidden_BSD @ model.output_weight.T


def _told(found: Verified) -> str:
    lines = [
        f"{found.folder}: loads whole in transformers {found.transformers}, and generates",
        f"  {found.parameters:,} parameters, {found.bytes:,} bytes",
    ]
    if found.base_parameters:
        lines[-1] += f"; before {found.base_parameters:,} parameters, {found.base_bytes:,} bytes"
    if found.difference is not None:
        lines.append(f"  logits differ by {found.difference:.1e} of the largest ({found.allowed:.0e} is allowed)")
    return "\n".join(lines)
