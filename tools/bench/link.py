"""A host per rank on one machine: network namespaces on a bridge, each behind a link of a given rate (Linux, root).

On loopback gloo's threads fight the ranks for cores and the network costs nothing; behind such a link they wait.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...launch.env import LISTENER
from ...launch.local import run_ranks

ADDRESS = "10.79.0.{}"
"""Of host 1, 2, …: rank 0 is on host 1."""
BURST = "256kb"
LATENCY = "400ms"
"""What a link's queue holds before it drops: long enough that TCP keeps the link full."""


class NoLinkError(RuntimeError):
    """This machine cannot have such a link, and why."""


@dataclass(frozen=True)
class Link:
    """Namespaces PREFIX0, PREFIX1, …, one for each rank."""

    prefix: str
    rate: str


@contextlib.contextmanager
def shaped_link(ranks: int, rate: str) -> Iterator[Link]:
    """`ranks` hosts that each send at `rate` (as tc writes it: `1gbit`); gone afterwards, whatever happens.

    Raises NoLinkError where the system refuses namespaces or shaping.
    """
    prefix = f"wn{os.getpid()}-"
    made: list[str] = []
    try:
        _build(prefix, ranks, rate, made)
        yield Link(prefix, rate)
    finally:
        for name in made:
            # Its ends of the links go with a namespace, and their other ends with them.
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def run_ranks_on(link: Link | None, module: str, argv: Sequence[str], ranks: int) -> int:
    """`launch.local.run_ranks` with every rank on its host of `link`; on loopback without one."""
    if link is None:
        return run_ranks(argv, ranks, module=module)
    return run_ranks([link.prefix, module, *argv], ranks, module=__name__)


def bytes_sent(interface: str) -> int:
    """What the kernel has sent through `interface` of this process's host, headers included."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == interface:
            return int(numbers.split()[8])
    raise ValueError(f"interface: {interface} is not one of this host's; see `ip link`")


def _build(prefix: str, ranks: int, rate: str, made: list[str]) -> None:
    def namespace(name: str) -> None:
        _system(f"ip netns add {name}")
        made.append(name)
        _system(f"ip -n {name} link set lo up")

    switch = f"{prefix}switch"
    namespace(switch)
    _system(f"ip -n {switch} link add bridge type bridge")
    _system(f"ip -n {switch} link set bridge up")
    for rank in range(ranks):
        host = f"{prefix}{rank}"
        namespace(host)
        _system(f"ip link add eth0 netns {host} type veth peer name port{rank} netns {switch}")
        _system(f"ip -n {switch} link set port{rank} master bridge up")
        _system(f"ip -n {host} addr add {ADDRESS.format(rank + 1)}/24 dev eth0")
        _system(f"ip -n {host} link set eth0 up")
        _system(f"tc -n {host} qdisc add dev eth0 root tbf rate {rate} burst {BURST} latency {LATENCY}")


def _system(command: str) -> None:
    try:
        subprocess.run(command.split(), check=True, capture_output=True, text=True)
    except OSError as error:
        raise NoLinkError(f"no network namespaces here: {error.strerror}: {command.split()[0]}") from None
    except subprocess.CalledProcessError as error:
        raise NoLinkError(f"this system refuses `{command}`: {error.stderr.strip()}") from None


def main(argv: Sequence[str]) -> None:
    """`PREFIX MODULE ARGUMENT…`: what `run_ranks` starts; becomes `python -m MODULE` on this rank's host."""
    prefix, module, *rest = argv
    environ = {name: value for name, value in os.environ.items() if name not in (LISTENER, "GLOO_SOCKET_IFNAME")}
    # The port that run_ranks has found is free there too: nobody else lives on that host.
    environ |= {"MASTER_ADDR": ADDRESS.format(1), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    host = f"{prefix}{environ['RANK']}"
    os.execvpe("ip", ["ip", "netns", "exec", host, sys.executable, "-m", module, *rest], environ)


if __name__ == "__main__":
    main(sys.argv[1:])
