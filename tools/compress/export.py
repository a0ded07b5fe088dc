"""`wastenot compress export`: what is left of a model as a checkpoint that stock loaders read."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from ...launch.errors import UserError
from ...launch.run_folder import RunFolder
from ...launch.saved_run import find_checkpoint, open_run, refuse_quantized
from ...launch.units import parse_size
from ...moe.compress.export import Exported, Loader, export
from ...moe.compress.export_source import Source, from_decoder, open_folder
from ...moe.compress.fingerprint import is_run, run_fingerprint

HELP = "write a checkpoint that stock transformers or vLLM load, without remote code"
EXAMPLE = """
wastenot compress export runs/smaller exported
wastenot compress export models/mixtral-smaller exported --target vllm
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `wastenot compress export`."""
    parser.add_argument(
        "source", metavar="SOURCE", type=Path, help="a run, or a Hugging Face folder, compressed or not"
    )
    parser.add_argument("folder", metavar="TARGET", type=Path, help="the folder to write; must not exist, or be empty")
    parser.add_argument("--target", choices=get_args(Loader), default="hf", help="what loads it (%(default)s)")
    parser.add_argument(
        "--allow-zeroed",
        action="store_true",
        help="write experts of zeros where the family needs some in every layer: right, but nothing is saved",
    )
    parser.add_argument(
        "--stub-width",
        type=int,
        metavar="N",
        help="hidden units of the dense network of zeros of a layer without experts, where the model leaves it free "
        "(128, or an expert's if it has fewer)",
    )
    parser.add_argument(
        "--shard-size", default="4GiB", metavar="SIZE", help="of a file, which memory holds (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Exports and says what was written."""
    try:
        shard_bytes = parse_size(args.shard_size)
    except ValueError as error:
        raise UserError(f"--shard-size: {error}") from error
    done = exported(
        args.source,
        args.folder,
        loader=args.target,
        allow_zeroed=args.allow_zeroed,
        stub_width=args.stub_width,
        shard_bytes=shard_bytes,
    )
    print(json.dumps(asdict(done), indent=2) if args.json else _told(done))
    return 0


def exported(source: Path, target: Path, **how: Any) -> Exported:
    """Exports the run or the folder `source` to `target`; `how`: see `moe.compress.export.export`.

    Raises UserError where it cannot be exported, or not be written.
    """
    try:
        return export(_opened(source), target, **how)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error}); name another folder") from error


def _opened(path: Path) -> Source:
    """The newest checkpoint of the run at `path`, or the Hugging Face folder there."""
    if not is_run(path):
        return open_folder(path)
    folder = RunFolder(path)
    refuse_quantized(find_checkpoint(folder, None), "be exported")
    saved = open_run(path)
    return from_decoder(
        saved.model,
        saved.config.router,
        path,
        fingerprint=run_fingerprint(saved.checkpoint, path),
        max_positions=saved.config.data.seq_len,
        end_token=saved.tokenizer.end_token,
        tokenizer=folder.tokenizer,
    )


def _told(done: Exported) -> str:
    lines = [f"{done.target}: {done.parameters:,} parameters, {done.bytes:,} bytes, {done.family}"]
    if done.stubs:
        lines.append(f"  layers {list(done.stubs)} have no experts: a dense network of {done.width} zeros stands there")
    if done.zeroed:
        lines.append(f"  layers {list(done.zeroed)} have experts of zeros: right, but as large as before")
    lines.append(f"  check it: wastenot compress verify {done.target}")
    return "\n".join(lines)
