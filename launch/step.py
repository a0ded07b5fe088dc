"""One optimizer step: micro-batches forward and backward, gradients summed over ranks, clipped, applied."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..moe.decoder import Decoder
from ..moe.ledger import check_identities, count_layers
from ..moe.losses import auxiliary_loss, update_bias
from ..moe.router import TopKRouter
from ..moe.routing import Routing
from ..parallel.apply import seed_of
from ..parallel.collectives import all_reduce
from ..parallel.gradients import Gradients, Summing
from ..parallel.mesh import Mesh
from .config import TrainConfig
from .data import Samples
from .optimizer import set_learning_rate
from .precision import computing_in
from .schedule import learning_rate
from .teacher import Teacher


@dataclass(frozen=True)
class StepResult:
    """What a step did, over all ranks; the same on every rank."""

    loss: float
    """Mean next-token loss in nats."""
    grad_norm: float
    """Global gradient norm before clipping."""
    lr: float
    auxiliary: dict[str, float]
    """Unweighted router losses, mean over layers and micro-batches; `divergence` from a teacher, mean over tokens."""
    counts: Tensor
    """`moe.ledger.count_layers` of all micro-batches, summed over ranks."""
    local_counts: Tensor
    """The same of this rank alone."""
    applied: bool
    """False where loss or gradient was not finite and the step was skipped."""
    stop_requested: bool
    """Whether any rank was asked to stop."""


class Judged(NamedTuple):
    """The loss of one micro-batch: this rank's part of means over the whole batch."""

    objective: Tensor
    """To be minimised."""
    nats: Tensor
    """Next-token loss."""
    shown: dict[str, Tensor]
    """What else the objective is made of."""


@dataclass(frozen=True)
class MicroBatch:
    """What one micro-batch saw."""

    judged: Judged
    shown: dict[str, Tensor]
    """Unweighted router losses."""
    routings: list[Routing]


