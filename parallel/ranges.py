"""Ranges with names in the timeline of torch's profiler; where none is on they cost nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.profiler import record_function


def named(name: str) -> AbstractContextManager[Any]:
    """A range to enter, on the host's timeline."""
    return record_function(name) if torch.autograd._profiler_enabled() else nullcontext()  # pyright: ignore[reportPrivateImportUsage]
