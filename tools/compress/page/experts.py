"""Sections of the page: what each expert is worth by several scores, and how many tokens those rest on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ....moe.compress.criteria import ExpertCriterion, coverage, expert_scores
from ....moe.compress.profile import Profile
from ...report.formats import count
from ...report.heat import expert_ticks, heat_image
from ...report.markup import Html, element, figure, folded, join, table, wide
from ...report.palette import LIGHT
from ...report.svg import new_figure, plain_axes, to_svg
from .fate import MOST_NAMES, Fate, fate_of, how_chosen, named
from .folder import Compression
from .marks import cross_out, forms, hatch_rows

CRITERIA: dict[ExpertCriterion, tuple[str, str]] = {
    "mass": ("Routing mass", "the probability that the router gives the expert, mean over all tokens"),
    "reap": ("REAP", "how large the expert's weighted output is, mean over the tokens it got"),
    "frequency": ("Frequency", "how many tokens it got"),
}
"""Scores that have a heat map: their names, and what they are."""

LAYER_HATCH, BLOCK_HATCH = "////", "|||"
FEW_COLUMNS = 16
"""So many experts have narrow charts, side by side."""

STARVED = 100
"""Tokens below which an expert's scores are called unreliable; a guess: a mean over so many is off by about a tenth of
their spread."""


def experts(compression: Compression) -> Html | None:
    """A heat map for each score, with what goes marked; None without a profile of experts."""
    profile = compression.profile
    if profile is None or not coverage(profile):
        return None
    fate = fate_of(compression.plan)
    meanings = [element("li", element("b", title), f": {meaning}.") for title, meaning in CRITERIA.values()]
    words = element(
        "p",
        "What each expert is worth beside the mean of its layer, which is 1: blue experts are worth less, red ones "
        "more. The least worthy are the first to go.",
    )
    chosen = [element("p", f"The plan chose {how}.")] if (how := how_chosen(compression.plan, "experts")) else []
    maps = [_map(profile, fate, criterion) for criterion in CRITERIA]
    narrow = max(profile.shape.experts) <= FEW_COLUMNS
    charts = element("div", *maps, class_="three charts") if narrow else join(maps)
    return join([words, element("ul", *meanings), *chosen, _marks(profile, fate), charts])


def _marks(profile: Profile, fate: Fate) -> Html:
    """What the marks of all maps mean, as far as there are any."""
    there = {*coverage(profile)}
    marks = [
        ("✕", "ink", "expert that goes") if fate.experts else None,
        ("▨", "ink", "layer whose feed-forward network goes") if fate.layers & there else None,
        ("▥", "ink", "block that goes whole") if fate.blocks & there else None,
    ]
    return forms(mark for mark in marks if mark is not None)


def _map(profile: Profile, fate: Fate, criterion: ExpertCriterion) -> Html:
    title, _ = CRITERIA[criterion]
    scores = expert_scores(profile, criterion)
    numbers, columns = list(scores), max(map(len, scores.values()))
    grid = [_beside_mean(of_layer) + [math.nan] * (columns - len(of_layer)) for of_layer in scores.values()]
    narrow = columns <= FEW_COLUMNS
    height = min(7.0, max(1.5, 0.7 + (0.2 if len(grid) <= 24 else 0.1) * len(grid)))
    drawing = new_figure(3.9 if narrow else 10.4, height)
    axes = drawing.subplots()
    heat_image(drawing, axes, grid, (0, columns, len(grid), 0))
    rows = {number: row for row, number in enumerate(numbers)}
    if fate.experts:
        width = 1.3 if narrow else min(1.3, 0.12 * 72 * 8.6 / columns)
        cross_out(axes, {(rows[layer], expert) for layer, expert in fate.experts if layer in rows}, width)
    hatch_rows(axes, [rows[layer] for layer in sorted(fate.layers) if layer in rows], columns, LAYER_HATCH)
    hatch_rows(axes, [rows[layer] for layer in sorted(fate.blocks) if layer in rows], columns, BLOCK_HATCH)
    axes.set_xlim(0, columns)
    axes.set_ylim(len(grid), 0)
    every = max(1, math.ceil(len(numbers) / 24))
    axes.set_yticks([row + 0.5 for row in range(0, len(numbers), every)], [str(n) for n in numbers[::every]])
    axes.set_ylabel("layer")
    expert_ticks(axes, columns)
    description = f"{title} of every expert, layers by experts, beside the mean of the layer. {_told(fate, rows)}"
    picture = to_svg(drawing, f"experts-{criterion}", description)
    return figure(title, picture if narrow else wide(picture))


def _beside_mean(scores: Sequence[float]) -> list[float]:
    """Each score over their mean; all 1 where nothing was routed."""
    mean = sum(scores) / len(scores)
    return [score / mean if mean else 1.0 for score in scores]


def _told(fate: Fate, rows: dict[int, int]) -> str:
    """What is marked."""
    by_layer: dict[int, list[int]] = {}
    for layer, expert in sorted(fate.experts):
        by_layer.setdefault(layer, []).append(expert)
    said = [f"layer {layer}: {named(gone)}" for layer, gone in list(by_layer.items())[:MOST_NAMES]]
    if len(by_layer) > MOST_NAMES:
        said.append(f"and {len(by_layer) - MOST_NAMES} layers more")
    sentences = [f"Crossed out: {'; '.join(said)}."] if said else []
    for what, layers in (("Feed-forward networks", fate.layers), ("Blocks", fate.blocks)):
        if there := [layer for layer in sorted(layers) if layer in rows]:
            sentences.append(f"{what} hatched as gone: {named(there)}.")
    return " ".join(sentences) or "Nothing is marked as gone."


def tokens_per_expert(compression: Compression) -> Html | None:
    """How many tokens each layer's experts got, and which got too few; None without a profile of experts."""
    profile = compression.profile
    if profile is None or not (got := coverage(profile)):
        return None
    text = profile.calibration
    starved = {layer: [e for e, tokens in enumerate(counts) if tokens < STARVED] for layer, counts in got.items()}
    starved = {layer: names for layer, names in starved.items() if names}
    number, whole = sum(map(len, starved.values())), sum(map(len, got.values()))
    words = element(
        "p",
        f"Every score of an expert rests on the tokens that the router sent to it, of the {count(text['tokens'])} "
        f"tokens of calibration text. Below {STARVED} tokens it says little, and without any nothing.",
    )
    verdict = (
        f"{count(number)} of {count(whole)} experts got fewer than {STARVED} tokens: use more text before you "
        "trust what is said of them."
        if number
        else f"Every one of the {count(whole)} experts got {STARVED} tokens or more."
    )
    beside = [_ranges(got)]
    if starved:
        gone = fate_of(compression.plan)
        rows = [[f"layer {layer}", _names(layer, names, got[layer], gone)] for layer, names in starved.items()]
        listed = table(["", "expert (tokens it got)"], rows, label="Experts with too few tokens", texts=2)
        beside.append(folded("Experts with too few tokens", listed, unfolded=len(rows) <= MOST_NAMES))
    verdict_line = element("p", verdict, class_="warning" if number else None)
    return join([words, verdict_line, element("div", *beside, class_="charts")])


