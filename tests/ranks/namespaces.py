"""Hosts played by network namespaces of this machine: each has its own name, its own loopback and one shared network."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

ADDRESS = "10.78.0.{}"
"""Of host 1, host 2, …, on the network they share."""


@contextlib.contextmanager
def namespace_hosts(count: int) -> Iterator[str]:
    """Prefix of the namespaces PREFIX1, …, PREFIX`count`, which a bridge connects. Raises OSError where they cannot be.

    Each also carries one and the same address on a `docker0`, as container hosts do: it answers, and leads nowhere.
    """
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("nsenter")):
        raise OSError("network namespaces need root, ip and nsenter")
    prefix = f"wn{os.getpid()}h"
    numbers = range(1, count + 1)
    try:
        _ip(f"netns add {prefix}0")
        _ip(f"-n {prefix}0 link add bridge type bridge")
        _ip(f"-n {prefix}0 link set bridge up")
        for number in numbers:
            _ip(f"netns add {prefix}{number}")
            _ip(f"link add net-{number} netns {prefix}{number} type veth peer name port-{number} netns {prefix}0")
            _ip(f"-n {prefix}0 link set port-{number} master bridge up")
            inside = f"-n {prefix}{number}"
            _ip(f"{inside} link set lo up")
            _ip(f"{inside} link add docker0 type veth peer name container")
            for name, address in ("docker0", "172.17.0.1/16"), (f"net-{number}", f"{ADDRESS.format(number)}/24"):
                _ip(f"{inside} addr add {address} dev {name}")
                _ip(f"{inside} link set {name} up")
            _ip(f"{inside} link set container up")
        yield prefix
    finally:
        for number in (0, *numbers):
            subprocess.run(["ip", "netns", "del", f"{prefix}{number}"], capture_output=True)


def _ip(command: str) -> None:
    done = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"this system refuses network namespaces: ip {command}: {done.stderr.strip()}")


def on_host(prefix: str, number: int, command: str, names: Path | None = None) -> list[str]:
    """`command` of a shell, run where only that host's network and name are seen; `names` is its /etc/hosts."""
    name = f"{prefix}{number}"
    known = "" if names is None else f"mount --bind {names} /etc/hosts; "
    # `ip netns exec` would also hide /sys/fs/cgroup, which slurmd asks for.
    inside = ["nsenter", f"--net=/run/netns/{name}", "unshare", "--uts", "--mount"]
    return [*inside, "sh", "-c", f"hostname {name}; {known}{command}"]


def run_all(commands: list[list[str]]) -> list[str]:
    """Standard output of all commands at once, as sorted lines; each has to succeed."""
    variables = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(command, env=variables, stdout=pipe, stderr=pipe, text=True) for command in commands]
    try:
        results = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), results
    return sorted(line for output, _ in results for line in output.splitlines())
