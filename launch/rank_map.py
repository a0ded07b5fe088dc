"""Whether the ranks that a launcher started make sense together: numbers, hosts, devices, addresses."""

# pyright: reportPrivateImportUsage=false
# torch.distributed does not declare its stores as exported.

from __future__ import annotations

import json
import os
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from . import rendezvous
from .alike import Makeup, unlike, versions
from .env import Rank
from .errors import UserError
from .network import host_identity, interface_of, interfaces, is_loopback, source_address

_STRAGGLER_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What one process says of itself."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    launcher: str
    host: str
    """The host's name."""
    home: str
    """Equal for processes to which 127.0.0.1 is the same place."""
    pid: int
    device: str
    device_id: str = ""
    """The accelerator's own number; empty on a CPU."""
    address: str
    """Where this process was told to meet the others."""
    source: str
    """Its own address on the way there."""
    interface: str = ""
    """The network interface that carries `source`."""
    chosen_interface: str = ""
    """GLOO_SOCKET_IFNAME, where set."""
    interfaces: tuple[str, ...] = ()
    """Names of its host's interfaces."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of Python, torch and wastenot."""


def report(rank: Rank, device: torch.device) -> RankReport:
    """This process's report; `rank` has an address."""
    assert rank.address is not None and rank.port is not None, "locate comes first"
    source = source_address(rank.address, rank.port)
    return RankReport(
        rank=rank.rank,
        world=rank.world,
        local_rank=rank.local_rank,
        local_world=rank.local_world,
        launcher=rank.launcher,
        host=socket.gethostname(),
        home=host_identity(),
        pid=os.getpid(),
        device=str(device),
        device_id=str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "",
        address=rank.address,
        source=source,
        interface=interface_of(source) or "",
        chosen_interface=rank.gloo_interface or "",
        interfaces=tuple(interface.name for interface in interfaces()),
        versions=versions(),
    )


class Assembly:
    """Where all processes of a job report, whatever numbers they claim: even two of one rank meet here."""

    def __init__(self, rank: Rank, seconds: float) -> None:
        """Raises UserError where the meeting place of `rank` cannot be reached within `seconds`."""
        self.seconds = seconds
        self.hosts_store = rank.rank == 0 and not rank.agent_store
        try:
            store = rendezvous.connect(rank, timedelta(seconds=seconds))
        except UserError:
            if not self.hosts_store:
                raise
            # The port may be taken by another rank 0: join its store, and the reports will tell.
            store = rendezvous.connect(replace(rank, agent_store=True), timedelta(seconds=seconds))
            self.hosts_store = False
        self.whole_store = store
        self.store = dist.PrefixStore("assembly", store)

    def gather(self, mine: RankReport) -> list[RankReport] | None:
        """Waits for all; the first to come gets every report. The others get None, and await its verdict."""
        number = self.store.add("count", 1)
        self.store.set(f"report/{number}", json.dumps(asdict(mine)))
        if number > 1:
            return None
        deadline = time.monotonic() + self.seconds
        found: list[RankReport] = []
        # Where they disagree on the size of the world, the smallest is enough to tell.
        while self._read_more(found) < min(r.world for r in found) and time.monotonic() < deadline:
            time.sleep(0.05)
        # More than the world may have been started.
        time.sleep(_STRAGGLER_SECONDS)
        self._read_more(found)
        return found

    def _read_more(self, found: list[RankReport]) -> int:
        """Adds the reports that have come since; returns how many there are."""
        for number in range(len(found) + 1, self.store.add("count", 0) + 1):
            found.append(_parsed(self.store.get(f"report/{number}")))
        return len(found)

    def release(self, verdict: str) -> None:
        """Called by the first to come: tells the others and lets them go."""
        self.store.set("verdict", verdict)
        self._leave()

    def await_verdict(self) -> str:
        """Called by the others: what the first to come said. Raises RuntimeError where it never does."""
        self.store.wait(["verdict"], timedelta(seconds=2 * self.seconds))
        verdict = self.store.get("verdict").decode()
        self._leave()
        return verdict

    def _leave(self) -> None:
        """Returns where the store lives only when all have read: it ends with its process."""
        left = self.store.add("left", 1)
        deadline = time.monotonic() + self.seconds
        while self.hosts_store and left < self.store.add("count", 0) and time.monotonic() < deadline:
            time.sleep(0.05)
            left = self.store.add("left", 0)


def _parsed(text: bytes) -> RankReport:
    told = json.loads(text)
    return RankReport(**told | {"interfaces": tuple(told["interfaces"])})