def _names(layer: int, names: Sequence[int], counts: Sequence[int], fate: Fate) -> str:
    """Every expert of `names` with its tokens; what goes anyway is said to."""
    gone = layer in fate.layers or layer in fate.blocks
    said = [f"{e} ({counts[e]}{', goes' if gone or (layer, e) in fate.experts else ''})" for e in names]
    return ", ".join(said)


def _ranges(got: dict[int, list[int]]) -> Html:
    """From the least to the most tokens, and the even share, layer by layer."""
    drawing = new_figure(5.0, 2.6)
    axes = drawing.subplots()
    plain_axes(axes)
    layers = list(got)
    least, most = [min(counts) for counts in got.values()], [max(counts) for counts in got.values()]
    even = [sum(counts) / len(counts) for counts in got.values()]
    axes.vlines(layers, least, most, color=LIGHT["run-0"], linewidth=min(5.0, 120 / len(layers)), alpha=0.45)
    for values, marker in ((most, "^"), (even, "_"), (least, "v")):
        colour = LIGHT["ink"] if marker == "_" else LIGHT["run-0"]
        axes.plot(layers, values, color=colour, linestyle="none", marker=marker, markersize=5, clip_on=False)
    axes.axhline(STARVED, color=LIGHT["bad"], linewidth=0.9, linestyle=(0, (4, 3)))
    _token_axis(axes, min(least))
    every = max(1, math.ceil(len(layers) / 16))
    axes.set_xticks(layers[::every])
    axes.set_xlabel("layer")
    caption = "Tokens per expert, by layer"
    legend = forms(
        [
            ("▲", "run-0", "most"),
            ("–", "ink", "even share"),
            ("▼", "run-0", "least"),
            ("╌", "bad", f"{STARVED} tokens"),
        ]
    )
    told = f"The fewest tokens of an expert are {count(min(least))}, the most {count(max(most))}."
    return figure(caption, legend, to_svg(drawing, "tokens", f"{caption}. {told}"))


def _token_axis(axes: Any, least: int) -> None:
    """A vertical axis of magnitudes, down to nothing where `least` is that."""
    from matplotlib.ticker import LogLocator

    if least:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        axes.set_yscale("symlog", linthresh=10)
        axes.set_ylim(bottom=0)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: count(value))
