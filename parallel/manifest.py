"""What a checkpoint folder holds: `meta.json`, the one file that makes shards a checkpoint.

A folder is `meta.json` beside safetensors files. The manifest lists every tensor with its dtype, its global
shape and the chunks that make it up, so completeness is proved without reading a weight: chunks must cover
each tensor exactly once, and every file must be there in full length. JSON and safetensors hold no code:
nothing here is ever unpickled, whoever wrote the folder.

Not here: who writes what and when (checkpoint.py).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

FILE = "meta.json"
_FORMAT, _VERSION = "wastenot-checkpoint", 1
# A name from the manifest is opened: it must not lead out of the folder.
_SHARD = re.compile(r"[0-9a-z-]+\.safetensors")


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor and the file that holds it, under the tensor's name."""

    file: str
    offset: tuple[int, ...]
    """First index of the box along each dim of the whole tensor."""
    shape: tuple[int, ...]
    sums: tuple[int, ...] = ()
    """CRC-32 of its bytes; of a stack of matrices, experts, one for each. None in checkpoints of older versions."""


@dataclass(frozen=True)
class TensorEntry:
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Shape of the whole tensor over all ranks."""
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything `meta.json` says."""

    step: int
    serial: int
    """Counts the checkpoints of a directory: the newest is the one saved last, whatever its step."""
    layout: Mapping[str, int]
    """Sizes of the axes (world, pipeline, data, shard, tensor, expert) that wrote it."""
    meta: Mapping[str, Any]
    """What the caller added."""
    tensors: Mapping[str, TensorEntry]
    files: Mapping[str, int]
    """Length of each shard file in bytes."""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `meta.json` and forces it to the disk. Raises ValueError where `meta` is not JSON."""
    path = folder / FILE
    with path.open("w", encoding="utf-8") as file:
        file.write(_encode(manifest))
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """Reads `meta.json`. Raises ValueError where it is missing, unreadable or of an unknown format."""
    path = folder / FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{folder} is not a complete checkpoint: {FILE} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder} is damaged: {FILE} is unreadable: {error}") from error
    try:
        return _decode(json.loads(text))
    except _UnknownFormatError as error:
        raise ValueError(f"{folder}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder} is damaged: {FILE} is not a manifest: {reason}") from error


def json_copy(meta: Mapping[str, Any]) -> dict[str, Any]:
    """`meta` as it will come back. Raises ValueError where that differs from what it is now."""
    try:
        back = json.loads(json.dumps(meta))
    except (TypeError, ValueError) as error:
        raise ValueError(f"meta of a checkpoint must be JSON: {error}") from None
    # repr tells tuples from lists and integer keys from strings, and NaN (which survives) equals itself in it.
    if repr(back) != repr(dict(meta)):
        raise ValueError("meta of a checkpoint must be JSON: use lists for tuples and strings as keys")
    return back


def check_coverage(name: str, entry: TensorEntry) -> None:
    """Proves that the chunks cover the tensor exactly once; otherwise ValueError with name and place."""
    volume = 0
    open_chunks: list[Chunk] = []
    for chunk in sorted(entry.chunks, key=lambda chunk: chunk.offset):
        if not _inside(chunk, entry.shape):
            raise ValueError(f"{name} {list(entry.shape)}: {_box(chunk)} lies outside the tensor")
        if not math.prod(chunk.shape):
            continue
        volume += math.prod(chunk.shape)
        # Sorted by the first dim: what ended before this chunk starts cannot meet a later one either.
        open_chunks = [other for other in open_chunks if _end(other) > chunk.offset[:1]]
        for other in open_chunks:
            if _overlap(chunk, other):
                raise ValueError(f"{name} {list(entry.shape)}: {_box(chunk)} and {_box(other)} overlap")
        open_chunks.append(chunk)
    # Disjoint boxes inside the tensor fill it if and only if their volumes add up to its own.
    if not entry.chunks or volume != math.prod(entry.shape):
        raise ValueError(f"{name} {list(entry.shape)}: the chunks hold {volume} of {math.prod(entry.shape)} elements")


def check_complete(folder: Path, manifest: Manifest) -> None:
    """Proves that every tensor is covered and every file is there in full; otherwise ValueError saying which."""
    where = f"{folder} is damaged"
    names: dict[str, set[str]] = {file: set() for file in manifest.files}
    for name, entry in manifest.tensors.items():
        try:
            check_coverage(name, entry)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        for chunk in entry.chunks:
            if chunk.file not in names:
                raise ValueError(f"{where}: {FILE} gives no length for {chunk.file}, which holds {name}")
            names[chunk.file].add(name)
    for file, length in manifest.files.items():
        path = folder / file
        try:
            found = path.stat().st_size
        except OSError:
            example = min(names[file], default="no tensor")
            raise ValueError(f"{where}: {file} is missing ({len(names[file])} tensors, among them {example})") from None
        if found != length:
            raise ValueError(f"{where}: {file} has {found} bytes instead of {length}")
        try:
            with safe_open(path, framework="pt") as shard:
                absent = names[file].difference(shard.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{where}: {file} is unreadable: {error}") from error
        if absent:
            raise ValueError(f"{where}: {file} lacks {some(sorted(absent))}")


def some(names: Sequence[str]) -> str:
    """The first ten, and how many more there are."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _inside(chunk: Chunk, shape: tuple[int, ...]) -> bool:
    if not len(chunk.offset) == len(chunk.shape) == len(shape):
        return False
    boxes = zip(chunk.offset, chunk.shape, shape, strict=True)
    return all(start >= 0 and size >= 0 and start + size <= whole for start, size, whole in boxes)


