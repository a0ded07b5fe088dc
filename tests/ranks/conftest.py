"""Two hosts on one machine, and configurations of training runs, for every test that wants them."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from real_runs import TINY
from two_hosts import ADDRESS

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "while", "seven", "wizards", "brew", "tea"]


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


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    draw = random.Random(0)
    documents = [{"text": " ".join(draw.choice(WORDS) for _ in range(3000))} for _ in range(3)]
    path = tmp_path_factory.mktemp("corpus") / "words.jsonl"
    path.write_text("\n".join(map(json.dumps, documents)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def made(corpus, tmp_path_factory):
    """Writes a configuration into a fresh run folder: made(**changes) -> path of the YAML file."""

    def write(**changes: Mapping[str, object]) -> Path:
        folder = tmp_path_factory.mktemp("run")
        settings = json.loads(json.dumps(TINY))
        settings["data"] |= {"corpus": str(corpus), "dir": str(corpus.parent / "prepared")}
        settings["log"]["dir"] = str(folder / "log")
        for key, values in changes.items():
            settings[key] = {**settings.get(key, {}), **values}
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return path

    return write
