"""Rectify-Router inside transformers' own Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE and DeepSeek-V3 models.

Weights are untouched: `rectify_` gives the mixture-of-experts blocks of a model, and their experts, another class each;
parameters, their names, hooks and what the model saves stay what they are. The gate still computes the logits that
transformers records (`output_router_logits`), so the model's own balancing loss sees all choices, before any is
dropped. DeepSeek's groups, scaling and correction bias act as they did, and shared experts are the model's own modules.

Tokens are dropped in training only, and never from a pass of one token per sequence: as with the cache of our own
decoder, what is generated must not depend on neighbours. `drop_in_eval` evaluates as training computes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...kernels.grouped_mm import grouped_swiglu
from ...parallel.mesh import single
from ..config import EmulateConfig, RectifyConfig, RouterConfig, nearest_divisor
from ..mixture import Mixer
from .routings import Observer, routings_of

__all__ = ["rectify_", "routings_of", "unrectify_"]

BLOCKS = (
    "MixtralSparseMoeBlock",
    "Qwen2MoeSparseMoeBlock",
    "Qwen3MoeSparseMoeBlock",
    "OlmoeSparseMoeBlock",
    "DeepseekV3MoE",
)
BIAS = "e_score_correction_bias"
"""What DeepSeek's gates add to their scores, which are sigmoids, before they choose."""
OLDEST = (5, 9)
"""Gates of transformers before return probabilities where later ones return logits."""


def rectify_(
    model: nn.Module,
    *,
    intra: bool = True,
    fill: bool = True,
    capacity_factor: float | None = 1.0,
    ranks: int = 1,
    select: Literal["any", "all"] = "any",
    capacity: float | None = None,
    fill_ranks: int = 1,
    priority: Literal["probability", "position"] = "probability",
    normalize: Literal["survivors", "top_k", "none"] | None = None,
    drop_in_eval: bool = False,
) -> nn.Module:
    """Puts capacity and Rectify-Router into every MoE block of `model`, in place; a second call sets other options.

    How many experts a token uses stays as the model's config says. `unrectify_` takes it back; `routings_of` shows
    what was kept, filled, rectified and dropped.

    Args:
        model: a Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE or DeepSeek-V3 of transformers 5.9 or later, or a module that
            contains one.
        intra, select, capacity: serve tokens that lost choices by the best expert of their rank: see `RectifyConfig`.
        fill, fill_ranks: give slots that would be padding to next-best choices: see `RectifyConfig`.
        capacity_factor: slots per expert and rank, in units of an even share; None drops nothing.
        ranks: emulated expert-parallel ranks: the tokens of a pass, flattened, are cut into so many equal blocks (a
            pass that cannot be raises ValueError), and the experts are shared out among so many owners.
        priority: who gets a slot first.
        normalize: what weights are divided by (`RouterConfig.normalize`); None: the sum of those that serve the token
            where the model divides at all, so that nothing changes while nothing is dropped.
        drop_in_eval: capacity holds in `model.eval()` too, though not for passes of one token per sequence.
    Returns:
        `model`.
    Raises:
        ValueError: before anything is changed, where no block is of these families, or one computes something else.
    """
    rectify = RectifyConfig(intra=intra, fill=fill, fill_ranks=fill_ranks, select=select, capacity=capacity)
    mixers: list[tuple[Any, Mixer]] = []
    for name, block in _blocks(model):
        _check(name, block, ranks)
        gate, top_k = block.gate, block.gate.top_k
        config = RouterConfig(
            top_k=top_k,
            score="sigmoid" if hasattr(gate, BIAS) else "softmax",
            # Mixtral's gates always divide, and do not say so.
            normalize=normalize or ("survivors" if getattr(gate, "norm_topk_prob", True) else "none"),
            # The weight of a single choice is a constant 1 otherwise, and teaches the gate nothing.
            detach=top_k == 1,
            scale=getattr(gate, "routed_scaling_factor", 1.0),
            groups=getattr(gate, "num_group", 1),
            top_groups=getattr(gate, "topk_group", 1),
            capacity_factor=capacity_factor,
            priority=priority,
            rectify=rectify,
            emulate=EmulateConfig(sources=ranks, owners=ranks),
        )
        mixers.append((block, Mixer(block.gate.num_experts, config, single())))
    for block, mixer in mixers:
        if not isinstance(block, RectifiedBlock):
            block.__class__ = _rectified(RectifiedBlock, type(block))
            block.experts.__class__ = _rectified(RectifiedExperts, type(block.experts))
        block.mixer, block.drop_in_eval, block.on_routing = mixer, drop_in_eval, None
    return model


def unrectify_(model: nn.Module) -> nn.Module:
    """Gives every rectified block of `model` its own forward pass again; returns `model`.

    Raises ValueError, before anything is changed, where another library changed a block's class since.
    """
    blocks = [(name, block) for name, block in model.named_modules() if isinstance(block, RectifiedBlock)]
    for name, block in blocks:
        for module in (block, block.experts):
            if "stock" not in vars(type(module)):
                raise ValueError(f"{name}: was changed to {type(module).__name__} after rectify_; undo that first")
    for _, block in blocks:
        del block.mixer, block.drop_in_eval, block.on_routing
        for module in (block, block.experts):
            module.__class__ = type(module).stock  # pyright: ignore[reportAttributeAccessIssue]
    return model


