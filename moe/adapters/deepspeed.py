"""Rectify-Router inside DeepSpeed's own MoE layers (deepspeed.moe.layer.MoE, 0.19), weights untouched.

    from wastenot.moe.adapters.deepspeed import rectify_

    rectify_(model, intra=True, fill=True)

`rectify_` gives the gate of each layer, its experts, and what holds them another class: parameters, their names and
what DeepSpeed knows of them stay what they are, and with them its ZeRO, its groups and its checkpoints. It may come
before or after `deepspeed.initialize`: the expert-parallel group is DeepSpeed's, looked up when a layer is first used.

DeepSpeed's own functions choose the experts, with their noise, and give the balancing loss and the expert counts, of
all choices before any is dropped. What comes then is our routing, dispatch and combine. As in DeepSpeed, capacity
holds in evaluation too, by `eval_capacity_factor`; `min_capacity` holds in both.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.route import scores
from ...kernels.route import select as select_best
from ...parallel.mesh import Axis, single
from ..config import RectifyConfig, RouterConfig
from ..mixture import Mixer
from ..router import place
from ..routing import Routing
from .routings import Observer, routings_of

try:
    from deepspeed.moe import sharded_moe
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups
    from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size
except ImportError as error:
    raise ImportError("wastenot.moe.adapters.deepspeed needs DeepSpeed; pip install 'wastenot[deepspeed]'") from error

__all__ = ["rectify_", "routings_of", "unrectify_"]

Normalize = Literal["survivors", "top_k", "none"]
Priority = Literal["probability", "position", "random"]


def rectify_(
    model: nn.Module,
    *,
    intra: bool = True,
    fill: bool = True,
    capacity_factor: float | None = None,
    select: Literal["any", "all"] = "any",
    capacity: float | None = None,
    fill_ranks: int = 1,
    priority: Priority | None = None,
    normalize: Normalize | None = None,
) -> nn.Module:
    """Puts Rectify-Router into every `deepspeed.moe.layer.MoE` of `model`, in place; a second call sets other options.

    What the layers were built with stays: k, noise, least capacity, residual networks. `unrectify_` takes it back;
    `routings_of` shows what was kept, filled, rectified and dropped.

    Args:
        model: holds such layers; what `deepspeed.initialize` returned will do.
        intra, select, capacity: serve tokens that lost choices by the best expert of their rank: see `RectifyConfig`.
        fill, fill_ranks: give slots that would be padding to next-best choices: see `RectifyConfig`.
        capacity_factor: slots per expert and rank, in units of an even share; None: the layer's own `capacity_factor`
            in training, `eval_capacity_factor` in evaluation.
        priority: who gets a slot first. None: as the layer has it: drawn at random where k is 1 and `use_rts` is set,
            by position for other k of 1 and 2, by probability for larger ones.
        normalize: what weights are divided by (`RouterConfig.normalize`). None: as the layer has it: nothing where k
            is 1, else the sum of those that serve the token.
    Returns:
        `model`.
    Raises:
        ValueError: before anything is changed, where there is no such layer, or one has options that leave no room.
    """
    rectify = RectifyConfig(intra=intra, fill=fill, fill_ranks=fill_ranks, select=select, capacity=capacity)
    found: list[tuple[Any, _Options]] = []
    for name, layer in _layers(model):
        _check(name, layer, rectify)
        try:
            options = _options(layer.gate, rectify, capacity_factor, priority, normalize)
            Mixer(layer.gate.wg.out_features, options.training, single())
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        found.append((layer, options))
    for layer, options in found:
        if not isinstance(layer, RectifiedLayer):
            layer.gate.__class__ = _rectified(RectifiedGate, type(layer.gate))
            layer.experts.__class__ = _rectified(RectifiedExperts, type(layer.experts))
            layer.__class__ = _rectified(RectifiedLayer, type(layer))
        layer.options, layer.mixer, layer.on_routing = options, None, None
    return model


def unrectify_(model: nn.Module) -> nn.Module:
    """Gives every rectified layer of `model` its own forward pass again; returns `model`.

    Raises ValueError, before anything is changed, where another library changed a layer's class since.
    """
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, RectifiedLayer)]
    for name, layer in layers:
        for module in (layer, layer.gate, layer.experts):
            if "stock" not in vars(type(module)):
                raise ValueError(f"{name}: was changed to {type(module).__name__} after rectify_; undo that first")
    for _, layer in layers:
        del layer.options, layer.mixer, layer.on_routing
        for module in (layer, layer.gate, layer.experts):
            module.__class__ = type(module).stock  # pyright: ignore[reportAttributeAccessIssue]
    return model


@dataclass(frozen=True)
class _Options:
    """What `rectify_` was called with, for one layer."""

    training: RouterConfig
    evaluation: RouterConfig
    at_random: bool
    """Whether slots are given out in an order drawn for each pass (Random Token Selection)."""


class RectifiedLayer(nn.Module):
    """The forward pass of a `MOELayer`; its class has DeepSpeed's as a second base, as have those below."""

    gate: Any
    experts: RectifiedExperts
    ep_size: int
    ep_group: dist.ProcessGroup | None
    options: _Options
    mixer: Mixer | None
    """Made when it is first needed: before, the group may not be there."""
    on_routing: Observer | None
    l_aux: Tensor
    exp_counts: Tensor

    def forward(self, x: Tensor, used_token: Tensor | None = None) -> Tensor:
        """[..., D] -> [..., D].

        Raises ValueError where only some tokens are used, there is no expert-parallel group, or tokens are split
        over tensor-parallel ranks.
        """
        if used_token is not None and self.gate.k == 1:
            raise ValueError("used_token: rectify_ routes all tokens of a pass; use None, or unrectify_ the model")
        if bwc_tensor_model_parallel_world_size(groups.mpu) > 1:
            raise ValueError("mpu: rectify_ knows no tensor parallelism; use a tensor-parallel size of 1")
        if self.mixer is None:
            self.mixer = self._make_mixer()
        x_TD = x.reshape(-1, x.size(-1))
        logits_TE, chosen_TK, self.l_aux, self.exp_counts = self.gate(x_TD)
        routing = self.mixer.rectify(self._place(logits_TE, chosen_TK))
        if self.on_routing is not None:
            self.on_routing(routing)
        return self.mixer(x_TD, routing, self.experts).view_as(x)

    def _place(self, logits_TE: Tensor, chosen_TK: Tensor) -> Routing:
        """Slots and weights of the chosen experts, with the next-best ones in line for what is left."""
        config = self.options.training if self.training else self.options.evaluation
        probs_TE = scores(logits_TE, "softmax")
        if config.rectify.fill:
            others_TE = probs_TE.detach().scatter(1, chosen_TK, -1.0)
            chosen_TK = torch.cat([chosen_TK, select_best(others_TE, config.rectify.fill_ranks)], 1)
        order_T = None
        if self.options.at_random:
            order_T = torch.randint(2**31 - 1, logits_TE.shape[:1], dtype=torch.int32, device=logits_TE.device)
        return place(
            chosen_TK,
            logits_TE,
            probs_TE,
            config,
            dropless=not self.gate.drop_tokens,
            min_capacity=self.gate.min_capacity,
            priority_T=order_T,
        )

    def _make_mixer(self) -> Mixer:
        mesh = single(self.gate.wg.weight.device)
        if self.ep_size > 1:
            if self.ep_group is None:
                raise ValueError(
                    "ep_group: this layer has none yet; call set_deepspeed_parallelism() of the MoE, or "
                    "deepspeed.initialize, before the first pass"
                )
            axis = Axis("expert", self.ep_size, dist.get_rank(self.ep_group), self.ep_group)
            mesh = replace(mesh, expert=axis)
        return Mixer(self.gate.wg.out_features, self.options.training, mesh)