@dataclass
class Stepper:
    """The parts a step needs; `step(n)` depends on them, on n and on nothing else."""

    config: TrainConfig
    mesh: Mesh
    model: Decoder
    optimizer: torch.optim.Optimizer
    gradients: Summing
    samples: Samples

    def step(self, step: int, first_sample: int, stop: bool) -> StepResult:
        """Trains on samples [first_sample, first_sample + batch); `step` counts from 0."""
        config, mesh = self.config, self.mesh
        torch.manual_seed(seed_of(config.train.seed, "step", step, mesh.world.rank))
        lr = learning_rate(config.optimizer.lr, config.schedule, step, config.train.steps)
        set_learning_rate(self.optimizer, lr)
        self.gradients.zero()
        local, shown = self._forward_backward(first_sample)
        norm = self.gradients.norm()
        flags = torch.full((1,), float(stop), dtype=torch.float64, device=mesh.device)
        losses = torch.stack([local["loss"], *shown.values()]).double()
        # A dense model has counts of nothing, and on the host.
        everything = torch.cat([losses, flags, local["counts"].to(losses).reshape(-1)])
        all_reduce(everything, mesh.world, "step-statistics", mesh.recorder)
        loss, *means, stops = everything[: len(losses) + 1].tolist()
        counts = everything[len(losses) + 1 :].view_as(local["counts"]).long()
        grad_norm = norm.item()
        applied = math.isfinite(grad_norm) and math.isfinite(loss)
        if applied:
            self._apply(norm, counts)
        return StepResult(
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            auxiliary=dict(zip(shown, means, strict=True)),
            counts=counts,
            local_counts=local["counts"],
            applied=applied,
            stop_requested=stops > 0,
        )

    def _forward_backward(self, first_sample: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Runs all micro-batches; this rank's parts of the loss, the counts and the router losses."""
        config, mesh = self.config, self.mesh
        micro = config.train.batch // config.train.accumulate
        share = micro // mesh.batch.size
        loss = torch.zeros((), dtype=torch.float64, device=mesh.device)
        counts: Tensor | None = None
        shown: dict[str, Tensor] = {}
        for i in range(config.train.accumulate):
            # Consecutive blocks of the global order: rank r of any world size sees what emulated ranks would.
            windows = self.samples.take(first_sample + i * micro + mesh.batch.rank * share, share)
            # Without waiting for what the device still has to do for the last micro-batch.
            tokens = torch.from_numpy(windows).to(mesh.device, non_blocking=True)
            last = i == config.train.accumulate - 1
            with self.gradients.reduced() if last else nullcontext():
                seen = self._learn(tokens)
            loss += seen.judged.nats.detach().double()
            for name, value in seen.shown.items():
                shown[name] = shown.get(name, 0) + value / config.train.accumulate
            for name, value in seen.judged.shown.items():
                shown[name] = shown.get(name, 0) + value
            # What is not finite ends in a skipped step, as without debug.
            if config.log.debug and seen.judged.objective.isfinite():
                for routing in seen.routings:
                    check_identities(routing)
            chosen = count_layers(seen.routings)
            counts = chosen if counts is None else counts + chosen
        assert counts is not None
        return {"loss": loss, "counts": counts}, shown

    def _learn(self, tokens_BS: Tensor) -> MicroBatch:
        """Forward and backward of the micro-batch whose windows are `tokens_BS`."""
        objective, micro = self.forward(tokens_BS)
        objective.backward()
        return micro

    def forward(self, tokens_BS: Tensor) -> tuple[Tensor, MicroBatch]:
        """What the backward of one micro-batch begins with, and what it saw."""
        config, mesh = self.config, self.mesh
        tokens_in_batch = config.train.batch * config.data.seq_len
        with computing_in(config.train.precision, mesh.device):
            output = self.model(tokens_BS[:, :-1])
            judged = self._judge(output.hidden_BSD, tokens_BS, tokens_in_batch)
        auxiliary, values = auxiliary_loss(output.routings, config.router, mesh, len(tokens_BS))
        return judged.objective + auxiliary / config.train.accumulate, MicroBatch(judged, values, output.routings)

    def _judge(self, hidden_BSD: Tensor, tokens_BS: Tensor, tokens_in_batch: int) -> Judged:
        """What the hidden states of one micro-batch, whose windows are `tokens_BS`, are worth."""
        nats = self.model.loss_sum(hidden_BSD, tokens_BS[:, 1:].contiguous()) / tokens_in_batch
        return Judged(nats, nats, {})

    def _apply(self, norm: Tensor, counts: Tensor) -> None:
        if self.config.optimizer.clip_norm > 0:
            self.gradients.clip(norm, self.config.optimizer.clip_norm)
        self._update()
        if self.config.router.bias_update > 0:
            routers = [m for m in self.model.modules() if isinstance(m, TopKRouter)]
            for router, layer in zip(routers, self.model.moe_layers, strict=True):
                update_bias(router, counts[layer, : router.num_experts])

    def _update(self) -> None:
        """The optimizer's step."""
        self.optimizer.step()


@dataclass
class DistillingStepper(Stepper):
    """A `Stepper` whose model also learns from a teacher."""

    teacher: Teacher

    def _judge(self, hidden_BSD: Tensor, tokens_BS: Tensor, tokens_in_batch: int) -> Judged:
        sums = self.teacher.loss_sums(self.model, hidden_BSD, tokens_BS)
        objective, nats, divergence = (each / tokens_in_batch for each in sums)
        return Judged(objective, nats, {"divergence": divergence})


def make_stepper(
    config: TrainConfig,
    mesh: Mesh,
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    gradients: Gradients,
    samples: Samples,
    teacher: Teacher | None = None,
) -> Stepper:
    """The kind of `Stepper` that the mesh and the teacher, if any, ask for; all ranks call it together."""
    if teacher is not None:
        return DistillingStepper(config, mesh, model, optimizer, gradients, samples, teacher)
    if mesh.pipeline.size == 1:
        return Stepper(config, mesh, model, optimizer, gradients, samples)
    # Imported here: torch's pipelining takes a second to load.
    from .pipelined import PipelinedStepper

    return PipelinedStepper(config, mesh, model, optimizer, gradients, samples)
