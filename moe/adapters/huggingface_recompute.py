"""Lynx's recompute segments in decoders of transformers: parts of layers whose tensors are computed again in backward.

    recomputation = recompute_(model)

Attention, feed-forward network (or mixture of experts) and the norm before each become segments (parallel/segment.py),
in every layer; parameters and their names stay. Gradients are the same bits. Finer than gradient checkpointing, which
computes whole layers again: `parts` says which of the four, and `recomputation.schedule` which of which layers, and in
the window of which collective, where a model has some (docs/lynx.md).

Not under FSDP, which frees weights that backward computes with again, nor together with gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from inspect import signature
from typing import Any, Literal, get_args

import torch
from torch import nn

from ...parallel.recomputation import Recomputation, Schedule

__all__ = ["recompute_", "unrecompute_"]

Part = Literal["attention norm", "attention", "mlp norm", "mlp"]

PARTS: dict[Part, str] = {
    "attention norm": "input_layernorm",
    "attention": "self_attn",
    "mlp norm": "post_attention_layernorm",
    "mlp": "mlp",
}
"""Of a layer: the module of each."""


def recompute_(model: nn.Module, *, parts: Sequence[Part] = get_args(Part), debug: bool = False) -> Recomputation:
    """Drops `parts` of all layers of `model` after forward; backward computes them again when it needs them.

    Segment `3.attention` is the attention of the layer that comes fourth in `model`. Another `schedule` of what is
    returned holds from the next pass on; `unrecompute_` takes everything back. A pass that fills a cache computes
    attention once and keeps it, so in training the model makes none unless its call says `use_cache=True`.

    Args:
        model: a decoder of transformers, or a module that contains one. Its own forward begins each pass.
        parts: which parts are dropped; the others are segments too, for a schedule to come.
        debug: compares what is computed again with what was, by a hash of every tensor; slow.
    Returns:
        What knows how long was spent (`spent.take()`), and takes a schedule.
    Raises:
        ValueError: before anything is changed: a model without such layers, one whose parts are segments already or
            have another forward, or that has gradient checkpointing on, or a part that is none.
    """
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"parts: {part!r} is not one of {', '.join(PARTS)}")
    layers = [module for module in model.modules() if all(hasattr(module, name) for name in PARTS.values())]
    if not layers:
        names = ", ".join(PARTS.values())
        raise ValueError(f"model: {type(model).__name__} has no layers of {names}; use parallel.recomputation in it")
    modules = [(f"{i}.{part}", getattr(layer, name)) for i, layer in enumerate(layers) for part, name in PARTS.items()]
    if any(isinstance(module, SegmentPart) for _, module in modules):
        raise ValueError("model: its parts are segments already; change the schedule that recompute_ gave you")
    replaced = next((name for name, module in modules if "forward" in vars(module)), None)
    if replaced is not None:
        raise ValueError(f"{replaced}: its forward was replaced already (hooks of accelerate?); call recompute_ before")
    _refuse_checkpointing(model)
    dropped = frozenset(f"{i}.{part}" for i in range(len(layers)) for part in parts)
    recomputation = Recomputation(Schedule(dropped), debug=debug)
    for name, module in modules:
        module.__class__ = _as_segment(type(module))
        module.segment, module.recomputation = name, recomputation
    model.register_forward_pre_hook(_Begin(recomputation))
    for module in model.modules():
        if module not in layers and "use_cache" in signature(module.forward).parameters:
            module.register_forward_pre_hook(_without_cache, with_kwargs=True)
    return recomputation


def unrecompute_(model: nn.Module) -> nn.Module:
    """Gives the parts of `model` that are segments their own forward pass again; returns `model`."""
    for module in list(model.modules()):
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, _Begin) or hook is _without_cache:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        if isinstance(module, SegmentPart):
            del module.segment, module.recomputation
            module.__class__ = type(module).whole  # pyright: ignore[reportAttributeAccessIssue]
    return model


class SegmentPart(nn.Module):
    """A part of a layer whose forward pass is a segment; its class has the one it had as a second base."""

    segment: str
    recomputation: Recomputation

    def forward(self, hidden_states: Any, *args: Any, **others: Any) -> Any:
        """As the part's own; named as transformers names it."""
        whole = super().forward
        # What fills a cache would fill it twice.
        if others.get("past_key_values") is not None:
            return whole(hidden_states, *args, **others)
        # Any module within may draw, LoRA's dropout for one; the state of the generators is quickly kept.
        return self.recomputation.segment(self.segment, partial(whole, **others), hidden_states, *args, draws=True)


class _Begin:
    """Begins a pass; an object, so that a copy of the model begins those of its own copy."""

    def __init__(self, recomputation: Recomputation) -> None:
        self.recomputation = recomputation

    def __call__(self, module: nn.Module, args: Any) -> None:
        _refuse_checkpointing(module)
        self.recomputation.begin(module)


def _without_cache(module: nn.Module, args: tuple[Any, ...], others: dict[str, Any]) -> Any:
    """Hook: in training, none of the caches that `config.use_cache`, true by default, makes unasked."""
    passed = dict(zip(signature(module.forward).parameters, args, strict=False)) | others
    is_asked = passed.get("use_cache") is not None or passed.get("past_key_values") is not None
    if is_asked or not module.training or not torch.is_grad_enabled():
        return None
    return args, others | {"use_cache": False}


def _refuse_checkpointing(model: nn.Module) -> None:
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError("gradient_checkpointing: computes whole layers again; disable it, or do without recompute_")


@cache
def _as_segment(whole: type[nn.Module]) -> type[nn.Module]:
    """`whole` with its forward pass in a segment."""
    return type(f"Segment{whole.__name__}", (SegmentPart, whole), {"whole": whole, "__doc__": SegmentPart.__doc__})
