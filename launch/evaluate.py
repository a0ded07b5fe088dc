"""The loss on held-out text, every token counted once, as bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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


Judge = Callable[[Tensor, Tensor, int], Tensor | None]
"""The sum of nats over tokens [B, S] whose targets are not negative, on this rank; of them the first so many are text.
None where this rank has no output layer."""


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

    def judge(tokens_BS: Tensor, targets_BS: Tensor, text: int) -> Tensor | None:
        with computing_in(precision, mesh.device):
            output = model(tokens_BS)
            nats = model.loss_sum(output.hidden_BSD, targets_BS) if model.stages.has_last else None
        routed(output.routings, text // mesh.tensor.size)
        return nats

    training = model.training
    model.eval()
    result = judged(judge, shards, mesh, seq_len=seq_len, batch=batch, progress=progress)
    model.train(training)
    free_gathered(model, mesh)
    return result


@torch.no_grad()
def judged(
    judge: Judge,
    shards: TokenShards,
    mesh: Mesh,
    *,
    seq_len: int,
    batch: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """What `judge` makes of all of `shards`; see `evaluate`."""
    inputs, targets = eval_windows(shards, seq_len)
    total = len(inputs)
    padding = -total % batch
    # Whole batches on every rank: what is added predicts nothing.
    inputs = np.concatenate([inputs, np.zeros((padding, seq_len), dtype=inputs.dtype)])
    targets = np.concatenate([targets, np.full((padding, seq_len), IGNORED, dtype=targets.dtype)])
    share = batch // mesh.batch.size
    sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    for start in range(0, len(inputs), batch):
        mine = slice(start + mesh.batch.rank * share, start + (mesh.batch.rank + 1) * share)
        tokens_BS = torch.from_numpy(inputs[mine]).to(mesh.device)
        targets_BS = torch.from_numpy(targets[mine]).to(mesh.device)
        nats = judge(tokens_BS, targets_BS, min(share, max(0, total - mine.start)) * seq_len)
        # Where the layers are spread over ranks, one of them has the output layer.
        if nats is not None:
            # Tensor ranks have the same targets, and losses of their own tokens.
            count = (targets_BS >= 0).sum() * (mesh.tensor.rank == 0)
            sums += torch.stack([nats.double(), count.double()])
        progress(min(start + batch, total), total)
    all_reduce(sums, mesh.world, "evaluation", mesh.recorder)
    nats, count = sums.tolist()
    return Evaluation(
        loss=nats / count,
        bits_per_byte=nats / math.log(2) / shards.num_text_bytes,
        tokens=int(count),
    )
