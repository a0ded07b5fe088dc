"""Hosts on one machine, and configurations of training runs, for every test that wants them."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from namespaces import namespace_hosts
from real_runs import TINY

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "while", "seven", "wizards", "brew", "tea"]


@pytest.fixture(scope="module")
def hosts():
    """Prefix of the namespaces PREFIX1, PREFIX2 and PREFIX3."""
    with contextlib.ExitStack() as stack:
        try:
            prefix = stack.enter_context(namespace_hosts(3))
        except OSError as error:
            pytest.skip(str(error))
        yield prefix


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
