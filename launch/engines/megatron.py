"""Megatron-Core trains: its GPTModel, its pipeline schedule and its reduction of gradients, around our router.

The weights are those of our decoder, and Megatron's model shares their memory (`megatron_model.py`): the optimizer,
checkpoints and generation are the native engine's, so that a run goes on, or is evaluated, under either engine.
"""

from __future__ import annotations

from ...parallel.gradients import Gradients
from ..data import Samples
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
