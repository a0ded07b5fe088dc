"""The head of the page: which compression this is, and its figures."""

from __future__ import annotations

from typing import Any

from ...report.formats import count, decimals, percent, short, size
from ...report.markup import Html, element, tile
from .fate import in_words
from .figures import times
from .folder import Compression, Quality, Row


def header(compression: Compression) -> Html:
    """Name, model, what goes in words, and tiles."""
    plan = compression.plan
    gone = [element("li", sentence) for sentence in in_words(plan)] if plan is not None else []
    tiles = [tile(*figure) for figure in _tiles(compression)]
    failed = bool(compression.verify) and not compression.verify.get("passed")
    warning = "Verification failed: stock software does not compute what this model is. Do not serve it."
    return element(
        "header",
        element("h1", compression.quality.checkpoint or compression.name),
        element("p", _model(compression), class_="model"),
        element("p", _facts(compression), class_="facts"),
        element("p", warning, class_="warning") if failed else "",
        element("ul", *gone) if gone else "",
        element("dl", *tiles, class_="tiles") if tiles else "",
    )


def figures(compression: Compression) -> dict[str, Any]:
    """The headline for machines; None where nothing was measured."""
    plan, found = compression.plan, compression.quality
    whole, last = found.whole, found.last
    return {
        "plan": None if plan is None else plan.hash,
        "blocks_dropped": None if plan is None else len(plan.blocks),
        "layers_dropped": None if plan is None else len(plan.layers),
        "experts_dropped": None if plan is None else sum(map(len, plan.experts.values())),
        "model": None if last is None else last.name,
        "parameters": None if last is None else last.parameters,
        "bytes": None if last is None else last.bytes,
        "bytes_of_whole": None if whole is None else whole.bytes,
        "loss": None if last is None else last.loss,
        "accuracy": None if last is None else last.accuracy,
        "kl": None if last is None else last.kl,
        "quality_kept": None if last is None else found.kept(last),
        "prefill_ratio": _latest(found, "prefill"),
        "decode_ratio": _latest(found, "decode"),
        "verified": bool(compression.verify["passed"]) if "passed" in compression.verify else None,
    }


def _model(compression: Compression) -> str:
    """The whole model's layers and experts."""
    shape = compression.plan.shape if compression.plan is not None else None
    if shape is None and compression.profile is not None:
        shape = compression.profile.shape
    if shape is None:
        return "A compression without plan and profile"
    counts = {experts for experts in shape.experts if experts}
    layers = f"{shape.layers} layers"
    if not counts:
        return f"{layers}, dense"
    with_experts = len(shape.moe_layers)
    where = "each" if with_experts == shape.layers else f"in {with_experts} of them"
    many = str(next(iter(counts))) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    return f"{layers}, {many} experts {where}, top-{shape.top_k}"


def _facts(compression: Compression) -> str:
    parts = []
    if compression.plan is not None:
        parts.append(f"plan {compression.plan.hash}")
    if compression.profile is not None:
        text = compression.profile.calibration
        parts.append(f"scored on {count(text['tokens'])} tokens of {text['name']}")
    if compression.quality.text:
        parts.append(f"judged on {compression.quality.text}")
    return " · ".join(parts)


def _tiles(compression: Compression) -> list[tuple[str, str, str]]:
    """(title, value, what it is a part of or stands beside)."""
    plan, found = compression.plan, compression.quality
    whole, last = found.whole, found.last
    tiles: list[tuple[str, str, str]] = []
    if plan is not None:
        there, left = sum(plan.shape.experts), sum(plan.result.experts)
        tiles.append(("experts", count(left), f"of {count(there)} in all layers"))
    if last is None:
        return tiles
    tiles += [
        ("parameters", short(last.parameters), _beside(whole, "parameters", short)),
        ("bytes", size(last.bytes), _beside(whole, "bytes", size)),
        ("quality kept", percent(found.kept(last)), f"{last.name}; accuracy {percent(last.accuracy)}"),
        ("loss", decimals(last.loss), _beside(whole, "loss", decimals)),
        ("prefill", times(_latest(found, "prefill")), "of the whole model"),
        ("decode", times(_latest(found, "decode")), "of the whole model"),
    ]
    return tiles


def _beside(whole: Row | None, name: str, shown: Any) -> str:
    value = None if whole is None else getattr(whole, name)
    return "of the compressed model" if value is None else f"whole: {shown(value)}"


def _latest(found: Quality, name: str) -> float | None:
    """The speed `name` of the last model that has one, beside the whole one's."""
    rows = [row for row in found.rows if row is not found.whole and getattr(row, name) is not None]
    return found.ratio(rows[-1], lambda row: getattr(row, name)) if rows else None
