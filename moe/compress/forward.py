"""A streamed layer computed: its experts spread over ranks, and a look at what each of them does.

    moe_output    tokens and their routers' choice -> what experts and shared experts make of them
    block_output  the residual stream before a layer -> after its attention, and after all of it
    read_planned  a layer as a plan leaves it
    run_layers    token ids -> the residual stream after the last layer, under a plan that nobody applied

Dropless. Every rank of the expert axis makes the same calls and so the same collectives, whatever it has to send.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.grouped_mm import grouped_swiglu
from ...kernels.grouped_mm.naive import grouped_mm
from ...kernels.route import assign
from ...parallel.collectives import all_gather_rows
from ...parallel.mesh import Mesh, single
from ..dispatcher import Dispatcher, DispatchHandle
from ..routing import Routing
from .plan import DropPlan
from .streamed import Choice, ExpertWeights, StreamedLayer, StreamedModel

__all__ = ["Observer", "block_output", "moe_output", "read_planned", "run_layers"]


class Observer(Protocol):
    """Sees what the experts of this rank do, of the tokens of all ranks."""

    def __call__(
        self, rows_RD: Tensor, hidden_RF: Tensor, outputs_RD: Tensor, gates_R: Tensor, offsets_e: Tensor
    ) -> None:
        """
        Args:
            rows_RD: inputs, sorted by expert.
            hidden_RF: what the down projection reads of each.
            outputs_RD: what it makes of that, not weighted yet.
            gates_R: the weight that the model gives each output.
            offsets_e: int32, the row after the last of each expert of this rank; some may have none.
        """
        ...


@torch.no_grad()
def moe_output(
    layer: StreamedLayer, x_TD: Tensor, choice: Choice, mesh: Mesh, observe: Observer | None = None
) -> Tensor:
    """Each token's weighted sum over its experts, and what the shared ones add; [T, D].

    `layer` was read with this rank's share of the experts, in order of `mesh.expert`. `observe` is called once, where
    there are no rows too.
    """
    weights = layer.experts
    assert weights is not None, "the layer was read without experts"
    dispatcher = Dispatcher(layer.num_experts, mesh)
    handle = dispatcher.plan(_dropless(choice, layer.num_experts), x_TD.size(-1) * x_TD.element_size())

    def dispatch(rows: Tensor) -> Tensor:
        return dispatcher.finish_dispatch(dispatcher.start_dispatch(rows, handle), handle)

    rows_RD = dispatch(x_TD)
    if observe is None:
        outputs_RD = grouped_swiglu(rows_RD, weights.gate_up, weights.down, handle.offsets_e)
    else:
        gates_R = _gates(choice, dispatch, handle, dispatcher.local.start)
        hidden_RF, outputs_RD = _experts(rows_RD, weights, handle.offsets_e)
        observe(rows_RD, hidden_RF, outputs_RD, gates_R, handle.offsets_e)
    y_TD = dispatcher.finish_combine(dispatcher.start_combine(outputs_RD, handle), handle)
    shared_TD = layer.shared(x_TD)
    return y_TD if shared_TD is None else y_TD + shared_TD


@torch.no_grad()
def block_output(
    layer: StreamedLayer, h_BSD: Tensor, mesh: Mesh, observe: Observer | None = None
) -> tuple[Tensor, Tensor]:
    """The residual stream after attention, and after the feed-forward network; the same where there is none."""
    a_BSD = layer.attend(h_BSD)
    if not layer.num_experts and not layer.is_dense:
        return a_BSD, a_BSD
    x_TD = layer.norm(a_BSD).flatten(0, -2)
    if layer.num_experts:
        y_TD = moe_output(layer, x_TD, layer.route(x_TD), mesh, observe)
    else:
        y_TD = layer.dense(x_TD)
    return a_BSD, a_BSD + y_TD.view_as(a_BSD)


@torch.no_grad()
def run_layers(
    model: StreamedModel,
    tokens_BS: Tensor,
    plan: DropPlan | None = None,
    mesh: Mesh | None = None,
    batch: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """The residual stream after the last layer, fp32 [B, S, D], as the model would have it that `plan` makes.

    Nothing is applied: layers are read as far as the plan keeps them, each once. `model.logits` follows.

    Args:
        tokens_BS: this rank's sequences, as many as it likes, but all of one length.
        plan: None: the model as it is.
        mesh: None: a single process.
        batch: sequences computed at a time.
        progress: hears (layers done, layers in all).
    Raises:
        ValueError: the plan was made for a model of another shape, or what `StreamedModel.layer` raises.
    """
    if plan is not None and plan.shape != model.shape:
        raise ValueError(f"the plan is for a model of {plan.shape}; this one has {model.shape}")
    h_BSD = model.embed(tokens_BS)
    mesh = mesh or single(h_BSD.device)
    layers = range(model.shape.layers) if plan is None else plan.survivors
    pieces = torch.tensor([-(-h_BSD.size(0) // batch)], device=h_BSD.device)
    pieces = int(all_gather_rows(pieces, mesh.expert, "pieces", mesh.recorder).max())
    for done, number in enumerate(layers):
        layer = read_planned(model, number, plan, (mesh.expert.rank, mesh.expert.size))
        for piece in range(pieces):
            # Beyond this rank's last sequence there is nothing to compute, but others' tokens come for its experts.
            part_BSD = h_BSD[piece * batch : (piece + 1) * batch]
            part_BSD.copy_(block_output(layer, part_BSD, mesh)[1])
        progress(done + 1, len(layers))
    return h_BSD


def read_planned(model: StreamedModel, number: int, plan: DropPlan | None, share: tuple[int, int]) -> StreamedLayer:
    """Layer `number` as `plan`, which does not drop its block, leaves it. `share`: as for `StreamedModel.layer`."""
    if plan is None:
        return model.layer(number, share=share)
    if number in plan.layers:
        return model.layer(number, feed=False)
    kept = plan.kept(number) or None
    layer = model.layer(number, kept, share)
    if plan.semantics == "skip" and layer.experts is not None and kept is not None:
        own = len(kept) // share[1]
        for place, expert in enumerate(kept[share[0] * own : (share[0] + 1) * own]):
            if expert in plan.experts.get(number, ()):
                layer.experts.down[place].zero_()
    return layer


def _dropless(choice: Choice, num_experts: int) -> Routing:
    """The choice as dispatch reads it."""
    slots_TK, counts_BE = assign(choice.experts_TK, None, num_experts)
    return Routing(
        experts_TK=choice.experts_TK,
        weights_TK=choice.weights_TK,
        slots_TK=slots_TK,
        counts_BE=counts_BE,
        capacity=None,
        logits_TE=choice.probs_TE,
        probs_TE=choice.probs_TE,
        top_k=choice.experts_TK.size(1),
    )


def _gates(choice: Choice, dispatch: Callable[[Tensor], Tensor], handle: DispatchHandle, first: int) -> Tensor:
    """The weight of each row that arrived: its token sends all of its weights, and the experts they are for.

    `first`: the number of this rank's first expert.
    """
    K = choice.experts_TK.size(1)
    # Numbers of experts are exact in fp32.
    said_TN = torch.cat([choice.weights_TK, choice.experts_TK.to(choice.weights_TK.dtype)], 1)
    weights_RK, experts_RK = dispatch(said_TN).split(K, 1)
    row_R = torch.arange(weights_RK.size(0), device=handle.offsets_e.device, dtype=handle.offsets_e.dtype)
    own_R = first + torch.searchsorted(handle.offsets_e, row_R, right=True)
    return torch.where(experts_RK == own_R.unsqueeze(1), weights_RK, 0).sum(1)


def _experts(rows_RD: Tensor, weights: ExpertWeights, offsets_e: Tensor) -> tuple[Tensor, Tensor]:
    """As `grouped_swiglu`: what the down projections read, and what they make of it."""
    product = partial(grouped_mm, offsets_e=offsets_e)
    gate_RF, up_RF = product(rows_RD, weights.gate_up).chunk(2, -1)
    hidden_RF = F.silu(gate_RF) * up_RF
    return hidden_RF, product(hidden_RF, weights.down)
