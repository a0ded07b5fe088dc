"""How ranks that know their number find each other, and what they then have to tell each other."""

# pyright: reportPrivateImportUsage=false
# torch.distributed does not declare its stores as exported.

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from . import alike, cores, mpi
from .env import Rank
from .errors import UserError
from .network import host_identity, interface_of, is_loopback, source_address

_RETRY_SECONDS = 0.1


def backend(choice: str, device: torch.device) -> str:
    """What init_process_group is asked for; CUDA ranks get gloo beside nccl, for what stays on the host.

    Raises UserError for nccl without a CUDA device.
    """
    if choice == "nccl" and device.type != "cuda":
        raise UserError(f"parallel.backend: nccl needs CUDA devices and this rank has {device}; use gloo or auto")
    if choice == "auto":
        choice = "nccl" if device.type == "cuda" else "gloo"
    return "cpu:gloo,cuda:nccl" if choice == "nccl" else choice


def group_timeout(watchdog_seconds: float) -> float:
    """Seconds after which collectives give up: the watchdog has reported and ended the process by then."""
    return watchdog_seconds * 1.25 + 60.0


def locate(rank: Rank) -> Rank:
    """`rank` with address and port: mpirun's ranks that were given none agree on them through MPI."""
    if rank.address is not None and rank.port is not None:
        return rank
    meeting = mpi.agree(rank=rank.rank, world=rank.world, address=rank.address, port=rank.port)
    listener = meeting.listener.detach() if meeting.listener is not None else None
    return replace(rank, address=meeting.address, port=meeting.port, listener=listener)


def connect(rank: Rank, timeout: timedelta) -> dist.Store:
    """A connection to the store of all ranks; rank 0 opens it, unless torchrun's agent already did.

    Raises UserError where it cannot be opened, or not be reached within `timeout`.
    """
    assert rank.address is not None and rank.port is not None, "locate comes first"
    hosts_it = rank.rank == 0 and not rank.agent_store
    if not hosts_it:
        _await_listener(rank, rank.address, rank.port, timeout.total_seconds())
    try:
        store = dist.TCPStore(
            rank.address,
            rank.port,
            is_master=hosts_it,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=rank.listener if hosts_it else None,
        )
    except RuntimeError as error:
        text = str(error)
        if "EADDRINUSE" in text or "address already in use" in text:
            text = f"it is taken on {socket.gethostname()}"
        raise UserError(f"MASTER_PORT: {rank.port} cannot be used: {text}; set another free port") from error
    # An elastic restart may find the store of the attempt before.
    return dist.PrefixStore(f"wastenot/{rank.attempt}", store)


def meet(rank: Rank, timeout: timedelta, makeup: alike.Makeup | None = None) -> dist.Store:
    """The same, once every rank is there. Raises UserError where some do not come within `timeout`, or are unlike.

    `makeup` is what this rank is made of; None is the installed versions alone.
    """
    makeup = makeup or alike.Makeup(rank=rank.rank, versions=alike.versions())
    store = connect(rank, timeout)
    alike.tell(store, makeup)
    _gather(rank, store, "start")
    alike.compare(store, makeup, rank.world)
    return store


def join(rank: Rank, store: dist.Store, backend: str, device: torch.device, timeout_seconds: float) -> None:
    """Makes the default process group of ranks that have met; every rank calls it.

    Shares out cores, refuses shared devices, and shows gloo the way where the user has not.
    """
    set_threads(rank, store)
    check_devices(rank, store, device, backend)
    if rank.gloo_interface is None and (interface := gloo_interface(rank, store)) is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", store),
        rank=rank.rank,
        world_size=rank.world,
        timeout=timedelta(seconds=group_timeout(timeout_seconds)),
        device_id=device if "nccl" in backend else None,
    )


