"""Any trained model, a run of ours or a Hugging Face folder, opened for streaming by the name of its folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ..moe.compress.native import NativeModel
from ..moe.compress.open import open_model
from ..moe.compress.streamed import StreamedModel
from .errors import UserError
from .run_folder import RunFolder
from .saved_run import find_checkpoint
from .tokenizer import load_tokenizer

__all__ = ["open_streamed"]


def open_streamed(path: Path | str, device: torch.device | str = "cpu", step: int | None = None) -> StreamedModel:
    """The model in the folder `path`; of a run, that of `step` (None: the newest complete checkpoint).

    Raises UserError where there is none, a part of it is damaged, or transformers, which Hugging Face folders need, is
    missing.
    """
    folder = RunFolder(path)
    try:
        if not folder.config.is_file():
            return open_model(path, device)
        config = folder.load_config()
        model = config.model
        if not model.vocab_size:
            model = replace(model, vocab_size=load_tokenizer(folder.tokenizer).vocab_size)
        return NativeModel(model, config.router, find_checkpoint(folder, step), device)
    except UserError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise UserError(str(error)) from error
