"""NVIDIA's fused Adam, RMS norm and gradient clipping where its apex is really there, and torch's fused ones otherwise.

apex comes from source only, and its name says nothing: PyPI's `apex` is a login toolkit, and packages of names near it
raise at import what is no ImportError. So it is known by what is used of it, one feature at a time, and only asked for
where a CUDA device would run it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

T = TypeVar("T")
Adam = Callable[..., torch.optim.Optimizer]
"""(parameters or groups, *, lr, betas, eps) -> AdamW; a group's weight decay is its own."""
RMSNorm = Callable[[Tensor, Tensor, float], Tensor]
"""(x, weight_D, eps) -> x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Clip(NamedTuple):
    """The two passes over gradients that clipping takes."""

    norms: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    """2-norm of each tensor."""
    scale: Callable[[Sequence[Tensor], Tensor | float], None]
    """Multiplies each tensor in place."""


@dataclass(frozen=True, kw_only=True)
class Fused(Generic[T]):
    """What runs, and whose it is."""

    run: T
    source: str
    """What it is called where it comes from."""
    why: str
    """What makes it apex's, or keeps it from being."""


@functools.cache
def fused_adam(device: torch.device) -> Fused[Adam]:
    """AdamW over parameters on `device`; apex's takes plain tensors of 32 or 16 bits only (`apex_takes`)."""
    return _choose(device, _apex_adam, torch_adam, "torch.optim.AdamW(fused=True)")


@functools.cache
def fused_rms_norm(device: torch.device) -> Fused[RMSNorm]:
    """RMS norm of tensors on `device`."""
    return _choose(device, _apex_rms_norm, _torch_rms_norm, "torch.nn.functional.rms_norm")


@functools.cache
def fused_clip(device: torch.device) -> Fused[Clip]:
    """Norms and scaling of gradients on `device`."""
    return _choose(device, _apex_clip, _TORCH_CLIP, "torch._foreach_norm, torch._foreach_mul_")


def apex_takes(parameters: Iterable[Tensor]) -> bool:
    """Whether apex's Adam can train these: no DTensors, no fp64, none that is empty (see `_apex_clip`)."""
    plain = (Tensor, torch.nn.Parameter)
    return all(type(p) in plain and p.dtype in _FLOATS and p.numel() > 0 for p in parameters)


def _choose(device: torch.device, apex: Callable[[], tuple[T, str]], torchs: T, name: str) -> Fused[T]:
    if device.type != "cuda":
        return Fused(run=torchs, source=name, why="no CUDA device")
    # transformer_engine's empty package raises RuntimeError, a stranger's may raise anything.
    try:
        run, source = apex()
    except ModuleNotFoundError as error:
        absent = error.name == "apex"
        why = (
            "NVIDIA's apex is not installed" if absent else f"an apex that lacks {error.name}: not NVIDIA's, or in part"
        )
        return Fused(run=torchs, source=name, why=why)
    except Exception as error:
        text = " ".join(str(error).split())
        return Fused(run=torchs, source=name, why=f"an apex that does not work ({type(error).__name__}: {text})")
    return Fused(run=run, source=source, why="NVIDIA's apex is installed")


def torch_adam(groups: Any, **settings: Any) -> torch.optim.Optimizer:
    """torch's AdamW in one fused kernel, for what `apex_takes` not."""
    return torch.optim.AdamW(groups, foreach=False, fused=True, **settings)


def _torch_rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight_D.shape, weight_D, eps)


def _torch_norms(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return torch._foreach_norm(list(tensors)) if tensors else ()  # pyright: ignore[reportPrivateImportUsage]


def _torch_scale(tensors: Sequence[Tensor], factor: Tensor | float) -> None:
    if tensors:
        torch._foreach_mul_(list(tensors), factor)  # pyright: ignore[reportPrivateImportUsage]


_TORCH_CLIP = Clip(_torch_norms, _torch_scale)


def _apex_adam() -> tuple[Adam, str]:
    base: Any = importlib.import_module("apex.optimizers").FusedAdam
    # Its compiled part: without it FusedAdam is there, and fails when made.
    importlib.import_module("amp_C")

    class FusedAdamW(base):
        """FusedAdam with the state of torch's AdamW, so that a run goes on from the other's checkpoints."""

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            for group in self.param_groups:
                trained = [p for p in group["params"] if p.grad is not None]
                for p in trained:
                    if not self.state[p]:
                        zeros = functools.partial(torch.zeros_like, p, dtype=torch.float32)
                        step = torch.zeros((), dtype=torch.float32, device=p.device)
                        self.state[p] = {"step": step, "exp_avg": zeros(), "exp_avg_sq": zeros()}
                if trained:
                    # apex counts steps in its groups, which checkpoints do not hold.
                    group["step"] = int(self.state[trained[0]]["step"])
            super().step()
            for group in self.param_groups:
                group.pop("step", None)
                for p in group["params"]:
                    if p.grad is not None:
                        self.state[p]["step"] += 1
            return loss

    return cast(Adam, functools.partial(cast(Any, FusedAdamW), adam_w_mode=True)), "apex.optimizers.FusedAdam"


def _apex_rms_norm() -> tuple[RMSNorm, str]:
    fused = importlib.import_module("apex.normalization.fused_layer_norm").fused_rms_norm_affine
    importlib.import_module("fused_layer_norm_cuda")

    def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        # It would follow autocast into 16 bits; norms here are as wide as what they get.
        with torch.autocast(x.device.type, enabled=False):
            return fused(x, weight_D, tuple(weight_D.shape), eps)

    return rms_norm, "apex.normalization.fused_rms_norm_affine"


def _apex_clip() -> tuple[Clip, str]:
    apply = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier
    kernels = importlib.import_module("amp_C")
    l2norm, scale_by = kernels.multi_tensor_l2norm, kernels.multi_tensor_scale

    # apex starts what is pending with the last chunk of the last tensor, and an empty one has none.
    def norms(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        full = _not_empty(tensors)
        if not _alike(full):
            return _torch_norms(tensors)
        found = iter(apply(l2norm, _overflow(full), [full], True)[1].unbind())
        zero = torch.zeros((), device=full[0].device)
        return [next(found) if t.numel() else zero for t in tensors]

    def scale(tensors: Sequence[Tensor], factor: Tensor | float) -> None:
        full = _not_empty(tensors)
        if _alike(full):
            apply(scale_by, _overflow(full), [full, full], float(factor))
        else:
            _torch_scale(full, factor)

    return Clip(norms, scale), "amp_C.multi_tensor_l2norm, amp_C.multi_tensor_scale"


def _not_empty(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t for t in tensors if t.numel() > 0]


def _alike(tensors: Sequence[Tensor]) -> bool:
    """Whether apex takes them in one go."""
    return len({t.dtype for t in tensors}) == 1 and tensors[0].dtype in _FLOATS


def _overflow(tensors: Sequence[Tensor]) -> Tensor:
    """The flag that apex raises for numbers that are not finite; the norm says so too."""
    return torch.zeros(1, dtype=torch.int32, device=tensors[0].device)
