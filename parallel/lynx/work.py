"""The work of a model on a cluster: its layers for the planner, what stands before and after them, and model FLOPs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .attention_work import attention_steps
from .cluster import Cluster
from .feedforward_work import dense_steps, moe_steps
from .layout import Layout, check
from .place import Place
from .problem import Layer
from .routing_skew import UNIFORM, Skew, load_of
from .shape import LayerKind, ModelShape
from .steps import LayerWork, Step, assemble
from .traffic import send_seconds
from .weights import layer_weights


def layer_of(shape: ModelShape, layout: Layout, cluster: Cluster, skew: Skew, kind: LayerKind) -> Layer:
    """What a layer of this kind does; see `work_of`."""
    return work_of(shape, layout, cluster, skew, kind).layer


def work_of(
    shape: ModelShape, layout: Layout, cluster: Cluster, skew: Skew = UNIFORM, kind: LayerKind = "dense"
) -> LayerWork:
    """What a layer of this kind does for a micro-batch, on the rank that has the most to do.

    Raises ValueError, in one line, where shape and layout, or shape and skew, do not go together, the model has no
    such layers, or the cluster is too small.
    """
    check(shape, layout)
    if kind not in shape.kinds:
        raise ValueError(f"{shape.name}: no layer is {kind}; its layers are {', '.join(sorted(set(shape.kinds)))}")
    at = Place(shape=shape, layout=layout, cluster=cluster)
    steps = list(attention_steps(at))
    if kind == "moe":
        assert shape.experts is not None, "kinds has no moe without experts"
        steps += moe_steps(at, load_of(shape.experts, layout, skew))
    else:
        steps += dense_steps(at)
    if cast := _cast_bytes(shape, layout, kind):
        steps.insert(1, Step(name="cast weights", bytes=cast, kind="input"))
    return assemble(kind, steps)


def _cast_bytes(shape: ModelShape, layout: Layout, kind: LayerKind) -> int:
    """Of a layer's matrices in the compute dtype, where each forward casts them; the router computes in fp32, and
    experts whose storage ranks share arrive so."""
    if not layout.eager or layout.compute_bytes >= layout.weight_bytes:
        return 0
    arrives = layout.zero == 3 and layout.expert_cut > 1
    matrices = (
        weight
        for weight in layer_weights(shape, kind)
        if weight.columns > 1 and weight.name != "router" and not (arrives and weight.role == "expert")
    )
    return math.ceil(layout.compute_bytes * sum(w.local(layout.tensor, layout.expert) for w in matrices))


@dataclass(frozen=True, kw_only=True)
class EndWork:
    """What the first stage does before its layers, or the last one after them, for a micro-batch."""

    forward: float
    """Seconds of compute."""
    backward: float
    weight_gradients: float
    """Seconds of the backward that nothing waits for."""
    forward_exchange: float
    """Seconds of communication between tensor-parallel ranks, in the forward ..."""
    backward_exchange: float
    """... and in the backward."""
    saved: int
    """Bytes kept from forward to backward."""
    working: int
    """Bytes at most while it runs: gradients, and logits."""
    flops: float
    """Of the forward's matrix products on this rank."""


def embedding_of(shape: ModelShape, layout: Layout, cluster: Cluster) -> EndWork:
    """The embedding; what it gives is the first layer's input, which that counts."""
    check(shape, layout)
    at = Place(shape=shape, layout=layout, cluster=cluster)
    stream = at.local * shape.d_model * layout.residual_bytes
    numbers = at.local * shape.d_model if shape.dropout else 0
    # Ranks look up the rows they hold and sum; what each holds of it is one more collective.
    leave = at.leave("embedding", "")
    return EndWork(
        forward=at.time.memory(2 * stream + numbers),
        backward=at.time.memory(2 * stream + numbers),
        weight_gradients=0.0,
        forward_exchange=leave.forward,
        backward_exchange=leave.backward,
        saved=8 * at.T + numbers,
        working=2 * stream,
        flops=0.0,
    )


