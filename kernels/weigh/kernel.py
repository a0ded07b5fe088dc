"""Combine weights in Triton: one program a token, forward and backward, instead of a dozen passes over [T, K]."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import launch
from ..operator import operator
from ..tiles import accumulator, dense_rows, power_of_two


@triton.jit
def _row(
    logits_ptr, experts_ptr, times_ptr, token, E, K, stride,
    SOFTMAX: tl.constexpr, ONCE: tl.constexpr, ACC: tl.constexpr, PAD_E: tl.constexpr, PAD_K: tl.constexpr,
):  # fmt: skip
    """A token's logits, and of its choices the expert, log(times * p), and times."""
    e, k = tl.arange(0, PAD_E), tl.arange(0, PAD_K)
    logits = tl.load(logits_ptr + token * stride + e, mask=e < E, other=float("-inf")).to(ACC)
    expert = tl.load(experts_ptr + token * K + k, mask=k < K, other=0)
    if ONCE:
        times = (k < K).to(tl.int64)
    else:
        times = tl.load(times_ptr + token * K + k, mask=k < K, other=0)
    chosen = tl.load(logits_ptr + token * stride + expert).to(ACC)
    if SOFTMAX:
        most = tl.max(logits, 0)
        log_p = chosen - most - tl.log(tl.sum(tl.exp(logits - most), 0))
    else:
        log_p = tl.minimum(chosen, 0.0) - tl.log(1 + tl.exp(-tl.abs(chosen)))
    return logits, expert, chosen, log_p + tl.log(tl.maximum(times, 1).to(ACC)), times


@triton.jit
def _shares(log_w, times, K, ALWAYS: tl.constexpr, PAD_K: tl.constexpr):
    """Log of the sum over choices that count, and each one's share of it (0 for the others)."""
    k = tl.arange(0, PAD_K)
    counted = (k < K) & ((times > 0) | (k < ALWAYS))
    masked = tl.where(counted, log_w, float("-inf"))
    most = tl.max(masked, 0)
    # Nobody is there: any finite value will do.
    most = tl.where(most == float("-inf"), 0.0, most)
    powers = tl.where(counted, tl.exp(masked - most), 0.0)
    total = tl.sum(powers, 0)
    total = tl.where(total == 0, 1.0, total)
    return most + tl.log(total), powers / total


@triton.jit
def weigh_fwd(
    logits_ptr,  # [T, E]
    experts_ptr,  # int64 [T, K]
    times_ptr,  # int64 [T, K], or anything where ONCE
    weights_ptr,  # [T, K]
    E,
    K,
    logits_stride,
    SOFTMAX: tl.constexpr,
    ONCE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ONE: tl.constexpr,
    ALWAYS: tl.constexpr,
    ACC: tl.constexpr,
    PAD_E: tl.constexpr,
    PAD_K: tl.constexpr,
):
    """As `naive.weigh`; ONE: K is 1 and weights are normalised; ONCE: every choice serves one route."""
    token = tl.program_id(0).to(tl.int64)
    _, _, _, log_w, times = _row(  # pyright: ignore[reportGeneralTypeIssues]
        logits_ptr, experts_ptr, times_ptr, token, E, K, logits_stride, SOFTMAX, ONCE, ACC, PAD_E, PAD_K
    )
    if ONE:
        weights = (times > 0).to(ACC)
    else:
        if NORMALIZE:
            total, _ = _shares(log_w, times, K, ALWAYS, PAD_K)  # pyright: ignore[reportGeneralTypeIssues]
            log_w = log_w - total
        weights = tl.exp(tl.where(times > 0, log_w, float("-inf")))
    k = tl.arange(0, PAD_K)
    tl.store(weights_ptr + token * K + k, weights, mask=k < K)


@triton.jit
def weigh_bwd(
    grad_ptr,  # [T, K]
    logits_ptr,  # [T, E]
    experts_ptr,  # int64 [T, K]
    times_ptr,  # int64 [T, K], or anything where ONCE
    grad_logits_ptr,  # [T, E]
    E,
    K,
    logits_stride,
    SOFTMAX: tl.constexpr,
    ONCE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ONE: tl.constexpr,
    DETACH: tl.constexpr,
    ALWAYS: tl.constexpr,
    ACC: tl.constexpr,
    PAD_E: tl.constexpr,
    PAD_K: tl.constexpr,
):
    """Gradient of the logits, through p of each choice and, unless DETACH, through the sum."""
    token = tl.program_id(0).to(tl.int64)
    logits, expert, chosen, log_w, times = _row(  # pyright: ignore[reportGeneralTypeIssues]
        logits_ptr, experts_ptr, times_ptr, token, E, K, logits_stride, SOFTMAX, ONCE, ACC, PAD_E, PAD_K
    )
    e, k = tl.arange(0, PAD_E), tl.arange(0, PAD_K)
    grad = tl.load(grad_ptr + token * K + k, mask=k < K, other=0.0).to(ACC)
    grad = tl.where(times > 0, grad, 0.0)
    if ONE:
        along = grad * tl.exp(log_w) / tl.maximum(times, 1).to(ACC)
    elif not NORMALIZE:
        along = grad * tl.exp(log_w)
    else:
        total, share = _shares(log_w, times, K, ALWAYS, PAD_K)  # pyright: ignore[reportGeneralTypeIssues]
        along = grad * tl.exp(tl.where(times > 0, log_w - total, float("-inf")))
        if not DETACH:
            along -= share * tl.sum(along, 0)
    # From log p to the logits.
    if SOFTMAX:
        powers = tl.exp(logits - tl.max(logits, 0))
        spread = powers / tl.sum(powers, 0) * tl.sum(along, 0)
    else:
        along = along / (1 + tl.exp(chosen))
        spread = tl.zeros([PAD_E], ACC)
    mine = (e[:, None] == expert[None, :]) & (k[None, :] < K)
    result = tl.sum(tl.where(mine, along[None, :], 0.0), 1) - spread
    tl.store(grad_logits_ptr + token * E + e, result, mask=e < E)


