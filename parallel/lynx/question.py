"""What a planner is asked."""

from __future__ import annotations

from dataclasses import dataclass, field

from .calibration import Calibration
from .cluster import Cluster
from .layout import Layout
from .optimizer_state import Optimizer
from .routing_skew import UNIFORM, Skew
from .shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Question:
    """A model on a cluster, and how it is to be trained."""

    shape: ModelShape
    layout: Layout
    cluster: Cluster
    optimizer: Optimizer = field(default_factory=Optimizer)
    skew: Skew = UNIFORM
    schedule: str = "1f1b"
    solver: str = "heu-mix"
    budget: int | None = None
    """Bytes of a device; None: all that it has."""
    replay: bool = False
    """Whether collectives may be replayed (METHODS L2)."""
    fill_stalls: bool = True
    """Whether waits of the pipeline are windows too."""
    cut: tuple[int, ...] | None = None
    """Layers of each stage; None: as equal as they can be."""
    calibration: Calibration | None = None
    """Operator times that were measured."""
    time_limit: float = 60.0
    """Seconds for each stage's search."""

    @property
    def bytes(self) -> int:
        """The budget."""
        return int(self.cluster.device.memory if self.budget is None else self.budget)
