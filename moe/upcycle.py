"""Sparse upcycling (Komatsuzaki et al., arXiv 2212.05055): a dense checkpoint becomes a mixture of experts.

Every expert of a layer is a copy of the dense network it replaces, the router is new, all else stays. Where the
weights of a token's choices sum to one (`normalize: survivors` or `top_k`) and nothing is dropped, the new model
computes what the dense one did, and training goes on from there.

Deviation: the paper also tries noise on the copies, and weights that do not sum to one; both depart from the dense
model at step 0 and are not offered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..parallel.apply import seed_of
from .config import ModelConfig, MoEConfig
from .decoder import Decoder, initialiser
from .layer import MoELayer


def upcycled_config(dense: ModelConfig, experts: int, *, every: int = 2, first_dense: int = 0) -> ModelConfig:
    """The shape of `dense` with `experts` copies of the feed-forward network in place of one.

    Of each `every` layers the last gets experts, after `first_dense` layers that stay as they are.

    Raises ValueError where `dense` has experts already, or no layer would get any.
    """
    if dense.moe is not None:
        there = f"{dense.moe.experts} experts are there already" if dense.expert_counts else "layers are not all dense"
        raise ValueError(f"model.moe: {there}; upcycle a model with moe: null")
    moe = MoEConfig(experts=experts, d_expert=dense.dense_width, every=every, first_dense=first_dense)
    config = replace(dense, moe=moe)
    if not any(config.is_moe(layer) for layer in range(config.layers)):
        raise ValueError(
            f"every: {every} and first_dense: {first_dense} leave none of the {dense.layers} layers with experts; "
            f"use every: {min(every, dense.layers)} and first_dense: 0"
        )
    return config


@torch.no_grad()
def upcycle_(model: Decoder, dense: Mapping[str, Tensor] | Decoder, *, seed: int = 0) -> None:
    """Fills `model`, built from `upcycled_config`, in place from the weights of the dense one, cast to its dtype.

    dense: the dense model, or its parameters by name; of a mapping that reads a tensor when it is asked for, one at
    a time is in memory. Under expert parallelism every rank calls this and fills its own experts, which are all
    alike. Routers are drawn as `build_decoder` draws them from this `seed`: the same under every layout of ranks.
    Selection biases become 0.

    Raises ValueError, before anything is changed and on every rank alike, where `model` has no experts, or ones of
    another width than the dense networks, or `dense` is not a model that it can come from.
    """
    weights = dict(dense.named_parameters()) if isinstance(dense, Decoder) else dense
    _check(model, weights)
    for name, home in _homes(model):
        # An expert dimension leads where there is one: all experts get the same.
        home.copy_(weights[name])
    fresh = initialiser(model.config)
    for prefix, module in model.named_modules():
        if isinstance(module, MoELayer):
            name, weight = f"{prefix}.router.weight", module.router.weight
            fresh(name, weight, torch.Generator(weight.device).manual_seed(seed_of(seed, name)))
            module.router.bias_E.zero_()


def _homes(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the dense model by name, and the part of `model` that it fills: [...] or [e, ...]."""
    for name, parameter in model.named_parameters():
        block, _, part = name.partition(".ffn.")
        if part == "router.weight":
            continue
        if part == "experts.gate_up":
            width = parameter.size(1) // 2
            yield f"{block}.ffn.gate.weight", parameter[:, :width]
            yield f"{block}.ffn.up.weight", parameter[:, width:]
        elif part == "experts.down":
            yield f"{block}.ffn.down.weight", parameter
        else:
            yield name, parameter


def _check(model: Decoder, weights: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless `weights` are those of a dense model from which `model` can come."""
    moe = model.config.moe
    layers = [layer for layer in range(model.config.layers) if model.config.is_moe(layer)]
    if moe is None or not layers:
        raise ValueError("model.moe: no layer has experts to fill; build the model from upcycled_config")
    if moe.shared_experts:
        raise ValueError(f"model.moe.shared_experts: {moe.shared_experts} would add to the dense model; use 0")
    # Matrices and vectors: whatever leads them is the experts.
    wanted = {name: tuple(home.shape[-2:]) for name, home in _homes(model)}
    wrong = [f"{name} is missing" for name in wanted if name not in weights]
    wrong += [f"{name} has no place" for name in weights if name not in wanted]
    if not wrong:
        width = weights[f"blocks.{layers[0]}.ffn.gate.weight"].size(0)
        if width != moe.d_expert:
            raise ValueError(
                f"model.moe.d_expert: {moe.d_expert} is not the width of the dense network that experts are copies "
                f"of; use {width}"
            )
        wrong = [
            f"{name} is {list(weights[name].shape)} instead of {list(shape)}"
            for name, shape in wanted.items()
            if tuple(weights[name].shape) != shape
        ]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(f"these are not the weights of the dense form of this model: {wrong[0]}{more}")
