"""The on-disk form of a token stream: flat little-endian files of bounded size beside one meta.json.

A prepared folder holds, for each split, `<split>-00000.bin`, `<split>-00001.bin`, ... (uint16 where every id fits,
else uint32) with the documents one after the other, the end token after each. meta.json lists every file with its
number of tokens, so a file cut short is found when the folder is opened, not in the middle of a run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .errors import UserError

Split = Literal["train", "val"]

META_NAME = "meta.json"

SHARD_TOKENS = 256 * 2**20
"""Most tokens in one file."""


@dataclass(frozen=True, eq=False)
class TokenShards:
    """One split of a prepared corpus, memory-mapped and read only."""

    folder: Path
    split: Split
    arrays: tuple[np.ndarray, ...]
    """The tokens of each file."""
    vocab_size: int
    end_token: int
    """Id that ends every document; the last token is one."""
    num_text_bytes: int
    """UTF-8 bytes of the documents' text: the denominator of bits per byte."""
    num_documents: int

    @classmethod
    def open(cls, folder: Path, split: Split) -> TokenShards:
        """Maps the files of one split; raises UserError where the folder is not a prepared one or a file is broken."""
        folder = Path(folder)
        meta = read_meta(folder)
        try:
            described = meta["splits"][split]
            dtype = np.dtype(described["dtype"]).newbyteorder("<")
            arrays = tuple(_map(folder, dtype, shard["file"], shard["tokens"]) for shard in described["shards"])
            return cls(
                folder=folder,
                split=split,
                arrays=arrays,
                vocab_size=meta["tokenizer"]["vocab_size"],
                end_token=meta["tokenizer"]["end_token"],
                num_text_bytes=described["text_bytes"],
                num_documents=described["documents"],
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder / META_NAME}: {error} is missing or malformed; {_remedy(folder)}") from error

    @property
    def num_tokens(self) -> int:
        return sum(len(array) for array in self.arrays)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) as int64; past the last token the stream begins anew."""
        pieces = []
        start %= self.num_tokens
        while count > 0:
            for array in self.arrays:
                piece = array[start : start + count]
                pieces.append(piece)
                count -= len(piece)
                start = max(0, start - len(array))
        return np.concatenate(pieces, dtype=np.int64)


def write_split(
    folder: Path, split: Split, tokens: Iterable[list[int]], vocab_size: int, shard_tokens: int = SHARD_TOKENS
) -> dict[str, Any]:
    """Writes a stream of token lists as files of at most `shard_tokens` tokens; returns their entry for meta.json."""
    dtype = np.dtype("uint16" if vocab_size <= 2**16 else "uint32")
    shards: list[dict[str, Any]] = []
    file = None
    try:
        for ids in tokens:
            rest = np.asarray(ids, dtype=dtype.newbyteorder("<"))
            while len(rest):
                if file is None or shards[-1]["tokens"] == shard_tokens:
                    if file is not None:
                        file.close()
                    shards.append({"file": f"{split}-{len(shards):05d}.bin", "tokens": 0})
                    file = (folder / shards[-1]["file"]).open("wb")
                now, rest = np.split(rest, [min(len(rest), shard_tokens - shards[-1]["tokens"])])
                file.write(now.tobytes())
                shards[-1]["tokens"] += len(now)
    finally:
        if file is not None:
            file.close()
    return {"tokens": sum(shard["tokens"] for shard in shards), "dtype": dtype.name, "shards": shards}


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json of a prepared folder; raises UserError where there is none or it is broken."""
    path = folder / META_NAME
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder} is not a prepared corpus (no {META_NAME}); make one: wastenot data prepare"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {_remedy(folder)}") from error
    if not isinstance(meta, dict):
        raise UserError(f"{path}: holds no JSON object; {_remedy(folder)}")
    return meta


def _map(folder: Path, dtype: np.dtype, name: str, num_tokens: int) -> np.ndarray:
    path = folder / name
    if not path.is_file():
        raise UserError(f"{path}: the token file is missing; {_remedy(folder)}")
    found, expected = path.stat().st_size, num_tokens * dtype.itemsize
    if found != expected:
        raise UserError(f"{path}: {found} bytes, {META_NAME} says {expected}; {_remedy(folder)}")
    return np.memmap(path, dtype=dtype, mode="r", shape=(num_tokens,))


def _remedy(folder: Path) -> str:
    return f"delete {folder} and prepare it again"
