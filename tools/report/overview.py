"""First section of the page: which runs these are, and their headline figures."""

from __future__ import annotations

from collections.abc import Sequence

from .formats import count, decimals, duration, percent, short, size
from .headline import Entry, Headline
from .markup import Html, element, join, table, tile
from .palette import run_line
from .runs import Run


def overview(entries: Sequence[Entry]) -> Html:
    """A card for each run; figures as tiles of a single run, as a table of several."""
    several = len(entries) > 1
    cards = [_card(i, entry, several=several) for i, entry in enumerate(entries)]
    if not several:
        tiles = element("dl", *(tile(*figure) for figure in figures(entries[0].headline)), class_="tiles")
        return join([*cards, tiles])
    titles = [title for title, _, _ in figures(entries[0].headline)]
    rows = [[entry.run.name, *(value for _, value, _ in figures(entry.headline))] for entry in entries]
    return join([element("div", *cards, class_="cards"), table(["", *titles], rows, label="Headline figures")])


def figures(headline: Headline) -> list[tuple[str, str, str]]:
    """(title, value, what it is a part of or stands beside)."""
    order5 = headline.order5_bits_per_byte
    beside = f"n-gram of 5 bytes: {decimals(order5)}" if order5 is not None else "held-out text"
    return [
        ("bits per byte", decimals(headline.val_bits_per_byte), beside),
        ("tokens/s", count(headline.tokens_per_second), "median"),
        ("dropped", percent(headline.dropped_ratio), "of choices"),
        ("padded", percent(headline.padding_ratio), "of slots"),
        ("rectified", percent(headline.rectified_ratio), "of choices"),
        ("filled", percent(headline.filled_ratio), "slots, per choice"),
        ("unserved", percent(headline.unserved_ratio), "of tokens"),
        (
            "optimizer bytes",
            decimals(headline.optimizer_bytes_per_parameter, 2),
            f"per parameter, {percent(headline.optimizer_part_of_adamw, 0)} of AdamW's",
        ),
    ]


def model_in_a_line(run: Run, headline: Headline) -> str:
    """Parameters, layers, experts, top-k, capacity, rectification."""
    parts = []
    if headline.parameters is not None:
        active = headline.active_parameters
        used = f" ({short(active)} per token)" if active is not None and active != headline.parameters else ""
        parts.append(f"{short(headline.parameters)} parameters{used}")
    layers = run.get("model.layers")
    parts.append(f"{layers} layers" if layers != 1 else "1 layer")
    if not run.experts:
        return ", ".join([*parts, "dense"])
    shared = run.get("model.moe.shared_experts")
    fewest = min(filter(None, run.get("model.moe.per_layer") or ()), default=run.experts)
    experts = f"{run.experts}" if fewest == run.experts else f"{fewest} to {run.experts}"
    parts.append(f"{experts} experts" + (f" + {shared} shared" if shared else ""))
    parts.append(f"top-{run.get('router.top_k')}")
    factor = run.get("router.capacity_factor")
    parts += ["dropless"] if factor is None else [f"capacity {factor:g}", f"rectify {_rectify(run)}"]
    return ", ".join(parts)


def _rectify(run: Run) -> str:
    on = [name for name, key in (("fill-in", "fill"), ("intra-GPU", "intra")) if run.get(f"router.rectify.{key}")]
    return " + ".join(on) or "off"


def _card(index: int, entry: Entry, *, several: bool) -> Html:
    run, headline = entry.run, entry.headline
    colour, dashes = run_line(index)
    mark = element("i", class_="line", style=f"border-top-color:var(--{colour});border-top-style:{dashes}")
    name = element("h2", mark, " ", run.name) if several else element("h1", run.name)
    kind = run.get("router.kind", "learned")
    warning = ""
    if run.experts and kind != "learned":
        warning = element("p", f"The router is {kind}: it ignores the tokens. For benchmarks only.", class_="warning")
    return element(
        "div",
        name,
        element("p", model_in_a_line(run, headline), class_="model"),
        element("p", _facts(run, headline), class_="facts"),
        warning,
        class_="card" if several else None,
    )


def _facts(run: Run, headline: Headline) -> str:
    """Ranks, steps, time."""
    planned = headline.planned_steps
    steps = (
        f"{count(headline.steps)} steps"
        if headline.steps == planned
        else f"{count(headline.steps)} of {count(planned)} steps"
    )
    parts = [steps if run.summary else f"{steps}, not ended"]
    if headline.world is not None:
        parts.insert(0, "1 rank" if headline.world == 1 else f"{headline.world} ranks")
    if headline.training_seconds is not None:
        parts.append(f"{duration(headline.training_seconds)} of training")
    if headline.peak_memory_bytes is not None:
        parts.append(f"{size(headline.peak_memory_bytes)} at most on a rank")
    if headline.skipped_steps:
        parts.append(f"{count(headline.skipped_steps)} steps skipped (not finite)")
    if len(run.starts) > 1:
        parts.append(f"{len(run.starts)} sessions")
    parts.append(f"last written {run.written:%Y-%m-%d %H:%M} UTC")
    return " · ".join(parts)
