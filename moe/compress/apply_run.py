"""A plan applied to a run of ours: its newest checkpoint, of whatever layout of ranks, with its optimizer's state.

The state of what is left goes along: cut like its parameter where every number of it belongs to one expert or one row
of the router. Where it does not (factors of a second moment over a router's rows, averages over them), all state of
that parameter stays behind, and the optimizer makes it anew at its next step. Weights in few bits are not trained: all
state stays behind where a plan quantizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ...parallel.checksums import check_sums, sums_of
from ...parallel.chunks import shard_files
from ...parallel.manifest import Chunk, Manifest, TensorEntry, check_complete, read_manifest, write_manifest
from .apply import Applied, Rewrite, check_base, check_shape, identity, refuse_few_bits
from .cut import Cut, Fate
from .fingerprint import CHECKPOINTS, RUN_CONFIG, checkpoint_fingerprint, newest_checkpoint, run_fingerprint
from .partial import Partial
from .places import NATIVE, Place, name_of, places_of
from .plan import DropPlan, Shape
from .writing import (
    OpenFiles,
    Output,
    Read,
    Transform,
    check_outputs,
    divide,
    in_order,
    output,
    take_rows,
    write_shards,
)

_MODEL, _OPTIMIZER = "model.", "optimizer."
_BY_EXPERT = ("rank", "xi", "true_xi")
"""State of a stack of experts in one number for each. Other vectors may be blocks that reach over experts."""
_BY_ROW = ("exp_avg_scale", "exp_avg#scale", "exp_avg_sq#scale")
"""State of a matrix in a few numbers for each row."""


def apply_to_run(
    source: Path,
    target: Path,
    plan: DropPlan,
    rewrite: Rewrite | None,
    transform: Transform | None,
    shard_bytes: int,
    progress: Callable[[int, int], None],
) -> Applied:
    """See `apply_plan`."""
    if rewrite is None:
        raise ValueError(f"{source} is a run; say what its {RUN_CONFIG} becomes (rewrite)")
    checkpoint = newest_checkpoint(source)
    manifest = read_manifest(checkpoint)
    check_complete(checkpoint, manifest)
    fingerprint = run_fingerprint(checkpoint, source)
    check_base(plan, fingerprint, source)
    refuse_few_bits(manifest.tensors, source)
    weights = [name for name in manifest.tensors if name.startswith(_MODEL)]
    places = places_of(weights, NATIVE, plan.shape.layers)
    shape = _shape_of(source, manifest, places, plan.shape.layers)
    check_shape(plan, shape, places, lambda name: manifest.tensors[name].shape[0], source)
    # Before anything is written: the configuration may refuse.
    config = rewrite(plan.result)
    left_out: list[str] = []
    outputs = [*_weights(manifest, places, plan), *_state(manifest, places, plan, left_out)]
    check_outputs(outputs, transform)
    shards = divide(_in_chunks(sorted(outputs, key=in_order), shard_bytes), shard_bytes)
    folder = f"{CHECKPOINTS}/step-{manifest.step:08d}"
    files = dict(zip(shard_files(len(shards)), shards, strict=True))
    partial = Partial(target, identity(fingerprint, plan, transform, shard_bytes))
    by_path = {f"{folder}/{file}": shard for file, shard in files.items()}
    reused = write_shards(partial, by_path, _reader(checkpoint, manifest), transform, progress, sums_of)
    meta = dict(manifest.meta)
    if "config" in meta:
        meta["config"] = dict(config.values)
    tensors = _entries({file: partial.finished[f"{folder}/{file}"] for file in files})
    lengths = {file: (partial.path / folder / file).stat().st_size for file in files}
    written = replace(manifest, serial=1, meta=meta, tensors=tensors, files=lengths)
    write_manifest(partial.path / folder, written)
    check_complete(partial.path / folder, written)
    for path in sorted((source / "tokenizer").glob("*")):
        partial.copy(path, f"tokenizer/{path.name}")
    partial.add(RUN_CONFIG, config.text)
    partial.complete()
    before = sum(entry.dtype.itemsize * torch.Size(entry.shape).numel() for entry in manifest.tensors.values())
    after = sum(entry.dtype.itemsize * torch.Size(entry.shape).numel() for entry in tensors.values())
    found, count = checkpoint_fingerprint(target), len(files)
    return Applied(target, found, plan.result, count, reused, before, after, tuple(left_out), config.notes)


def _weights(manifest: Manifest, places: Mapping[str, Place], plan: DropPlan) -> Iterator[Output]:
    cut = Cut(plan)
    for name, place in places.items():
        if (found := cut.fate(place)) is not None:
            yield _output(manifest, name, name_of(found.place, NATIVE), place, found)


def _state(manifest: Manifest, places: Mapping[str, Place], plan: DropPlan, left_out: list[str]) -> Iterator[Output]:
    """The optimizer's state of what stays; `left_out` gets the parameters of which none can come along."""
    plan_cut, keys = Cut(plan), dict[str, list[str]]()
    for name in manifest.tensors:
        if name.startswith(_OPTIMIZER):
            parameter, _, key = name.removeprefix(_OPTIMIZER).rpartition(".")
            keys.setdefault(parameter, []).append(key)
        elif not name.startswith(_MODEL):
            raise ValueError(f"{name}: is neither a weight nor the optimizer's; this checkpoint cannot be compressed")
    for parameter, its_keys in keys.items():
        weight = f"{_MODEL}{parameter}"
        if weight not in places:
            raise ValueError(f"{_OPTIMIZER}{parameter}: is the state of a parameter that the checkpoint lacks")
        found = plan_cut.fate(places[weight])
        if found is None:
            continue
        shape = manifest.tensors[weight].shape
        entries = {key: manifest.tensors[f"{_OPTIMIZER}{parameter}.{key}"].shape for key in its_keys}
        is_cut = found.rows is not None
        if plan.quantize or (is_cut and not all(_is_by_row(key, its, shape) for key, its in entries.items())):
            left_out.append(parameter)
            continue
        there = name_of(found.place, NATIVE).removeprefix(_MODEL)
        for key, its in entries.items():
            # A count is of the whole parameter. Weights that become zero keep their state, as all that stays.
            cut = Fate(found.place, found.rows if its else None)
            yield _output(manifest, f"{_OPTIMIZER}{parameter}.{key}", f"{_OPTIMIZER}{there}.{key}", None, cut)


