"""The loss on held-out text, every token counted once, as bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..moe.decoder import Decoder
from ..moe.routing import Routing
from ..parallel.apply import free_gathered
from ..parallel.collectives import all_reduce
from ..parallel.mesh import Mesh
from .data import IGNORED, eval_windows
from .precision import computing_in
from .shards import TokenShards


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of a held-out split."""

    loss: float
    """Mean nats per token."""
    bits_per_byte: float
    """Comparable over tokenizers."""
    tokens: int
    """Tokens predicted."""


@torch.no_grad()
def evaluate(
    model: Decoder,
    shards: TokenShards,
    mesh: Mesh,
    *,
    seq_len: int,
    batch: int,
    precision: str = "fp32",
    progress: Callable[[int, int], None] = lambda done, total: None,
    routed: Callable[[Sequence[Routing], int], None] = lambda routings, tokens: None,
) -> Evaluation:
    """Evaluates on all of `shards` in windows of `seq_len`, `batch` sequences at a time over all ranks.

    All ranks must call it; all get the same result. `progress` hears (sequences done, sequences in all), `routed`
    every batch's routings on this rank and how many of their first tokens are text.
    """
    inputs, targets = eval_windows(shards, seq_len)
    total = len(inputs)
    padding = -total % batch
    # Whole batches on every rank: what is added predicts nothing.
    inputs = np.concatenate([inputs, np.zeros((padding, seq_len), dtype=inputs.dtype)])
    targets = np.concatenate([targets, np.full((padding, seq_len), IGNORED, dtype=targets.dtype)])
    share = batch // mesh.batch.size
    sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    training = model.training
    model.eval()
    for start in range(0, len(inputs), batch):
        mine = slice(start + mesh.batch.rank * share, start + (mesh.batch.rank + 1) * share)
        tokens_BS = torch.from_numpy(inputs[mine]).to(mesh.device)
        targets_BS = torch.from_numpy(targets[mine]).to(mesh.device)
        with computing_in(precision, mesh.device):
            output = model(tokens_BS)
            # Where the layers are spread over ranks, one of them has the output layer.
            if model.stages.has_last:
                nats = model.loss_sum(output.hidden_BSD, targets_BS)
                # Tensor ranks have the same targets, and losses of their own tokens.
                count = (targets_BS >= 0).sum() * (mesh.tensor.rank == 0)
                sums += torch.stack([nats.double(), count.double()])
        routed(output.routings, min(share, max(0, total - mine.start)) * seq_len // mesh.tensor.size)
        progress(min(start + batch, total), total)
    model.train(training)
    free_gathered(model, mesh)
    all_reduce(sums, mesh.world, "evaluation", mesh.recorder)
    nats, count = sums.tolist()
    return Evaluation(
        loss=nats / count,
        bits_per_byte=nats / math.log(2) / shards.num_text_bytes,
        tokens=int(count),
    )