def problems(reports: Sequence[RankReport]) -> list[str]:
    """What is wrong with these processes as one job, each with what to change; empty where nothing is."""
    checks = (_worlds, _absent, _twice, _local_ranks, _devices, _addresses, _interfaces, _versions)
    return [problem for check in checks for problem in check(reports)]


def _worlds(reports: Sequence[RankReport]) -> list[str]:
    by_world = _grouped(reports, lambda r: r.world)
    if len(by_world) == 1:
        return []
    views = "; ".join(f"{world} say ranks {_numbers(rs)}" for world, rs in sorted(by_world.items()))
    return [f"the ranks disagree on WORLD_SIZE: {views}. Start them with one command, or set it alike everywhere"]


def _absent(reports: Sequence[RankReport]) -> list[str]:
    world = max(r.world for r in reports)
    absent = sorted(set(range(world)) - {r.rank for r in reports})
    if not absent:
        return []
    return [f"of {world} ranks {absent} did not come; look for their errors, and whether every host starts its part"]


def _twice(reports: Sequence[RankReport]) -> list[str]:
    return [
        f"RANK {rank} is claimed by {' and '.join(f'process {r.pid} on {r.host}' for r in claimants)}; give each "
        "process its own, or let torchrun, mpirun or srun number them"
        for rank, claimants in sorted(_grouped(reports, lambda r: r.rank).items())
        if len(claimants) > 1
    ]


def _local_ranks(reports: Sequence[RankReport]) -> list[str]:
    found = []
    # On CPUs nothing follows from local numbers: several nodes may well be played on one machine.
    for here in _grouped([r for r in reports if r.device_id], lambda r: r.home).values():
        host = here[0].host
        for local_rank, same in sorted(_grouped(here, lambda r: r.local_rank).items()):
            if len(same) > 1:
                found.append(
                    f"LOCAL_RANK {local_rank} is claimed by ranks {_numbers(same)}, which share host {host}; number "
                    "the ranks of a host from 0"
                )
        claimed = sorted({r.local_world for r in here})
        if claimed != [len(here)]:
            views = " or ".join(map(str, claimed))
            found.append(
                f"host {host} has {len(here)} ranks, which say LOCAL_WORLD_SIZE {views}; set it to {len(here)}"
            )
    return found


def _devices(reports: Sequence[RankReport]) -> list[str]:
    on_devices = [r for r in reports if r.device_id]
    return [
        f"ranks {_numbers(same)} share {same[0].device} of {same[0].host}, which nccl refuses; start one rank per "
        "device, or set CUDA_VISIBLE_DEVICES for each"
        for same in _grouped(on_devices, lambda r: r.device_id).values()
        if len(same) > 1
    ]


def _addresses(reports: Sequence[RankReport]) -> list[str]:
    found = []
    by_address = _grouped(reports, lambda r: r.address)
    if len(by_address) > 1:
        views = "; ".join(f"{address} say ranks {_numbers(rs)}" for address, rs in sorted(by_address.items()))
        found.append(f"the ranks disagree on MASTER_ADDR: {views}. Set it alike everywhere")
    if _absent(reports) and all(is_loopback(r.source) and r.local_world < r.world for r in reports):
        found.append(
            f"MASTER_ADDR {reports[0].address} is host {reports[0].host} only, while LOCAL_WORLD_SIZE says that ranks "
            "run on others; set it to an address that all hosts share"
        )
    return found


def _interfaces(reports: Sequence[RankReport]) -> list[str]:
    found = []
    several = len({r.home for r in reports}) > 1
    for r in sorted(reports, key=lambda r: r.rank):
        chosen = r.chosen_interface
        if chosen and r.interfaces and chosen not in r.interfaces:
            found.append(
                f"rank {r.rank}: GLOO_SOCKET_IFNAME {chosen} does not exist on {r.host}; use one of "
                f"{', '.join(dict.fromkeys(r.interfaces))}, or unset it to take {r.interface or 'the right one'}"
            )
        elif several and chosen and chosen != r.interface and not is_loopback(r.source):
            found.append(
                f"rank {r.rank}: GLOO_SOCKET_IFNAME is {chosen}, but the way to {r.address} is {r.interface}; use "
                "that, or unset it"
            )
    return found


def _versions(reports: Sequence[RankReport]) -> list[str]:
    return unlike(Makeup(rank=r.rank, host=r.host, versions=r.versions) for r in reports)


def _grouped(reports: Iterable[RankReport], key: Callable[[RankReport], Any]) -> dict[Any, list[RankReport]]:
    groups: dict[Any, list[RankReport]] = defaultdict(list)
    for r in reports:
        groups[key(r)].append(r)
    return groups


def _numbers(reports: Iterable[RankReport]) -> str:
    return ", ".join(str(r.rank) for r in sorted(reports, key=lambda r: r.rank))
