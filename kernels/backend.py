"""Which implementation of a kernel runs.

`reference` is each kernel's plainest PyTorch (its `naive.py`), differentiated by autograd, in any dtype; `torch` is
vectorised PyTorch with hand-written backwards; `triton` is a Triton kernel where there is one and `torch` elsewhere.
`auto` takes the fastest that the device and dtype allow.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Literal, get_args

import torch

from .launching import interpreted

Backend = Literal["auto", "triton", "torch", "reference"]
Implementation = Literal["triton", "torch", "reference"]


def implementation(backend: Backend, device: torch.device) -> Implementation:
    """What runs on `device` where `backend` is asked for.

    Raises ValueError for a name that nobody implements, and for `triton` where it cannot run.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"kernels: {backend!r} is unknown; use one of {', '.join(get_args(Backend))}")
    if backend == "auto":
        return "triton" if device.type == "cuda" and _has_triton() else "torch"
    if backend == "triton":
        if not _has_triton():
            raise ValueError("kernels: triton is not installed; pip install 'wastenot[triton]', or use kernels: torch")
        if device.type != "cuda" and not interpreted():
            raise ValueError(
                f"kernels: triton needs a CUDA device and this is {device.type}; use kernels: auto, or set "
                "TRITON_INTERPRET=1 to have Triton's interpreter, which is slow"
            )
    return backend


# What `torch.compiler.assume_constant_result` does, without its import of the compiler, which takes a second.
implementation._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
