"""How a process that is measured uses the machine: the same way for every contender."""

from __future__ import annotations

import torch

from ...launch import cores
from ...launch.memory import keep_freed_memory


def use_the_machine(threads: int | None = None) -> None:
    """Sets this process's threads (default: one per physical core that it may use) and its allocator, for good.

    The allocator is set as wastenot's trainer sets it: the peers gain from it too.
    """
    torch.set_num_threads(threads or cores.threads(cores.physical_cores(), sharing=1))
    keep_freed_memory()