class RectifiedGate(nn.Module):
    """The gate of a layer: logits, choices, and what DeepSpeed makes of them all."""

    k: int
    wg: nn.Linear
    noisy_gate_policy: str | None
    top2_2nd_expert_sampling: bool

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """fp32 logits [T, E], chosen experts int64 [T, k], best first, balancing loss, and choices per expert [E]."""
        noise = self.noisy_gate_policy if self.training else None
        x_TD = x_TD.float()
        if noise == "Jitter":
            x_TD = sharded_moe.multiplicative_jitter(x_TD, device=x_TD.device)
        logits_TE = F.linear(x_TD, self.wg.weight.float())
        # A capacity of all tokens, so that none of these drops a choice.
        room: dict[str, Any] = {"capacity_factor": 1.0, "min_capacity": x_TD.size(0), "sparse_routes": True}
        if self.k == 1:
            found: Any = sharded_moe.top1gating(logits_TE, noisy_gate_policy=noise, use_rts=False, **room)
        elif self.k == 2:
            # It adds its noise to what it is given.
            sampled = self.top2_2nd_expert_sampling
            found = sharded_moe.top2gating(logits_TE.clone(), top2_2nd_expert_sampling=sampled, **room)
        else:
            found = sharded_moe.topkgating(logits_TE, self.k, **room)
        loss, _, _, experts_KT, _, _, counts_E = found
        return logits_TE.float(), experts_KT.t().long().contiguous(), loss, counts_E


