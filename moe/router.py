"""Token-choice top-k routers (METHODS R1-R4, R10): tokens in, a `Routing` out."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.backend import Backend
from ..kernels.route import assign, select
from .config import RouterConfig
from .routing import Routing


def capacity_of(config: RouterConfig, tokens: int, num_experts: int) -> int | None:
    """Slots per (source rank, expert) for `tokens` of one source, known before any communication (R2)."""
    if config.capacity_factor is None:
        return None
    return math.ceil(config.top_k * config.capacity_factor * tokens / num_experts)


def combine_weights(probs_TE: Tensor, experts_TK: Tensor, slots_TK: Tensor, config: RouterConfig) -> Tensor:
    """The weight of each choice, 0 where dropped (R4); [T, K] with gradient to `probs_TE`.

    `normalize: survivors` divides by the sum over choices that got a slot, `top_k` over all choices; in log
    space, so that underflow needs no eps. For K = 1 the result is exactly 1 with the gradient of p.
    """
    kept_TK = slots_TK >= 0
    p_TK = probs_TE.gather(1, experts_TK)
    if config.normalize == "none":
        weights_TK = p_TK
    elif config.top_k == 1:
        weights_TK = p_TK - p_TK.detach() + 1
    else:
        log_p = p_TK.log()
        counted = log_p if config.normalize == "top_k" else log_p.masked_fill(~kept_TK, -torch.inf)
        total = counted.logsumexp(-1, keepdim=True)
        # Nobody survived: any finite value will do, the mask below zeroes the row.
        total = torch.where(total.isinf(), torch.zeros_like(total), total)
        weights_TK = (log_p - (total.detach() if config.detach else total)).exp()
    weights_TK = weights_TK if config.scale == 1 else weights_TK * config.scale
    return weights_TK.masked_fill(~kept_TK, 0)


def priority_of(probs_TE: Tensor) -> Tensor:
    """Rank of each token in the queue for slots, as integers that sort like max_e p_e (R3); int32 [T].

    Deviation (ours): probabilities are compared rounded to 12 bits. Tokens that are equal, such as the first of
    two sequences, must tie exactly and fall back to their index; matrix products of other shapes, under another
    layout of ranks, give them different last bits.
    """
    bits = probs_TE.detach().amax(-1).to(torch.float32).view(torch.int32)
    return (bits + (1 << 10)) >> 11


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
        """Gate per block (R10): matrix products of other shapes may differ in the last bit."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        x_TD, weight = x_TD.to(wide), self.weight.to(wide)
        if self.training and self.config.jitter > 0:
            noise = torch.empty_like(x_TD).uniform_(1 - self.config.jitter, 1 + self.config.jitter)
            x_TD = x_TD * noise
        return torch.cat([F.linear(block, weight) for block in x_TD.chunk(blocks)])

    def forward(self, x_TD: Tensor, blocks: int = 1, dropless: bool = False) -> Routing:
        """Routes T tokens; `blocks` > 1 stands for that many source ranks of T / blocks tokens each (R10).

        `dropless` lifts the capacity: generation, where a token must not depend on its neighbours.
        """
        config = self.config
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD, blocks)
            if config.score == "softmax":
                scores_TE = probs_TE = logits_TE.softmax(-1)
            else:
                scores_TE = logits_TE.sigmoid()
                probs_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
            return self.decide(logits_TE, scores_TE, probs_TE, blocks, dropless)

    def decide(self, logits_TE: Tensor, scores_TE: Tensor, probs_TE: Tensor, blocks: int, dropless: bool) -> Routing:
        """Selection, slots and weights from scores."""
        config = self.config
        selecting = scores_TE.detach() + self.bias_E.to(scores_TE.dtype)
        experts_TK = select(selecting, config.top_k, config.groups, config.top_groups, self.backend)
        tokens = logits_TE.size(0)
        capacity = None if dropless else capacity_of(config, tokens // blocks, self.num_experts)
        if config.priority == "probability":
            priority_T = priority_of(probs_TE)
        else:
            priority_T = torch.zeros(tokens, dtype=torch.int32, device=probs_TE.device)
        slots_TK, counts_BE = assign(experts_TK, priority_T, self.num_experts, blocks, capacity, self.backend)
        weights_TK = combine_weights(scores_TE, experts_TK, slots_TK, config)
        return Routing(experts_TK, weights_TK, slots_TK, counts_BE, capacity, logits_TE, probs_TE)


class UniformRouter(TopKRouter):
    """Spreads choices evenly whatever the tokens say: benchmarks only."""

    def decide(self, logits_TE: Tensor, scores_TE: Tensor, probs_TE: Tensor, blocks: int, dropless: bool) -> Routing:
        T, E = logits_TE.shape
        K = self.config.top_k
        cell = torch.arange(T * K, device=logits_TE.device).view(T, K) % E
        return self.forced(cell, logits_TE, blocks, dropless)

    def forced(self, experts_TK: Tensor, logits_TE: Tensor, blocks: int, dropless: bool) -> Routing:
        """The routing that uses `experts_TK` with equal weights; logits get a zero gradient."""
        scores_TE = torch.zeros_like(logits_TE).scatter_(1, experts_TK, 1.0 / experts_TK.size(1))
        even = (scores_TE + 1e-9) / (scores_TE + 1e-9).sum(-1, keepdim=True) + 0 * logits_TE
        capacity = None if dropless else capacity_of(self.config, logits_TE.size(0) // blocks, self.num_experts)
        priority_T = priority_of(even)
        slots_TK, counts_BE = assign(experts_TK, priority_T, self.num_experts, blocks, capacity, self.backend)
        weights_TK = combine_weights(even, experts_TK, slots_TK, self.config)
        return Routing(experts_TK, weights_TK, slots_TK, counts_BE, capacity, logits_TE, even)


class SkewedRouter(UniformRouter):
    """Draws each token's experts by a Zipf law over expert numbers, the same at every step: benchmarks only."""

    def decide(self, logits_TE: Tensor, scores_TE: Tensor, probs_TE: Tensor, blocks: int, dropless: bool) -> Routing:
        T, E = logits_TE.shape
        generator = torch.Generator().manual_seed(0)
        zipf_E = torch.arange(1, E + 1, dtype=torch.float64).pow(-self.config.skew)
        # Gumbel top-k: sampling without replacement with probabilities proportional to the law.
        uniform = torch.rand(T, E, dtype=torch.float64, generator=generator).clamp_(1e-12, 1 - 1e-12)
        keys = zipf_E.log() - uniform.log().neg().log()
        experts_TK = select(keys, self.config.top_k).to(logits_TE.device)
        return self.forced(experts_TK, logits_TE, blocks, dropless)


def make_router(d_model: int, num_experts: int, config: RouterConfig, backend: Backend = "auto") -> TopKRouter:
    """The router that `config.kind` names."""
    kinds = {"learned": TopKRouter, "uniform": UniformRouter, "skewed": SkewedRouter}
    return kinds[config.kind](d_model, num_experts, config, backend)
