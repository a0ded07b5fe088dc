"""What a checkpoint is, in 16 characters: a run of ours or a Hugging Face folder. Torch-free, and reads little.

It covers the configuration of the model and, of every weight, name, dtype, shape and the first and last 4 KiB of its
bytes; of a stack of matrices, experts, those of each. The same weights have the same fingerprint in however many files
they lie, and whatever layout of ranks wrote them.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .plan import fingerprint
from .stored import StockFolder, StoredTensor, read_header, read_stock

__all__ = ["checkpoint_fingerprint", "is_run", "newest_checkpoint"]

RUN_CONFIG, CHECKPOINTS, MANIFEST = "config.yaml", "checkpoints", "meta.json"
_WEIGHTS = "model."
_EDGE = 4096
"""Bytes at each end of a tensor, or of a matrix of a stack, that are looked at."""
_UNRELATED = ("transformers_version", "_name_or_path")
"""Keys of config.json that say who wrote it."""
_Box = tuple[tuple[int, ...], tuple[int, ...], StoredTensor]
"""Offset and shape of a part of a tensor, and where it lies."""
_COMPLETE = re.compile(r"step-\d{8,}(-\d+)?")


def checkpoint_fingerprint(folder: Path | str) -> str:
    """Of the newest whole checkpoint of the run at `folder`, or of the Hugging Face folder there, compressed or not.

    Raises ValueError where it is neither, or a file is missing, damaged or cut short.
    """
    folder = Path(folder)
    return (
        run_fingerprint(newest_checkpoint(folder), folder) if is_run(folder) else stock_fingerprint(read_stock(folder))
    )


def is_run(folder: Path) -> bool:
    """Whether `folder` is a run of ours."""
    return (folder / RUN_CONFIG).is_file()


def stock_fingerprint(stock: StockFolder) -> str:
    """Of a folder that has been read."""
    config = {key: value for key, value in stock.config.items() if key not in _UNRELATED}
    shape = stock.shape
    said = [shape.experts, shape.dense, shape.top_k, shape.groups, shape.top_groups]
    tensors = []
    for name, tensor in sorted(stock.tensors.items()):
        with tensor.file.open("rb") as file:
            tensors.append([name, tensor.dtype, tensor.shape, *(zlib.crc32(edge) for edge in _edges(file, tensor))])
    return fingerprint([config, said, tensors])


def newest_checkpoint(run: Path) -> Path:
    """Folder of the checkpoint that the run at `run` saved last, of those whose files are there in full length.

    Raises ValueError where there is none.
    """
    found: list[tuple[int, Path]] = []
    for path in sorted((run / CHECKPOINTS).glob("step-*")):
        try:
            said = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            whole = all((path / file).stat().st_size == length for file, length in said["files"].items())
            if whole and _COMPLETE.fullmatch(path.name):
                found.append((int(said["serial"]), path))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    if not found:
        raise ValueError(f"{run} has no complete checkpoint; train until checkpoint.every or to the end")
    return max(found)[1]


def run_fingerprint(checkpoint: Path, run: Path) -> str:
    """Of one checkpoint of the run at `run`; the state of its optimizer does not count."""
    try:
        config = yaml.safe_load((run / RUN_CONFIG).read_text(encoding="utf-8"))
        model = [config["model"], config["router"]]
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        weights = {name: said for name, said in manifest["tensors"].items() if name.startswith(_WEIGHTS)}
        headers = {
            file: read_header(checkpoint / file)
            for file in {chunk["file"] for said in weights.values() for chunk in said["chunks"]}
        }
        tensors = [
            [name, said["dtype"], said["shape"], *_chunked_edges(checkpoint, name, said, headers)]
            for name, said in sorted(weights.items())
        ]
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{run}: cannot be read as a run ({' '.join(repr(error).split())})") from error
    return fingerprint([model, tensors])


def _edges(file: Any, tensor: StoredTensor) -> list[bytes]:
    """The first and the last bytes of a tensor that lies in one piece, or of each of its matrices."""
    edges = []
    for start, size in _spans(tensor.shape, tensor.length, _EDGE):
        file.seek(tensor.start + start)
        edges.append(file.read(size))
    return edges


def _spans(shape: Sequence[int], length: int, edge: int) -> list[tuple[int, int]]:
    """Start and size of what is looked at of a tensor, or of each matrix of a stack; `edge` at each end of it."""
    count = math.prod(shape[:-2])
    each = length // max(1, count)
    size = min(edge, each)
    return [(i * each + start, size) for i in range(count) for start in (0, each - size)]


def _chunked_edges(
    checkpoint: Path, name: str, said: Mapping[str, Any], headers: Mapping[str, Mapping[str, StoredTensor]]
) -> list[int]:
    """CRC-32 of what `_edges` has, of a tensor that is cut into boxes."""
    shape = list(said["shape"])
    numel = math.prod(shape)
    boxes = [
        (tuple(chunk["offset"]), tuple(chunk["shape"]), headers[chunk["file"]][name])
        for chunk in said["chunks"]
        if math.prod(chunk["shape"])
    ]
    if not numel:
        return [0, 0]
    itemsize = boxes[0][2].length // math.prod(boxes[0][1])
    spans = _spans(shape, numel, _EDGE // itemsize)
    return [zlib.crc32(_elements(checkpoint, name, shape, boxes, first, count)) for first, count in spans]


def _elements(
    checkpoint: Path,
    name: str,
    shape: list[int],
    boxes: list[_Box],
    first: int,
    count: int,
) -> bytes:
    """The bytes of `count` elements from `first` on, as the whole tensor would have them in row-major order."""
    found, position = b"", first
    while position < first + count:
        index = _unravel(position, shape)
        inside = [box for box in boxes if _holds(box, index)]
        if not inside:
            raise ValueError(f"{checkpoint} is damaged: {name} lacks element {index}")
        offset, size, tensor = inside[0]
        local = [i - o for i, o in zip(index, offset, strict=True)]
        itemsize = tensor.length // math.prod(size)
        # As far as this row of the box reaches; a scalar has one element.
        run = min(size[-1] - local[-1] if size else 1, first + count - position)
        start = 0
        for i, n in zip(local, size, strict=True):
            start = start * n + i
        with tensor.file.open("rb") as file:
            file.seek(tensor.start + start * itemsize)
            found += file.read(run * itemsize)
        position += run
    return found


def _holds(box: _Box, index: list[int]) -> bool:
    return all(o <= i < o + n for i, o, n in zip(index, box[0], box[1], strict=True))


def _unravel(position: int, shape: list[int]) -> list[int]:
    index: list[int] = []
    for size in reversed(shape):
        position, remainder = divmod(position, size)
        index.insert(0, remainder)
    return index
