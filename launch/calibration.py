"""Windows of text to profile and judge a checkpoint on: of a corpus or a file, in the checkpoint's own tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..moe.compress.calibration import Calibration, padded
from ..moe.compress.fingerprint import is_run
from .config import DataConfig
from .corpus import prepare
from .documents import read_documents
from .errors import UserError
from .run_folder import RunFolder
from .shards import Split, TokenShards
from .tokenizer import FILE_NAME, load_tokenizer

__all__ = ["calibration", "documents"]


def calibration(
    checkpoint: Path, data: str | None, split: Split, windows: int, seq_len: int | None, seed: int = 0
) -> Calibration:
    """`windows` windows of `seq_len` tokens from places of `split` that `seed` draws; none overlap, in text order.

    data: a named corpus, a text or JSONL file, or a prepared folder; None: what the run was trained on.
    seq_len: None: the run's, or 2048.

    Raises UserError where there is no such text, or less than one window of it.
    """
    config, tokenizer = _data_of(checkpoint, data)
    seq_len = seq_len or config.seq_len
    folder = prepare(config)
    if (folder / FILE_NAME).read_bytes() != tokenizer.read_bytes():
        raise UserError(
            f"{folder}: was prepared with another tokenizer than {checkpoint} has; prepare with {tokenizer}"
        )
    shards = TokenShards.open(folder, split)
    whole = shards.num_tokens // seq_len
    if whole == 0:
        raise UserError(f"{folder}: {shards.num_tokens} tokens are less than one window of {seq_len}; use shorter ones")
    chosen = np.sort(np.random.default_rng(seed).permutation(whole)[:windows])
    tokens_NS = torch.from_numpy(np.stack([shards.read(int(window) * seq_len, seq_len) for window in chosen]))
    name = f"{config.corpus}, {split}, {len(chosen)} windows of {seq_len}, seed {seed}"
    return Calibration(tokens_NS, torch.ones_like(tokens_NS, dtype=torch.bool), name)


def documents(checkpoint: Path, data: str, windows: int, seq_len: int | None) -> Calibration:
    """The beginnings of the first `windows` documents of a text or JSONL file, each in a window of its own, padded.

    Raises UserError where `data` cannot be read or holds no text.
    """
    config, file = _data_of(checkpoint, data)
    seq_len = seq_len or config.seq_len
    tokenizer = load_tokenizer(file.parent)
    texts = []
    for text in read_documents(Path(data)):
        if len(texts) == windows:
            break
        texts.append(tokenizer.encode(text))
    try:
        return padded(texts, seq_len, f"{data}, {len(texts)} documents of up to {seq_len}")
    except ValueError as error:
        raise UserError(str(error)) from error


def _data_of(checkpoint: Path, data: str | None) -> tuple[DataConfig, Path]:
    """The corpus in the tokens of `checkpoint`, and the file that holds its tokenizer."""
    if is_run(checkpoint):
        folder = RunFolder(checkpoint)
        own, config = folder.tokenizer / FILE_NAME, folder.load_config().data
        return (config if data is None else replace(config, corpus=data, tokenizer=str(own))), own
    own = checkpoint / FILE_NAME
    if not own.is_file():
        raise UserError(f"{checkpoint}: has no {FILE_NAME}, so no text can be read for it")
    if data is None:
        raise UserError(f"{checkpoint}: nothing says what it was trained on; name a corpus or a file with --data")
    return DataConfig(corpus=data, tokenizer=str(own), seq_len=2048), own
