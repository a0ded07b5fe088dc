"""Tensors of a checkpoint that are made of tensors of another one, written file by file.

Which file a tensor goes to follows from the target alone, and what is finished stays as it is: a process that is killed
and started again makes the same bytes. Memory holds one file's worth of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .cut import Fate
from .partial import Partial
from .places import Place

__all__ = [
    "OpenFiles",
    "Output",
    "Transform",
    "check_outputs",
    "divide",
    "in_order",
    "output",
    "take_rows",
    "write_shards",
]

Transform = Callable[[Place, str, Tensor], Mapping[str, Tensor]]
"""Slims or quantizes one matrix [rows, columns] of a linear layer that stays: its place in the source, its name in the
target, its values -> tensors by name. Stacks of experts come one matrix at a time, each with its number. Where the plan
does not say all, its attribute `rests_on` names what else the result follows from; its `check(place, name, shape)`, if
there is one, hears of all of it before anything is written, of stacks as a whole: ValueError for what cannot be."""


@dataclass(frozen=True)
class Output:
    """A tensor of the target, or consecutive rows of it, and what it is made of."""

    source: str
    name: str
    place: Place | None
    """In the source; None for what is no weight."""
    shape: tuple[int, ...]
    """Of these rows."""
    whole: tuple[int, ...]
    """Of the tensor."""
    row_bytes: int
    name_order: tuple[int, int] = (-1, -1)
    """Layer and expert in the target, by which outputs are stored."""
    rows: tuple[int, ...] | None = None
    """Of the source, one for each row here; None: all."""
    first: int = 0
    """Number of the first row here."""
    zeroed: tuple[int, ...] | None = None
    """Of these rows the values become zero; None: of none, empty: of all."""

    @property
    def num_bytes(self) -> int:
        return self.row_bytes * (self.shape[0] if self.shape else 1)


class OpenFiles:
    """The files that tensors of one shard are read from; each is opened once, and closed before the next shard."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._files: dict[Path, Any] = {}

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def open(self, path: Path) -> Any:
        """The file at `path`, as safetensors has it."""
        if path not in self._files:
            self._files[path] = self._stack.enter_context(safe_open(path, framework="pt"))
        return self._files[path]


Read = Callable[[OpenFiles, Output], Tensor]
"""Reads what an `Output` is made of, rows cut and not yet zeroed."""


def output(source: str, name: str, place: Place | None, found: Fate, shape: Sequence[int], num_bytes: int) -> Output:
    """What `found` makes of the tensor `source` of `shape`."""
    rows, there = found.rows, found.place
    here = tuple(shape) if rows is None else (len(rows), *shape[1:])
    order = (-1 if there.layer is None else there.layer, -1 if there.expert is None else there.expert)
    return Output(source, name, place, here, here, num_bytes // max([1, *shape[:1]]), order, rows, 0, found.zeroed)


def in_order(each: Output) -> tuple[bool, tuple[int, int], str]:
    """Sorts outputs: weights before state, then layer by layer, expert by expert. A matter of the target alone."""
    return each.place is None, each.name_order, each.name


def divide(outputs: Iterable[Output], shard_bytes: int) -> list[list[Output]]:
    """Consecutive outputs together, up to `shard_bytes`."""
    shards: list[list[Output]] = []
    held = 0
    for each in outputs:
        if not shards or held + each.num_bytes > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(each)
        held += each.num_bytes
    return shards


def check_outputs(outputs: Iterable[Output], transform: Transform | None) -> None:
    """Raises ValueError where `transform` says that it cannot change one of them."""
    check = getattr(transform, "check", None)
    for each in outputs:
        if check is not None and each.place is not None:
            check(each.place, each.name, each.whole)


def write_shards(
    partial: Partial,
    shards: Mapping[str, Sequence[Output]],
    read: Read,
    transform: Transform | None,
    progress: Callable[[int, int], None],
    sums: Callable[[Tensor], tuple[int, ...]] = lambda tensor: (),
) -> int:
    """Writes the files of `partial` that are not finished; returns how many were. What each holds, `sums` of the
    values included, is noted.

    Raises ValueError where a file of the source cannot be read, OSError where one cannot be written.
    """
    total = sum(each.num_bytes for shard in shards.values() for each in shard)
    done = reused = 0
    for file, shard in shards.items():
        if file in partial.finished:
            reused += 1
        else:
            partial.write(file, lambda path, shard=shard: _write_shard(path, shard, read, transform, sums))
        done += sum(each.num_bytes for each in shard)
        progress(done, total)
    return reused


def take_rows(tensor: Any, rows: Sequence[int]) -> Tensor:
    """Rows of a slice of a safetensors file, in the order given; what is consecutive is read at once."""
    return torch.cat([tensor[first:end] for first, end in _runs(rows)])


def _write_shard(
    path: Path, shard: Sequence[Output], read: Read, transform: Transform | None, sums: Callable[[Tensor], Any]
) -> dict[str, Any]:
    """Writes one file; returns what a manifest or an index says of its tensors."""
    tensors: dict[str, Tensor] = {}
    notes: dict[str, Any] = {}
    with OpenFiles() as files:
        for each in shard:
            try:
                value = read(files, each)
            except SafetensorError as error:
                raise ValueError(f"{each.source}: cannot be read ({error}); fetch the checkpoint again") from error
            if each.zeroed is not None:
                value = value.clone()
                value[list(each.zeroed) if each.zeroed else ...] = 0
            for name, tensor in _transformed(each, value, transform).items():
                tensors[name] = tensor.contiguous()
                whole = tensor.shape if each.rows is None else (each.whole[0], *tensor.shape[1:])
                notes[name] = {
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                    "shape": list(tensor.shape),
                    "whole": list(whole),
                    "first": each.first,
                    "bytes": tensor.numel() * tensor.element_size(),
                    "sums": list(sums(tensor)),
                }
        try:
            save_file(tensors, path, {"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error})") from error
    return notes


def _transformed(each: Output, value: Tensor, transform: Transform | None) -> Mapping[str, Tensor]:
    place = each.place
    if transform is None or place is None or not place.is_linear:
        return {each.name: value}
    if place.part != "experts":
        return transform(place, each.name, value)
    numbers = range(len(value)) if each.rows is None else each.rows
    made = [
        transform(replace(place, part="expert", expert=expert, leaf="weight"), each.name, matrix)
        for expert, matrix in zip(numbers, value, strict=True)
    ]
    return {name: torch.stack([one[name] for one in made]) for name in made[0]}


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Consecutive numbers of `rows` as (first, one past the last)."""
    first = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1:
            yield rows[first], rows[i - 1] + 1
            first = i
