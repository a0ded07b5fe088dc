"""Communication between ranks that repeat weights, once a step: gradients summed, weights gathered."""

from __future__ import annotations

from .cluster import Cluster
from .layout import Group, Layout
from .memory import Share
from .shape import ModelShape
from .traffic import all_reduce_seconds, reduce_scatter_seconds
from .weights import Weight, first_weights, last_weights, layer_weights


def reduction_seconds(shape: ModelShape, layout: Layout, cluster: Cluster, share: Share) -> dict[str, float]:
    """Seconds by what is sent, of one rank of the pipeline, one thing after the other.

    dense gradients, expert gradients    all-reduced, or reduce-scattered where ZeRO cuts what comes next
    dense weights, expert weights        gathered after the step with ZeRO-1; with ZeRO-3, in each forward and backward
        of each micro-batch, whose gradients are scattered each time too
    """
    dense, experts = _bytes(shape, layout, share)
    found: dict[str, float] = {}
    times = 2 * layout.micro_batches if layout.zero == 3 else 1
    for name, numel, group in (
        ("dense", dense, layout.data_group),
        ("expert", experts, layout.expert_data_group),
    ):
        gradients, weights = numel * layout.gradient_bytes, numel * layout.compute_bytes
        found[f"{name} gradients"] = _summed(layout, cluster, group, gradients)
        gather = reduce_scatter_seconds(cluster, group, weights) if layout.zero and group.size > 1 and weights else 0.0
        found[f"{name} weights"] = times * gather
    return found


def _summed(layout: Layout, cluster: Cluster, group: Group, size: float) -> float:
    if group.size == 1 or not size:
        return 0.0
    if layout.zero == 0:
        return all_reduce_seconds(cluster, group, size)
    times = layout.micro_batches if layout.zero == 3 else 1
    return times * reduce_scatter_seconds(cluster, group, size)


def _bytes(shape: ModelShape, layout: Layout, share: Share) -> tuple[float, float]:
    """Numbers on one rank, of dense weights and of experts."""
    weights: list[Weight] = [weight for kind in share.kinds for weight in layer_weights(shape, kind)]
    weights += first_weights(shape) if share.first else ()
    weights += last_weights(shape) if share.last else ()
    experts = sum(weight.numel for weight in weights if weight.role == "expert") / layout.expert
    dense = sum(
        weight.numel / (layout.tensor if weight.split != "none" else 1) for weight in weights if weight.role != "expert"
    )
    return dense, experts
