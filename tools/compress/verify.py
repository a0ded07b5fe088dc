"""`wastenot compress verify`: whether stock transformers loads an export whole and computes the right thing with it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...launch.errors import UserError
from ...launch.saved_run import open_run
from ...launch.streamed import open_streamed
from ...moe.attention import KVCache
from ...moe.compress.fingerprint import is_run
from ...moe.compress.forward import run_layers
from ...moe.compress.stored import COMPRESSED
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
        help="the stock folder that was compressed, with what was dropped bypassed; or what was exported",
    )
    parser.add_argument(
        "--python", default=sys.executable, metavar="FILE", help="another interpreter, to try its transformers"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Verifies and says what was found."""
    found = verified(args.exported, args.against, args.python)
    print(json.dumps(found, indent=2) if args.json else _told(found))
    return 0


def verified(exported: Path, against: Path | None, python: str = sys.executable) -> dict[str, Any]:
    """What was found of the folder `exported`: the fields of `Verified`.

    against: the stock folder that was compressed, or the run or compressed folder that was exported, or None; python:
    the interpreter whose transformers loads it.
    Raises UserError where the export is not what it should be, or a folder is none.
    """
    found = examined(exported, against, python)
    if found.problems:
        raise UserError(f"{found.folder}: {'; '.join(found.problems)}")
    return asdict(found)


def examined(exported: Path, against: Path | None, python: str = sys.executable) -> Verified:
    """As `verified`, problems told and not raised."""
    try:
        if against is None or not (is_run(against) or (against / COMPRESSED).is_file()):
            return verify(exported, against=against, python=python)
        compute = _decoder(against) if is_run(against) else _streamed(against)
        return verify(exported, logits_of=compute, python=python)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def _decoder(run: Path) -> Callable[[Tensor], Tensor]:
    """int64 tokens [B, S] -> [B, S, V] in fp32 of the run at `run`, without a capacity: stock models have none."""
    model = open_run(run).model.float()
    return lambda tokens_BS: dropless_logits(model, tokens_BS)


@torch.no_grad()
def dropless_logits(model: Decoder, tokens_BS: Tensor) -> Tensor:
    """[B, S, V] of int64 tokens [B, S]."""
    B, S = tokens_BS.shape
    # With a cache nothing is dropped.
    cache = KVCache.empty(model.config, torch.zeros(B, dtype=torch.int64), S, model.output_weight.dtype)
    return model(tokens_BS, cache).hidden_BSD @ model.output_weight.T


def _streamed(folder: Path) -> Callable[[Tensor], Tensor]:
    """The same of the compressed folder at `folder`, which no stock class loads, layer by layer."""
    model = open_streamed(folder)
    return lambda tokens_BS: model.logits(run_layers(model, tokens_BS))


def _told(found: dict[str, Any]) -> str:
    lines = [
        f"{found['folder']}: loads whole in transformers {found['transformers']}, and generates",
        f"  {found['parameters']:,} parameters, {found['bytes']:,} bytes",
    ]
    if found["base_parameters"]:
        lines[-1] += f"; before {found['base_parameters']:,} parameters, {found['base_bytes']:,} bytes"
    if found["difference"] is not None:
        allowed = f"({found['allowed']:.0e} is allowed)" if found["allowed"] else "(none is allowed)"
        lines.append(f"  logits differ by {found['difference']:.1e} of the largest {allowed}")
    return "\n".join(lines)
