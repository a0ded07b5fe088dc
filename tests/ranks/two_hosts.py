"""Commands on the two hosts that the fixture `hosts` makes of network namespaces."""

from __future__ import annotations

import os
import subprocess

ADDRESS = "10.78.0.{}"
"""Of host 1 and host 2, on the network they share."""


def on_host(prefix: str, number: int, command: str) -> list[str]:
    """`command` of a shell, run where only that host's network and name are seen."""
    name = f"{prefix}{number}"
    return ["ip", "netns", "exec", name, "unshare", "-u", "sh", "-c", f"hostname {name}; {command}"]


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
