"""One optimizer step whose forward and backward passes are Megatron-Core's, gradients summed by its own means."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..pipelined import Learning, Tally
from ..step import Stepper
from .megatron_model import Batch, MegatronModel


@dataclass
class MegatronStepper(Stepper):
    """A `Stepper` of our weights; their gradients come from `theirs`."""

    theirs: MegatronModel

    def __post_init__(self) -> None:
        config, mesh = self.config, self.mesh
        self._share = config.train.batch // config.train.accumulate // mesh.batch.size
        self._tally = Tally(config, mesh.device)
        self._learning = Learning(self.theirs, config, mesh, self._share, self._tally)

    def _forward_backward(self, first_sample: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Runs all micro-batches; this rank's parts of the loss (of the last stage), counts and router losses."""
        theirs, config = self.theirs, self.config
        self._tally.clear()
        theirs.parallel.zero_grad_buffer()
        losses = theirs.run(self._read(first_sample), self._learning, config.train.batch * config.data.seq_len)
        theirs.hand_over()
        loss = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for nats in losses:
            loss += nats.double()
        return {"loss": loss, "counts": self._tally.counts}, self._tally.shown

    def _update(self) -> None:
        super()._update()
        self.theirs.refresh()

    def _read(self, first_sample: int) -> list[Batch]:
        """This rank's micro-batches, of the same samples as under every engine."""
        train = self.config.train
        firsts = range(first_sample, first_sample + train.batch, train.batch // train.accumulate)
        windows = [self.samples.take(first + self.mesh.batch.rank * self._share, self._share) for first in firsts]
        tokens = [torch.from_numpy(each).to(self.mesh.device, non_blocking=True) for each in windows]
        return [(each[:, :-1].contiguous(), each[:, 1:].contiguous()) for each in tokens]
