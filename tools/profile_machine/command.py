"""`wastenot profile`: measures what the planner's cost model assumes, and writes it as a calibration file.

`--json` prints one object: what the file holds (`parallel/lynx/calibration.py`), in bytes, bytes/s, FLOP/s and seconds

    file, version, command        where it was written, its format, and the command that predicts with it
    machine, date, versions       what was measured
    cluster                       whose figures it replaces
    device, peak, efficiency      figures of a device; `peak` by dtype
    links                         figures by link
    layers                        by kind: `work`, a fingerprint, and `seconds` by operator or window
    notes                         what was not measured, and why; how far measurements scattered
    samples                       by link and collective: [bytes that one rank sent, seconds]
"""

from __future__ import annotations

import argparse
import os
import pickle
import shlex
import tempfile
from pathlib import Path

from ...launch import cores, env
from ...launch.errors import UserError
from ...launch.local import run_ranks
from ...parallel.lynx.calibration import read_calibration
from ...parallel.lynx.cluster import shipped_clusters
from ..lynx_arguments import add_work_arguments, question_of
from ..lynx_input import read_model
from ..output import check_output
from .job import FULL, QUICK, Job

HELP = "measure what the planner assumes: kernels, links, and the operators of a run's layers"
EXAMPLE = """
wastenot profile configs/quickstart.yaml -o calib.yaml --nproc 2 --quick
wastenot profile mixtral-8x7b --cluster h100-nvlink8-ib --nproc 8 -o h100.yaml
torchrun --nnodes 2 --nproc-per-node 8 ... -m wastenot.tools.cli profile mixtral-8x7b -o h100.yaml
"""

_USUAL = "calib.yaml"
_BY_DEVICE = "by device"
"""The cluster where none is named."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `wastenot profile`."""
    add_work_arguments(parser)
    parser.set_defaults(cluster=_BY_DEVICE)
    parser.add_argument("-o", "--output", type=Path, default=Path(_USUAL), metavar="FILE", help="(%(default)s)")
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="local ranks; default: what CONFIG asks for, or 2, if they fit"
    )
    parser.add_argument("--quick", action="store_true", help="in a minute on 2 cores: fewer turns, smaller kernels")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Measures on local ranks, or as one of the ranks that a launcher started."""
    rank = env.detect(os.environ)
    if args.nproc is not None and args.nproc < 1:
        raise UserError(f"--nproc: {args.nproc} ranks measure nothing; use 1 or more")
    if rank.rank == 0:
        check_file(args.output)
    job, nproc = _job(args, rank.world)
    if rank.launcher != "none":
        from .rank import run_rank

        return run_rank(job, rank)
    with tempfile.TemporaryDirectory(prefix="wastenot-profile-") as folder:
        file = Path(folder) / "job"
        file.write_bytes(pickle.dumps(job))
        return run_ranks([str(file)], nproc, module="wastenot.tools.profile_machine.rank")


def check_file(output: Path) -> None:
    """Raises UserError where the file cannot stand there, or would replace what is no calibration."""
    check_output(output, b"", "a calibration", _USUAL)
    if output.exists():
        try:
            read_calibration(output)
        except ValueError as error:
            raise UserError(f"{output} exists and is not a calibration ({error}); name another --output") from error


def _job(args: argparse.Namespace, world: int) -> tuple[Job, int]:
    """What to measure, and on how many local ranks where no launcher has started any."""
    try:
        config = read_model(args.config).config
    except (ValueError, OSError) as error:
        raise error if isinstance(error, UserError) else UserError(str(error)) from error
    nproc = args.nproc or min(
        _devices_here(), 2 if config is None else config.parallel.world(config.train.nproc or None)
    )
    if args.cluster == _BY_DEVICE:
        args.cluster = _cluster_here()
    if args.devices is None and config is not None:
        args.devices = world if world > 1 else nproc
    question = question_of(args)
    said = [args.config, "--devices", str(question.layout.devices), "--cluster", args.cluster]
    job = Job(
        shape=question.shape,
        layout=question.layout,
        skew=question.skew,
        cluster=question.cluster,
        config=config,
        output=args.output,
        effort=QUICK if args.quick else FULL,
        as_json=args.json,
        command=f"wastenot simulate {shlex.join(said)} --calibration {shlex.quote(str(args.output))}",
    )
    return job, nproc


def _devices_here() -> int:
    """Ranks that do not share a GPU, or a core."""
    import torch

    return torch.cuda.device_count() or len(cores.physical_cores())


def _cluster_here() -> str:
    """The shipped cluster of the device that is here: by its name, or the usual one."""
    import torch

    if not torch.cuda.is_available():
        return "cpu-gloo"
    device = torch.cuda.get_device_name(0).lower()
    found = [name for name in shipped_clusters() if name.partition("-")[0] in device]
    return found[0] if found else "h100-nvlink8-ib"
