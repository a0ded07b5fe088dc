"""From a corpus to a prepared folder: token shards of both splits, the tokenizer, and a meta.json that says it all.

The last part of every document is held out. The folder's name carries a hash of everything that shapes it, so the
same question always finds the same folder. It is built beside its place and renamed into it: whatever stands there
is whole, however many processes ask at once and whichever of them is killed.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import functools
import hashlib
import json
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import Progress

from .config import DataConfig
from .documents import read_documents
from .errors import UserError
from .indexed import find_indexed
from .ngram import witten_bell_curve
from .shards import META_NAME, Split, TokenShards, write_split
from .sources import SOURCES, Source, read_texts
from .tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, parse_bpe_size, train_bpe

FORMAT = 1
"""Part of every folder's hash; raise it when cleaning, splitting or the layout changes."""

NGRAM_ORDERS = (1, 3, 5)

# The n-gram models sort 64-bit keys in memory: they are fitted on and asked about this much text at most.
NGRAM_BYTES: dict[Split, int] = {"train": 16 * 2**20, "val": 4 * 2**20}

# Text on which it is tried whether the tokenizer gives back what it was given.
ROUND_TRIP_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents that can be read again and again."""

    name: str
    identity: Any
    """JSON value that changes whenever the text does."""
    about: dict[str, Any]
    """What meta.json says of its origin and licence."""
    read: Callable[[], Iterable[str]]


def prepare(config: DataConfig, progress: bool = True) -> Path:
    """The prepared folder of `config.corpus`, made on first use and found again later.

    `config.corpus` is a named corpus, a text or JSONL file, files of Megatron's datasets (see indexed.py), or a folder
    prepared before, which brings its own tokenizer and split.
    `progress` shows bars on stderr where that is a terminal. Safe to call from several processes at once.
    Raises UserError where the corpus is unknown, cannot be fetched or is too short.
    """
    source = SOURCES.get(config.corpus)
    if source is not None:
        return _find_or_build(_named(source, Path(config.dir) / "downloads"), config, progress)
    indexed = find_indexed(config.corpus)
    if indexed:
        # Here: other corpora do not need it.
        from .indexed_corpus import prepare_indexed

        return prepare_indexed(indexed, config, progress)
    folder = Path(config.corpus)
    if folder.is_file():
        return prepare_files([folder], config, progress)
    if not folder.is_dir():
        near = difflib.get_close_matches(config.corpus, SOURCES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"use {', '.join(SOURCES)}, or a folder made by data prepare"
        raise UserError(f"data.corpus: {config.corpus} is neither a known corpus, a file nor a folder; {hint}")
    return _checked(folder)


def prepare_files(files: Sequence[str | Path], config: DataConfig, progress: bool = True) -> Path:
    """As `prepare`, for the user's own text or JSONL files (see documents.py); `config.corpus` is not looked at."""
    paths = [Path(file) for file in files]
    for path in paths:
        if path.is_dir():
            raise UserError(f"{path} is a folder; name its files, for example {path}/*.txt")
        if not path.is_file():
            near = difflib.get_close_matches(str(path), SOURCES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"use {', '.join(SOURCES)}, or text or JSONL files"
            raise UserError(f"{path}: no such file; {hint}")
    return _find_or_build(_from_files(paths), config, progress)


def _named(source: Source, downloads: Path) -> Corpus:
    return Corpus(
        name=source.name,
        identity=source.sha256,
        about={"origin": source.origin, "licence": source.licence, "sha256": source.sha256},
        read=functools.cache(lambda: read_texts(source, downloads)),
    )


def _from_files(paths: Sequence[Path]) -> Corpus:
    hashes = []
    for path in paths:
        with path.open("rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    return Corpus(
        name="".join(character if character.isalnum() else "_" for character in paths[0].stem)[:40],
        identity=[[path.suffix.lower(), digest] for path, digest in zip(paths, hashes, strict=True)],
        about={
            "origin": "the user's own files",
            "licence": "the user's own to know",
            "files": [{"name": path.name, "sha256": digest} for path, digest in zip(paths, hashes, strict=True)],
        },
        read=lambda: (text for path in paths for text in read_documents(path)),
    )


def _find_or_build(corpus: Corpus, config: DataConfig, progress: bool) -> Path:
    """The folder of this corpus, tokenizer and split: found, or built by one process while the others wait."""
    tokenizer_name, tokenizer_identity = _identify_tokenizer(config.tokenizer)
    identity = {
        "format": FORMAT,
        "corpus": corpus.identity,
        "tokenizer": tokenizer_identity,
        "val_fraction": config.val_fraction,
    }
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    folder = Path(config.dir) / f"{corpus.name}-{tokenizer_name}-{digest}"

    def build(part: Path) -> None:
        with progress_bars(progress) as bars:
            _build(part, corpus, config, bars)

    return find_or_build(folder, build)


def find_or_build(folder: Path, build: Callable[[Path], None]) -> Path:
    """The prepared `folder`: found, or filled by `build`, in one process while others wait, and then put there whole.

    Raises UserError where it cannot be written, or is none in the end.
    """
    parent = folder.parent
    try:
        if not folder.is_dir():
            parent.mkdir(parents=True, exist_ok=True)
            with _locked(parent / f".{folder.name}.lock") as alone:
                if not folder.is_dir():
                    _build_beside(folder, alone, build)
    except OSError as error:
        raise UserError(f"data.dir: cannot prepare {folder.name} in {parent} ({error})") from error
    return _checked(folder)


def _checked(folder: Path) -> Path:
    """The folder itself, once both splits have opened."""
    TokenShards.open(folder, "train")
    TokenShards.open(folder, "val")
    return folder


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Holds an advisory lock, which the system drops when its holder dies, however it dies.

    Yields False on a file system without locks: there several may build, and the rename lets one of them through.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True


def _build_beside(folder: Path, alone: bool, build: Callable[[Path], None]) -> None:
    """Builds in a folder of another name and renames it; `alone` says that leftovers belong to nobody."""
    if alone:
        for leftover in folder.parent.glob(f".{folder.name}.*.part"):
            shutil.rmtree(leftover)
    part = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.part"
    part.mkdir()
    try:
        build(part)
        try:
            part.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def progress_bars(progress: bool) -> Progress:
    """Bars on stderr, where that is a terminal and `progress` asks for them; none otherwise."""
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not (progress and sys.stderr.isatty()))


