"""`wastenot train CONFIG`, and what torchrun, mpirun and srun start: `-m wastenot.launch.train CONFIG`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .alike import Makeup, versions
from .config import TrainConfig
from .engine_rules import devices_for_engine
from .env import Rank, detect, pick_device, start, stop
from .errors import UserError, all_together
from .exits import OK, OUR_FAULT, guarded
from .layout_rules import world_rules
from .run_folder import RunFolder
from .settings import as_mapping, load_config

HELP = "train a model as a configuration says, on local ranks or under torchrun, mpirun or srun"
EXAMPLE = "wastenot train configs/quickstart.yaml -s train.steps=100 -s log.dir=runs/short"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `wastenot train`."""
    parser.add_argument("config", help="a YAML file, or the name of one that comes along (quickstart)")
    parser.add_argument(
        "-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="override one value, as in train.steps=10"
    )
    parser.add_argument("--nproc", type=int, default=None, help="local ranks to start; default: what parallel asks for")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Runs this process's part: a rank where a launcher started it, else the start of local ranks."""
    overrides = list(args.set)
    if args.nproc is not None:
        overrides.append(f"train.nproc={args.nproc}")
    config = load_config(args.config, overrides)
    args.run_dir = config.log.dir
    if missing := devices_for_engine(config):
        raise all_together(str(args.config), missing)
    rank = detect(os.environ)
    if rank.launcher == "none":
        return _start_here(config, rank, args, overrides)
    return _run_rank(config, rank, args.json)


def _start_here(config: TrainConfig, rank: Rank, args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Checks and prepares everything once, so that ranks find nothing to complain about; then starts them."""
    from .corpus import prepare

    nproc = config.parallel.world(config.train.nproc or None)
    violations = world_rules(config, nproc)
    if violations:
        raise all_together(str(args.config), violations)
    RunFolder(config.log.dir).check_may_continue(config)
    prepare(config.data, progress=True)
    if nproc == 1:
        return _run_rank(config, rank, args.json)
    from .local import run_ranks

    command = [args.config, *(f"--set={override}" for override in overrides)]
    return run_ranks([*command, "--json"] if args.json else command, nproc)


def _run_rank(config: TrainConfig, rank: Rank, as_json: bool) -> int:
    """One rank from the start of its process group to the end of its run."""
    from ..moe.ledger import Ledger
    from ..parallel.events import Recorders
    from ..parallel.mesh import make_mesh
    from .console import RunConsole
    from .corpus import prepare
    from .memory import keep_freed_memory
    from .summary import print_table
    from .trainer import Trainer, TrainingFailedError
    from .watchdog import Watchdog

    console = RunConsole(speaks=rank.rank == 0)
    folder = RunFolder(config.log.dir)
    folder.check_may_continue(config)
    data = prepare(config.data, progress=rank.local_rank == 0)
    keep_freed_memory()
    device = pick_device(rank)
    makeup = Makeup(rank=rank.rank, versions=versions(config.engine), config=as_mapping(config))
    store = start(rank, config.parallel, device, makeup)
    ledger = Ledger()
    watchdog = Watchdog(rank, store, config.parallel.timeout_seconds)
    try:
        mesh = make_mesh(config.parallel, device, Recorders(ledger, watchdog))
        trainer = Trainer(config, mesh, data, console=console, ledger=ledger, watchdog=watchdog)
        summary = trainer.run()
    except TrainingFailedError as error:
        if rank.rank == 0:
            console.say(f"error: {error}")
        return OUR_FAULT
    except UserError:
        raise
    except Exception as error:
        explanation = watchdog.explain(error)
        if explanation:
            print(explanation, file=sys.stderr, flush=True)
        raise
    finally:
        watchdog.close()
    stop()
    if summary is not None and rank.rank == 0:
        print_table(summary, folder, console.console)
        if as_json:
            print(json.dumps(asdict(summary)))
    return OK


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of one rank: `python -m wastenot.launch.train CONFIG [-s key=value ...]`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m wastenot.launch.train", description=HELP, epilog=EXAMPLE)
    add_arguments(parser)
    args = argparse.Namespace(run_dir=None)

    def work() -> int:
        parser.parse_args(arguments, namespace=args)
        return run(args)

    def run_dir() -> Path | None:
        return None if args.run_dir is None else Path(args.run_dir)

    return guarded(work, as_json="--json" in arguments, run_dir=run_dir)


if __name__ == "__main__":
    sys.exit(main())
