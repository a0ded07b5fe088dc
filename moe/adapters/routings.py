"""Reads the routings of a model that an adapter rectifies, as our own decoder returns them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from ..routing import Routing

OBSERVER = "on_routing"
"""Attribute of modules that route: what they call with each routing they make, or None."""

Observer = Callable[[Routing], None]


@contextmanager
def routings_of(model: nn.Module) -> Iterator[dict[str, Routing]]:
    """Within it every rectified block of `model` leaves its latest routing here, by the name of its module.

        with routings_of(model) as routings:
            loss = model(**batch).loss
        slots = count_layers(list(routings.values()))

    In the order of the forward pass, one routing per block: that of the latest pass, and recomputing a block for its
    backward counts no second time. They hold no graph: nothing of the forward pass stays in memory with them. A
    block that dropped nothing by rule (see the adapter) leaves a routing without a capacity.

    Raises ValueError where nothing in `model` is rectified, RuntimeError where it is being read already.
    """
    blocks = {name: module for name, module in model.named_modules() if hasattr(module, OBSERVER)}
    if not blocks:
        raise ValueError(f"model: nothing in this {type(model).__name__} is rectified; rectify it first")
    if any(getattr(block, OBSERVER) is not None for block in blocks.values()):
        raise RuntimeError("routings_of: this model's routings are being read already; leave the outer `with` first")
    found: dict[str, Routing] = {}

    def observer(name: str) -> Observer:
        return lambda routing: found.__setitem__(name, _without_graph(routing))

    try:
        for name, block in blocks.items():
            setattr(block, OBSERVER, observer(name))
        yield found
    finally:
        for block in blocks.values():
            setattr(block, OBSERVER, None)


@torch.no_grad()
def _without_graph(routing: Routing) -> Routing:
    stand_ins = routing.stand_ins
    return replace(
        routing,
        weights_TK=routing.weights_TK.detach(),
        logits_TE=routing.logits_TE.detach(),
        probs_TE=routing.probs_TE.detach(),
        stand_ins=None if stand_ins is None else replace(stand_ins, weight_T=stand_ins.weight_T.detach()),
    )