def _end(chunk: Chunk) -> tuple[int, ...]:
    """One past the last index along the first dim; a scalar's only chunk stays open for a second one."""
    return (chunk.offset[0] + chunk.shape[0],) if chunk.shape else (1,)


def _overlap(one: Chunk, two: Chunk) -> bool:
    boxes = zip(one.offset, one.shape, two.offset, two.shape, strict=True)
    return all(a < b + b_size and b < a + a_size for a, a_size, b, b_size in boxes)


def _box(chunk: Chunk) -> str:
    ranges = (f"{start}:{start + size}" for start, size in zip(chunk.offset, chunk.shape, strict=False))
    return f"chunk [{', '.join(ranges)}] in {chunk.file}"


class _UnknownFormatError(Exception):
    """A manifest that is whole but not ours to read."""


def _encode(manifest: Manifest) -> str:
    tensors = {
        name: {
            "dtype": str(entry.dtype).removeprefix("torch."),
            "shape": list(entry.shape),
            "chunks": [
                {
                    "file": chunk.file,
                    "offset": list(chunk.offset),
                    "shape": list(chunk.shape),
                    "sums": list(chunk.sums),
                }
                for chunk in entry.chunks
            ],
        }
        for name, entry in manifest.tensors.items()
    }
    head = {"format": _FORMAT, "version": _VERSION, "step": manifest.step, "serial": manifest.serial}
    body = {"layout": dict(manifest.layout), "meta": dict(manifest.meta), "files": dict(manifest.files)}
    return json.dumps({**head, **body, "tensors": tensors})


def _decode(raw: dict[str, Any]) -> Manifest:
    if raw["format"] != _FORMAT or raw["version"] != _VERSION:
        raise _UnknownFormatError(
            f"{FILE} has format {raw['format']} {raw['version']}; this version of wastenot reads {_FORMAT} {_VERSION}"
        )
    tensors = {
        str(name): TensorEntry(
            _dtype(entry["dtype"]),
            _ints(entry["shape"]),
            tuple(
                Chunk(
                    _file(chunk["file"]),
                    _ints(chunk["offset"]),
                    _ints(chunk["shape"]),
                    _ints(chunk.get("sums", ())),
                )
                for chunk in entry["chunks"]
            ),
        )
        for name, entry in raw["tensors"].items()
    }
    return Manifest(
        step=int(raw["step"]),
        serial=int(raw["serial"]),
        layout={str(axis): int(size) for axis, size in raw["layout"].items()},
        meta=dict(raw["meta"]),
        tensors=tensors,
        files={_file(file): int(length) for file, length in raw["files"].items()},
    )


def _ints(values: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _file(name: str) -> str:
    if not _SHARD.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a shard")
    return name


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not a dtype")
    return dtype
