"""Token-choice top-k routers (METHODS R1-R4, R10): tokens in, a `Routing` out.

route        logits of any gate -> Routing
place        the same, where the experts have been chosen already
TopKRouter   a gate and `route`
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction

import torch
from torch import Tensor, nn

from ..kernels.backend import Backend
from ..kernels.gate import gate
from ..kernels.route import Score, assign, choose
from .config import RouterConfig, nearest_divisor
from .routing import Routing
from .weights import combine_weights


def capacity_of(config: RouterConfig, tokens: int, num_experts: int) -> int | None:
    """Slots per (source rank, expert) for `tokens` of one source, known before any communication (R2)."""
    if config.capacity_factor is None:
        return None
    # As the number is written: 1.1 means 11/10, which no float is.
    return math.ceil(Fraction(str(config.capacity_factor)) * config.top_k * tokens / num_experts)


def priority_of(probs_TE: Tensor) -> Tensor:
    """Rank of each token in the queue for slots, as integers that sort like max_e p_e (R3); int32 [T].

    Deviation (ours): probabilities are compared rounded to 12 bits. Tokens that are equal, such as the first of
    two sequences, must tie exactly and fall back to their index; matrix products of other shapes, under another
    layout of ranks, give them different last bits.
    """
    bits = probs_TE.detach().amax(-1).to(torch.float32).view(torch.int32)
    return (bits + (1 << 10)) >> 11


def route(
    logits_TE: Tensor,
    config: RouterConfig,
    blocks: int = 1,
    dropless: bool = False,
    bias_E: Tensor | None = None,
    backend: Backend = "auto",
) -> Routing:
    """What `config` makes of a gate's logits, in fp32 or wider: selection, slots and weights (R1-R4).

    `bias_E` steers selection only. See `TopKRouter.forward` for `blocks` and `dropless`.

    Raises ValueError where the tokens cannot be cut into `blocks`.
    """
    if logits_TE.size(0) % blocks:
        tokens, nearest = logits_TE.size(0), nearest_divisor(logits_TE.size(0), blocks)
        raise ValueError(f"{tokens} tokens cannot be cut into {blocks} emulated ranks; use {nearest}")
    with _full_precision(logits_TE.device.type):
        logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
        scores_TE, chosen_TK = choose(
            logits_TE, config.num_choices, config.score, config.groups, config.top_groups, bias_E, backend
        )
        probs_TE = probabilities(scores_TE, config.score)
        return place(chosen_TK, logits_TE, probs_TE, config, blocks, dropless, backend)


def _full_precision(device_type: str) -> AbstractContextManager[object]:
    """Lifts autocast where there is one: entering the other is most of what it costs."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def probabilities(scores_TE: Tensor, score: Score) -> Tensor:
    """Scores made to sum to one; [T, E] with gradient."""
    return scores_TE if score == "softmax" else scores_TE / scores_TE.sum(-1, keepdim=True)


def place(
    chosen_TK: Tensor,
    logits_TE: Tensor,
    probs_TE: Tensor,
    config: RouterConfig,
    blocks: int = 1,
    dropless: bool = False,
    backend: Backend = "auto",
    *,
    min_capacity: int = 0,
    priority_T: Tensor | None = None,
) -> Routing:
    """Slots and weights of choices that have been made.

    chosen_TK: int64, `config.num_choices` experts per token, best first; those beyond `top_k` wait for fill-in.
    logits_TE, probs_TE: fp32 or wider.
    min_capacity: slots that there are at least, whatever the capacity factor.
    priority_T: int32, who gets a slot first; None: as `config.priority` says.
    """
    tokens, num_experts = logits_TE.shape
    experts_TK, next_TJ = chosen_TK, None
    if config.num_choices > config.top_k:
        experts_TK, next_TJ = chosen_TK.tensor_split([config.top_k], 1)
    capacity = None if dropless else capacity_of(config, tokens // blocks, num_experts)
    if capacity is None:
        priority_T = None
    else:
        capacity = max(capacity, min_capacity)
        if priority_T is None and config.priority == "probability":
            priority_T = priority_of(probs_TE)
        elif priority_T is None:
            priority_T = torch.zeros(tokens, dtype=torch.int32, device=probs_TE.device)
    slots_TK, counts_BE = assign(experts_TK, priority_T, num_experts, blocks, capacity, backend)
    weights_TK = combine_weights(logits_TE, experts_TK, None if capacity is None else slots_TK, config, backend)
    return Routing(
        experts_TK=experts_TK,
        weights_TK=weights_TK,
        slots_TK=slots_TK,
        counts_BE=counts_BE,
        capacity=capacity,
        logits_TE=logits_TE,
        probs_TE=probs_TE,
        top_k=config.top_k,
        next_TJ=next_TJ,
        priority_T=priority_T,
    )


class TopKRouter(nn.Module):
    """Learned token-choice router without bias, in fp32 whatever the model computes in."""

    bias_E: Tensor

    def __init__(self, d_model: int, num_experts: int, config: RouterConfig, backend: Backend = "auto") -> None:
        super().__init__()
        self.config, self.num_experts = config, num_experts
        self.backend: Backend = backend
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        # Steers selection only, never weights; moved by `losses.update_bias`.
        self.register_buffer("bias_E", torch.zeros(num_experts))

    def logits(self, x_TD: Tensor, blocks: int) -> Tensor:
        """What the gate says of all experts, block by block (R10); [T, E] in fp32 or wider."""
        if self.training and self.config.jitter > 0:
            x_TD = x_TD.to(torch.promote_types(self.weight.dtype, torch.float32))
            noise = torch.empty_like(x_TD).uniform_(1 - self.config.jitter, 1 + self.config.jitter)
            x_TD = x_TD * noise
        return gate(x_TD, self.weight, blocks, self.backend)

    def forward(self, x_TD: Tensor, blocks: int = 1, dropless: bool = False) -> Routing:
        """Routes T tokens; `blocks` > 1 stands for that many source ranks of T / blocks tokens each (R10).

        `dropless` lifts the capacity: generation, where a token must not depend on its neighbours.
        """
        with _full_precision(x_TD.device.type):
            logits_TE = self.logits(x_TD, blocks)
        return route(logits_TE, self.config, blocks, dropless, self.bias_E, self.backend)


def make_router(
    d_model: int, num_experts: int, config: RouterConfig, backend: Backend = "auto", layer: int = 0
) -> TopKRouter:
    """The router that `config.kind` names; `layer` counts MoE layers from 0."""
    if config.kind == "learned":
        return TopKRouter(d_model, num_experts, config, backend)
    from .skew import ForcedRouter  # for benchmarks only

    return ForcedRouter(d_model, num_experts, config, backend, layer)
