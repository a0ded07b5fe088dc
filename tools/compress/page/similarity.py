"""Section of the page: how little each layer and each run of blocks changes what flows through the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ....moe.compress.criteria import block_scores, layer_scores
from ....moe.compress.profile import Profile
from ...report.formats import decimals
from ...report.heat import cosine_image
from ...report.markup import Html, element, figure, join
from ...report.palette import LIGHT
from ...report.svg import new_figure, plain_axes, to_svg
from .fate import Fate, fate_of, how_chosen, named
from .folder import Compression
from .marks import cross_out, forms

PARTS = (("feed-forward network", "run-0", "o", "●"), ("whole block", "run-1", "D", "◆"))
"""The two curves: name, colour, marker, and the letter that looks like it."""


def similarity(compression: Compression) -> Html | None:
    """The curves over the layers, and the matrix of runs of blocks; None without a profile."""
    profile = compression.profile
    if profile is None:
        return None
    words = element(
        "p",
        "Each layer adds something to a stream of numbers that flows through the model. Similarity (the cosine between "
        "the stream before and after, mean over all tokens) says how little that changes: 1 is no change of direction. "
        "What changes the stream least is the first to go.",
    )
    fate = fate_of(compression.plan)
    charts = [_curves(profile, fate)]
    if profile.config.window > 1:
        charts.append(_matrix(profile, fate))
    how = how_chosen(compression.plan, "layers", "blocks")
    chosen = element("p", f"The plan chose {how}.") if how else ""
    return join([words, chosen, element("div", *charts, class_="charts")])


def _curves(profile: Profile, fate: Fate) -> Html:
    scores = (layer_scores(profile), block_scores(profile, 1))
    gone = (fate.layers, fate.blocks)
    drawing = new_figure(5.0, 2.8)
    axes = drawing.subplots()
    plain_axes(axes)
    told, legend = [], []
    for (name, colour, marker, letter), of_layer, taken in zip(PARTS, scores, gone, strict=True):
        if not of_layer:
            continue
        axes.plot(
            list(of_layer),
            list(of_layer.values()),
            color=LIGHT[colour],
            linewidth=1.2,
            linestyle="-" if marker == "o" else "--",
            marker=marker,
            markersize=3,
        )
        legend.append((letter, colour, name))
        marked = {layer: score for layer, score in of_layer.items() if layer in taken}
        axes.plot(
            list(marked),
            list(marked.values()),
            color=LIGHT["ink"],
            linestyle="none",
            marker="x" if marker == "o" else "s",
            markersize=8 if profile.shape.layers <= 24 else 5.5,
            markerfacecolor="none",
            markeredgewidth=1.5,
        )
        if marked:
            legend.append(("✕" if marker == "o" else "□", "ink", f"{name} that goes"))
        told.append(_range(name, of_layer) + (f" Gone: {named(sorted(marked))}." if marked else ""))
    _layer_axis(axes, profile.shape.layers)
    axes.set_ylabel("similarity")
    caption = "Similarity before and after, by layer"
    return figure(caption, forms(legend), to_svg(drawing, "similarity", f"{caption}. {' '.join(told)}"))


def _range(name: str, scores: Mapping[int, float]) -> str:
    least, most = min(scores, key=lambda n: scores[n]), max(scores, key=lambda n: scores[n])
    return (
        f"{name.capitalize()}: from {decimals(scores[least])} in layer {least} to {decimals(scores[most])} in layer "
        f"{most}."
    )


def _matrix(profile: Profile, fate: Fate) -> Html:
    """Layers x length of the run, as far as the window of the profile reaches."""
    layers, window = profile.shape.layers, min(profile.config.window, profile.shape.layers)
    by_length = [block_scores(profile, blocks) for blocks in range(1, window + 1)]
    grid = [[scores.get(layer, math.nan) for layer in range(layers)] for scores in by_length]
    gone = {
        (blocks - 1, first)
        for blocks in range(1, window + 1)
        for first in by_length[blocks - 1]
        if {*range(first, first + blocks)} <= fate.blocks
    }
    drawing = new_figure(5.0, min(4.0, 1.1 + 0.3 * window))
    axes = drawing.subplots()
    cosine_image(drawing, axes, grid, (0, layers, window, 0))
    if gone:
        cross_out(axes, gone, min(1.2, 40 / layers))
    axes.set_yticks([i + 0.5 for i in range(window)], [str(i + 1) for i in range(window)])
    axes.set_ylabel("blocks in the run")
    every = max(1, math.ceil(layers / 16))
    axes.set_xticks([n + 0.5 for n in range(0, layers, every)], [str(n) for n in range(0, layers, every)])
    axes.set_xlabel("first layer of the run")
    flat = {(first, blocks + 1): score for blocks, of in enumerate(by_length) for first, score in of.items()}
    first, blocks = max((key for key in flat if key[1] > 1), key=lambda key: flat[key])
    told = (
        f"Of runs of several, the {blocks} blocks from layer {first} on change least: {decimals(flat[first, blocks])}."
    )
    caption = "Similarity before and after runs of neighbouring blocks"
    legend = forms([("✕", "ink", "all blocks of the run go")] if gone else [])
    return figure(caption, legend, to_svg(drawing, "similarity-runs", f"{caption}. {told}"))


def _layer_axis(axes: Any, layers: int) -> None:
    every = max(1, math.ceil(layers / 16))
    axes.set_xticks(range(0, layers, every))
    axes.set_xlim(-0.5, layers - 0.5)
    axes.set_xlabel("layer")
