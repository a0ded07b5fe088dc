"""`wastenot launch slurm|mpi|torchrun CONFIG`: a job script for a cluster, printed, written or submitted."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from ..launch.config import TrainConfig
from ..launch.errors import UserError, all_together
from ..launch.layout_rules import world_rules
from ..launch.settings import load_config

HELP = "write a job script for Slurm, mpirun or torchrun, and submit it"
EXAMPLE = """\
  wastenot launch slurm CONFIG.yaml --nodes 4 --gpus-per-node 8 --time 24:00:00 -o job.sh
  wastenot launch mpi CONFIG.yaml --nodes 2 --ranks-per-node 4 --hosts node1,node2 --submit
  wastenot launch mpi CONFIG.yaml --nodes 2 --ranks-per-node 4 --hosts node1,node2 --flavour intel -o job.sh
  wastenot launch torchrun CONFIG.yaml --nodes 2 --ranks-per-node 8 --hosts node1,node2 -s log.dir=runs/big"""

_PLACEHOLDER = re.compile(r"@([A-Z_]+)@")
_SUBMIT_WITH = {"slurm": "sbatch", "mpi": "mpirun or mpiexec", "torchrun": "torchrun"}


@dataclass(frozen=True)
class _Flavour:
    """One make of MPI."""

    starter: str
    """The program that starts its ranks, and the name of the template for it: Hydra's are alike."""
    version: str
    """What that program says of itself in `--version`."""
    package: str
    """What pip calls it."""


