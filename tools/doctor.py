"""`wastenot doctor`: what this machine has, what works on it, and whether a launcher's ranks make sense together."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..kernels.fused import fused_adam, fused_clip, fused_rms_norm
from ..launch import cores, env, rendezvous
from ..launch.errors import UserError
from ..launch.rank_map import Assembly, RankReport, problems, report
from ..launch.watchdog import Watchdog
from . import checkpoint_proof, rank_grid, selftest
from .packages import Package, examine

HELP = "show what this machine has and what works on it"
EXAMPLE = """\
  wastenot doctor --selftest
  torchrun --nnodes 2 --nproc-per-node 8 ... -m wastenot.tools.cli doctor --selftest
  srun --nodes 2 --ntasks-per-node 8 wastenot doctor --json
  wastenot doctor --checkpoint runs/quickstart
  wastenot doctor --layout run.yaml --ranks 16 --picture ranks.png"""

_MEET_SECONDS = 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `wastenot doctor`."""
    parser.add_argument(
        "--selftest",
        action="store_true",
        help="run collectives and training on two local ranks, or on a launcher's, whose results are known",
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="PATH", help="prove instead that a checkpoint is whole: a run, or one of its"
    )
    parser.add_argument("--layout", metavar="CONFIG", help="show which rank does what under a configuration, instead")
    parser.add_argument("--ranks", type=int, metavar="N", help="of --layout; default: as many as it asks for")
    parser.add_argument(
        "-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="of --layout: set one field; repeatable"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="of --layout: draw it as PNG")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Examines and prints; 2 where the ranks of a launcher do not fit together, 1 where the self-test fails."""
    if args.checkpoint is not None:
        return checkpoint_proof.run(args.checkpoint, as_json=args.json)
    if args.layout is not None:
        rank_grid.show(rank_grid.grid_of(args.layout, args.set, args.ranks), as_json=args.json, picture=args.picture)
        return 0
    for name in ("ranks", "set", "picture"):
        if getattr(args, name):
            raise UserError(f"--{name} belongs to --layout; add --layout CONFIG, or leave it out")
    rank = env.detect(os.environ)
    if rank.world > 1:
        return _run_rank(rank, args)
    with _patience(args.json):
        findings: dict[str, Any] = machine() | {"packages": examine()}
    findings["selftest"] = selftest.on_local_ranks() if args.selftest else []
    _print(findings, args.json)
    return int(not all(finding.good for finding in findings["selftest"]))


def _run_rank(rank: env.Rank, args: argparse.Namespace) -> int:
    """One of several ranks: the first to come gathers the map and speaks, for all of them."""
    rank = rendezvous.locate(rank)
    device = env.pick_device(rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    assembly = Assembly(rank, _MEET_SECONDS)
    reports = assembly.gather(report(rank, device))
    wrong = None if reports is None else problems(reports)
    if wrong is not None and reports is not None and (wrong or not args.selftest):
        _print(machine() | {"ranks": reports, "problems": wrong}, args.json)
    if wrong is not None:
        assembly.release("wrong" if wrong else "good")
    verdict = assembly.await_verdict() if wrong is None else ("wrong" if wrong else "good")
    if verdict == "wrong":
        return 2
    if not args.selftest:
        return 0
    results = _selftest(rank, assembly, device)
    if reports is not None:
        _print(machine() | {"ranks": reports, "problems": [], "selftest": results}, args.json)
    return int(not all(finding.good for finding in results))


def _selftest(rank: env.Rank, assembly: Assembly, device: torch.device) -> list[selftest.Finding]:
    """The checks on the ranks that a launcher started, over the network between them."""
    backend = rendezvous.backend("auto", device)
    rendezvous.join(rank, assembly.whole_store, backend, device, selftest.TIMEOUT_SECONDS)
    watchdog = Watchdog(rank, assembly.whole_store, selftest.TIMEOUT_SECONDS)
    results = selftest.check(device, watchdog)
    dist.barrier()
    watchdog.close()
    env.stop()
    return results


def machine() -> dict[str, Any]:
    """Device, cores, memory, backends and versions, as they would go into JSON."""
    devices = [
        f"{torch.cuda.get_device_name(i)}, {torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB"
        for i in range(torch.cuda.device_count())
    ]
    quota = cores.quota()
    return {
        "device": "cuda" if devices else "cpu",
        "devices": devices,
        "cores": len(cores.physical_cores()),
        "core_quota": None if quota == float("inf") else quota,
        "memory_bytes": _memory_bytes(),
        "bf16": _bf16(bool(devices)),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "backends": {
            "gloo": dist.is_gloo_available(),
            "nccl": dist.is_nccl_available(),
            "mpi": dist.is_mpi_available(),
        },
        "cuda": torch.version.cuda,
        "fused": _fused(torch.device("cuda" if devices else "cpu")),
        "versions": {name: _version(name) for name in ("wastenot", *_core_requirements())},
    }


def _fused(device: torch.device) -> dict[str, dict[str, str]]:
    """Whose fused kernels run, and why those."""
    chosen = {"adam": fused_adam(device), "rms_norm": fused_rms_norm(device), "clip": fused_clip(device)}
    return {name: {"runs": choice.source, "why": choice.why} for name, choice in chosen.items()}


def _memory_bytes() -> int | None:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("MemTotal")).split()[1]) * 1024
    return None


