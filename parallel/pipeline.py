"""Training through a pipeline of stages, by the schedules of torch.distributed.pipelining.

The orders are those of `lynx/schedules`, by the same names (`tests/unit/test_lynx_schedule.py` compares them):
`zb-h1` is torch's interleaved zero bubble with one stage per rank. In `zb-h1` and `dualpipev` a backward is split: its
gradients of inputs first, those of weights later. Functions that compute both at once then do it twice; what travels
between ranks of a stage travels once, with the gradients of inputs (in the first stage, whose inputs have none, with
those of weights). What is recomputed is so for each half.

All ranks of a stage run the same order of actions, and within an action the same order of collectives: ranks can
never disagree about which exchange comes next, whatever the schedule.

Not imported where nothing is pipelined: torch's package takes a second to load.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)
from torch.utils.checkpoint import GraphExecGroup

from .config import ParallelConfig
from .mesh import Mesh
from .relay import RECEIVE, SEND
from .stages import Stages
from .stopwatch import Stopwatch

__all__ = ["Pipeline", "Shapes", "with_loss"]

_SINGLE: dict[str, type[PipelineScheduleSingle]] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
_MULTI: dict[str, type[PipelineScheduleMulti]] = {
    "interleaved": ScheduleInterleaved1F1B,
    "zb-h1": ScheduleInterleavedZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, loss):
        ctx.loss_like = loss.dtype, loss.device
        # Not a view to autograd: torch's stages detach what they have passed on, in place.
        return x.detach()

    @staticmethod
    def backward(ctx, *grads):
        dtype, device = ctx.loss_like
        return grads[0], torch.ones((), dtype=dtype, device=device)


def with_loss(x: Tensor, loss: Tensor) -> Tensor:
    """`x`, whose backward is also that of the scalar `loss`: an auxiliary loss of a stage that others follow."""
    return _WithLoss.apply(x, loss)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class Shapes:
    """What one micro-batch brings on this rank."""

    inputs: tuple[int, ...]
    """Of what the first stage reads; int64."""
    hidden: tuple[int, ...]
    """Of what stages pass on."""
    dtype: torch.dtype
    """Of that."""


class Pipeline:
    """This rank's stages and their schedule; `step` runs the micro-batches of one step forward and backward."""

    def __init__(
        self,
        config: ParallelConfig,
        stages: Stages,
        modules: Sequence[nn.Module],
        loss: Callable[[Tensor, Tensor], Tensor],
        micro_batches: int,
        shapes: Shapes,
        mesh: Mesh,
    ) -> None:
        """modules: one for each of this rank's stages, from input to output tensor; `loss` is of the last output and
        the targets. All ranks call it together.

        Raises ValueError where the schedule has no order for so many micro-batches.
        """
        if not config.runs(micro_batches):
            raise ValueError(
                f"{config.schedule}: no order for {micro_batches} micro-batches on {config.pipeline} ranks"
            )
        self._stages = stages
        self._clock = _Clock(mesh, len(stages.own) * micro_batches)
        parts = [
            _Stage(module, stage, stages, shapes, mesh, self._clock)
            for stage, module in zip(stages.own, modules, strict=True)
        ]

        def timed(output: Tensor, target: Tensor) -> Tensor:
            value = loss(output, target)
            self._clock.computed()
            return value

        self._schedule: PipelineScheduleSingle | PipelineScheduleMulti
        if config.schedule in _SINGLE:
            self._schedule = _SINGLE[config.schedule](parts[0], micro_batches, timed, scale_grads=False)
        else:
            self._schedule = _MULTI[config.schedule](list(parts), micro_batches, timed, scale_grads=False)

    def step(self, inputs: Tensor | None, targets: Tensor | None, last_backward: Callable[[], Any]) -> list[Tensor]:
        """Adds the gradients of all micro-batches to the parameters'; their losses, where this rank computes them.

        inputs, targets: of all micro-batches, one after the other along the first dim; read where this rank holds the
        first stage, and the last. `last_backward` is called before the rank's last backward, if that is a whole one.
        """
        losses: list[Tensor] = []
        self._clock.start(last_backward)
        read = (inputs,) if self._stages.has_first else ()
        compared = targets if self._stages.has_last else None
        self._schedule.step(*read, target=compared, losses=losses, return_outputs=False)
        return losses