def head_of(shape: ModelShape, layout: Layout, cluster: Cluster) -> EndWork:
    """The final norm, the output layer and the loss.

    Logits are kept in fp32 from forward to backward, unless the loss goes over the tokens in chunks: then they are
    computed, used and dropped chunk by chunk, gradients and all, in the forward.
    """
    check(shape, layout)
    at = Place(shape=shape, layout=layout, cluster=cluster)
    columns = -(-shape.vocab // layout.tensor)
    norm = at.norm("final norm", "input", at.local, shape.d_model, layout.residual_bytes)
    enter, again = at.enter("head", "final norm")
    product = at.linear("head", "final norm", at.T, shape.d_model, columns)
    logits = at.T * columns * 4
    loss = at.time.memory(3 * logits)
    stream = at.local * shape.d_model * layout.residual_bytes
    kept = stream + norm.bytes
    chunk = min(layout.loss_chunk, at.T) or at.T
    in_chunks = chunk < at.T or layout.eager
    if in_chunks:
        # What the chunks leave behind is the gradient of their inputs.
        kept = stream + 2 * norm.bytes
    gradients = product.backward + product.weights + loss
    return EndWork(
        forward=norm.seconds + product.seconds + loss + (gradients if in_chunks else 0.0),
        backward=norm.backward + (0.0 if in_chunks else gradients),
        weight_gradients=0.0 if in_chunks else product.weights,
        forward_exchange=enter.forward,
        backward_exchange=enter.backward + (again.seconds if again else 0.0),
        saved=kept + (0 if in_chunks else logits),
        working=_eager_loss(at, chunk, columns) if layout.eager else chunk * columns * (4 + layout.compute_bytes),
        flops=product.flops,
    )


def _eager_loss(at: Place, chunk: int, columns: int) -> int:
    """Bytes at most while a loss forms its gradients, whose backward, right after it, only scales them.

    The weight's gradient is summed in fp32; beside it and a chunk's logits are their product (cast, where it is not in
    fp32) or the next logits, the weight and the logits once more where they are cast, and what tensor ranks gather and
    scatter.
    """
    layout, weight, logits = at.layout, columns * at.shape.d_model, chunk * columns
    narrow = layout.compute_bytes if layout.compute_bytes < 4 else 0
    beside = max(weight * (4 + narrow), 4 * logits if chunk < at.T else 0)
    travels = 2 * chunk * at.shape.d_model * layout.compute_bytes if layout.tensor > 1 else 0
    return weight * (4 + narrow) + logits * (4 + narrow) + beside + travels


def hop_seconds(shape: ModelShape, layout: Layout, cluster: Cluster) -> float:
    """Of the residual stream of a micro-batch, or its gradient, on the way to a neighbouring pipeline stage."""
    size = layout.local_tokens * shape.d_model * layout.residual_bytes
    return send_seconds(cluster, layout.pipeline_group.stride, size)


def model_flops(shape: ModelShape, layout: Layout) -> float:
    """Of one step over all ranks, without recomputation: what the model needs, for MFU.

    Twice the weights of matrices that a token uses, and half of all pairs of tokens in attention; three times that for
    forward and backward. The embedding's look-up is none.
    """
    per_token = 2.0 * shape.vocab * shape.d_model
    used = shape.experts.top_k if shape.experts is not None else 0
    for kind in set(shape.kinds):
        matrices = sum(
            weight.rows * weight.columns * (used if weight.role == "expert" else weight.copies)
            for weight in layer_weights(shape, kind)
            if weight.columns > 1
        )
        pairs = layout.seq_len * shape.heads * (shape.qk_dim + shape.value_dim)
        per_token += shape.kinds.count(kind) * (2.0 * matrices + pairs)
    return 3 * per_token * layout.global_batch * layout.seq_len