class RectifiedExperts(nn.Module):
    """The experts of a rank, each a module of its own."""

    deepspeed_experts: nn.ModuleList

    def forward(self, rows_RD: Tensor, offsets_e: Tensor) -> Tensor:
        """Each row through its expert: rows of expert i end before row offsets_e[i] (int32).

        Every expert is called, if with no row, so that all ranks have gradients of the same parameters.
        """
        parts = rows_RD.tensor_split(offsets_e[:-1].tolist())
        return torch.cat([_apply(expert, part) for expert, part in zip(self.deepspeed_experts, parts, strict=True)])


def _apply(expert: nn.Module, rows_RD: Tensor) -> Tensor:
    """`expert` of rows, in as many dims as DeepSpeed has it compute; without the bias that some return beside."""
    found = expert(rows_RD[None, None])
    return (found[0] if isinstance(found, tuple) else found).reshape(rows_RD.shape)


@cache
def _rectified(part: type[nn.Module], stock: type[nn.Module]) -> type[nn.Module]:
    """`stock` with the forward pass of `part`."""
    return type(f"Rectified{stock.__name__}", (part, stock), {"stock": stock, "__doc__": part.__doc__})


def _options(
    gate: Any,
    rectify: RectifyConfig,
    capacity_factor: float | None,
    priority: Priority | None,
    normalize: Normalize | None,
) -> _Options:
    """`rectify_`'s arguments for one layer. Raises ValueError where an option has no such value."""
    if priority not in (None, *get_args(Priority)):
        raise ValueError(f"priority: {priority!r} is not one of {', '.join(get_args(Priority))}")
    if priority is None:
        by_position = "random" if gate.k == 1 and gate.use_rts else "position"
        priority = "probability" if gate.k > 2 else by_position
    config = RouterConfig(
        top_k=gate.k,
        normalize=normalize or ("none" if gate.k == 1 else "survivors"),
        # The weight of a single choice is a constant 1 otherwise, and teaches the gate nothing.
        detach=gate.k == 1,
        capacity_factor=gate.capacity_factor if capacity_factor is None else capacity_factor,
        priority="position" if priority == "random" else priority,
        rectify=rectify,
    )
    evaluation = gate.eval_capacity_factor if capacity_factor is None else capacity_factor
    return _Options(config, replace(config, capacity_factor=evaluation), priority == "random")


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Names and `MOELayer`s. Raises ValueError where a `MoE` computes something else, or none is there."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, MoE)]
    if not found:
        raise ValueError(
            f"model: {type(model).__name__} has no deepspeed.moe.layer.MoE; in a model of another kind call "
            "wastenot.moe.mixture.mixture between its gate and its experts"
        )
    for name, module in found:
        if module.enable_expert_tensor_parallelism:
            raise ValueError(
                f"{name}: enable_expert_tensor_parallelism cuts experts, and rectify_ takes whole ones; use False"
            )
    return [(name, module.deepspeed_moe) for name, module in found]


def _check(name: str, layer: Any, rectify: RectifyConfig) -> None:
    """Raises ValueError where `layer` computes something else than its class says, or drops nothing."""
    if "sparse_routes" not in inspect.signature(sharded_moe.topkgating).parameters:
        raise ValueError("deepspeed: its gates do not tell which experts they chose; pip install 'deepspeed>=0.19'")
    if layer.use_tutel:
        raise ValueError(f"{name}: use_tutel puts Tutel's dispatch in the place of ours; use use_tutel=False")
    if not layer.gate.drop_tokens and rectify.is_on:
        raise ValueError(
            f"{name}: drop_tokens=False drops nothing and pads nothing, so there is nothing to rectify; use "
            "drop_tokens=True"
        )
    for module in (layer, layer.gate, layer.experts):
        if "forward" in vars(module):
            raise ValueError(f"{name}: the forward of its {type(module).__name__} was replaced; call rectify_ before")
