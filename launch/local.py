"""A small launcher: starts ranks on this host, for a command that no other launcher started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from .env import LISTENER

_POLL_SECONDS = 0.05
_PR_SET_PDEATHSIG = 1
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def run_ranks(
    argv: Sequence[str],
    nproc: int,
    *,
    module: str = "wastenot.launch.train",
    grace_seconds: float = 10.0,
) -> int:
    """Runs `python -m module argv…` as `nproc` ranks that meet on 127.0.0.1, and waits for all of them.

    Returns 0 where every rank did, 2 where one did (bad input, which it has explained), 128 + n where signal n was
    passed on and ended them, else 1, after naming on stderr the first rank that failed. When one fails the others
    have `grace_seconds` to say what they saw.

    The first SIGTERM, SIGINT (Ctrl-C) or SIGHUP is passed on to every rank, once, and the ranks decide; a second
    one kills them. No rank outlives this process, however it ends.
    """
    ranks: list[subprocess.Popen] = []
    try:
        # The port stays ours from here on: rank 0 inherits the listening socket itself.
        with socket.create_server(("127.0.0.1", 0)) as listener:
            for rank in range(nproc):
                ranks.append(_start(rank, nproc, listener, [sys.executable, "-m", module, *argv]))
        with _forwarding(ranks) as passed_on:
            return _outcome(ranks, _wait(ranks, grace_seconds), passed_on)
    finally:
        for process in ranks:
            _signal(process, signal.SIGKILL)
            process.wait()


def _start(rank: int, nproc: int, listener: socket.socket, command: list[str]) -> subprocess.Popen:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(listener.getsockname()[1]),
    }
    # When one rank ends, torch's stores in the others add stack traces to what the ranks say themselves.
    environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if rank == 0:
        environ[LISTENER] = str(listener.fileno())
    return subprocess.Popen(
        command,
        env=environ,
        stdin=subprocess.DEVNULL,
        pass_fds=[listener.fileno()] if rank == 0 else [],
        # A session of its own: Ctrl-C in the terminal reaches this process alone, which passes it on once.
        start_new_session=True,
        preexec_fn=_die_with_parent(),
    )


def _die_with_parent() -> Callable[[], None] | None:
    """What a rank does before its program starts, so that the kernel kills it when this process is gone.

    A signal from the kernel needs nothing of the rank: it may hang in a collective, or be stopped.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            # Too late to be told: the parent ended between the fork and the line above.
            os._exit(1)

    return ask


@contextlib.contextmanager
def _forwarding(ranks: list[subprocess.Popen]) -> Iterator[list[int]]:
    """Passes the first signal on to every rank and puts it into the list it yields; a second one kills them."""
    passed_on: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may catch signals; there, whoever started this thread decides.
        yield passed_on
        return

    def forward(number: int, frame: FrameType | None) -> None:
        for process in ranks:
            _signal(process, signal.SIGKILL if passed_on else signal.Signals(number))
        passed_on.append(number)

    # Whoever runs under nohup has asked to ignore SIGHUP.
    caught = [number for number in _FORWARDED if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, forward) for number in caught}
    try:
        yield passed_on
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: list[subprocess.Popen], grace_seconds: float) -> int | None:
    """Returns when every rank has ended, or some time after one failed; the first that did, if any."""
    failed: int | None = None
    deadline = float("inf")
    while None in [process.poll() for process in ranks] and time.monotonic() < deadline:
        if failed is None and (failed := _first_failed(ranks)) is not None:
            deadline = time.monotonic() + grace_seconds
        time.sleep(_POLL_SECONDS)
    return _first_failed(ranks) if failed is None else failed


def _first_failed(ranks: list[subprocess.Popen]) -> int | None:
    # Of several within one look the one that a signal killed: the others saw it disappear.
    failed = [(process.returncode > 0, rank) for rank, process in enumerate(ranks) if process.returncode]
    return min(failed)[1] if failed else None


def _outcome(ranks: list[subprocess.Popen], failed: int | None, passed_on: list[int]) -> int:
    if failed is None:
        return 0
    codes = [process.returncode for process in ranks]
    if 2 in codes:
        return 2
    for number in passed_on[:1]:
        if all(code in (0, -number, 128 + number) for code in codes):
            return 128 + number
    print(f"rank {failed} of {len(ranks)} {_describe(codes[failed])}", file=sys.stderr, flush=True)
    return 1


def _describe(code: int) -> str:
    if code > 0:
        return f"ended with exit code {code}"
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"


def _signal(process: subprocess.Popen, number: signal.Signals) -> None:
    # The whole session, so that processes which a rank started (a checkpoint writer, say) go with it.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if number == signal.SIGKILL:
            os.killpg(process.pid, number)
        elif process.poll() is None:
            process.send_signal(number)
