"""One optimizer step whose forward and backward passes are Megatron-Core's, gradients summed by its own means."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from ...moe.adapters.megatron_names import to_ours
from ..pipelined import Learning, Tally
from ..step import Stepper
from .megatron_model import MegatronModel

Judged = tuple[Tensor, Tensor, Tensor]
"""In Megatron's order: what is minimised, the tokens that it is of, and what is handed back."""


@dataclass
class MegatronStepper(Stepper):
    """A `Stepper` of our weights; their gradients come from `theirs`."""

    theirs: MegatronModel

    def __post_init__(self) -> None:
        config, mesh = self.config, self.mesh
        self._share = config.train.batch // config.train.accumulate // mesh.batch.size
        self._tokens_in_batch = config.train.batch * config.data.seq_len
        self._tally = Tally(config, mesh.device)
        self._learning = Learning(self.theirs, config, mesh, self._share, self._tally)
        self._run: Any = get_forward_backward_func()

    def _forward_backward(self, first_sample: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Runs all micro-batches; this rank's parts of the loss (of the last stage), counts and router losses."""
        config, parallel = self.config, self.theirs.parallel
        self._tally.clear()
        parallel.zero_grad_buffer()
        losses = self._run(
            forward_step_func=self._forward,
            data_iterator=self._micro_batches(first_sample),
            model=parallel,
            num_microbatches=config.train.accumulate,
            seq_length=config.data.seq_len,
            micro_batch_size=self._share,
        )
        parallel.finish_grad_sync()
        gradients = {name: p.grad for name, p in self.theirs.ours.items() if p.grad is not None}
        to_ours(self.theirs.links, self.theirs.gradients(), gradients)
        loss = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for nats in losses:
            loss += nats.double()
        return {"loss": loss, "counts": self._tally.counts}, self._tally.shown

    def _apply(self, norm: Tensor, counts: Tensor) -> None:
        super()._apply(norm, counts)
        self.theirs.refresh()

    def _micro_batches(self, first_sample: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's inputs and targets, of the same samples as under every engine."""
        micro = self.config.train.batch // self.config.train.accumulate
        for first in range(first_sample, first_sample + self.config.train.batch, micro):
            windows = self.samples.take(first + self.mesh.batch.rank * self._share, self._share)
            tokens = torch.from_numpy(windows).to(self.mesh.device, non_blocking=True)
            yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def _forward(self, batches: Iterator[tuple[Tensor, Tensor]], model: object) -> tuple[Tensor, Any]:
        """One micro-batch through this rank's stage, and what judges it on the last."""
        inputs_BS, targets_BS = next(batches)
        return self._learning(inputs_BS, targets_BS), partial(self._judge_tokens, targets_BS.numel())

    def _judge_tokens(self, num_tokens: int, nats_BS: Tensor) -> Judged:
        nats = nats_BS.sum() / self._tokens_in_batch
        return nats, torch.tensor(num_tokens, dtype=torch.int, device=nats.device), nats.detach()
