"""Bytes of a rank that are not activations of layers, by what they are for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from .cluster import Cluster
from .cost import Roofline
from .layout import Layout, check
from .optimizer_state import Optimizer, state_bytes
from .routing_skew import UNIFORM, Skew, load_of
from .shape import LayerKind, ModelShape
from .weights import Weight, first_weights, last_weights, layer_weights
from .work import embedding_of, head_of, work_of


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one rank of the pipeline holds, over all its chunks."""

    kinds: tuple[LayerKind, ...]
    """Of its layers."""
    first: bool = False
    """Whether the embedding is here ..."""
    last: bool = False
    """... and whether the output layer is; where it is tied and the embedding is elsewhere, a copy of that."""


def static_bytes(
    shape: ModelShape,
    layout: Layout,
    cluster: Cluster,
    optimizer: Optimizer,
    share: Share,
    skew: Skew = UNIFORM,
) -> dict[str, int]:
    """Bytes by component, in this order:

    dense weights, expert weights, dense gradients, expert gradients, dense optimizer, expert optimizer  with what ZeRO
        cuts divided over the ranks that repeat it: `data` for dense weights, `expert_data` for experts
    gathered weights   with ZeRO-3, whole layers at a time: the one that computes, the next, and a layer of gradients;
        for an eager layout see `_gather_eagerly`
    all-to-all         the larger exchange's rows to be sent and received, on the fullest rank
    working            gradients that the largest backward operator reads and writes
    loss               the last rank's logits and their gradient while they are used; for an eager layout as far as
        they exceed what a layer's backward takes, which comes after them
    context            driver, libraries, communication buffers
    fragmentation      what the allocator cannot use

    Raises ValueError as `work_of` does.
    """
    check(shape, layout)
    weights = list(_weights(shape, share))
    dense = [weight for weight in weights if weight.role != "expert"]
    experts = [weight for weight in weights if weight.role == "expert"]
    found: dict[str, float] = {}
    cut_all = layout.zero == 3
    for name, those, copies, cut in (
        ("dense", dense, layout.data, layout.dense_cut),
        ("expert", experts, layout.expert_data, layout.expert_cut),
    ):
        numel = sum(_local(weight, layout) for weight in those)
        over = cut if cut_all else 1
        # With ZeRO-3 `_state` is that of a part already.
        spread = copies if layout.zero == 1 else 1
        found[f"{name} weights"] = numel * layout.weight_bytes / over
        found[f"{name} gradients"] = numel * layout.gradient_bytes / over
        master = 4 * numel if optimizer.master and layout.weight_bytes < 4 else 0
        state = sum(_state(optimizer, weight, layout) for weight in those)
        found[f"{name} optimizer"] = master / (over * spread) + state / spread
    found["gathered weights"] = _gathered(shape, layout, share) if cut_all and not layout.eager else 0
    found["all-to-all"] = _all_to_all(shape, layout, skew) if "moe" in share.kinds else 0
    found["working"] = max(
        (work_of(shape, layout, cluster, skew, kind).working for kind in set(share.kinds)), default=0
    )
    found["loss"] = head_of(shape, layout, cluster).working if share.last else 0
    if layout.eager:
        _gather_eagerly(shape, layout, share, found)
    found["context"] = cluster.allowance.context
    found["fragmentation"] = cluster.allowance.fragmentation * cluster.device.memory
    return {name: math.ceil(found[name]) for name in COMPONENTS}


COMPONENTS = (
    "dense weights",
    "expert weights",
    "dense gradients",
    "expert gradients",
    "dense optimizer",
    "expert optimizer",
    "gathered weights",
    "all-to-all",
    "working",
    "loss",
    "context",
    "fragmentation",
)
"""Keys of what `static_bytes` gives."""


def kept_outside_layers(shape: ModelShape, layout: Layout, cluster: Cluster, share: Share) -> dict[str, int]:
    """Bytes that each micro-batch in flight keeps of the embedding and of the output layer."""
    return {
        "embedding": embedding_of(shape, layout, cluster).saved if share.first else 0,
        "head": head_of(shape, layout, cluster).saved if share.last else 0,
    }


