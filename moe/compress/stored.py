"""A Hugging Face folder, stock or compressed: what describes it, and where the bytes of its tensors are. Torch-free.

A compressed folder is what applying a plan to a stock one leaves: safetensors under the family's names, layers and
experts counted from 0 again, the configuration of the stock model as `base_config.json` (so that no stock loader
takes it for one of its own), and `compressed.json`, which says what the layers have now.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .places import family_of
from .plan import Shape, shape_from
from .shapes import shape_of_config

__all__ = ["StockFolder", "StoredTensor", "compressed_text", "read_header", "read_stock"]

CONFIG, BASE_CONFIG, COMPRESSED = "config.json", "base_config.json", "compressed.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
VERSION = 1


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file's header describes it."""

    file: Path
    dtype: str
    """As safetensors spells it: `BF16`, `F32`, ..."""
    shape: tuple[int, ...]
    start: int
    """Its first byte in the file, row-major."""
    length: int
    """In bytes."""


@dataclass(frozen=True)
class StockFolder:
    """A folder of safetensors and what its configuration makes of them."""

    path: Path
    config: Mapping[str, Any]
    """config.json of the stock model."""
    family: str
    shape: Shape
    origin: tuple[int, ...]
    """Number that each layer had in the stock model."""
    plans: tuple[str, ...]
    """Hashes of the plans applied so far."""
    tensors: Mapping[str, StoredTensor]

    @property
    def config_file(self) -> Path:
        return self.path / (BASE_CONFIG if self.plans else CONFIG)


def read_stock(path: Path | str) -> StockFolder:
    """The folder at `path`. Raises ValueError where it is none, its family is not supported, or a file is damaged."""
    path = Path(path)
    if (path / COMPRESSED).is_file():
        config, said = _json(path / BASE_CONFIG), _json(path / COMPRESSED)
        try:
            if said["version"] != VERSION:
                raise ValueError(f"version {said['version']} is unknown; this version of wastenot reads {VERSION}")
            shape = shape_from(said["shape"])
            origin, plans = tuple(map(int, said["origin"])), tuple(map(str, said["plans"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path / COMPRESSED}: does not describe a compressed checkpoint ({error})") from error
        family = family_of(config)
    else:
        config = _json(path / CONFIG)
        try:
            family, shape = family_of(config), shape_of_config(config)
        except ValueError as error:
            raise ValueError(f"{path / CONFIG}: {error}") from error
        origin, plans = tuple(range(shape.layers)), ()
    return StockFolder(path, config, family, shape, origin, plans, _tensors(path))


def compressed_text(shape: Shape, origin: tuple[int, ...], plans: tuple[str, ...]) -> str:
    """What `compressed.json` holds."""
    said = {
        "version": VERSION,
        "shape": {
            "experts": list(shape.experts),
            "dense": list(shape.dense),
            "top_k": shape.top_k,
            "groups": shape.groups,
            "top_groups": shape.top_groups,
        },
        "origin": list(origin),
        "plans": list(plans),
    }
    return json.dumps(said, indent=2) + "\n"


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of the safetensors file at `path`. Raises ValueError where it is cut short or no such file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length < size else None
        assert header is not None
        header.pop("__metadata__", None)
        first = 8 + length
        tensors = {
            str(name): StoredTensor(
                path,
                str(said["dtype"]),
                tuple(said["shape"]),
                first + said["data_offsets"][0],
                said["data_offsets"][1] - said["data_offsets"][0],
            )
            for name, said in header.items()
        }
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (struct.error, ValueError, AssertionError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is cut short, or is no safetensors file; fetch it again") from error
    end = max((tensor.start + tensor.length for tensor in tensors.values()), default=first)
    if size != end:
        raise ValueError(f"{path}: has {size} bytes instead of {end}; fetch it again")
    return tensors


def _tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of `folder`, of one file or those that the index names; ValueError where one is not there."""
    index = folder / INDEX
    if not index.is_file():
        if not (folder / WEIGHTS).is_file():
            raise ValueError(f"{folder}: has neither {WEIGHTS} nor {INDEX}; give a folder of safetensors")
        return read_header(folder / WEIGHTS)
    try:
        weight_map = dict(_json(index)["weight_map"])
        files = {name: Path(file).name for name, file in weight_map.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{index}: is no index of safetensors ({error})") from error
    headers = {file: read_header(folder / file) for file in sorted(set(files.values()))}
    absent = sorted(name for name, file in files.items() if name not in headers[file])
    if absent:
        raise ValueError(f"{folder / files[absent[0]]}: lacks {absent[0]}, which {INDEX} places there; fetch it again")
    return {name: tensor for header in headers.values() for name, tensor in header.items()}


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); give a run or the folder of a checkpoint") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return value
