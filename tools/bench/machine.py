"""How a process that is measured uses the machine: the same way for every contender."""

from __future__ import annotations

import multiprocessing
import os
import threading

import torch

from ...launch import cores
from ...launch.errors import UserError
from ...launch.memory import keep_freed_memory


def use_the_machine(threads: int | None = None) -> None:
    """Sets this process's threads (default: one per physical core that it may use) and its allocator, for good.

    The allocator is set as wastenot's trainer sets it: the peers gain from it too.
    """
    torch.set_num_threads(threads or cores.threads(cores.physical_cores(), sharing=1))
    keep_freed_memory()


def needs_cuda(name: str) -> None:
    """UserError where the benchmark `name` has no device to measure."""
    if not torch.cuda.is_available():
        cpu = name.removesuffix("-gpu")
        raise UserError(f"bench {name}: needs a CUDA device, and there is none; `wastenot bench {cpu}` measures CPUs")


def end_with_parent() -> None:
    """Ends this worker of a pool when the process that started it is gone: killed, it could not tell its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