class _Clock:
    """When this rank last computed, and how many backwards are left to it."""

    def __init__(self, mesh: Mesh, backwards: int) -> None:
        self._mesh, self._backwards = mesh, backwards

    def start(self, last_backward: Callable[[], Any]) -> None:
        self._last_backward, self._left = last_backward, self._backwards
        self.computed()

    def computed(self) -> None:
        """From here on this rank waits, unless it computes again."""
        self._watch = Stopwatch(self._mesh.device)

    def arrived(self) -> None:
        """What was waited for is there."""
        self._mesh.recorder.collective_left(RECEIVE, self._watch.stop())

    def finishing(self, whole: bool) -> None:
        """A backward that forms gradients of weights is about to run."""
        self._left -= 1
        if not self._left and whole:
            self._last_backward()


class _Stage(PipelineStage):
    """torch's stage, which tells the recorder what travels and how long it was waited for."""

    def __init__(
        self, module: nn.Module, stage: int, stages: Stages, shapes: Shapes, mesh: Mesh, clock: _Clock
    ) -> None:
        # Examples without memory: nothing is run to find the shapes out.
        hidden = torch.empty(shapes.hidden, dtype=shapes.dtype, device="meta", requires_grad=True)
        tokens = torch.empty(shapes.inputs, dtype=torch.int64, device="meta")
        super().__init__(
            module,
            stage,
            len(stages.layers),
            mesh.device,
            input_args=tokens if stage == 0 else hidden,
            output_args=hidden,
            group=mesh.pipeline.group,
        )
        self._mesh, self._clock = mesh, clock
        self._fed = stage > 0 and stages.ranks[stage - 1] != stages.rank
        self._led = stage < stages.last and stages.ranks[stage + 1] != stages.rank

    def get_fwd_recv_ops(self, fwd_chunk_id):
        return self._expected(super().get_fwd_recv_ops(fwd_chunk_id))

    def get_bwd_recv_ops(self, bwd_chunk_id):
        return self._expected(super().get_bwd_recv_ops(bwd_chunk_id))

    def get_fwd_send_ops(self, fwd_chunk_id):
        return self._sent(super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id):
        return self._sent(super().get_bwd_send_ops(bwd_chunk_id))

    def forward_one_chunk(self, *args, **kwargs):
        if self._fed:
            self._clock.arrived()
        output = super().forward_one_chunk(*args, **kwargs)
        self._clock.computed()
        return output

    def backward_one_chunk(self, *args, **kwargs):
        if self._led:
            self._clock.arrived()
        super().backward_one_chunk(*args, **kwargs)
        self._clock.computed()

    def backward_weight_one_chunk(self, *args, **kwargs):
        # torch forms them group by group; what they need of a block is computed again once, not once for each group.
        with GraphExecGroup():
            super().backward_weight_one_chunk(*args, **kwargs)
        self._clock.computed()

    def backward_maybe_with_nosync(self, backward_type, bwd_kwargs, last_backward=False):
        if backward_type != "input":
            self._clock.finishing(whole=backward_type == "full")
        return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)

    def _post_metadata_inference_cleanup(self):
        """Nothing was run to find shapes out. torch's would take the gradients from the buckets of gradients.py."""

    def _expected(self, ops: list) -> list:
        for _ in ops:
            self._mesh.recorder.collective_entered(RECEIVE, 0)
        return ops

    def _sent(self, ops: list) -> list:
        for op in ops:
            self._mesh.recorder.collective_entered(SEND, op.tensor.numel() * op.tensor.element_size())
            self._mesh.recorder.collective_left(SEND, 0.0)
        return ops
