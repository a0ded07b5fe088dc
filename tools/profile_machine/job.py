"""What the ranks of `wastenot profile` are told, and what of it can be measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ...launch.config import TrainConfig
from ...parallel.lynx.cluster import Cluster
from ...parallel.lynx.layout import Layout
from ...parallel.lynx.routing_skew import Skew
from ...parallel.lynx.shape import LayerKind, ModelShape
from ...parallel.lynx.weights import layer_weights

_MOST_BYTES = 0.25
"""Of a rank's memory, that a layer's weights and their gradients may take. A guess."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is measured."""

    is_quick: bool
    """Smaller kernels and messages."""
    kernels_s: float
    """Seconds for all kernels together."""
    layer_s: float
    """Seconds for each kind of layer."""
    rounds: int
    """Of each collective."""


QUICK = Effort(is_quick=True, kernels_s=12.0, layer_s=6.0, rounds=11)
FULL = Effort(is_quick=False, kernels_s=60.0, layer_s=25.0, rounds=41)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One measurement."""

    shape: ModelShape
    layout: Layout
    skew: Skew
    cluster: Cluster
    """Whose figures are to be replaced."""
    config: TrainConfig | None
    """The run whose layers are timed; None: CONFIG is the shape of a model that wastenot has no code for."""
    output: Path
    effort: Effort
    as_json: bool
    command: str
    """That predicts with the file."""


def layers_to_time(job: Job, world: int, memory_bytes: float) -> tuple[list[LayerKind], list[str]]:
    """Kinds of layers that `world` ranks, with so much memory each, can time as they are; and why others not."""
    kinds: list[LayerKind] = [kind for kind in ("dense", "moe") if kind in job.shape.kinds]
    found: list[LayerKind] = []
    notes = []
    for kind in kinds:
        reason = _obstacle(job, kind, world, memory_bytes)
        if reason:
            notes.append(f"layers.{kind}: not measured, its operators are predicted: {reason}")
        else:
            found.append(kind)
    return found, notes


def _obstacle(job: Job, kind: LayerKind, world: int, memory_bytes: float) -> str:
    """Why a layer of this kind cannot be timed here; empty: it can."""
    layout, config = job.layout, job.config
    if config is None:
        return "the configuration is a model's shape, not a wastenot run's"
    if layout.tensor > 1:
        return "layers that tensor ranks share are not timed operator by operator"
    numel = sum(
        weight.numel / (layout.expert if weight.role == "expert" else 1) for weight in layer_weights(job.shape, kind)
    )
    if 8 * numel > _MOST_BYTES * memory_bytes:
        return f"{8 * numel / 2**30:.1f} GiB of weights and gradients are too much for a rank of this machine"
    if kind == "dense":
        return ""
    if world % layout.expert:
        return f"{layout.expert} expert-parallel ranks do not fit the {world} that were started"
    if config.router.rectify.is_on:
        return "the cost model has no stand-ins and no fill-in"
    if job.skew.counts:
        return "no router draws by a recorded histogram"
    if layout.merged_dispatch:
        return "wastenot's own dispatch sends every route"
    return ""


def config_of(job: Job) -> TrainConfig:
    """The run, with one micro-batch of the layout's size on this rank."""
    config, layout = job.config, job.layout
    assert config is not None, "layers_to_time has found that it is a run"
    router = replace(config.router, capacity_factor=layout.capacity_factor, emulate=None, jitter=0.0)
    return replace(
        config,
        train=replace(config.train, batch=layout.micro_batch, accumulate=1),
        data=replace(config.data, seq_len=layout.seq_len),
        router=router,
    )
