"""What each rank does in the `layout-memory` benchmark: a few steps of training, and bytes counted by storage.

`python -m wastenot.tools.bench.layout_memory_ranks CONFIGS RESULT` is one rank, as `layout_memory.measure` starts it.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ...launch.config import TrainConfig
from ...launch.engines.decoder import stages_of
from ...launch.env import detect, start, stop
from ...launch.memory import keep_freed_memory
from ...launch.optimizer import make_optimizer
from ...launch.optimizer_state import state_bytes
from ...launch.peak_memory import peak_bytes, storage_bytes
from ...launch.precision import compute_dtype
from ...launch.run_folder import write_atomically
from ...launch.step import Stepper, make_stepper
from ...moe.decoder import build_decoder
from ...parallel.gradients import Gradients
from ...parallel.mesh import Mesh, make_mesh
from ..random_tokens import RandomTokens

WARM_UP = 1
"""Steps before the one that is counted: they make the optimizer's state."""


def bytes_of(config: TrainConfig, mesh: Mesh) -> dict[str, int]:
    """Of this rank: weights, gradients and optimizer state after a step, and the most that the next has beside them."""
    model = build_decoder(
        config.model,
        config.router,
        mesh,
        seed=config.train.seed,
        stages=stages_of(config, mesh),
        compute_dtype=compute_dtype(config.train.precision),
    )
    optimizer = make_optimizer(model, config.optimizer)
    gradients = Gradients(model, mesh, config.parallel.bucket_bytes)
    samples: Any = RandomTokens(config.model.vocab_size, config.data.seq_len)
    stepper = make_stepper(config, mesh, model, optimizer, gradients, samples)
    for step in range(WARM_UP):
        _step(stepper, step)
    found = {
        "weights": storage_bytes([*model.parameters(), *model.buffers()]),
        "gradients": _gradient_bytes(model),
        "optimizer": state_bytes(optimizer),
    }
    # A step begins so; where ranks share storage it frees gradients, which the profiler would not see.
    gradients.zero()
    freed = found["gradients"] - _gradient_bytes(model)
    return {**found, "step": peak_bytes(lambda: _step(stepper, WARM_UP)) - freed}


def _gradient_bytes(model: nn.Module) -> int:
    return storage_bytes(p.grad for p in model.parameters() if p.grad is not None)


def _step(stepper: Stepper, step: int) -> None:
    result = stepper.step(step, step * stepper.config.train.batch, stop=False)
    if not result.applied:
        raise RuntimeError(f"step {step + 1} was not finite")


def main(argv: Sequence[str]) -> None:
    """One rank from start to end; rank 0 writes, of each configuration, what every rank found."""
    configs: list[TrainConfig] = pickle.loads(Path(argv[0]).read_bytes())
    keep_freed_memory()
    # Adapprox is kept at its largest rank here, and would say so.
    warnings.filterwarnings("ignore", message=".*factors of the largest rank", category=UserWarning)
    device, rank = torch.device("cpu"), detect(os.environ)
    start(rank, configs[0].parallel, device)
    torch.set_num_threads(1)
    found = []
    for config in configs:
        found.append(_gathered(bytes_of(config, make_mesh(config.parallel, device))))
        # A model and its gradients hold each other.
        gc.collect()
        if rank.rank == 0:
            print(f"bench layout-memory: {len(found)} of {len(configs)} on {rank.world} ranks", file=sys.stderr)
    if rank.rank == 0:
        write_atomically(Path(argv[1]), json.dumps(found))
    if dist.is_initialized():
        # Nobody closes a connection that another rank still reads from.
        dist.barrier()
    stop()


def _gathered(value: dict[str, int]) -> list[dict[str, int]]:
    """Everyone's `value`, on all ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


if __name__ == "__main__":
    main(sys.argv[1:])
