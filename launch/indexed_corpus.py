"""A prepared corpus from files of Megatron's datasets, and such files from a prepared corpus.

The ids are taken as they are, with the tokenizer that made them: it says which one ends a document, how many there
are, and what text they stand for, without which there are no bits per byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from .config import DataConfig
from .corpus import FORMAT, NGRAM_BYTES, find_or_build, progress_bars, write_corpus
from .errors import UserError
from .indexed import IndexedTokens, check_free, remove, targets_of, write_indexed
from .shards import Split, TokenShards
from .tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, parse_bpe_size

__all__ = ["export_indexed", "prepare_indexed"]

# Bytes of the longest character of UTF-8: so many tokens may be needed for one.
_LONGEST_CHARACTER = 4

# Of a .bin is read, to know it again: its first and last block and so many between, all of one of 4 MiB or less.
_BLOCK_BYTES = 64 * 2**10
_BLOCKS_BETWEEN = 64


def prepare_indexed(prefixes: Mapping[Split | None, Path], config: DataConfig, progress: bool = True) -> Path:
    """The prepared folder of what `indexed.find_indexed` found; made on first use and found again later.

    Files are known again by all of the .idx, and the size and some blocks of the .bin. `progress` as for
    `corpus.prepare`.
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
    known_by = {str(split): _identity(each.prefix) for split, each in opened.items()}
    identity = [FORMAT, known_by, tokenizer.fingerprint(), config.val_fraction if None in opened else None]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    name = "".join(character if character.isalnum() else "_" for character in first.name)[:40]

    def build(part: Path) -> None:
        tokenizer.save(part)
        splits: tuple[Split, ...] = ("train", "val")
        about = {"origin": f"tokens of {first}", "licence": "the user's own to know", "files": known_by}
        with progress_bars(progress) as bars:
            shares = [_Share(split, opened, tokenizer, config.val_fraction, bars) for split in splits]
            write_corpus(part, name, about, config, tokenizer, [(share, share) for share in shares], bars)

    return find_or_build(Path(config.dir) / f"{name}-tokens-{digest}", build)


def export_indexed(folder: Path, prefix: Path) -> dict[str, Any]:
    """Writes both splits of a prepared folder as `PREFIX-train` and `PREFIX-val`; what was written, by split.

    Each document ends with the end token, as Megatron's own `--append-eod` does it. Where this raises, as UserError
    where one of the four files is there already, it leaves none.
    """
    opened = {prefix.with_name(f"{prefix.name}-{split}"): TokenShards.open(folder, split) for split in ("train", "val")}
    for target in opened:
        check_free(target)
    written: dict[str, Any] = {}
    try:
        for target, shards in opened.items():
            counts = write_indexed(target, _ended(shards), shards.vocab_size)
            written[shards.split] = counts
    except BaseException:
        for target, shards in opened.items():
            if shards.split in written:
                remove(targets_of(target))
        raise
    return written


class _Share:
    """The documents of one split as token lists, the end token after each; counts what went by."""

    def __init__(
        self,
        split: Split,
        opened: Mapping[Split | None, IndexedTokens],
        tokenizer: Tokenizer,
        val_fraction: float,
        bars: Progress,
    ) -> None:
        self.split: Split = split
        self.documents, self.text_bytes = 0, 0
        self.kept: list[bytes] = []
        self._source = opened[split if split in opened else None]
        self._is_cut = None in opened
        self._tokenizer, self._val_fraction, self._bars = tokenizer, val_fraction, bars

    def __iter__(self) -> Iterator[list[int]]:
        self.documents = self.text_bytes = 0
        self.kept, room = [], NGRAM_BYTES[self.split]
        doing = f"reading {self._source.prefix.name}, {self.split}"
        arrays = self._bars.track(self._source, total=len(self._source), description=doing)
        for ids in _documents(arrays, self._source.prefix, self._tokenizer):
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
        if not self.text_bytes and not self._is_cut:
            raise UserError(f"{self._source.prefix}.idx: holds no text; a pair needs some in both its parts")

    def _part(self, ids: list[int]) -> list[int]:
        cut = len(ids) - int(len(ids) * self._val_fraction)
        # Not within a character: a text that begins with half of one has none there.
        while cut < len(ids) and self._tokenizer.decode(ids[cut : cut + _LONGEST_CHARACTER]).startswith("\ufffd"):
            cut += 1
        return ids[:cut] if self.split == "train" else ids[cut:]


def _documents(arrays: Iterable[np.ndarray], prefix: Path, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Token lists without end tokens: where there is one, a document ends.

    Raises UserError at an id that the tokenizer does not have.
    """
    for number, ids in enumerate(arrays):
        low, high = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
        if low < 0 or high >= tokenizer.vocab_size:
            raise UserError(
                f"{prefix}: document {number} has the id {low if low < 0 else high}, and data.tokenizer "
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


def _identity(prefix: Path) -> dict[str, Any]:
    """What changes whenever the documents do, but for ids that are changed in place between the blocks."""
    ids, index = targets_of(prefix)
    with index.open("rb") as file:
        whole = hashlib.file_digest(file, "sha256").hexdigest()
    size = ids.stat().st_size
    span, steps = max(size - _BLOCK_BYTES, 0), _BLOCKS_BETWEEN + 1
    blocks = hashlib.sha256()
    with ids.open("rb") as file:
        for step in range(steps + 1):
            file.seek(span * step // steps)
            blocks.update(file.read(_BLOCK_BYTES))
    return {"idx_sha256": whole, "bin_bytes": size, "bin_blocks_sha256": blocks.hexdigest()}
