"""Real ranks for tests: `run_ranks(world, fn, *args)` calls fn on gloo processes and returns the results.

    from spawned import run_ranks

    def sum_of_ranks(rank: int, world: int, scale: float) -> float:
        total = torch.tensor(rank * scale)
        dist.all_reduce(total)
        return total.item()

    def test_all_reduce_sums():
        assert run_ranks(3, sum_of_ranks, 10.0) == [30.0, 30.0, 30.0]

What a rank can rely on:

- `fn` stands at the top level of its test file; arguments and result are pickled (tensors travel by value).
- The default process group is initialised (gloo, every rank on this host) and destroyed afterwards.
- One thread, seed 0, deterministic algorithms, so `torch.empty` holds NaN: memory nobody wrote shows.
- Environment variables and warning filters are those of the calling test: a warning in a rank is an error.

What the test can rely on: the first rank that fails, in time, raises RankError with that rank's own traceback
and the others are killed; a run longer than `timeout` raises TimeoutError with the stack of every rank.
Nothing outlives the call.

Processes come from a fork server that has torch loaded: the first run of a session costs about 2 s, later
ones some 30 ms a rank.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_PRELOAD = [
    "numpy",
    "pytest",
    "torch",
    "torch._dynamo",
    "torch.distributed",
    "torch.distributed.checkpoint",
    "torch.distributed.device_mesh",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor",
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_PRELOAD)


class RankError(RuntimeError):
    """A rank failed; the message ends with its traceback."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(f"rank {rank} failed\n{message}")
        self.rank = rank


def run_ranks(world: int, fn: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    """Calls `fn(rank, world, *args)` on `world` ranks at once; returns their results in order of rank.

    Raises RankError for the first rank that raised or died, TimeoutError after `timeout` seconds.
    """
    try:
        return _run_ranks(world, fn, *args, timeout=timeout)
    except RankError as error:
        # Before any test code ran: gloo's handshake meets a stranger on its port now and then.
        if "connectFullMesh failed" not in str(error) or "init_process_group" not in str(error):
            raise
        return _run_ranks(world, fn, *args, timeout=timeout)


def _run_ranks(world: int, fn: Callable[..., Any], *args: Any, timeout: float) -> list[Any]:
    job = pickle.dumps((fn, args, dict(os.environ), list(warnings.filters)))
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        processes, pipes = [], []
        try:
            for rank in range(world):
                receive, send = _context.Pipe(duplex=False)
                process = _context.Process(target=_rank_main, args=(rank, world, folder, timeout, job, send))
                process.start()
                # The child has its own copy: closing ours is what makes its death readable as end of file.
                send.close()
                processes.append(process)
                pipes.append(receive)
            return _collect(processes, pipes, Path(folder), timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
            for pipe in pipes:
                pipe.close()


def _collect(processes: list, pipes: list[Connection], folder: Path, timeout: float) -> list[Any]:
    # A rank that is still there after `timeout` writes its stack and exits by itself; the rest is for that.
    deadline = time.monotonic() + timeout + 3.0
    results: dict[int, Any] = {}
    failures: list[tuple[float, int, str]] = []
    died: list[int] = []
    waiting = dict(zip(pipes, range(len(pipes)), strict=True))
    while waiting and not failures and not died and (left := deadline - time.monotonic()) > 0:
        _read(wait(list(waiting), left), waiting, results, failures, died)
    if waiting and (failures or died):
        # Others fail because the first did. One that died says nothing: look for it before blaming a witness.
        _read(wait(list(waiting), 0.2), waiting, results, failures, died)
    stacks = [f"--- rank {rank}\n{text}" for rank in range(len(pipes)) if (text := _stack(folder, rank))]
    if stacks or (waiting and not failures and not died):
        late = sorted(set(range(len(pipes))) - set(results))
        raise TimeoutError(f"rank(s) {late} did not finish within {timeout:g} s\n" + "\n".join(stacks))
    if died:
        processes[died[0]].join(5.0)
        raise RankError(died[0], f"its process ended with exit code {processes[died[0]].exitcode} and no result")
    if failures:
        _, rank, text = min(failures)
        raise RankError(rank, text)
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    return [results[rank] for rank in range(len(pipes))]


def _read(ready: list, waiting: dict, results: dict, failures: list, died: list) -> None:
    for pipe in ready:
        rank = waiting.pop(pipe)
        try:
            when, good, value = pickle.loads(pipe.recv_bytes())
        except EOFError:
            died.append(rank)
            continue
        if good:
            results[rank] = value
        else:
            failures.append((when, rank, value))


def _stack(folder: Path, rank: int) -> str:
    file = folder / f"stack-{rank}"
    return file.read_text() if file.exists() else ""


def _rank_main(rank: int, world: int, folder: str, timeout: float, job: bytes, send: Connection) -> None:
    with (Path(folder) / f"stack-{rank}").open("w") as stack:
        # Runs without the interpreter's lock, and when the test process is gone too: no rank stays behind.
        faulthandler.dump_traceback_later(timeout, exit=True, file=stack)
        try:
            result = _run(rank, world, folder, timeout, job)
            answer = pickle.dumps((time.monotonic(), True, result))
        except BaseException:
            answer = pickle.dumps((time.monotonic(), False, traceback.format_exc()))
            send.send_bytes(answer)
            # Without waiting for threads: a hung collective must not hide the error.
            os._exit(1)
        send.send_bytes(answer)
        if dist.is_initialized():
            # Nobody closes a connection that another rank still reads from.
            dist.barrier()
            dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()


def _run(rank: int, world: int, folder: str, timeout: float, job: bytes) -> Any:
    fn, args, environ, filters = pickle.loads(job)
    os.environ.clear()
    os.environ.update(environ)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    warnings.resetwarnings()
    warnings.filters.extend(filters)  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # As torch.use_deterministic_algorithms(True), without its import of the compiler (1.5 s a rank).
    torch.set_deterministic_debug_mode("error")
    store = dist.FileStore(str(Path(folder) / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
    return fn(rank, world, *args)
