"""One rank of the `lynx` benchmark, as `lynx.launch` starts it.

`python -m wastenot.tools.bench.lynx_ranks JOB RESULT`: JOB is pickled, a function of the mesh; rank 0 writes RESULT.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...launch.env import detect, start, stop
from ...launch.memory import keep_freed_memory
from ...launch.run_folder import write_atomically
from ...parallel.mesh import Mesh, make_mesh
from .lynx_contest import layout


def main(argv: Sequence[str]) -> None:
    """From start to end."""
    job: Callable[[Mesh], Any] = pickle.loads(Path(argv[0]).read_bytes())
    device = torch.device("cpu")
    keep_freed_memory()
    rank = detect(os.environ)
    start(rank, layout(rank.world), device)
    # Ranks on hosts of their own cannot see that they share this machine's cores.
    torch.set_num_threads(1)
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    found = job(make_mesh(layout(rank.world), device))
    if rank.rank == 0:
        write_atomically(Path(argv[1]), json.dumps(found))
    # Nobody closes a connection that another rank still reads from.
    if rank.world > 1:
        dist.barrier()
    stop()


if __name__ == "__main__":
    main(sys.argv[1:])
