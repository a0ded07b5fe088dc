"""Text that a trained model wrote, as a prepared corpus: data in the model's own distribution, of nobody's licence.

Recovery and calibration want text like that which a model was trained on, and that is often not to be had. As in
"Beware of Calibration Data for Pruning LLMs" (arXiv 2410.17711): continue short beginnings of real documents, score
every text by the model's own perplexity, and leave out the worst.

Deviation: neither a top-k, a top-p nor a penalty for repetitions. Distillation asks for the teacher's distribution.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..moe.attention import KVCache
from ..moe.generate import generate
from ..parallel.apply import seed_of
from ..parallel.manifest import FILE
from .corpus import find_or_build
from .data import IGNORED
from .errors import UserError
from .saved_run import SavedRun
from .shards import META_NAME, TokenShards, read_meta, write_split
from .tokenizer import FILE_NAME

__all__ = ["Writing", "self_generated", "write_documents"]

_PREFIX = 2
"""Tokens of real text that a document begins with, as in the paper's code: without, all of them begin alike."""

_BATCH = 32
"""Documents written at a time. A guess; it decides which random numbers each document draws, so it is no option."""


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How a model writes a corpus."""

    tokens: int
    """At least so many are kept."""
    temperature: float = 1.0
    """1 draws from the model's own odds, less from likelier text."""
    seed: int = 0
    keep: float = 0.8
    """Part of the documents that stays: those of the lowest perplexity."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens: {self.tokens} is too small; use 1 or more")
        if self.temperature <= 0:
            raise ValueError(f"temperature: {self.temperature} is not positive; use for example 1.0")
        if self.seed < 0:
            raise ValueError(f"seed: {self.seed} is negative; use 0 or more")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep: {self.keep} is outside (0, 1]; use {1.0 if self.keep > 1 else 0.8}")


def self_generated(
    saved: SavedRun, corpus: Path, writing: Writing, progress: Callable[[int, int], None] = lambda done, total: None
) -> Path:
    """A prepared corpus whose training split `saved` wrote, and whose held-out split is that of `corpus`.

    corpus: a prepared folder in the run's tokens; its training split gives the beginnings. Stands in `data.dir` of the
    run under a name that tells model and options apart: asked again, it is found. `progress` hears (tokens kept, tokens
    wanted). The same options give the same tokens. Raises UserError where `corpus` has another tokenizer.
    """
    if (corpus / FILE_NAME).read_bytes() != (saved.folder.tokenizer / FILE_NAME).read_bytes():
        raise UserError(
            f"{corpus} was prepared with another tokenizer than {saved.folder.path} was trained with; prepare its "
            f"texts with --tokenizer {saved.folder.tokenizer / FILE_NAME}"
        )
    question = [*vars(writing).items(), read_meta(corpus), (saved.checkpoint / FILE).read_text(encoding="utf-8")]
    digest = hashlib.sha256(json.dumps(question).encode()).hexdigest()[:12]

    def build(part: Path) -> None:
        documents = write_documents(saved, TokenShards.open(corpus, "train"), writing, progress)
        _write(part, saved, corpus, documents, writing)

    return find_or_build(Path(saved.config.data.dir) / f"self-{digest}", build)


def write_documents(
    saved: SavedRun,
    beginnings: TokenShards,
    writing: Writing,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[int]]:
    """Documents that `saved` wrote, without end tokens: at most `data.seq_len` tokens each, in the order of writing.

    Written in batches, until the part `writing.keep` of lowest perplexity makes up `writing.tokens`: that part.
    """
    written: list[tuple[float, int, list[int]]] = []
    kept: list[list[int]] = []
    while sum(map(len, kept)) < writing.tokens:
        fresh = _continued(saved, beginnings, writing, len(written))
        written += zip(_mean_nats(saved, fresh), itertools.count(len(written)), fresh, strict=False)
        best = sorted(written)[: math.ceil(writing.keep * len(written))]
        kept = [document for _, _, document in sorted(best, key=lambda each: each[1])]
        progress(min(sum(map(len, kept)), writing.tokens), writing.tokens)
    return kept


def _continued(saved: SavedRun, beginnings: TokenShards, writing: Writing, first: int) -> list[list[int]]:
    """Documents number `first` and on, one batch."""
    seed, seq_len = seed_of("self-generated", writing.seed, first), saved.config.data.seq_len
    places = np.random.default_rng(seed).integers(beginnings.num_tokens, size=_BATCH)
    prefixes = [_until_end(beginnings.read(int(place), _PREFIX).tolist(), beginnings.end_token) for place in places]
    made = generate(
        saved.model,
        # Documents follow an end token in training: after one, a document begins.
        [[beginnings.end_token, *prefix] for prefix in prefixes],
        max_new_tokens=max(1, seq_len - _PREFIX),
        temperature=writing.temperature,
        seed=seed,
        end_token=beginnings.end_token,
    )
    return [[*prefix, *new] for prefix, new in zip(prefixes, made, strict=True)]


def _until_end(tokens: list[int], end_token: int) -> list[int]:
    return tokens[: tokens.index(end_token)] if end_token in tokens else tokens


@torch.no_grad()
def _mean_nats(saved: SavedRun, documents: Sequence[list[int]]) -> list[float]:
    """The model's own loss per token of each document; of an empty one the loss of ending at once."""
    model, end = saved.model, saved.tokenizer.end_token
    device = next(model.parameters()).device
    texts = [document or [end] for document in documents]
    longest = max(map(len, texts))
    inputs_BS = torch.tensor([[end, *text[:-1]] + [end] * (longest - len(text)) for text in texts], device=device)
    targets_BS = torch.tensor([[*text] + [IGNORED] * (longest - len(text)) for text in texts], device=device)
    # A cache makes the pass dropless, as writing was: a score must not depend on the others in the batch.
    padding_B = torch.zeros(len(texts), dtype=torch.int64, device=device)
    cache = KVCache.empty(model.config, padding_B, longest, next(model.parameters()).dtype)
    hidden_BSD = model(inputs_BS, cache).hidden_BSD
    sums = [model.loss_sum(hidden_BSD[i : i + 1], targets_BS[i : i + 1]).item() for i in range(len(texts))]
    return [total / len(text) for total, text in zip(sums, texts, strict=True)]


def _write(part: Path, saved: SavedRun, corpus: Path, documents: list[list[int]], writing: Writing) -> None:
    """Fills the folder `part`: `documents` as its training split, the rest from `corpus`."""
    meta: dict[str, Any] = read_meta(corpus)
    end_token = saved.tokenizer.end_token
    entry = write_split(part, "train", ([*tokens, end_token] for tokens in documents), meta["tokenizer"]["vocab_size"])
    text_bytes = sum(len(saved.tokenizer.decode(tokens).encode()) for tokens in documents)
    held_out = meta["splits"]["val"]
    for name in [shard["file"] for shard in held_out["shards"]] + [
        path.name for path in corpus.glob("tokenizer*.json")
    ]:
        shutil.copyfile(corpus / name, part / name)
    meta |= {
        "corpus": "self-generated",
        "origin": f"written by {saved.folder.path} at step {saved.step}; held-out text of {meta['corpus']}",
        "writing": vars(writing),
        "splits": {"train": {"documents": len(documents), "text_bytes": text_bytes, **entry}, "val": held_out},
    }
    (part / META_NAME).write_text(json.dumps(meta, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
