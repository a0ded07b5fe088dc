"""Which implementation of a kernel runs.

`reference` is each kernel's plainest PyTorch (its `naive.py`), differentiated by autograd, in any dtype;
`torch` is vectorised PyTorch with hand-written backwards. `auto` takes the fastest the device and dtype allow.
"""

from __future__ import annotations

from typing import Literal, get_args

Backend = Literal["auto", "torch", "reference"]


def is_reference(backend: Backend) -> bool:
    """Whether `backend` asks for the reference; raises ValueError for a name that nobody implements."""
    if backend not in get_args(Backend):
        raise ValueError(f"kernels: {backend!r} is unknown; use one of {', '.join(get_args(Backend))}")
    return backend == "reference"