def _build(folder: Path, corpus: Corpus, config: DataConfig, bars: Progress) -> None:
    train, val = (_Part(corpus, split, config.val_fraction, bars) for split in ("train", "val"))
    tokenizer = _make_tokenizer(config.tokenizer, train)
    tokenizer.save(folder)
    parts = [(part, tokenizer.encode_documents(part)) for part in (train, val)]
    for part, _ in parts:
        part.doing = f"tokenizing {corpus.name}, {part.split}"
    write_corpus(folder, corpus.name, corpus.about, config, tokenizer, parts, bars)


class Share(Protocol):
    """What one split's tokens came from, known once they were read."""

    split: Split
    documents: int
    text_bytes: int
    kept: list[bytes]
    """The text's beginnings, NGRAM_BYTES of them."""


def write_corpus(
    folder: Path,
    name: str,
    about: Mapping[str, Any],
    config: DataConfig,
    tokenizer: Tokenizer,
    parts: Sequence[tuple[Share, Iterable[list[int]]]],
    bars: Progress | None = None,
) -> None:
    """Fills `folder`: the tokens of `parts`, which are training and held-out split, and meta.json.

    Raises UserError where a split is without text.
    """
    splits = {}
    for part, tokens in parts:
        entry = write_split(folder, part.split, tokens, tokenizer.vocab_size)
        if not part.text_bytes:
            raise UserError(
                f"{name}: val_fraction {config.val_fraction:g} leaves the {part.split} split without text; "
                "use longer texts or another val_fraction"
            )
        splits[part.split] = {"documents": part.documents, "text_bytes": part.text_bytes, **entry}
    if bars is not None:
        bars.add_task("fitting n-gram models", total=None)
    train, val = (part for part, _ in parts)
    curve = witten_bell_curve(train.kept, val.kept, max(NGRAM_ORDERS))
    sample = val.kept[0][:ROUND_TRIP_BYTES].decode(errors="ignore")
    meta = {
        "format": FORMAT,
        "corpus": name,
        **about,
        "val_fraction": config.val_fraction,
        "tokenizer": {
            "kind": config.tokenizer,
            "vocab_size": tokenizer.vocab_size,
            "end_token": tokenizer.end_token,
            "lossless": tokenizer.decode(tokenizer.encode(sample)) == sample,
        },
        "splits": splits,
        "ngram_bits_per_byte": {str(order): curve[order] for order in NGRAM_ORDERS},
        "ngram_text_bytes": {part.split: sum(map(len, part.kept)) for part in (train, val)},
    }
    (folder / META_NAME).write_text(json.dumps(meta, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class _Part:
    """The documents' shares of one split, as often as they are asked for; counts what went by last time."""

    def __init__(self, corpus: Corpus, split: Split, val_fraction: float, bars: Progress) -> None:
        self.split: Split = split
        self.doing = f"reading {corpus.name}"
        self.documents = 0
        self.text_bytes = 0
        self.kept: list[bytes] = []
        """The first NGRAM_BYTES of them."""
        self._corpus = corpus
        self._val_fraction = val_fraction
        self._bars = bars

    def __iter__(self) -> Iterator[str]:
        task = self._bars.add_task(self.doing, total=self.text_bytes or None)
        self.documents = self.text_bytes = 0
        self.kept = []
        room = NGRAM_BYTES[self.split]
        for text in self._corpus.read():
            train, val = split_document(text, self._val_fraction)
            share = train if self.split == "train" else val
            if not share:
                continue
            self.documents += 1
            self.text_bytes += len(share)
            if room > 0:
                self.kept.append(share[:room])
                room -= len(share)
            yield share.decode()
            self._bars.advance(task, len(share))
        self._bars.remove_task(task)


def split_document(text: str, val_fraction: float) -> tuple[bytes, bytes]:
    """The UTF-8 bytes of a text as (train, val); val is the last `val_fraction` of them, cut between characters."""
    data = text.encode()
    cut = len(data) - int(len(data) * val_fraction)
    # 10xxxxxx continues a character.
    while cut < len(data) and data[cut] & 0xC0 == 0x80:
        cut += 1
    return data[:cut], data[cut:]


def _identify_tokenizer(spec: str) -> tuple[str, str]:
    """A short name for the folder, and a text that changes whenever the tokenizer does."""
    size = parse_bpe_size(spec)
    if size is not None:
        return f"bpe{size}", f"bpe:{size}"
    if spec == "bytes":
        return spec, spec
    return "hf", load_tokenizer(spec).fingerprint()


def _make_tokenizer(spec: str, train: Iterable[str]) -> Tokenizer:
    size = parse_bpe_size(spec)
    if size is not None:
        return train_bpe(train, size)
    return byte_tokenizer() if spec == "bytes" else load_tokenizer(spec)
