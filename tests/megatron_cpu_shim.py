"""Lets Megatron-Core 0.16 train on CPU: a yardstick for tests and benchmarks, never part of the package.

Megatron-Core asks for CUDA by name: devices, streams, random states. `install` gives it a CUDA that is the
CPU. There are no real streams, so nothing overlaps: use it to compare numbers and like-for-like CPU
time only.

    install()                    # first: megatron.core reads torch.cuda while it is imported
    from megatron.core ...
    with devices_on_cpu():       # while a model is built and at its first step
        ...
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class _Stream:
    """A stream or event on which everything has already happened."""

    device = CPU
    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Stream) -> float:
        return 0.0

    def record_event(self, event: _Stream | None = None) -> _Stream:
        return event or _Stream()

    def _nothing(self, *args: Any) -> None:
        pass

    wait_stream = wait_event = synchronize = record = wait = _nothing


def _is_cuda(value: object) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.split(":")[0] == "cuda"


class devices_on_cpu(TorchFunctionMode):  # noqa: N801 (used as a context manager)
    """Turns every device="cuda" of a torch call into the CPU.

    It costs a Python call per torch function; Megatron spells such devices only while it builds and caches.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return func(*(CPU if _is_cuda(arg) else arg for arg in args), **kwargs)


def install() -> None:
    """Patches torch for the whole process, then imports and patches Megatron-Core. Cannot be undone."""
    _patch_torch()
    _patch_megatron()


def _returns(value: object) -> Callable[..., Any]:
    """A new function each time: torch.compile keys its rules on the objects it finds under torch's names."""
    return lambda *args, **kwargs: value


def _patch_torch() -> None:
    cuda: Any = torch.cuda
    cuda.Stream = cuda.Event = _Stream
    cuda.current_device = _returns(CPU)
    cuda.device_count = _returns(1)
    cuda.get_device_capability = _returns((9, 0))
    for name in ("current_stream", "default_stream"):
        setattr(cuda, name, _returns(_Stream()))
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(cuda, name, _returns(None))
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        setattr(cuda, name, _returns(0))
    for name in ("range_push", "range_pop"):
        setattr(cuda.nvtx, name, _returns(None))
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.get_rng_state = lambda *args: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)

    tensor: Any = torch.Tensor
    module: Any = torch.nn.Module
    tensor.cuda = lambda self, *args, **kwargs: self
    module.cuda = lambda self, *args, **kwargs: self
    tensor.record_stream = _returns(None)
    # Megatron's optimizers accept parameters by the name of their CUDA type.
    plain_type = tensor.type
    tensor.type = lambda self, *args, **kwargs: (
        # Within `devices_on_cpu` torch asks the type twice, the second time here.
        plain_type(self, *args, **kwargs)
        if args or kwargs
        else plain_type(self).replace("torch.cuda.", "torch.").replace("torch.", "torch.cuda.")
    )
    plain_barrier: Any = dist.barrier
    distributed: Any = dist
    distributed.barrier = lambda group=None, async_op=False, device_ids=None: plain_barrier(group, async_op)


def _patch_megatron() -> None:
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import grouped_gemm_util, moe_utils, token_dispatcher

    # Dropout and initialisation draw from the CPU's generator.
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # Without TransformerEngine 0.16.1 reads this name before it is bound.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    # Split sizes are only converted where they leave a GPU; gloo needs them as numpy too.
    token_dispatcher.maybe_move_tensor_to_cpu = _splits
    if getattr(grouped_gemm_util, "grouped_gemm", None) is None:
        grouped_gemm_util.grouped_gemm = types.SimpleNamespace(ops=types.SimpleNamespace(gmm=_grouped_mm))
        grouped_gemm_util.ops = grouped_gemm_util.grouped_gemm.ops
        grouped_gemm_util.grouped_gemm_is_available = lambda: True
        grouped_gemm_util.assert_grouped_gemm_is_available = lambda: None


def _splits(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _grouped_mm(a: torch.Tensor, b: torch.Tensor, batch_sizes: torch.Tensor, trans_b: bool = False) -> torch.Tensor:
    """The CUDA-only grouped_gemm package, as a loop: each group of rows times its matrix."""
    groups = zip(a.split(batch_sizes.tolist()), b, strict=True)
    return torch.cat([rows @ (matrix.t() if trans_b else matrix) for rows, matrix in groups])
