"""A checkpoint and a plan make a checkpoint (METHODS C6): tensor by tensor, without building a model.

    apply_plan("Mixtral-8x7B", "smaller", read_plan("plan.yaml"))

What becomes of a tensor follows from its name and the plan alone (`Cut`), and so does the file it goes to: a process
that is killed and started again makes the same bytes. Memory holds one file's worth of tensors. Only what the plan
names is touched; a weight is copied bit by bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .cut import Cut
from .fingerprint import checkpoint_fingerprint, is_run, stock_fingerprint
from .partial import Partial, check_target
from .places import Place, name_of, places_of
from .plan import DropPlan, Shape
from .stored import BASE_CONFIG, COMPRESSED, INDEX, WEIGHTS, StockFolder, compressed_text, read_stock
from .writing import OpenFiles, Output, Transform, check_outputs, divide, in_order, output, take_rows, write_shards

__all__ = ["Applied", "Rewrite", "RunConfig", "Transform", "apply_plan"]


@dataclass(frozen=True)
class RunConfig:
    """The configuration of the run to be."""

    text: str
    """Of config.yaml."""
    values: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    """What had to become other than it was."""


Rewrite = Callable[[Shape], RunConfig]
"""The shape of what is left -> the configuration of a run of it."""

_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.tiktoken")
_ALONGSIDE = (*_TOKENIZER, "chat_template*", "generation_config.json")


@dataclass(frozen=True)
class Applied:
    """What came of it."""

    target: Path
    fingerprint: str
    shape: Shape
    files: int
    """Of tensors."""
    reused: int
    """... of which a process before this one had written so many."""
    bytes_before: int
    """Of all tensors, optimizer state included."""
    bytes_after: int
    state_left_out: tuple[str, ...] = ()
    """Parameters of the source, a run, whose optimizer state does not come along: it does not fit what is left."""
    notes: tuple[str, ...] = ()
    """What of a run's configuration had to become other than it was."""


