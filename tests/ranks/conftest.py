"""Two hosts on one machine, for every test that wants them."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
from two_hosts import ADDRESS


@pytest.fixture(scope="module")
def hosts():
    """Prefix of the namespaces PREFIX1 and PREFIX2."""
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("unshare")):
        pytest.skip("network namespaces need root, ip and unshare")
    prefix = f"wn{os.getpid()}h"
    made = subprocess.run(["ip", "netns", "add", f"{prefix}1"], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"this system refuses network namespaces: {made.stderr.strip()}")

    def ip(command: str) -> None:
        subprocess.run(["ip", *command.split()], check=True, capture_output=True)

    try:
        ip(f"netns add {prefix}2")
        ip(f"link add net-1 netns {prefix}1 type veth peer name net-2 netns {prefix}2")
        for number in (1, 2):
            inside = f"-n {prefix}{number}"
            ip(f"{inside} link set lo up")
            ip(f"{inside} link add docker0 type veth peer name container")
            for name, address in ("docker0", "172.17.0.1/16"), (f"net-{number}", f"{ADDRESS.format(number)}/24"):
                ip(f"{inside} addr add {address} dev {name}")
                ip(f"{inside} link set {name} up")
            ip(f"{inside} link set container up")
        yield prefix
    finally:
        for number in (1, 2):
            subprocess.run(["ip", "netns", "del", f"{prefix}{number}"], capture_output=True)
