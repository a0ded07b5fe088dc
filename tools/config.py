"""`wastenot config CONFIG`: what a configuration comes to once its defaults and overrides are in."""

from __future__ import annotations

import argparse
import json

from ..launch.config import TrainConfig
from ..launch.rules import tokenizer_size
from ..launch.settings import as_mapping, dump_config, load_config
from ..moe.config_size import count_parameters

HELP = "check a configuration and print it with every default filled in"
EXAMPLE = "wastenot config models/olmoe-1b-7b -s parallel.expert=4 --check"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `wastenot config`."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or a packaged name such as quickstart")
    parser.add_argument(
        "-s",
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set one field, for example train.steps=100; may be repeated",
    )
    parser.add_argument("--check", action="store_true", help="only say whether it is legal, and its size")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints the resolved configuration; bad ones end in UserError."""
    config = load_config(args.config, args.set)
    if args.check:
        size = _size(config)
        print(json.dumps({"legal": True, **size}) if args.json else _summary(args.config, size))
    elif args.json:
        print(json.dumps(as_mapping(config), indent=2))
    else:
        print(dump_config(config), end="")
    return 0


def _size(config: TrainConfig) -> dict[str, int | None]:
    """Parameters in all and used per token; None where only the tokenizer's file tells the vocabulary."""
    vocab_size = config.model.vocab_size or tokenizer_size(config.data.tokenizer)
    if vocab_size is None:
        return {"total": None, "active": None}
    return {**count_parameters(config.model, config.router, vocab_size)}


def _summary(name: str, size: dict[str, int | None]) -> str:
    if size["total"] is None or size["active"] is None:
        return f"{name}: legal; its parameters depend on the tokenizer"
    return f"{name}: legal; {size['total'] / 1e6:,.1f} M parameters, {size['active'] / 1e6:,.1f} M used per token"