def apply_plan(
    source: Path | str,
    target: Path | str,
    plan: DropPlan,
    *,
    rewrite: Rewrite | None = None,
    transform: Transform | None = None,
    shard_bytes: int = 2 * 2**30,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Applied:
    """Writes what `plan` leaves of the checkpoint `source` as the folder `target`, of the same kind.

    source: a Hugging Face folder, stock or compressed, or a run of ours, of which the newest checkpoint is taken, with
    the state of its optimizer. rewrite: what config.yaml of that run becomes. transform: does what `plan.slim` and
    `plan.quantize` ask for. shard_bytes: of a file, unless one tensor (one row of a stack of experts) is larger.
    progress: hears (bytes done, bytes in all).

    Raises ValueError, and writes nothing, where the plan was made for another checkpoint, a tensor is unknown,
    missing, cut short or of a shape that `transform` cannot change, or `target` exists; OSError where it cannot be
    written. A target that was begun by a process that ended is continued.
    """
    source, target = Path(source), Path(target)
    check_target(target)
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes: {shard_bytes} holds no tensor; use for example {2**30}")
    if (plan.slim or plan.quantize) and transform is None:
        what = "slim" if plan.slim else "quantize"
        raise ValueError(f"{what}: this plan changes weights, and nobody was given to do it; leave it out of the plan")
    changes = transform if plan.slim or plan.quantize else None
    if is_run(source):
        from .apply_run import apply_to_run

        return apply_to_run(source, target, plan, rewrite, changes, shard_bytes, progress)
    return _apply_to_stock(read_stock(source), target, plan, changes, shard_bytes, progress)


def check_base(plan: DropPlan, fingerprint: str, source: Path) -> None:
    """Raises ValueError where `plan` was made for another checkpoint than that at `source`."""
    if plan.base != fingerprint:
        raise ValueError(
            f"base: the plan was made for the checkpoint {plan.base}, and {source} is {fingerprint}; make a plan for it"
        )


def refuse_few_bits(names: Iterable[str], source: Path) -> None:
    """Raises ValueError where some of the tensors are codes of weights that were quantized."""
    if codes := [name for name in names if name.endswith((".q", ".scale"))]:
        raise ValueError(
            f"{source}: holds weights in few bits ({min(codes)}); apply plans to what was quantized instead"
        )


def check_shape(
    plan: DropPlan, shape: Shape, places: Mapping[str, Place], rows: Callable[[str], int], source: Path
) -> None:
    """Raises ValueError where `plan` or the tensors do not have the layers and experts of `shape`.

    rows: size of the first dim of a tensor.
    """
    if plan.shape != shape:
        raise ValueError(f"shape: the plan says {plan.shape}, and {source} has {shape}; make a plan for it")
    parts: dict[int, set[str]] = {layer: set() for layer in range(shape.layers)}
    experts: dict[int, dict[int, set[str]]] = {layer: {} for layer in range(shape.layers)}
    for name, place in places.items():
        if place.layer is None or place.part == "next_n":
            continue
        layer, count = place.layer, shape.experts[place.layer]
        parts[layer].add("experts" if place.part == "expert" else place.part)
        if place.expert is not None:
            experts[layer].setdefault(place.expert, set()).add(place.weight)
        elif place.part in ("router", "router_bias", "experts") and rows(name) != count:
            raise ValueError(f"{source}: {name} is of {rows(name)} experts, but its layer should have {count}")
    for layer, count in enumerate(shape.experts):
        has_feed = bool(count) or layer in shape.dense
        wanted = {"router": bool(count), "experts": bool(count), "dense": layer in shape.dense, "norm": has_feed}
        for part, is_wanted in wanted.items():
            if (part in parts[layer]) != is_wanted:
                raise ValueError(f"{source}: layer {layer} {'lacks its' if is_wanted else 'should not have a'} {part}")
        every = set().union(*experts[layer].values())
        for expert in range(max([count - 1, *experts[layer]]) + 1) if every else ():
            if expert >= count:
                raise ValueError(f"{source}: layer {layer} has an expert {expert}, but should have {count}")
            if lacks := every - experts[layer].get(expert, set()):
                raise ValueError(f"{source}: layer {layer} lacks {min(lacks)} of expert {expert}; fetch it again")


def _apply_to_stock(
    stock: StockFolder,
    target: Path,
    plan: DropPlan,
    transform: Transform | None,
    shard_bytes: int,
    progress: Callable[[int, int], None],
) -> Applied:
    fingerprint = stock_fingerprint(stock)
    check_base(plan, fingerprint, stock.path)
    refuse_few_bits(stock.tensors, stock.path)
    places = places_of(stock.tensors, stock.family, stock.shape.layers)
    check_shape(plan, stock.shape, places, lambda name: stock.tensors[name].shape[0], stock.path)
    cut, outputs = Cut(plan), []
    for name, place in places.items():
        if (found := cut.fate(place)) is not None:
            there = stock.tensors[name]
            outputs.append(output(name, name_of(found.place, stock.family), place, found, there.shape, there.length))

    check_outputs(outputs, transform)

    def read(files: OpenFiles, wanted: Output) -> Tensor:
        file = files.open(stock.tensors[wanted.source].file)
        if wanted.rows is None:
            return file.get_tensor(wanted.source)
        return take_rows(file.get_slice(wanted.source), wanted.rows)

    shards = divide(sorted(outputs, key=in_order), shard_bytes)
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    files = files if len(files) > 1 else [WEIGHTS]
    partial = Partial(target, identity(fingerprint, plan, transform, shard_bytes))
    reused = write_shards(partial, dict(zip(files, shards, strict=True)), read, transform, progress)
    notes = {file: partial.finished[file] for file in files}
    total = sum(tensor["bytes"] for note in notes.values() for tensor in note.values())
    if len(files) > 1:
        weight_map = {name: file for file, note in notes.items() for name in note}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        partial.add(INDEX, json.dumps(index, indent=2) + "\n")
    partial.add(BASE_CONFIG, stock.config_file.read_text(encoding="utf-8"))
    origin = tuple(stock.origin[layer] for layer in plan.survivors)
    partial.add(COMPRESSED, compressed_text(plan.result, origin, (*stock.plans, plan.hash)))
    for path in sorted({path for pattern in _ALONGSIDE for path in stock.path.glob(pattern) if path.is_file()}):
        partial.copy(path, path.name)
    partial.complete()
    before = sum(tensor.length for tensor in stock.tensors.values())
    return Applied(target, checkpoint_fingerprint(target), plan.result, len(files), reused, before, total)


def identity(fingerprint: str, plan: DropPlan, transform: Transform | None, shard_bytes: int) -> dict[str, Any]:
    """Of what is being made: equal identities make equal files."""
    rests_on = getattr(transform, "rests_on", "")
    return {"source": fingerprint, "plan": plan.hash, "rests_on": rests_on, "shard_bytes": shard_bytes}