def _is_by_row(key: str, shape: Sequence[int], parameter: Sequence[int]) -> bool:
    """Whether state of that key and shape is a part for each row (expert) of `parameter`, or one number for all."""
    if not shape or tuple(shape) == tuple(parameter):
        return True
    if shape[0] != parameter[0]:
        return False
    if len(parameter) > 2:
        return len(shape) > 1 or key in _BY_EXPERT
    return len(shape) == 2 and key in _BY_ROW


def _output(manifest: Manifest, source: str, name: str, place: Place | None, found: Fate) -> Output:
    entry = manifest.tensors[source]
    return output(source, name, place, found, entry.shape, entry.dtype.itemsize * torch.Size(entry.shape).numel())


def _in_chunks(outputs: Iterable[Output], shard_bytes: int) -> Iterator[Output]:
    """Stacks of matrices that are larger than a file as several chunks; each lands in a file of its own."""
    for each in outputs:
        size = max(1, shard_bytes // max(1, each.row_bytes))
        if len(each.shape) < 3 or size >= each.shape[0]:
            yield each
            continue
        rows = range(each.shape[0]) if each.rows is None else each.rows
        for first in range(0, each.shape[0], size):
            here = tuple(rows[first : first + size])
            zeroed = each.zeroed and tuple(row - first for row in each.zeroed if first <= row < first + size)
            shape = (len(here), *each.shape[1:])
            yield replace(each, shape=shape, rows=here, first=first, zeroed=zeroed or None)


def _reader(checkpoint: Path, manifest: Manifest) -> Read:
    """Reads tensors from the chunks that ranks wrote; ValueError where bytes are not those that were saved."""

    def read(files: OpenFiles, wanted: Output) -> Tensor:
        entry = manifest.tensors[wanted.source]
        if not entry.shape:
            [chunk] = entry.chunks
            return _read_chunk(checkpoint, files.open(checkpoint / chunk.file), wanted.source, chunk, (0,))
        rows = range(entry.shape[0]) if wanted.rows is None else wanted.rows
        value = torch.empty(wanted.shape, dtype=entry.dtype)
        for chunk in entry.chunks:
            first, count = chunk.offset[0], chunk.shape[0]
            inside = [(i, row - first) for i, row in enumerate(rows) if first <= row < first + count]
            if inside:
                file = files.open(checkpoint / chunk.file)
                part = _read_chunk(checkpoint, file, wanted.source, chunk, [row for _, row in inside])
                box = [slice(start, start + size) for start, size in zip(chunk.offset, chunk.shape, strict=True)]
                value[(torch.tensor([i for i, _ in inside]), *box[1:])] = part
        return value

    return read


def _read_chunk(checkpoint: Path, file: Any, name: str, chunk: Chunk, rows: Sequence[int]) -> Tensor:
    """Those rows of a chunk. Of a stack of matrices no more is read; all that is read is checked."""
    if len(chunk.shape) > 2:
        part = take_rows(file.get_slice(name), rows)
        sums = tuple(chunk.sums[row] for row in rows) if chunk.sums else ()
        check_sums(checkpoint, name, replace(chunk, sums=sums), part)
        return part
    whole = file.get_tensor(name)
    check_sums(checkpoint, name, chunk, whole)
    return whole[list(rows)] if chunk.shape and list(rows) != list(range(chunk.shape[0])) else whole


def _entries(notes: Mapping[str, Mapping[str, Any]]) -> dict[str, TensorEntry]:
    """What a manifest lists, of what was noted of each file."""
    entries: dict[str, TensorEntry] = {}
    for file, tensors in notes.items():
        for name, said in tensors.items():
            shape = tuple(said["shape"])
            offset = (said["first"], *(0 for _ in shape[1:])) if shape else ()
            chunk = Chunk(file, offset, shape, tuple(said["sums"]))
            before = entries.get(name, TensorEntry(getattr(torch, said["dtype"]), tuple(said["whole"]), ()))
            entries[name] = replace(before, chunks=(*before.chunks, chunk))
    return entries


def _shape_of(source: Path, manifest: Manifest, places: Mapping[str, Place], layers: int) -> Shape:
    """Of the model in the checkpoint: experts as weights have them, the router's choice as config.yaml says."""
    router = yaml.safe_load((source / RUN_CONFIG).read_text(encoding="utf-8"))["router"]
    rows = {place.layer: manifest.tensors[name].shape[0] for name, place in places.items() if place.part == "router"}
    dense = {place.layer for place in places.values() if place.part == "dense"}
    return Shape(
        experts=tuple(rows.get(layer, 0) for layer in range(layers)),
        top_k=int(router["top_k"]),
        dense=tuple(layer for layer in range(layers) if layer in dense),
        groups=int(router["groups"]),
        top_groups=int(router["top_groups"]),
    )
