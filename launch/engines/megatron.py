"""Megatron-Core trains: its GPTModel, its pipeline schedule and its reduction of gradients, around our router.

The weights are those of our decoder, and Megatron's model shares their memory (`megatron_model.py`): the optimizer,
checkpoints and generation are the native engine's, so that a run goes on, or is evaluated, under either engine.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron.core import parallel_state
from torch import Tensor

from ...parallel.gradients import Gradients
from ..data import Samples
from ..evaluate import Evaluation, judged
from .engine import Restored
from .megatron_model import MegatronModel, make_groups
from .megatron_step import MegatronStepper
from .native import NativeEngine


class MegatronEngine(NativeEngine):
    """See `engine.Engine`."""

    theirs: MegatronModel

    def make_stepper(self, gradients: Gradients, samples: Samples) -> MegatronStepper:
        """Builds Megatron's model as well."""
        config, mesh = self.ground.config, self.ground.mesh
        make_groups(config, mesh)
        self.theirs = MegatronModel(config, mesh, self.model)
        return MegatronStepper(config, mesh, self.model, self.optimizer, gradients, samples, self.theirs)

    def restore(self) -> Restored | None:
        restored = super().restore()
        self.theirs.refresh()
        return restored

    def evaluate(self, progress: Callable[[int, int], None]) -> Evaluation:
        """By Megatron's model, in its schedule."""
        ground, theirs = self.ground, self.theirs
        data, train = ground.config.data, ground.config.train

        def judge(tokens_BS: Tensor, targets_BS: Tensor, text: int) -> Tensor | None:
            batch = (tokens_BS, targets_BS)
            losses = theirs.run([batch], lambda *batch: theirs(*batch)[0], tokens=1, forward_only=True)
            return losses[0] if losses else None

        theirs.eval()
        result = judged(
            judge, ground.held_out, ground.mesh, seq_len=data.seq_len, batch=train.eval_batch, progress=progress
        )
        theirs.train()
        return result

    def close(self) -> None:
        super().close()
        parallel_state.destroy_model_parallel()