_FLAVOURS = {
    "openmpi": _Flavour("mpirun", "Open MPI", "'wastenot[mpi]'"),
    "mpich": _Flavour("mpiexec", "HYDRA", "mpich mpi4py"),
    "intel": _Flavour("mpiexec", "Intel", "impi-rt mpi4py"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `wastenot launch`."""
    launchers = parser.add_subparsers(dest="launcher", metavar="slurm|mpi|torchrun", required=True)
    for name, summary in (
        ("slurm", "a batch script in which srun starts the ranks"),
        ("mpi", "a script that starts the ranks with mpirun or mpiexec"),
        ("torchrun", "a script to run on every node"),
    ):
        sub = launchers.add_parser(name, help=summary, description=f"Writes {summary}.", allow_abbrev=False)
        sub.add_argument("config", metavar="CONFIG", help="a YAML file, or a packaged name such as quickstart")
        sub.add_argument("--nodes", type=_count, required=True, metavar="N", help="hosts that take part")
        sub.add_argument(
            "--ranks-per-node", type=_count, metavar="N", help="default: one per GPU, else what parallel asks for"
        )
        sub.add_argument("--gpus-per-node", type=_count, metavar="N", help="default: train on CPUs")
        sub.add_argument("-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="as for wastenot train")
        sub.add_argument("--name", type=_word, default="wastenot", help="of the job (%(default)s)")
        sub.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the script there")
        sub.add_argument("--submit", action="store_true", help=f"hand it to {_SUBMIT_WITH[name]}")
        sub.add_argument("--json", action="store_true", help="print one JSON object")
        if name == "slurm":
            sub.add_argument("--cpus-per-rank", type=_count, metavar="N", help="default: the cluster's")
            sub.add_argument("--time", type=_limit, metavar="LIMIT", help="such as 24:00:00; default: the partition's")
            sub.add_argument("--partition", type=_word)
            sub.add_argument("--account", type=_word)
        else:
            sub.add_argument("--hosts", type=_hosts, metavar="A,B,…", help="their names, that of rank 0 first")
        if name == "mpi":
            sub.add_argument("--flavour", choices=_FLAVOURS, default="openmpi", help="whose MPI (%(default)s)")
        if name == "torchrun":
            sub.add_argument("--port", type=_count, default=29500, help="where agents meet (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Makes the script; prints it where nothing else is to be done with it."""
    config = load_config(args.config, args.set)
    script = make_script(args, config)
    if args.output is not None:
        _write(args.output, script)
    if args.submit:
        return _submit(args, script)
    if args.json:
        print(json.dumps({"script": script, "file": str(args.output) if args.output else None}))
    elif args.output is None:
        print(script, end="")
    else:
        print(f"{args.output}: start it with `{'sbatch' if args.launcher == 'slurm' else 'bash'} {args.output}`")
    return 0


def make_script(args: argparse.Namespace, config: TrainConfig) -> str:
    """The filled template. Raises UserError where ranks and configuration, or hosts and nodes, do not fit."""
    ranks_per_node = args.ranks_per_node or args.gpus_per_node or -(-config.parallel.world() // args.nodes)
    ranks = args.nodes * ranks_per_node
    if violations := world_rules(config, ranks):
        raise all_together(f"{args.config} on {args.nodes} x {ranks_per_node} ranks", violations)
    hosts = getattr(args, "hosts", None)
    if hosts is not None and len(hosts) != args.nodes:
        raise UserError(f"--hosts: {len(hosts)} names for --nodes {args.nodes}; give {args.nodes}")
    if args.launcher == "torchrun" and hosts is None and args.nodes > 1:
        raise UserError("--hosts: torchrun's agents need to know where to meet; name the nodes, rank 0's first")
    config_path = Path(args.config)
    arguments = [str(config_path.resolve()) if config_path.exists() else args.config]
    arguments += [f"--set={override}" for override in args.set]
    starter = _FLAVOURS[args.flavour].starter if args.launcher == "mpi" else args.launcher
    return fill(
        files("wastenot.launch").joinpath("jobs", f"{starter}.sh").read_text(encoding="utf-8"),
        {
            "NAME": args.name,
            "NODES": args.nodes,
            "RANKS": ranks,
            "RANKS_PER_NODE": ranks_per_node,
            "CPUS_PER_RANK": getattr(args, "cpus_per_rank", None),
            "GPUS_PER_NODE": args.gpus_per_node,
            "TIME": getattr(args, "time", None),
            "PARTITION": getattr(args, "partition", None),
            "ACCOUNT": getattr(args, "account", None),
            "HOSTS": hosts and ",".join(f"{host}:{ranks_per_node}" for host in hosts),
            "FIRST_HOST": hosts[0] if hosts else "localhost",
            "PORT": getattr(args, "port", None) if hosts else 0,
            "WORKDIR": Path.cwd(),
            "PYTHON": sys.executable,
            "LOG_DIR": config.log.dir,
            "ARGUMENTS": arguments,
        },
    )


def fill(template: str, values: Mapping[str, object]) -> str:
    """Replaces each @NAME@ by its value, quoted for the shell; a line that asks for a None is left out."""
    lines = []
    for line in template.splitlines():
        names = _PLACEHOLDER.findall(line)
        if not any(values[name] is None for name in names):
            lines.append(_PLACEHOLDER.sub(lambda match: _quoted(values[match[1]]), line))
    return "\n".join(lines) + "\n"


def _quoted(value: object) -> str:
    return shlex.join(value) if isinstance(value, list) else shlex.quote(str(value))


def _write(path: Path, script: str) -> None:
    try:
        path.write_text(script, encoding="utf-8")
        path.chmod(0o755)
    except OSError as error:
        raise UserError(f"--output: {path} cannot be written ({error.strerror}); choose another file") from error


def _submit(args: argparse.Namespace, script: str) -> int:
    """Hands the script to what starts it, and returns 0 where that accepted it (or ran it well)."""
    if args.launcher == "torchrun" and args.nodes > 1:
        raise UserError(f"--submit: torchrun starts one node; copy the script to all {args.nodes} and run it there")
    if args.launcher == "slurm":
        return _submit_to_slurm(script)
    if args.launcher == "mpi":
        _check_mpi(args.flavour)
    code = subprocess.run(["bash", "-c", script]).returncode
    if code:
        print(f"error: the job ended with exit code {code}", file=sys.stderr)
    return 2 if code == 2 else int(code != 0)


def _check_mpi(name: str) -> None:
    """Raises UserError where the program that the script will call is missing, or another MPI's."""
    wanted = _FLAVOURS[name]
    # As the script has it.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    tool = shutil.which(wanted.starter, path=path)
    advice = f"pip install {wanted.package}, or load your cluster's MPI"
    if tool is None:
        raise UserError(f"--submit: no {wanted.starter} on PATH; {advice}")
    said = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout
    found = next((other for other, flavour in _FLAVOURS.items() if flavour.version in said), None)
    if found not in (name, None):
        raise UserError(f"--flavour: {name}, but {tool} is of {found}; use {found}, or {advice}")


def _submit_to_slurm(script: str) -> int:
    """0 where sbatch took the script; 1 where it also waited (SBATCH_WAIT is set) and the job failed."""
    if shutil.which("sbatch") is None:
        raise UserError("--submit: no sbatch on PATH; run this where Slurm is installed, or leave --submit out")
    submitted = False
    with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile("w+") as told:
        given.write(script)
        given.seek(0)
        with subprocess.Popen(["sbatch"], stdin=given, stdout=subprocess.PIPE, stderr=told, text=True) as process:
            assert process.stdout is not None
            # At once: it names the job that sbatch then may wait for.
            for line in process.stdout:
                print(line, end="", flush=True)
                submitted |= line.startswith("Submitted batch job")
        told.seek(0)
        said = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in told.read().splitlines()]
    if process.returncode and not submitted:
        refusal = "; ".join(said)
        raise UserError(f"--submit: sbatch refused the job: {refusal}{_partitions(refusal)}")
    print("".join(f"sbatch: {line}\n" for line in said), end="", file=sys.stderr)
    if process.returncode:
        print(f"error: the job ended with exit code {process.returncode}", file=sys.stderr)
    return int(process.returncode != 0)


def _partitions(refusal: str) -> str:
    """The partitions there are, where the wrong one, or none, was asked for."""
    if "partition" not in refusal or shutil.which("sinfo") is None:
        return ""
    listed = subprocess.run(["sinfo", "--noheader", "--format=%R"], capture_output=True, text=True).stdout.split()
    return f"; --partition: this cluster has {', '.join(listed)}" if listed else ""


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def _word(text: str) -> str:
    if not re.fullmatch(r"[\w.,+-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a plain name; use letters, digits, dots and dashes")
    return text


def _limit(text: str) -> str:
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time limit; use for example 24:00:00 or 2-00:00:00")
    return text


def _hosts(text: str) -> list[str]:
    hosts = text.split(",")
    if not all(re.fullmatch(r"[\w.:-]+", host) for host in hosts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of host names; use for example node1,node2")
    return hosts
