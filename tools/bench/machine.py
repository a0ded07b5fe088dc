"""How a process that is measured uses the machine: the same way for every contender."""

from __future__ import annotations

import multiprocessing
import os
import threading
from pathlib import Path

import torch

from ...launch import cores
from ...launch.errors import UserError
from ...launch.memory import keep_freed_memory

_CPUINFO = Path("/proc/cpuinfo")


def use_the_machine(threads: int | None = None) -> None:
    """Sets this process's threads (default: one per physical core that it may use) and its allocator, for good.

    The allocator is set as wastenot's trainer sets it: the peers gain from it too.
    """
    torch.set_num_threads(threads or cores.threads(cores.physical_cores(), sharing=1))
    keep_freed_memory()


def bf16_notes() -> list[str]:
    """How contenders compute in bf16, and whether this processor has instructions for it."""
    flags = {
        word
        for line in (_CPUINFO.read_text(errors="replace").splitlines() if _CPUINFO.exists() else [])
        if line.startswith("flags")
        for word in line.split()
    }
    found = [name for name in ("avx512_bf16", "amx_bf16") if name in flags]
    return [
        "bf16: autocast over fp32 weights; megatron-core and transformers grouped_mm, which autocast does not reach, "
        "with bf16 weights and fp32 copies of them in the optimizer",
        f"this processor has {' and '.join(found)}" if found else "this processor has no bf16 instructions",
    ]


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
