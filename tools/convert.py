"""`wastenot convert`: checkpoints of Hugging Face, Megatron, DeepSpeed as runs, and runs as Hugging Face's."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..launch.config import DataConfig, LogConfig, TrainConfig
from ..launch.env import Rank, pick_device
from ..launch.errors import UserError
from ..launch.run_folder import RunFolder
from ..launch.saved_run import SavedRun, blank_decoder, open_run, refuse_quantized, write_run
from ..launch.settings import as_mapping, parse_config
from ..launch.tokenizer import FILE_NAME, Tokenizer, load_tokenizer
from ..moe.adapters.huggingface import (
    CONFIG,
    FAMILIES,
    Family,
    config_from_huggingface,
    config_to_huggingface,
    load_huggingface,
    save_huggingface,
)
from ..moe.adapters.huggingface_names import has_experts
from ..moe.decoder import Decoder
from ..parallel.mesh import single

HELP = "turn checkpoints of Hugging Face, Megatron or DeepSpeed into runs, and runs into Hugging Face's"
EXAMPLE = """\
  wastenot convert to-hf runs/quickstart exported
  wastenot convert from-deepspeed runs/under-deepspeed runs/ours
  wastenot convert from-megatron checkpoints/iter_0001000 runs/imported --tokenizer tokenizer.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `wastenot convert`."""
    parser.add_argument("direction", choices=["to-hf", "from-hf", "from-deepspeed", "from-megatron"])
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a run for to-hf; a folder of safetensors for from-hf, of Megatron's torch_dist format for from-megatron; "
        "a run that DeepSpeed trained, or a checkpoint of it, for from-deepspeed",
    )
    parser.add_argument("target", metavar="TARGET", help="the folder to write; must not exist, or be empty")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="of a run: the step; default: the newest")
    parser.add_argument(
        "--family", choices=FAMILIES, help="to-hf: whose names to write; default: the first that can say the model"
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="from-megatron: the tokenizer.json it was trained with")
    parser.add_argument(
        "--config", metavar="YAML", help="from-megatron: `model` and `router` of the run; default: the saved options"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Converts and says what was written."""
    source, target = Path(args.source), Path(args.target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists; name a new folder")
    if args.direction != "from-megatron" and (args.tokenizer is not None or args.config is not None):
        raise UserError("--tokenizer and --config are for from-megatron; the others read both from the source")
    if args.direction == "to-hf":
        done = to_huggingface(source, target, args.checkpoint, args.family)
    elif args.family is not None:
        raise UserError(f"--family is for to-hf; {args.direction} reads it from the source")
    elif args.direction == "from-deepspeed":
        from .convert_deepspeed import from_deepspeed

        done = from_deepspeed(source, target, args.checkpoint)
    elif args.checkpoint is not None:
        raise UserError(f"--checkpoint is for runs; {args.direction} reads it from the source")
    elif args.direction == "from-megatron":
        # Here: the others do not need it.
        from .convert_megatron import from_megatron

        done = from_megatron(source, target, args.tokenizer, args.config)
    else:
        done = from_huggingface(source, target)
    print(json.dumps(done) if args.json else f"{done['target']}: {done['parameters']:,} parameters, {done['family']}")
    return 0


def to_huggingface(source: Path, target: Path, step: int | None, family: Family | None) -> dict[str, Any]:
    """Writes a checkpoint of the run `source`, with its tokenizer, as a folder that transformers loads.

    Raises UserError where the run cannot be read or no family can say its model.
    """
    saved = open_run(source, step)
    refuse_quantized(saved.checkpoint, "be converted")
    family = family or _family_of(saved)
    end_token = saved.tokenizer.end_token
    try:
        save_huggingface(saved.model, target, family, max_positions=saved.config.data.seq_len, end_token=end_token)
    except ValueError as error:
        raise UserError(str(error)) from error
    saved.tokenizer.save(target)
    return _told(target, family, saved.model)


def from_huggingface(source: Path, target: Path) -> dict[str, Any]:
    """Writes the checkpoint folder `source`, with its tokenizer.json, as a run with one checkpoint, of step 0.

    Raises UserError as `open_huggingface`.
    """
    config, model, tokenizer, family = open_huggingface(source, target)
    write_run(config, model, tokenizer, str(source))
    return _told(target, family, model)


def open_huggingface(source: Path, target: Path) -> tuple[TrainConfig, Decoder, Tokenizer, Family]:
    """The checkpoint folder `source` in this process, and the configuration of the run at `target` it may become.

    Raises UserError where `source` is no checkpoint of a known family.
    """
    described = _read_config(source / CONFIG)
    try:
        model_config, router, family = config_from_huggingface(described)
        tokenizer = load_tokenizer(source)
        config = TrainConfig(
            model=model_config,
            router=router,
            data=DataConfig(
                tokenizer=str(RunFolder(target).tokenizer / FILE_NAME),
                seq_len=described.get("max_position_embeddings", 2048),
            ),
            log=LogConfig(dir=str(target)),
        )
        # Rules that span owners, as for a file.
        config = parse_config(as_mapping(config), str(source / CONFIG))
        model = blank_decoder(config, single(pick_device(Rank())), router)
        load_huggingface(model, source, family)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    return config, model, tokenizer, family


def _family_of(saved: SavedRun) -> Family:
    """The first family whose stock models compute what this one does; UserError saying why none does."""
    reasons: list[str] = []
    for family in FAMILIES:
        if has_experts(family) != bool(saved.config.model.expert_counts):
            continue
        try:
            config_to_huggingface(saved.config.model, saved.config.router, family)
        except ValueError as error:
            reasons.append(str(error))
        else:
            return family
    raise UserError("\n".join([f"{saved.folder.path}: no Hugging Face family has such models", *reasons]))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give the folder of a Hugging Face checkpoint") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds no JSON object")
    return config


def _told(target: Path, family: Family, model: Decoder) -> dict[str, Any]:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"target": str(target), "family": family, "parameters": parameters}
