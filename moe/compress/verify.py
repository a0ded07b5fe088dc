"""Whether stock transformers loads an export whole, and computes with it what the source does without what was dropped.

Loading is done by a process of its own (`stock_forward.py`): a missing tensor is a warning there, and random weights.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..adapters.huggingface import StoredWeights
from . import stock_forward
from .export_source import EXPORTED
from .places import Place, name_of, places_of
from .stored import StockFolder, read_stock

__all__ = ["TOLERANCE", "Verified", "verify"]

TOLERANCE = 5e-6
"""Largest difference of logits, as a part of the largest logit, between two implementations in fp32; between two
models of the same one it is 0, unless routers have fewer rows or another order of them, which rounds otherwise."""

_BATCH, _LENGTH, _GENERATED = 2, 48, 4
_LISTED = 4
_PACKED = re.compile(r"(?<=\.weight)_(packed|scale|shape)$")
"""What stands behind the name of a weight in few bits."""
_NOTHING: dict[str, Any] = {"generate": 0, "blocks": [], "feeds": [], "experts": {}, "silent": {}}


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What was found. Without problems the export is as good as its source."""

    folder: str
    transformers: str = ""
    parameters: int
    bytes: int
    base_parameters: int = 0
    """0: not compared."""
    base_bytes: int = 0
    difference: float | None = None
    """Largest difference of logits, as a part of the largest; None: not compared."""
    allowed: float = 0.0
    problems: tuple[str, ...] = field(default=())


def verify(
    folder: Path | str,
    *,
    against: Path | str | None = None,
    logits_of: Callable[[Tensor], Tensor] | None = None,
    python: str = sys.executable,
) -> Verified:
    """Loads the export at `folder` with the transformers of `python`, and compares.

    against: the stock checkpoint that it was made from, or None; logits_of: what a model of ours computes for int64
    tokens [B, S], instead. Raises ValueError where a folder is no checkpoint, or the two do not belong together.
    """
    folder = Path(folder)
    stock = read_stock(folder)
    problems = _left_over(stock)
    vocab, length = stock.config["vocab_size"], stock.config.get("max_position_embeddings", _LENGTH) - _GENERATED
    length = min(_LENGTH, length)
    # Fixed, and none twice in a row.
    tokens_BS = ((torch.arange(_BATCH * length) * 7919 + 13) % 10007 % vocab).view(_BATCH, length)
    orders: list[dict[str, Any]] = [{"folder": str(folder.resolve()), "generate": _GENERATED}]
    exact, result = False, {}
    if against is not None:
        base = read_stock(against)
        if stock.config.get("quantization_config") is not None:
            raise ValueError(f"{against}: has whole weights, and the export few bits; compare with what was exported")
        bypass, exact = _bypass(base, stock)
        orders.append({"folder": str(Path(against).resolve()), **bypass})
        exact = exact and python == sys.executable
        result = {"base_parameters": _elements(base), "base_bytes": _bytes(base)}
    answers = _answers(orders, tokens_BS, python)
    found, logits = answers[0]
    if logits is None:
        return _verified(stock, problems=(*problems, f"does not load: {found['error']}"))
    for kind in ("missing", "unexpected", "mismatched", "errors", "not_finite"):
        if names := found[kind]:
            problems.append(f"{kind.replace('_', ' ')} ({len(names)}): {', '.join(names[:_LISTED])}")
    if not found["generates"]:
        problems.append("generates another text with a cache than without")
    reference = None
    if logits_of is not None:
        reference = logits_of(tokens_BS).float()
    elif against is not None:
        told, reference = answers[1]
        if reference is None:
            raise ValueError(f"{against}: does not load: {told['error']}")
    if reference is not None:
        difference = float((logits - reference).abs().max() / reference.abs().max())
        allowed = 0.0 if exact else TOLERANCE
        if not difference <= allowed:
            problems.append(f"logits differ by {difference:.1e} of the largest, and {allowed:.0e} is allowed")
        result |= {"difference": difference, "allowed": allowed}
    return _verified(stock, transformers=found["transformers"], problems=tuple(problems), **result)


def _verified(stock: StockFolder, **more: Any) -> Verified:
    return Verified(folder=str(stock.path), parameters=_elements(stock), bytes=_bytes(stock), **more)


def _answers(
    orders: list[dict[str, Any]], tokens_BS: Tensor, python: str
) -> list[tuple[dict[str, Any], Tensor | None]]:
    """What each model said of itself, and its logits; None and `error` where it did not load.

    The first order is carried out by `python`, the others by this one's.
    """
    with tempfile.TemporaryDirectory() as scratch:
        for number, order in enumerate(orders):
            logits = Path(scratch) / f"{number}.safetensors"
            order |= _NOTHING | order | {"tokens": tokens_BS.tolist(), "logits": str(logits)}
        if python == sys.executable:
            answers = ask(orders, python)
        else:
            answers = ask(orders[:1], python) + (ask(orders[1:], sys.executable) if orders[1:] else [])
        return [
            (answer, None if "error" in answer else load_file(order["logits"])["logits"].float())
            for order, answer in zip(orders, answers, strict=True)
        ]


