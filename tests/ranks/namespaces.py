"""Hosts played by network namespaces: each has a name and a loopback of its own, and a network shared by all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

ADDRESS = "10.78.0.{}"
"""Of host 1, host 2, …, on the network they share."""

# `ip netns exec` would also hide /sys/fs/cgroup, which slurmd asks for.
_ENTER = "nsenter --net=/run/netns/{} unshare --uts --mount"


class UnavailableError(OSError):
    """This machine lacks what hosts are made of, or refuses it."""


@contextlib.contextmanager
def namespace_hosts(count: int) -> Iterator[str]:
    """Prefix of the namespaces PREFIX1, …, PREFIX`count`, which a bridge connects. Raises UnavailableError.

    Each also carries one and the same address on a `docker0`, as container hosts do: it answers, and leads nowhere.
    """
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("nsenter")):
        raise UnavailableError("network namespaces need root, ip and nsenter")
    _delete_those_of_the_dead()
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


def _delete_those_of_the_dead() -> None:
    """Deletes the namespaces of processes that were killed before they could."""
    for file in Path("/run/netns").glob("wn*"):
        owner = re.fullmatch(r"wn(\d+)h\d+", file.name)
        if owner is not None and not Path(f"/proc/{owner[1]}").exists():
            subprocess.run(["ip", "netns", "del", file.name], capture_output=True)


def _ip(command: str) -> None:
    done = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
    if done.returncode:
        raise UnavailableError(f"this system refuses network namespaces: ip {command}: {done.stderr.strip()}")


def write_names(prefix: str, count: int, file: Path) -> Path:
    """Writes an /etc/hosts by which `count` hosts know each other; returns `file`."""
    known = [f"{ADDRESS.format(number)} {prefix}{number}" for number in range(1, count + 1)]
    file.write_text("\n".join(["127.0.0.1 localhost", *known, ""]))
    return file


def on_host(prefix: str, number: int, command: str, names: Path | None = None) -> list[str]:
    """`command` of a shell, run where only that host's network and name are seen; `names` is its /etc/hosts, if any."""
    name = f"{prefix}{number}"
    return [*_ENTER.format(name).split(), "sh", "-c", f"{_introduce(name, names)}{command}"]


def write_agent(prefix: str, file: Path, names: Path | None = None) -> Path:
    """Writes what stands in for ssh between the hosts, called as `FILE [-option…] HOST COMMAND…`; returns `file`."""
    file.write_text(
        "#!/bin/bash\n"
        "while [[ $1 == -* ]]; do shift; done\n"
        f"name={prefix}${{1##*[.h]}}; shift\n"
        f'exec {_ENTER.format("$name")} bash -c "{_introduce("$name", names)}$*"\n'
    )
    file.chmod(0o755)
    return file


def _introduce(name: str, names: Path | None) -> str:
    return f"hostname {name}; " + (f"mount --bind {names} /etc/hosts; " if names is not None else "")


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
