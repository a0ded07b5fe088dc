"""`wastenot compress recover RUN TARGET`: a compressed run learns again, from text and from the dense model.

It is a training run like any other, by the ordinary trainer, over any ranks, resumable: the configuration is RUN's,
with what is said here set over it (`train.start`, `train.only`, `train.distill`).
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from ...launch import train
from ...launch.config import TrainConfig
from ...launch.errors import UserError
from ...launch.run_folder import RunFolder

HELP = "train a compressed run a little longer, on text and against the dense model"
EXAMPLE = """
wastenot compress recover runs/dropped runs/recovered --teacher runs/dense --steps 200 --nproc 2
wastenot compress recover runs/dropped runs/recovered --teacher runs/dense --data self --train router
wastenot compress recover runs/dropped runs/recovered --stub 64 --train stub -s optimizer.lr=1e-3
"""

SELF = "self"

_LEARNING_RATE = 0.25
"""Of the run's own peak, which throws a trained model off its course. A guess: on small runs an eighth to a half do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `wastenot compress recover`."""
    parser.add_argument("run_folder", metavar="RUN", help="what `compress apply` made of a run, or any other run")
    parser.add_argument("target", metavar="TARGET", help="folder of the new run; an interrupted one goes on")
    parser.add_argument("--teacher", metavar="DENSE_RUN", help="the run to learn from beside the text")
    parser.add_argument(
        "--train",
        choices=["all", "router", "norms", "stub"],
        default="all",
        help="what learns: everything (default), routers, norms, or dense feed-forward networks",
    )
    parser.add_argument("--steps", type=int, help="default: a tenth of the run's")
    parser.add_argument(
        "--stub", type=int, metavar="WIDTH", help="put a dense network of this width into layers that only attend"
    )
    parser.add_argument(
        "--data",
        metavar="CORPUS",
        help="as data.corpus; or `self`: text that the teacher writes; default: what the run was trained on",
    )
    parser.add_argument(
        "--tokens", type=int, help="of --data self; default: as many as the steps read, so that none is read twice"
    )
    parser.add_argument(
        "-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="override one value of the configuration"
    )
    parser.add_argument("--nproc", type=int, help="local ranks to start; default: what parallel asks for")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Runs this process's part of the training run, as `wastenot train` does.

    Its learning rate is a quarter of the run's; weights of experts that slimming made zero stay zero.
    """
    if args.tokens is not None and args.data != SELF:
        raise UserError(f"--tokens: {args.tokens} are those of --data self; leave it out")
    folder = RunFolder(args.run_folder)
    before = folder.load_config()
    steps = max(1, before.train.steps // 10) if args.steps is None else args.steps
    settings: dict[str, Any] = {
        "log.dir": args.target,
        "log.profile": [],
        "train.start": args.run_folder,
        "train.steps": steps,
        "train.only": args.train,
        "train.keep_zeros": True,
        "train.distill": None if args.teacher is None else {"teacher": args.teacher},
        "optimizer.lr": before.optimizer.lr * _LEARNING_RATE,
        "schedule.warmup_steps": min(before.schedule.warmup_steps, steps // 10),
        "checkpoint.resume": "auto",
        "checkpoint.every": max(1, steps // 5),
    }
    if args.train in ("norms", "stub"):
        settings["router.bias_update"] = 0
    if args.stub is not None:
        settings |= stub_settings(before, args.stub, args.run_folder)
    if args.data is not None and args.data != SELF:
        settings |= {"data.corpus": args.data, "data.tokenizer": str(folder.tokenizer / "tokenizer.json")}
    # What the user sets comes last.
    overrides = [*(f"{path}={json.dumps(value)}" for path, value in settings.items()), *args.set]
    if args.data == SELF:
        overrides.append(f"data.corpus={json.dumps(str(_written(args, str(folder.config), overrides)))}")
    args.config, args.set = str(folder.config), overrides
    return train.run(args)


def stub_settings(before: TrainConfig, width: int, run: str) -> dict[str, Any]:
    """Settings that make the layers of `before` that only attend dense ones of `width`; UserError where none can be."""
    model, moe = before.model, before.model.moe
    layers = range(model.layers)
    if width < 1:
        raise UserError(f"--stub: {width} is too small; use 1 or more")
    if moe is None or all(map(model.has_ffn, layers)):
        raise UserError(f"--stub: no layer of {run} only attends; drop MoE layers first, or leave --stub out")
    there = [layer for layer in layers if model.is_dense(layer)]
    if there and model.dense_width != width:
        raise UserError(
            f"--stub: {width} is not the width of the dense layers {there} that {run} has, and all have one; use "
            f"{model.dense_width}"
        )
    return {"model.d_ff": width, "model.moe.dense": [layer for layer in layers if not model.is_moe(layer)]}


def _written(args: argparse.Namespace, config_file: str, overrides: list[str]) -> Path:
    """A corpus that the teacher wrote, for the run that `overrides` make."""
    from ...launch.console import RunConsole
    from ...launch.corpus import prepare
    from ...launch.env import detect
    from ...launch.saved_run import open_run
    from ...launch.self_generated import Writing, self_generated
    from ...launch.settings import load_config

    if args.teacher is None:
        raise UserError("--data: self is text that the teacher writes; name one with --teacher")
    config = load_config(config_file, overrides)
    each_once = config.train.steps * config.train.batch * config.data.seq_len
    try:
        writing = Writing(tokens=each_once if args.tokens is None else args.tokens, seed=config.train.seed)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    speaks = detect(os.environ).local_rank == 0
    with RunConsole(speaks=speaks).following("write", writing.tokens) as line:
        return self_generated(open_run(args.teacher), prepare(config.data, progress=speaks), writing, line.portion)