def _options(
    logits_TE: Tensor, K: int, once: bool, score: str, normalize: bool, always_counted: int
) -> dict[str, int | bool | tl.dtype]:
    return {
        "SOFTMAX": score == "softmax",
        "ONCE": once,
        "NORMALIZE": normalize,
        "ONE": normalize and K == 1,
        "ALWAYS": always_counted,
        "ACC": accumulator(logits_TE),
        "PAD_E": power_of_two(logits_TE.size(1)),
        "PAD_K": power_of_two(K),
        "num_warps": 1,
    }


def forward(
    logits_TE: Tensor, experts_TK: Tensor, times_TK: Tensor | None, score: str, normalize: bool, always_counted: int
) -> Tensor:
    """Weights [T, K] in the dtype of the logits."""
    weights_TK = torch.empty(experts_TK.shape, dtype=logits_TE.dtype, device=logits_TE.device)
    if weights_TK.numel():
        (T, K), logits_TE = experts_TK.shape, dense_rows(logits_TE)
        options = _options(logits_TE, K, times_TK is None, score, normalize, always_counted)
        experts_TK = experts_TK.contiguous()
        times = experts_TK if times_TK is None else times_TK.contiguous()
        launch(
            weigh_fwd, (T,), logits_TE, experts_TK, times, weights_TK,
            logits_TE.size(1), K, logits_TE.stride(0), **options,
        )  # fmt: skip
    return weights_TK


def differentiate(
    grad_TK: Tensor,
    logits_TE: Tensor,
    experts_TK: Tensor,
    times_TK: Tensor | None,
    score: str,
    normalize: bool,
    detach: bool,
    always_counted: int,
) -> Tensor:
    """Gradient of the logits [T, E]."""
    (T, K), E = experts_TK.shape, logits_TE.size(1)
    grad_TE = logits_TE.new_empty(T, E)
    if grad_TE.numel():
        logits_TE = dense_rows(logits_TE)
        options = _options(logits_TE, K, times_TK is None, score, normalize, always_counted)
        experts_TK = experts_TK.contiguous()
        times = experts_TK if times_TK is None else times_TK.contiguous()
        launch(
            weigh_bwd, (T,), grad_TK.contiguous(), logits_TE, experts_TK, times, grad_TE,
            E, K, logits_TE.stride(0), DETACH=detach, **options,
        )  # fmt: skip
    return grad_TE


def _forward(
    logits_TE: Tensor,
    experts_TK: Tensor,
    times_TK: Tensor | None,
    score: str,
    normalize: bool,
    detach: bool,
    always_counted: int,
) -> Tensor:
    return forward(logits_TE, experts_TK, times_TK, score, normalize, always_counted)


def _forward_fake(logits_TE, experts_TK, times_TK, score, normalize, detach, always_counted):
    return logits_TE.new_empty(experts_TK.shape)


def _differentiate_fake(grad_TK, logits_TE, experts_TK, times_TK, score, normalize, detach, always_counted):
    return logits_TE.new_empty(logits_TE.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _backward(ctx, grad_TK: Tensor):
    return _weigh_backward(grad_TK, *ctx.saved_tensors, *ctx.options), *[None] * 6


_weigh_backward = operator("weigh_backward", differentiate, _differentiate_fake)
_weigh = operator("weigh", _forward, _forward_fake, _save, _backward)


def weigh(
    logits_TE: Tensor,
    experts_TK: Tensor,
    times_TK: Tensor | None,
    score: str,
    normalize: bool,
    detach: bool,
    always_counted: int,
) -> Tensor:
    """As `naive.weigh`, where `times_TK` is; None: every choice serves one route. Differentiable once."""
    return _weigh(logits_TE, experts_TK, times_TK, score, normalize, detach, always_counted)
