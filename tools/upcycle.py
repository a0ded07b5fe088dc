"""`wastenot upcycle`: a dense model as a mixture of experts that computes the same, to be trained on."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..launch.config import TrainConfig
from ..launch.errors import UserError
from ..launch.run_folder import RunFolder
from ..launch.saved_run import blank_decoder, open_run, refuse_quantized, write_run
from ..launch.settings import as_mapping, parse_config
from ..launch.tokenizer import FILE_NAME, Tokenizer
from ..moe.adapters.huggingface import CONFIG
from ..moe.config import RouterConfig
from ..moe.decoder import Decoder
from ..moe.upcycle import upcycle_, upcycled_config
from .convert import open_huggingface

HELP = "turn a dense model into a mixture of experts that computes the same, to train on"
EXAMPLE = """
wastenot upcycle runs/dense runs/upcycled --experts 8 --every 2
wastenot train runs/upcycled/config.yaml -s checkpoint.resume=runs/upcycled -s log.dir=runs/moe
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `wastenot upcycle`."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a run with model.moe: null, one of its checkpoints/step-…, or a Hugging Face folder of a dense model",
    )
    parser.add_argument("target", metavar="TARGET", help="the run to write; must not exist, or be empty")
    parser.add_argument("--experts", type=int, default=8, help="copies of each dense network (%(default)s)")
    parser.add_argument(
        "--every", type=int, default=2, help="of this many layers the last gets experts (%(default)s); 1: all do"
    )
    parser.add_argument("--first-dense", type=int, default=0, help="layers that stay dense at first (%(default)s)")
    parser.add_argument("--top-k", type=int, default=1, help="experts per token (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the new routers (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Upcycles and says what was written."""
    target = Path(args.target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists; name a new folder")
    done = upcycle(
        Path(args.source),
        target,
        experts=args.experts,
        every=args.every,
        first_dense=args.first_dense,
        top_k=args.top_k,
        seed=args.seed,
    )
    said = "{target}: {dense_parameters:,} parameters became {parameters:,}; {moe_layers} layers have {experts} experts"
    print(json.dumps(done) if args.json else said.format(**done))
    return 0


def upcycle(
    source: Path, target: Path, *, experts: int, every: int, first_dense: int, top_k: int, seed: int
) -> dict[str, Any]:
    """Writes the dense model at `source` as a run of a mixture of experts with one checkpoint, of step 0.

    The run keeps the configuration of `source`, but for `model.moe`, `router` and the places of things. Raises
    UserError where `source` is no dense model, or the experts do not fit it.
    """
    before, dense, tokenizer = _open(source, target)
    try:
        shape = upcycled_config(before.model, experts, every=every, first_dense=first_dense)
        config = replace(
            before,
            model=shape,
            # Weights of the choices sum to one, and nothing is dropped: what step 0 needs to equal the dense model.
            router=RouterConfig(top_k=top_k),
            # Trained anew on another corpus, a tokenizer of that name would give other tokens.
            data=replace(before.data, tokenizer=str(RunFolder(target).tokenizer / FILE_NAME)),
            checkpoint=replace(before.checkpoint, resume="auto"),
            log=replace(before.log, dir=str(target)),
        )
        # Rules that span owners, as for a file.
        config = parse_config(as_mapping(config), str(source))
        model = blank_decoder(config, dense.mesh, config.router)
        upcycle_(model, dense, seed=seed)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    write_run(config, model, tokenizer, str(source))
    return {
        "target": str(target),
        "parameters": _count(model),
        "dense_parameters": _count(dense),
        "experts": experts,
        "moe_layers": sum(map(shape.is_moe, range(shape.layers))),
    }


def _open(source: Path, target: Path) -> tuple[TrainConfig, Decoder, Tokenizer]:
    """The dense model at `source`, its tokenizer, and the configuration it has or would have as a run at `target`."""
    if (source / CONFIG).is_file():
        config, model, tokenizer, _ = open_huggingface(source, target)
        return config, model, tokenizer
    checkpoint = re.fullmatch(r"step-(\d+)(-\d+)?", source.name)
    saved = open_run(source, None) if checkpoint is None else open_run(source.parent.parent, int(checkpoint[1]))
    refuse_quantized(saved.checkpoint, "be upcycled")
    return saved.config, saved.model, saved.tokenizer


def _count(model: Decoder) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
