"""Token ids in the files of Megatron's datasets: `PREFIX.bin` and `PREFIX.idx`, read and written without Megatron.

The .bin is the ids of all sequences, one after the other. The .idx says where they are, all little-endian:

    9 bytes     MMIDIDX and two zeros
    uint64      version, 1
    uint8       kind of the ids: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 6 float64, 7 float32, 8 uint16
    uint64      n, sequences
    uint64      d, boundaries of documents
    int32 [n]   length of each sequence, in ids
    int64 [n]   where each begins in the .bin, in bytes
    int64 [d]   the first sequence of each document, and n at the end

Multimodal data has an int8 [n] after these: refused. Torch-free.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import UserError
from .shards import Split

__all__ = ["IndexedTokens", "check_free", "find_indexed", "remove", "targets_of", "write_indexed"]

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}

_FEW_IDS = 65500
"""Below so many, Megatron takes uint16 for them, else int32."""


def find_indexed(corpus: str) -> dict[Split | None, Path]:
    """The prefixes of what `corpus` names: PREFIX, PREFIX.idx or PREFIX.bin, under None; or, for PREFIX, a pair
    `PREFIX-train` and `PREFIX-val` under those; nothing where there are no such files."""
    path = Path(corpus)
    if path.suffix in (".idx", ".bin"):
        prefix = path.with_suffix("")
        return {None: prefix} if _with(prefix, ".idx").is_file() else {}
    if not corpus or path.exists():
        return {}
    if _with(path, ".idx").is_file():
        return {None: path}
    pair: dict[Split | None, Path] = {split: _with(path, f"-{split}") for split in ("train", "val")}
    return pair if all(_with(prefix, ".idx").is_file() for prefix in pair.values()) else {}


@dataclass(frozen=True, eq=False)
class IndexedTokens:
    """The documents of one pair of files, memory-mapped and read only; iterates over them as arrays of ids."""

    prefix: Path
    tokens: np.ndarray
    """Every id of the .bin."""
    lengths: np.ndarray
    """int32 [n]: ids of each sequence."""
    firsts: np.ndarray
    """int64 [n]: position of each sequence's first id in `tokens`."""
    boundaries: np.ndarray
    """int64 [d]: the first sequence of each document, and n at the end."""

    @classmethod
    def open(cls, prefix: Path) -> IndexedTokens:
        """Maps both files; raises UserError where they are missing, cut short, or not of this format."""
        index = _with(prefix, ".idx")
        try:
            size = index.stat().st_size
            with index.open("rb") as file:
                header = file.read(_HEADER.size)
        except OSError as error:
            raise UserError(f"{index}: cannot be read ({error})") from error
        if not header.startswith(_MAGIC) or len(header) < _HEADER.size:
            raise UserError(f"{index}: not an index of Megatron's datasets, which begins with MMIDIDX")
        _, version, code, sequences, documents = _HEADER.unpack(header)
        if version != 1:
            raise UserError(f"{index}: has version {version}; only version 1 is known")
        if code not in _DTYPES or np.dtype(_DTYPES[code]).kind == "f":
            kind = f"of {np.dtype(_DTYPES[code]).name}" if code in _DTYPES else f"of unknown kind {code}"
            raise UserError(f"{index}: its entries are {kind}, not token ids; use a dataset of integers")
        expected = _HEADER.size + 12 * sequences + 8 * documents
        if size == expected + sequences and sequences:
            raise UserError(f"{index}: is multimodal, with a mode for each sequence; use one of text alone")
        if size != expected:
            raise UserError(
                f"{index}: {size} bytes, its header says {expected}; it is cut short or damaged: copy or make it again"
            )
        dtype = np.dtype(_DTYPES[code])
        at = np.memmap(index, dtype=np.uint8, mode="r")[_HEADER.size :]
        lengths, starts, boundaries = np.split(at, [4 * sequences, 12 * sequences])
        lengths, starts, boundaries = lengths.view("<i4"), starts.view("<i8"), boundaries.view("<i8")
        found = cls(prefix, _ids(_with(prefix, ".bin"), dtype), lengths, starts // dtype.itemsize, boundaries)
        found._check(starts, dtype.itemsize)
        return found

    def __len__(self) -> int:
        return len(self.boundaries) - 1

    def __iter__(self) -> Iterator[np.ndarray]:
        for first, end in zip(self.boundaries[:-1].tolist(), self.boundaries[1:].tolist(), strict=True):
            spans = zip(self.firsts[first:end].tolist(), self.lengths[first:end].tolist(), strict=True)
            pieces = [self.tokens[start : start + length] for start, length in spans]
            yield np.concatenate(pieces) if pieces else self.tokens[:0]

    def _check(self, starts: np.ndarray, itemsize: int) -> None:
        """Raises UserError where the index contradicts itself or asks for more than the .bin has."""
        index, bounds = _with(self.prefix, ".idx"), self.boundaries
        is_ordered = len(bounds) > 0 and bounds[0] == 0 and bounds[-1] == len(self.lengths)
        if not is_ordered or np.any(np.diff(bounds) < 0):
            raise UserError(f"{index}: its documents do not follow each other from the first sequence to the last")
        if np.any(self.lengths < 0) or np.any(starts < 0) or np.any(starts % itemsize):
            raise UserError(f"{index}: has a sequence of negative length or at no id's place; make it again")
        needed = int((self.firsts + self.lengths).max(initial=0))
        if needed > len(self.tokens):
            bin_file = _with(self.prefix, ".bin")
            raise UserError(
                f"{bin_file}: holds {len(self.tokens)} ids, its index asks for {needed}; it is cut short: copy it again"
            )


def targets_of(prefix: Path) -> tuple[Path, Path]:
    """The two files: ids and index."""
    return _with(prefix, ".bin"), _with(prefix, ".idx")


def check_free(prefix: Path) -> None:
    """Raises UserError where one of the files is there already."""
    for target in targets_of(prefix):
        if target.exists():
            raise UserError(f"{target}: exists; name another prefix")


def write_indexed(prefix: Path, documents: Iterable[Sequence[int] | np.ndarray], vocab_size: int) -> dict[str, int]:
    """Writes `PREFIX.bin` and `PREFIX.idx`, each document as one sequence; returns how many documents and tokens.

    Each file appears whole or not at all, and where this raises it leaves none. Raises UserError where one is there
    already or cannot be written.
    """
    dtype = np.dtype(_DTYPES[8] if vocab_size < _FEW_IDS else _DTYPES[4])
    code = next(code for code, name in _DTYPES.items() if np.dtype(name) == dtype)
    check_free(prefix)
    targets = targets_of(prefix)
    parts = [_with(target, ".part") for target in targets]
    lengths: list[int] = []
    ours: list[Path] = []
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with parts[0].open("wb") as file:
            for document in documents:
                file.write(np.asarray(document).astype(dtype).tobytes())
                lengths.append(len(document))
        each = np.array(lengths, dtype="<i4")
        starts = (np.cumsum(each, dtype="<i8") - each) * dtype.itemsize
        with parts[1].open("wb") as file:
            file.write(_HEADER.pack(_MAGIC, 1, code, len(lengths), len(lengths) + 1))
            file.write(each.tobytes() + starts.astype("<i8").tobytes())
            file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
        for part, target in zip(parts, targets, strict=True):
            part.rename(target)
            ours.append(target)
    except BaseException as error:
        remove(ours)
        if isinstance(error, OSError):
            raise UserError(f"{prefix}: cannot be written ({error})") from error
        raise
    finally:
        remove(parts)
    return {"documents": len(lengths), "tokens": sum(lengths)}


def remove(paths: Iterable[Path]) -> None:
    """As many of the files as are there and can be."""
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()


def _ids(path: Path, dtype: np.dtype) -> np.ndarray:
    try:
        size = path.stat().st_size
        if size % dtype.itemsize:
            raise UserError(f"{path}: {size} bytes are no whole number of {dtype.name}; it is cut short: copy it again")
        return np.memmap(path, dtype=dtype, mode="r") if size else np.empty(0, dtype)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def _with(prefix: Path, suffix: str) -> Path:
    """The suffix goes on, whatever dots the name has."""
    return prefix.with_name(prefix.name + suffix)
