"""Routers that ignore the tokens, for benchmarks and tests: balanced, Zipf, bursts, a recorded trace.

They make logits, so that priority, capacity and rectification work on them as on learned ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.backend import Backend
from .config import RouterConfig
from .router import TopKRouter
from .routing import Routing
from .trace import read_trace, write_trace

_BURST = 32
"""Tokens in a row that prefer the same expert."""


def balanced_logits(tokens: int, experts: int, top_k: int) -> Tensor:
    """Token t prefers experts t * top_k, t * top_k + 1, … in this order, modulo E: all are used evenly. [T, E]."""
    first_T1 = (torch.arange(tokens) * top_k).unsqueeze(1)
    return -0.5 * ((torch.arange(experts) - first_T1) % experts).double()


def zipf_logits(tokens: int, experts: int, skew: float, seed: int = 0) -> Tensor:
    """Expert e is drawn with probability proportional to (e + 1)^-skew, without replacement (Gumbel); [T, E]."""
    zipf_E = torch.arange(1, experts + 1, dtype=torch.float64).pow(-skew)
    return zipf_E.log() + _gumbel(tokens, experts, seed)


def bursty_logits(tokens: int, experts: int, skew: float, seed: int = 0) -> Tensor:
    """Runs of tokens that prefer one expert, another for each run: even in the long run, never at a time; [T, E]."""
    generator = torch.Generator().manual_seed(seed + 1)
    favourite_N = torch.randint(experts, (-(-tokens // _BURST),), generator=generator)
    favourite_T = favourite_N.repeat_interleave(_BURST)[:tokens]
    boost_TE = torch.nn.functional.one_hot(favourite_T, experts).double() * 3 * skew
    return boost_TE + _gumbel(tokens, experts, seed)


def _gumbel(tokens: int, experts: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(tokens, experts, dtype=torch.float64, generator=generator).clamp_(1e-12, 1 - 1e-12)
    return -uniform.log().neg().log()


def save_trace(path: Path | str, routings: Sequence[Routing], tokens: int | None = None) -> None:
    """Records the logits of one forward pass, layer by layer: of its first `tokens` tokens, or of all."""
    write_trace(path, [routing.logits_TE.detach()[:tokens].float().cpu().numpy() for routing in routings])


class ForcedRouter(TopKRouter):
    """Takes its logits from `config.kind` instead of the tokens: the same ones at every step and on every rank.

    Emulated ranks count: each block of tokens gets the same logits.
    """

    def __init__(
        self, d_model: int, num_experts: int, config: RouterConfig, backend: Backend = "auto", layer: int = 0
    ) -> None:
        """`layer` counts MoE layers from 0. Raises ValueError where the trace does not fit."""
        super().__init__(d_model, num_experts, config, backend)
        self.layer = layer
        self.trace_NE: Tensor | None = None
        if config.trace is not None:
            trace = read_trace(config.trace, {layer: num_experts})
            self.trace_NE = torch.from_numpy(trace[layer % len(trace)])

    def logits(self, x_TD: Tensor, blocks: int) -> Tensor:
        """Forced logits, with a zero gradient to tokens and gate."""
        made_TE = super().logits(x_TD, blocks)
        T, E = made_TE.shape
        return self._forced(T // blocks, E).repeat(blocks, 1).to(made_TE) + 0 * made_TE

    def _forced(self, tokens: int, experts: int) -> Tensor:
        config = self.config
        if self.trace_NE is not None:
            return self.trace_NE[torch.arange(tokens) % self.trace_NE.size(0)]
        with torch.device("cpu"):
            if config.kind == "uniform":
                return balanced_logits(tokens, experts, config.top_k)
            make = zipf_logits if config.kind == "skewed" else bursty_logits
            return make(tokens, experts, config.skew, self.layer)