def ask(orders: list[dict[str, Any]], python: str) -> list[dict[str, Any]]:
    """The answers of `stock_forward.py`, in a process of its own without a network."""
    program = shutil.which(python)
    if program is None:
        raise ValueError(f"{python}: is no program that can be started; give the file of a Python interpreter")
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # As text, and elsewhere: a script's folder comes before the standard library, and modules here have names of that.
    command = [str(Path(program).absolute()), "-c", Path(stock_forward.__file__).read_text(encoding="utf-8")]
    with tempfile.TemporaryDirectory() as nowhere:
        done = subprocess.run(
            command, input=json.dumps(orders), capture_output=True, text=True, env=env, cwd=nowhere, check=False
        )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ValueError(f"{python}: {lines[-1]}; it needs torch and transformers: pip install 'wastenot[hf]'")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _left_over(stock: StockFolder) -> list[str]:
    """Tensors of layers or experts that the model does not have: some loaders ignore them in silence."""
    left: list[str] = []
    whole = {_PACKED.sub("", name) for name in stock.tensors}
    for name, place in places_of(whole, stock.family, stock.shape.layers).items():
        is_beyond = place.expert is not None and place.expert >= stock.shape.experts[place.layer or 0]
        if place.part == "next_n" or is_beyond:
            left.append(name)
    return [f"left over ({len(left)}): {', '.join(left[:_LISTED])}"] if left else []


def _bypass(base: StockFolder, left: StockFolder) -> tuple[dict[str, Any], bool]:
    """What to leave out of the base model to make it what was exported, and whether sums are rounded alike.

    Which experts stay is found by the rows of the routers: nothing that was written about them is trusted.
    """
    about = _about(left.path)
    if base.family != about["from"]:
        raise ValueError(f"{base.path}: is {base.family}, and the export was made from {about['from']}")
    origin = about["origin"]
    if not {*origin} <= {*range(base.shape.layers)}:
        raise ValueError(f"{base.path}: has {base.shape.layers} layers, and the export was made from more: {origin}")
    weights, stored, exact = StoredWeights(base.path), StoredWeights(left.path), True
    bypass: dict[str, Any] = {
        "blocks": sorted({*range(base.shape.layers)} - {*origin}),
        "feeds": [origin[layer] for layer in (*about["stubs"], *about["zeroed"])],
        "experts": {},
        "silent": {},
    }
    for layer, old in enumerate(origin):
        if old in bypass["feeds"] or not left.shape.experts[layer]:
            continue
        gates = (
            weights[name_of(Place(old, "router", "router"), base.family)],
            stored[name_of(Place(layer, "router", "router"), left.family)],
        )
        experts = _matched(*gates, base.path, old)
        if gone := sorted({*range(base.shape.experts[old])} - {*experts}):
            bypass["experts"][old] = gone
        exact = exact and experts == list(range(base.shape.experts[old]))
        silent = [
            expert
            for place, expert in enumerate(experts)
            if not stored[name_of(Place(layer, "expert", "down", place), left.family)].any()
            and weights[name_of(Place(old, "expert", "down", expert), base.family)].any()
        ]
        if silent:
            bypass["silent"][old] = silent
    return bypass, exact


def _matched(base_ED: Tensor, rows_eD: Tensor, where: Path, layer: int) -> list[int]:
    """Which row of `base_ED` each of `rows_eD` is."""
    known = {row.numpy().tobytes(): expert for expert, row in enumerate(base_ED.float())}
    experts = [known.get(row.numpy().tobytes(), -1) for row in rows_eD.float()]
    if -1 in experts or len(set(experts)) < len(experts):
        raise ValueError(
            f"{where}: the router of layer {layer} is not the one that was exported: trained since, or of another "
            f"model. Compare with the checkpoint that was exported"
        )
    return experts


def _about(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / EXPORTED).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: was not written by `wastenot compress export` ({error})") from error


def _elements(stock: StockFolder) -> int:
    """Of all weights, also where several of few bits are in one int32."""
    few = stock.config.get("quantization_config")
    in_one = 32 // few["config_groups"]["group_0"]["weights"]["num_bits"] if few else 1
    return sum(
        prod(tensor.shape) * (in_one if name.endswith("_packed") else 1)
        for name, tensor in stock.tensors.items()
        if not name.endswith(("weight_scale", "weight_shape"))
    )


def _bytes(stock: StockFolder) -> int:
    return sum(tensor.length for tensor in stock.tensors.values())
