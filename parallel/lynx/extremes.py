"""The assignments at both ends: everything kept, and everything computed again on demand."""

from __future__ import annotations

from .problem import Assignment, Source, Stage


def all_kept(stage: Stage) -> Assignment:
    """Every output that the backward reads is kept, and nothing is computed again."""
    return tuple(
        tuple(
            "keep" if layer.is_needed[i] or operator.kind == "input" else "none"
            for i, operator in enumerate(layer.operators)
        )
        for layer in stage.layers
    )


def all_on_demand(stage: Stage) -> Assignment:
    """Only layer inputs are kept, and collectives that must not be replayed, where something needs them."""
    found = []
    for layer in stage.layers:
        sources: list[Source] = ["none"] * len(layer.operators)
        for i in reversed(range(len(sources))):
            operator = layer.operators[i]
            if operator.kind == "input":
                sources[i] = "keep"
            elif layer.is_needed[i] or any(sources[c] == "demand" for c in layer.readers[i]):
                sources[i] = "demand" if operator.kind == "compute" or stage.replay else "keep"
        found.append(tuple(sources))
    return tuple(found)