def _bf16(on_gpu: bool) -> str:
    """What makes bf16 products fast here; empty where nothing does."""
    if on_gpu:
        return "tensor cores" if torch.cuda.is_bf16_supported(including_emulation=False) else ""
    with contextlib.suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text()
        return next((name for name in ("amx_bf16", "avx512_bf16") if name in flags), "")
    return ""


def _core_requirements() -> Iterable[str]:
    """Names of the packages that wastenot always needs, from its own metadata."""
    for requirement in requires("wastenot") or []:
        if "extra ==" not in requirement:
            yield requirement.partition(";")[0].partition("[")[0].rstrip("<>=!~.,0123456789 ")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@contextlib.contextmanager
def _patience(quiet: bool) -> Iterator[None]:
    """Imports of large packages take their time: say so in a terminal."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    with Console(stderr=True).status("importing optional packages, each in a process of its own"):
        yield


def _print(findings: dict[str, Any], as_json: bool) -> None:
    if as_json:
        plain = {name: _plain(value) for name, value in findings.items()}
        print(json.dumps(plain, indent=2))
        return
    console = Console(highlight=False)
    console.print(_machine_table(findings))
    if findings.get("packages"):
        console.print(_package_table(findings["packages"]))
    if "ranks" in findings:
        console.print(_rank_table(findings["ranks"]))
        for problem in findings["problems"]:
            _verdict(console, False, problem)
        if not findings["problems"]:
            _verdict(console, True, "numbers, hosts, devices and addresses of the ranks fit together")
    for finding in findings.get("selftest", []):
        _verdict(console, finding.good, f"{finding.name}: {finding.detail}")


def _verdict(console: Console, good: bool, text: str) -> None:
    console.print(Text("good  " if good else "wrong ", "green" if good else "red") + text, soft_wrap=True)


def _plain(value: Any) -> Any:
    return [item if isinstance(item, str) else asdict(item) for item in value] if isinstance(value, list) else value


def _machine_table(findings: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    quota = findings["core_quota"]
    cpu = f"{findings['cores']} cores" + (f", {quota:g} of them granted" if quota is not None else "")
    if findings["memory_bytes"]:
        cpu += f", {findings['memory_bytes'] / 2**30:.0f} GiB"
    available = [name for name, there in findings["backends"].items() if there]
    for name, text in (
        ("device", "; ".join(findings["devices"]) or "CPU, no CUDA device"),
        ("cpu", cpu),
        ("bf16", findings["bf16"] or "no unit for it: slower than fp32"),
        ("backends", ", ".join(available)),
        *((name, f"{told['runs']} ({told['why']})") for name, told in findings["fused"].items()),
        ("system", f"{findings['system']}, Python {findings['python']}"),
        ("versions", ", ".join(f"{name} {number or 'missing'}" for name, number in findings["versions"].items())),
    ):
        table.add_row(name, text)
    return table


def _package_table(packages: list[Package]) -> Table:
    table = Table(title="optional packages", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name in ("package", "extra", ""):
        table.add_column(name, no_wrap=True)
    table.add_column("version, or what to do")
    colors = {"works": "green", "missing": "yellow", "broken": "red"}
    for package in packages:
        rest = package.version
        if package.state != "works":
            rest = "; ".join(filter(None, (package.note, f"for {package.purpose}: {package.install}")))
        table.add_row(package.name, package.extra, Text(package.state, colors[package.state]), Text(rest))
    return table


def _rank_table(ranks: list[RankReport]) -> Table:
    table = Table(
        title=f"ranks, started by {ranks[0].launcher}", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD
    )
    for name in ("rank", "host", "local", "device", "meets at", "through"):
        table.add_column(name)
    for r in sorted(ranks, key=lambda r: (r.rank, r.pid)):
        through = r.chosen_interface or f"{r.interface} ({r.source})"
        local = f"{r.local_rank}/{r.local_world}"
        table.add_row(f"{r.rank}/{r.world}", r.host, local, r.device, r.address, through)
    return table
