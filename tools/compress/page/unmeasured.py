"""Section of the page: what nobody measured, so that nobody takes it for good."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ....moe.compress.criteria import coverage
from ...report.formats import count
from ...report.markup import Html, element
from .folder import WHOLE, Compression


def unmeasured(compression: Compression) -> Html:
    """The sentences of `sentences` as a list."""
    return element("ul", *(element("li", said) for said in dict.fromkeys(sentences(compression))))


def sentences(compression: Compression) -> Iterator[str]:
    """What is missing of this compression, and what no compression of ours measures."""
    yield from _missing_parts(compression)
    yield from _missing_figures(compression)
    yield from compression.quality.not_measured
    yield from _always(compression)


def _missing_parts(compression: Compression) -> Iterator[str]:
    profile, found = compression.profile, compression.quality
    if profile is None:
        yield "Similarity of layers and worth of experts: there is no profile."
    else:
        if not coverage(profile):
            yield "Worth of experts: the model has none."
        if profile.config.window == 1:
            yield "Runs of several blocks: the profile compares single blocks; profile with a longer --window."
        if not compression.costs:
            yield "What the profile cost: costs.json is missing."
    if compression.plan is None:
        yield "What goes: there is no plan."
    if not compression.steps:
        yield "Other plans on the way to this one: it was not searched for within a budget."
    if not found.rows:
        yield "Quality, size and speed of the compressed model: there is no quality.json."
    if not found.balance:
        yield "Balance of expert-parallel ranks before and after."
    if not found.stability:
        yield "Whether less text would have chosen the same (stability)."
    if not compression.verify:
        yield "Whether stock software computes the same: the compressed model was not exported and verified."
    if not compression.bench:
        yield "Other compressions of the same size, such as random drops: no benchmark was given with --bench."


def _missing_figures(compression: Compression) -> Iterator[str]:
    found = compression.quality
    if not found.rows:
        return
    if found.whole is None:
        yield "The whole model: nothing is known of it to compare with."
    elif found.last is None:
        yield "The compressed model: only the whole one was measured."
    if found.unigram_accuracy is None:
        yield "Quality kept: the accuracy of the commonest token is not known."
    for name, missing in (
        ("Loss", [row.name for row in found.rows if row.loss is None]),
        ("Accuracy", [row.name for row in found.rows if row.accuracy is None]),
        ("KL from the whole model", [row.name for row in found.rows if row.kl is None and row.name != WHOLE]),
        ("Speed of reading a prompt", [row.name for row in found.rows if row.prefill is None]),
        ("Speed of writing", [row.name for row in found.rows if row.decode is None]),
    ):
        if missing:
            yield f"{name} of the model as {_listed(missing)}."


def _always(compression: Compression) -> Iterator[str]:
    profile, found = compression.profile, compression.quality
    if profile is not None:
        text = profile.calibration
        yield (
            f"What another text would have chosen: layers and experts were scored on {count(text['tokens'])} tokens of "
            f"{text['name']} alone, and what that text does not use looks worthless."
        )
    if found.text:
        yield f"Tasks: quality is that of predicting the next token of {found.text}, not of answers to questions."
    if any(row.prefill is not None or row.decode is not None for row in found.rows):
        yield "Speed elsewhere: it was measured on one machine, and does not carry over to other hardware or batches."
    slim = compression.plan is not None and compression.plan.slim is not None
    whose = "the weights that this plan sets" if slim else "this plan sets none, but weights set"
    yield (
        f"Sparsity: {whose} to zero buy no speed in stock serving, which multiplies by zeros as by any number. Dropped "
        "layers and blocks do; dropped experts and fewer bits save bytes, and time only where reading them takes it."
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
