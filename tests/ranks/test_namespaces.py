"""Hosts played by network namespaces leave nothing behind, however the test that played them ended."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
from namespaces import UnavailableError, namespace_hosts

PLAY_FOR_EVER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from namespaces import namespace_hosts

with namespace_hosts(1) as prefix:
    print(prefix, flush=True)
    time.sleep(600)
"""


def test_what_a_killed_test_left_is_deleted_and_what_a_living_one_has_is_not():
    def there(prefix: str) -> list[str]:
        return sorted(path.name.removeprefix(prefix) for path in Path("/run/netns").glob(f"{prefix}*"))

    def play() -> tuple[subprocess.Popen, str]:
        command = [sys.executable, "-c", PLAY_FOR_EVER, str(Path(__file__).parent)]
        process = players.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        players.callback(process.terminate)
        assert process.stdout is not None
        return process, process.stdout.readline().strip()

    try:
        with namespace_hosts(1):
            pass
    except UnavailableError as error:
        pytest.skip(str(error))
    with contextlib.ExitStack() as players:
        (killed, dead), (_, living) = play(), play()
        killed.kill()
        killed.wait()
        assert there(dead) == there(living) == ["0", "1"]
        with namespace_hosts(1) as prefix:
            assert there(dead) == []
            assert there(prefix) == there(living) == ["0", "1"]
    with namespace_hosts(1):
        assert there(living) == []
