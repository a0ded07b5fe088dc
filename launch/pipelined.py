"""One optimizer step through a pipeline: its micro-batches are those of `train.accumulate`."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..moe.decoder import Section
from ..moe.ledger import SLOTS, check_identities, count_layers
from ..moe.losses import auxiliary_loss
from ..moe.routing import Routing
from ..parallel.mesh import Mesh
from ..parallel.pipeline import Pipeline, Shapes, with_loss
from .config import TrainConfig
from .precision import computing_in
from .step import Stepper


@dataclass
class PipelinedStepper(Stepper):
    """A `Stepper` whose model is spread over a pipeline; the numbers are those of one process."""

    def __post_init__(self) -> None:
        """All ranks call it together."""
        config, mesh, stages = self.config, self.mesh, self.model.stages
        self._share = config.train.batch // config.train.accumulate // mesh.batch.size
        tokens_in_batch = config.train.batch * config.data.seq_len
        self._tally = Tally(config, mesh.device)

        def loss(hidden_BSD: Tensor, targets_BS: Tensor) -> Tensor:
            with computing_in(config.train.precision, mesh.device):
                return self.model.loss_sum(hidden_BSD, targets_BS) / tokens_in_batch

        tokens = (self._share, config.data.seq_len)
        hidden = (self._share, config.data.seq_len // mesh.tensor.size, config.model.d_model)
        self._pipeline = Pipeline(
            config.parallel,
            stages,
            [Learning(Section(self.model, stage), config, mesh, self._share, self._tally) for stage in stages.own],
            loss,
            config.train.accumulate,
            Shapes(tokens, hidden, next(self.model.parameters()).dtype),
            mesh,
        )

    def _forward_backward(self, first_sample: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Runs all micro-batches; this rank's parts of the loss (of the last stage), counts and router losses."""
        inputs, targets = self._read(first_sample)
        self._tally.clear()
        with ExitStack() as reducing:
            reduced = self.gradients.reduced()
            entered = []

            def last_backward() -> None:
                entered.append(reducing.enter_context(reduced))

            losses = self._pipeline.step(inputs, targets, last_backward)
            if not entered:
                last_backward()
        loss = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for nats in losses:
            loss += nats.detach().double()
        return {"loss": loss, "counts": self._tally.counts}, self._tally.shown

    def _read(self, first_sample: int) -> tuple[Tensor | None, Tensor | None]:
        """Inputs and targets of all micro-batches, where they are of use."""
        stages, train = self.model.stages, self.config.train
        if not (stages.has_first or stages.has_last):
            return None, None
        firsts = range(first_sample, first_sample + train.batch, train.batch // train.accumulate)
        windows = [self.samples.take(first + self.mesh.batch.rank * self._share, self._share) for first in firsts]
        tokens = torch.from_numpy(np.concatenate(windows)).to(self.mesh.device, non_blocking=True)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class Tally:
    """What the stages of this rank saw in one step, in tables of the whole model."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        model = config.model
        counts = model.expert_counts.values()
        self.num_layers, self._experts = len(counts), max(counts, default=0)
        self._accumulate, self._device = config.train.accumulate, device
        self.clear()

    def clear(self) -> None:
        """Before a step."""
        columns = self._experts + len(SLOTS)
        self.counts = torch.zeros(self.num_layers, columns, dtype=torch.int64, device=self._device)
        self.shown: dict[str, Tensor] = {}

    def add(self, layers: list[int], routings: list[Routing], values: dict[str, Tensor]) -> None:
        """One micro-batch through one stage, whose MoE layers have these numbers."""
        if layers:
            self.counts[layers] += count_layers(routings, self._experts)
        for name, value in values.items():
            self.shown[name] = self.shown.get(name, 0) + value / self._accumulate


class Running(Protocol):
    """A stage that runs: a `Section` of our decoder, or another engine's model."""

    moe_layers: list[int]
    """Numbers of its MoE layers among those of the model, in order."""

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, list[Routing]]:
        """What it passes on, and the routings of its MoE layers, with their graph."""
        ...


class Learning(nn.Module):
    """A stage in training: counts its routings, and lets their losses take part in its backward."""

    def __init__(self, section: Running, config: TrainConfig, mesh: Mesh, sequences: int, tally: Tally) -> None:
        """`sequences` of a micro-batch on this rank."""
        super().__init__()
        self.section, self.sequences = section, sequences
        self.config, self.mesh, self.tally = config, mesh, tally

    def forward(self, *inputs: Tensor) -> Tensor:
        config = self.config
        with computing_in(config.train.precision, self.mesh.device):
            x_BSD, routings = self.section(*inputs)
        auxiliary, values = auxiliary_loss(routings, config.router, self.mesh, self.sequences, self.tally.num_layers)
        self.tally.add(self.section.moe_layers, routings, values)
        # What is not finite ends in a skipped step, as without debug.
        if config.log.debug and x_BSD.isfinite().all():
            for routing in routings:
                check_identities(routing)
        return with_loss(x_BSD, auxiliary / config.train.accumulate) if auxiliary.requires_grad else x_BSD
