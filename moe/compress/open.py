"""A Hugging Face checkpoint, as it was or after plans were applied to it, opened for streaming.

Runs of ours are opened by `launch.streamed`, which knows their folders.
"""

from __future__ import annotations

from pathlib import Path

import torch

from .streamed import StreamedModel

__all__ = ["open_model"]


def open_model(path: Path | str, device: torch.device | str = "cpu") -> StreamedModel:
    """The model in the folder `path`, whose layers are read to `device`.

    Raises ValueError where there is no checkpoint of a known family or it is damaged, ImportError without transformers.
    """
    from .stock import StockModel

    return StockModel(path, device)
