"""Hidden states from stage to stage where nothing is learned: evaluation and generation."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .mesh import Mesh
from .stages import Stages
from .stopwatch import Stopwatch

SEND, RECEIVE = "pipeline-send", "pipeline-receive"
"""What a recorder hears of hidden states and of their gradients."""


class Relay:
    """Carries what a stage makes to the next, whether that is on this rank or another.

    Every rank goes through its stages in the model's order, and through batches in theirs, so that none waits for
    what waits for it.
    """

    def __init__(self, mesh: Mesh, stages: Stages) -> None:
        self.mesh, self.stages = mesh, stages
        self._here: dict[int, Tensor] = {}

    def send(self, stage: int, x: Tensor) -> None:
        """Hands `x`, made by `stage` of this rank, to the stage after it."""
        to = self.stages.ranks[stage + 1]
        if to == self.stages.rank:
            self._here[stage + 1] = x
            return
        self.mesh.recorder.collective_entered(SEND, x.numel() * x.element_size())
        watch = Stopwatch(x.device)
        dist.send(x.contiguous(), group=self.mesh.pipeline.group, group_dst=to)
        self.mesh.recorder.collective_left(SEND, watch.stop())

    def receive(self, stage: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """What the stage before `stage` of this rank made."""
        if stage in self._here:
            return self._here.pop(stage)
        x = torch.empty(shape, dtype=dtype, device=self.mesh.device)
        self.mesh.recorder.collective_entered(RECEIVE, 0)
        watch = Stopwatch(x.device)
        dist.recv(x, group=self.mesh.pipeline.group, group_src=self.stages.ranks[stage - 1])
        self.mesh.recorder.collective_left(RECEIVE, watch.stop())
        return x