class RectifiedBlock(nn.Module):
    """The forward pass of a block; its class has the one it had in transformers as a second base."""

    gate: nn.Module
    experts: RectifiedExperts
    shared_expert: nn.Module
    shared_expert_gate: nn.Module
    mixer: Mixer
    drop_in_eval: bool
    on_routing: Observer | None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]; named as transformers names it."""
        x_BSD = hidden_states
        noise = getattr(self, "jitter_noise", 0)
        if self.training and noise > 0:
            x_BSD = x_BSD * torch.empty_like(x_BSD).uniform_(1 - noise, 1 + noise)
        x_TD = x_BSD.flatten(0, 1)
        logits_TE = self.gate(x_TD)[0]
        drops = (self.training or self.drop_in_eval) and x_BSD.size(1) > 1
        routing = self.mixer.route(logits_TE, dropless=not drops, bias_E=getattr(self.gate, BIAS, None))
        if self.on_routing is not None:
            self.on_routing(routing)
        return self.mixer(x_TD, routing, self.experts, self._shared).view_as(x_BSD).to(x_BSD.dtype)

    @property
    def _shared(self) -> Callable[[Tensor], Tensor] | None:
        """What the experts compute that all tokens go to; None: there are none."""
        if not hasattr(self, "shared_expert"):
            return getattr(self, "shared_experts", None)
        return lambda x_TD: torch.sigmoid(self.shared_expert_gate(x_TD)) * self.shared_expert(x_TD)


class RectifiedExperts(nn.Module):
    """The experts of a block as a module of their own, so that what gathers its parameters still does."""

    gate_up_proj: Tensor
    """Gate rows above up rows, [E, 2F, D]."""
    down_proj: Tensor
    """[E, D, F]."""

    def forward(self, rows_RD: Tensor, offsets_e: Tensor) -> Tensor:
        """Each row through its expert: rows of expert i end before row offsets_e[i] (int32)."""
        dtype = rows_RD.dtype
        return grouped_swiglu(rows_RD, self.gate_up_proj.to(dtype), self.down_proj.to(dtype), offsets_e)


@cache
def _rectified(part: type[nn.Module], stock: type[nn.Module]) -> type[nn.Module]:
    """`stock` with the forward pass of `part`."""
    return type(f"Rectified{stock.__name__}", (part, stock), {"stock": stock, "__doc__": part.__doc__})


def _blocks(model: nn.Module) -> list[tuple[str, Any]]:
    found = [
        (name, module)
        for name, module in model.named_modules()
        if any(base.__name__ in BLOCKS and base.__module__.startswith("transformers.") for base in type(module).__mro__)
    ]
    if not found:
        raise ValueError(
            f"model: {type(model).__name__} has no mixture-of-experts block of Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE or "
            "DeepSeek-V3; in a model of another kind call wastenot.moe.mixture.mixture between its gate and its experts"
        )
    return found


def _check(name: str, block: Any, ranks: int) -> None:
    """Raises ValueError where `block` computes, or holds, something else than its class says."""
    gate, experts = block.gate, block.experts
    found = version("transformers")
    # Also of 5.9rc0, which has the gates of 5.9.
    if tuple(int(number) for number in re.findall(r"\d+", found)[:2]) < OLDEST:
        raise ValueError(f"transformers: {found} is too old; pip install 'transformers>={OLDEST[0]}.{OLDEST[1]}'")
    if type(block).__name__ == "DeepseekV3MoE" and not hasattr(gate, "num_group"):
        raise ValueError(f"transformers: {found} is too old for DeepSeek-V3; pip install 'transformers>=5.23'")
    activation = type(experts.act_fn).__name__
    if activation not in ("SiLU", "SiLUActivation"):
        raise ValueError(f"{name}: its hidden_act is {activation}, and the experts' kernel computes silu only")
    E, D = gate.num_experts, gate.weight.size(1)
    shapes = tuple(experts.gate_up_proj.shape), tuple(experts.down_proj.shape)
    F = shapes[1][-1]
    if shapes != ((E, 2 * F, D), (E, D, F)):
        raise ValueError(
            f"{name}: its experts are of shapes {shapes[0]} and {shapes[1]} instead of {(E, 2 * F, D)} and "
            f"{(E, D, F)}; rectify_ takes whole, unquantized experts"
        )
    for module in (block, experts):
        if "recomputation" in vars(module) and not isinstance(module, RectifiedBlock):
            raise ValueError(f"{name}: is a recompute segment already; call rectify_ before recompute_")
        if "forward" in vars(module):
            raise ValueError(f"{name}: its forward was replaced already (hooks of accelerate?); call rectify_ before")
    if ranks < 1 or E % ranks:
        nearest = nearest_divisor(E, max(1, ranks))
        raise ValueError(f"ranks: {ranks} does not divide the {E} experts of {name}; use {nearest}")