def optimizer_seconds(components: Mapping[str, int], cluster: Cluster) -> float:
    """Of one step over what `static_bytes` says is here: gradients read, weights and state read and written.

    As fast as memory allows: what factored optimizers compute beside it is left out.
    """
    moved = sum(
        components[f"{which} gradients"] + 2 * (components[f"{which} weights"] + components[f"{which} optimizer"])
        for which in ("dense", "expert")
    )
    return Roofline(cluster, "").memory(moved)


def total(components: Mapping[str, int]) -> int:
    """Of all components."""
    return sum(components.values())


def _weights(shape: ModelShape, share: Share) -> Iterable[Weight]:
    for kind in share.kinds:
        yield from layer_weights(shape, kind)
    if share.first:
        yield from first_weights(shape)
    if share.last:
        yield from last_weights(shape)
        if shape.tied and not share.first:
            yield from (weight for weight in first_weights(shape) if weight.name == "embedding")


def _local(weight: Weight, layout: Layout) -> float:
    return weight.local(layout.tensor, layout.expert)


def _state(optimizer: Optimizer, weight: Weight, layout: Layout) -> float:
    """With ZeRO-3 of this rank's rows; else before ZeRO, which spreads whole matrices evenly over ranks (or nearly)."""
    is_expert, cuts_rows = weight.role == "expert", layout.zero == 3
    rows = (layout.expert_cut if is_expert else layout.dense_cut) if cuts_rows else 1
    if is_expert:
        return state_bytes(optimizer, weight, rows) / layout.expert
    cut = layout.tensor if weight.split != "none" else 1
    return state_bytes(optimizer, weight, *((rows, cut) if weight.split == "columns" else (rows * cut, 1)))


def _gathered(shape: ModelShape, layout: Layout, share: Share) -> float:
    """Two layers' weights in the compute dtype and one's gradients, of the largest kind that is here."""
    numels = [sum(_local(weight, layout) for weight in layer_weights(shape, kind)) for kind in set(share.kinds)]
    return max(numels, default=0) * (2 * layout.compute_bytes + layout.gradient_bytes)


def _gather_eagerly(shape: ModelShape, layout: Layout, share: Share, found: dict[str, float]) -> None:
    """Sets what FSDP2 gathers in `found`, and leaves of the loss what exceeds a layer's backward.

    The weights of the ends are whole from the first forward to the last backward, a layer's as they come: what arrives
    lies in one piece, then by weights, and experts, which are not cut along their first side, are then put in order.
    While micro-batches accumulate gradients are whole: more than the parts that are counted as gradients.
    """
    whole, held, arriving, largest = 0.0, 0.0, 0.0, 0.0
    narrow = min(layout.weight_bytes, layout.compute_bytes)
    if layout.zero == 3:
        whole = layout.weight_bytes * _cut_numel(_weights(shape, replace(share, kinds=())), layout)
        parts = (found["dense gradients"] + found["expert gradients"]) / layout.gradient_bytes
        accumulated = sum(_local(weight, layout) for weight in _weights(shape, share)) - parts
        for kind in set(share.kinds):
            weights = layer_weights(shape, kind)
            layer = _cut_numel(weights, layout)
            dense = _cut_numel((weight for weight in weights if weight.role != "expert"), layout)
            largest = max(largest, layer)
            # Experts are gathered in what they compute in (shard.py).
            dense_bytes, expert_bytes = dense * layout.weight_bytes, (layer - dense) * narrow
            held = max(held, dense_bytes + expert_bytes)
            arriving = max(arriving, dense_bytes, 2 * expert_bytes)
        whole += layout.gradient_bytes * (accumulated if layout.micro_batches > 1 else largest)
    found["gathered weights"] = whole + held + max(0.0, arriving - found["working"])
    found["loss"] = max(0.0, found["loss"] - held - max(arriving, found["working"]))


def _cut_numel(weights: Iterable[Weight], layout: Layout) -> float:
    """Numbers, on one rank, of those whose storage ranks share."""
    is_cut = {"expert": layout.expert_cut > 1}
    return sum(_local(weight, layout) for weight in weights if is_cut.get(weight.role, True))


def _all_to_all(shape: ModelShape, layout: Layout, skew: Skew) -> float:
    assert shape.experts is not None, "kinds has no moe without experts"
    if layout.expert == 1:
        return 0
    load = load_of(shape.experts, layout, skew)
    return (load.num_sent + load.fullest) * shape.d_model * layout.compute_bytes