def _await_listener(rank: Rank, address: str, port: int, seconds: float) -> None:
    """Returns when somebody listens there. TCPStore would wait too, in ever longer steps and with much to say."""
    deadline = time.monotonic() + seconds
    problem: OSError | None = None
    while (left := deadline - time.monotonic()) > 0:
        try:
            socket.create_connection((address, port), timeout=left).close()
            return
        except OSError as error:
            problem = error
            time.sleep(min(_RETRY_SECONDS, left))
    message = (
        f"rank {rank.rank} on {socket.gethostname()} cannot reach rank 0 at {address}:{port} within {seconds:g} s "
        f"({problem})"
    )
    if rank.world > rank.local_world and is_loopback(source_address(address, port)):
        raise UserError(f"{message}: MASTER_ADDR is this host's loopback; set it to an address that all hosts share")
    raise UserError(f"{message}; check that rank 0 runs, MASTER_ADDR, MASTER_PORT, and firewalls between the hosts")


def _gather(rank: Rank, store: dist.Store, topic: str) -> None:
    """Returns when every rank has said so; what each wrote to the store before can then be read by all."""
    if store.add(f"{topic}/arrived", 1) == rank.world:
        store.set(f"{topic}/complete", "")
    try:
        store.wait([f"{topic}/complete"])
    except RuntimeError as error:
        arrived = store.add(f"{topic}/arrived", 0)
        raise UserError(
            f"only {arrived} of {rank.world} ranks came to {rank.address}:{rank.port} in time; look for the first "
            "error among the others, and whether each host starts its part of the ranks"
        ) from error


def _neighbours(rank: Rank, store: dist.Store, topic: str, mine: Any) -> list[Any]:
    """What each rank on this very host says about `topic`; this rank says `mine`."""
    place = f"{topic}/{host_identity()}"
    store.set(f"{place}/{store.add(f'{place}/count', 1)}", json.dumps(mine))
    _gather(rank, store, topic)
    count = store.add(f"{place}/count", 0)
    return [json.loads(store.get(f"{place}/{index}")) for index in range(1, count + 1)]


def set_threads(rank: Rank, store: dist.Store | None) -> None:
    """Shares the cores out among ranks that run on the same ones, unless the user fixed the number of threads.

    Some launchers bind each rank to cores of its own and some bind none, so the ranks tell each other.
    """
    count = rank.threads
    if count is None:
        mine = cores.physical_cores()
        others = [mine] if store is None else _neighbours(rank, store, "cores", sorted(mine))
        count = cores.threads(mine, sharing=sum(not mine.isdisjoint(other) for other in others))
    torch.set_num_threads(count)


def check_devices(rank: Rank, store: dist.Store, device: torch.device, backend: str) -> None:
    """Raises UserError where nccl ranks of one host share a device; gloo ranks may."""
    if "nccl" not in backend:
        return
    mine = str(torch.cuda.get_device_properties(device).uuid)
    others = _neighbours(rank, store, "device", [rank.rank, mine])
    sharing = sorted(number for number, uuid in others if uuid == mine)
    if len(sharing) > 1:
        raise UserError(
            f"ranks {sharing} on {socket.gethostname()} share {device} ({mine}), which nccl refuses; start one rank "
            "per device, or set parallel.backend: gloo"
        )


def gloo_interface(rank: Rank, store: dist.Store) -> str | None:
    """The interface gloo should use: loopback for one host, else the one that leads to the other hosts.

    None leaves it to gloo, which asks what the host's name resolves to: on many machines, to loopback.
    """
    if rank.world == rank.local_world:
        return interface_of("127.0.0.1")
    assert rank.address is not None and rank.port is not None, "locate comes first"
    source = source_address(rank.address, rank.port)
    # Beside rank 0, its host's name often means loopback: look back at a rank that sees it from outside.
    if not is_loopback(source):
        store.set("interface/outside", source)
    _gather(rank, store, "interface")
    if is_loopback(source) and store.check(["interface/outside"]):
        source = source_address(store.get("interface/outside").decode(), rank.port)
    return interface_of(source)
