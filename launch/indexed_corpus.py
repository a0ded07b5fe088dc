"""A prepared corpus from files of Megatron's datasets, and such files from a prepared corpus.

The ids are taken as they are, with the tokenizer that made them: it says which one ends a document, how many there
are, and what text they stand for, without which there are no bits per byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .config import DataConfig
from .corpus import FORMAT, NGRAM_BYTES, find_or_build, write_corpus
from .errors import UserError
from .indexed import IndexedTokens, write_indexed
from .shards import Split, TokenShards
from .tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, parse_bpe_size

__all__ = ["export_indexed", "prepare_indexed"]

# Bytes of the longest character of UTF-8: so many tokens may be needed for one.
_LONGEST_CHARACTER = 4


def prepare_indexed(prefixes: Mapping[Split | None, Path], config: DataConfig) -> Path:
    """The prepared folder of what `indexed.find_indexed` found; made on first use and found again later.

    Of one dataset the last `val_fraction` of each document's tokens is held out; a pair has its own held-out part.
    Raises UserError where `config.tokenizer` is not the one that the ids were made with, as far as one can see.
    """
    first = next(iter(prefixes.values()))
    if parse_bpe_size(config.tokenizer) is not None:
        raise UserError(
            f"data.tokenizer: {config.tokenizer} would be trained on text, and {first} holds tokens; name the "
            "tokenizer.json that they were made with"
        )
    tokenizer = byte_tokenizer() if config.tokenizer == "bytes" else load_tokenizer(config.tokenizer)
    opened: dict[Split | None, IndexedTokens] = {
        split: IndexedTokens.open(prefix) for split, prefix in prefixes.items()
    }
    hashes = {
        str(split): [_digest(each.prefix, suffix) for suffix in (".idx", ".bin")] for split, each in opened.items()
    }
    identity = [FORMAT, hashes, tokenizer.fingerprint(), config.val_fraction if None in opened else None]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    name = "".join(character if character.isalnum() else "_" for character in first.name)[:40]

    def build(part: Path) -> None:
        tokenizer.save(part)
        splits: tuple[Split, ...] = ("train", "val")
        shares = [_Share(split, opened, tokenizer, config.val_fraction) for split in splits]
        about = {"origin": f"tokens of {first}", "licence": "the user's own to know", "files": hashes}
        write_corpus(part, name, about, config, tokenizer, [(share, share) for share in shares])

    return find_or_build(Path(config.dir) / f"{name}-tokens-{digest}", build)


def export_indexed(folder: Path, prefix: Path) -> dict[str, Any]:
    """Writes both splits of a prepared folder as `PREFIX-train` and `PREFIX-val`; what was written, by split.

    Each document ends with the end token, as Megatron's own `--append-eod` does it.
    """
    opened = {split: TokenShards.open(folder, split) for split in ("train", "val")}
    return {
        split: write_indexed(prefix.with_name(f"{prefix.name}-{split}"), _ended(shards), shards.vocab_size)
        for split, shards in opened.items()
    }


class _Share:
    """The documents of one split as token lists, the end token after each; counts what went by."""

    def __init__(
        self, split: Split, opened: Mapping[Split | None, IndexedTokens], tokenizer: Tokenizer, val_fraction: float
    ) -> None:
        self.split: Split = split
        self.documents, self.text_bytes = 0, 0
        self.kept: list[bytes] = []
        self._source = opened.get(split) or opened[None]
        self._is_cut = None in opened
        self._tokenizer, self._val_fraction = tokenizer, val_fraction

    def __iter__(self) -> Iterator[list[int]]:
        self.documents = self.text_bytes = 0
        self.kept, room = [], NGRAM_BYTES[self.split]
        for ids in _documents(self._source, self._tokenizer):
            own = self._part(ids) if self._is_cut else ids
            if not own:
                continue
            text = self._tokenizer.decode(own).encode()
            self.documents += 1
            self.text_bytes += len(text)
            if room > 0:
                self.kept.append(text[:room])
                room -= len(text)
            yield [*own, self._tokenizer.end_token]

    def _part(self, ids: list[int]) -> list[int]:
        cut = len(ids) - int(len(ids) * self._val_fraction)
        # Not within a character: a text that begins with half of one has none there.
        while cut < len(ids) and self._tokenizer.decode(ids[cut : cut + _LONGEST_CHARACTER]).startswith("\ufffd"):
            cut += 1
        return ids[:cut] if self.split == "train" else ids[cut:]


def _documents(source: IndexedTokens, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Token lists without end tokens: where there is one, a document ends.

    Raises UserError at an id that the tokenizer does not have.
    """
    for number, ids in enumerate(source):
        low, high = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
        if low < 0 or high >= tokenizer.vocab_size:
            raise UserError(
                f"{source.prefix}: document {number} has the id {low if low < 0 else high}, and data.tokenizer "
                f"ids from 0 to {tokenizer.vocab_size - 1}; name the tokenizer.json that they were made with"
            )
        for piece in _split(ids, tokenizer.end_token):
            if len(piece):
                yield piece.tolist()


def _split(ids: np.ndarray, end_token: int) -> Sequence[np.ndarray]:
    """The stretches before, between and after end tokens."""
    ends = np.flatnonzero(ids == end_token)
    return [ids[first:end] for first, end in zip([0, *(ends + 1)], [*ends, len(ids)], strict=True)]


def _ended(shards: TokenShards) -> Iterator[np.ndarray]:
    """The documents of a split, each with its end token, wherever its files are cut."""
    rest: list[np.ndarray] = []
    for array in shards.arrays:
        first = 0
        for end in (np.flatnonzero(array == shards.end_token) + 1).tolist():
            yield np.concatenate([*rest, array[first:end]])
            rest, first = [], end
        rest.append(array[first:])


def _digest(prefix: Path, suffix: str) -> str:
    with prefix.with_name(prefix.name + suffix).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
