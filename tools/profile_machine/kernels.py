"""The kernels that a device's figures are measured with: a model's own sizes, cut down where the device is slow.

matmul                  each projection of a layer and the output layer: its product and both gradients'
grouped                 the experts, both passes, less their activation's
attention               torch's scaled dot product, causal, forward and backward
memory                  norm, activation, residual, permutation, both passes, and a step of AdamW
peak, bandwidth, launch a large product, a large copy, and products of one number

Each counts what the cost model counts for it (`parallel/lynx/cost.py`), however often it goes over memory in fact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.dispatch import permute
from ...kernels.grouped_mm import grouped_swiglu
from ...kernels.norm import rms_norm
from ...parallel.lynx.layout import Layout
from ...parallel.lynx.routing_skew import Skew, load_of
from ...parallel.lynx.shape import ModelShape
from ...parallel.lynx.weights import Weight, last_weights, layer_weights, outer_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_ROTATED_BYTES = 64 * 2**20
"""Of operands that take turns, where copies of them fit in that: a layer does not find its weights in a cache."""
_MOST_COPIES = 4
_FEW = 256
"""Tokens of a product, or of an expert, that are left: with less, reading the matrix would be the bound. A guess."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How large a kernel may be. Guesses: some tens of milliseconds, and a small part of the memory."""

    flops: float
    bytes: float
    product: int
    """Side of the large product."""
    copy_bytes: int


def limits(device: torch.device, *, quick: bool) -> Limits:
    """For a CPU core or a GPU."""
    if device.type == "cuda":
        return Limits(flops=4e12, bytes=2**32, product=8192, copy_bytes=2**30)
    return Limits(flops=1e9 if quick else 4e9, bytes=2**28, product=1024 if quick else 2048, copy_bytes=2**27)


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """Something to time, and what the cost model counts for it."""

    name: str
    belongs: str
    """matmul, grouped, attention, attention_backward, memory, or peak, bandwidth, launch."""
    work: float
    """FLOPs, or bytes moved."""
    run: Callable[[], object]
    occurs: float = 1.0
    """In a step of a micro-batch, this rank's layers together."""
    launches: int = 1
    less: tuple[str, ...] = ()
    """Kernels that it contains and that are not its own."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the kernels are made for."""

    shape: ModelShape
    layout: Layout
    skew: Skew
    limits: Limits
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES.get(self.layout.compute, torch.bfloat16)

    @property
    def width(self) -> int:
        return self.dtype.itemsize

    def full(self, *size: int) -> Tensor:
        return torch.randn(size, device=self.device).to(self.dtype)


def kernels(sizes: Sizes) -> list[Kernel]:
    """All of them."""
    found = [*_peaks(sizes), *_projections(sizes), *_attention(sizes), *_memory(sizes)]
    if sizes.shape.experts is not None:
        found += _experts(sizes)
    return found


def _turning(operands: Sequence[Tensor], use: Callable[..., object]) -> Callable[[], object]:
    """`use` with operands of which copies take turns."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in operands)
    copies = max(1, min(_MOST_COPIES, _ROTATED_BYTES // max(1, size)))
    sets = [operands, *([tensor.clone() for tensor in operands] for _ in range(copies - 1))]
    number = count()
    return lambda: use(*sets[next(number) % len(sets)])


def _peaks(sizes: Sizes) -> Iterator[Kernel]:
    n, device = sizes.limits.product, sizes.device
    for dtype in sorted({sizes.dtype, torch.float32}, key=str):
        left, right = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        name = next(name for name, each in DTYPES.items() if each == dtype)
        yield Kernel(name=f"peak {name}", belongs="peak", work=2.0 * n**3, run=_turning([left, right], torch.mm))
    large = torch.empty(sizes.limits.copy_bytes, dtype=torch.uint8, device=device).zero_()
    into = torch.empty_like(large)
    yield Kernel(name="copy", belongs="bandwidth", work=2.0 * large.numel(), run=lambda: into.copy_(large))
    one = sizes.full(1, 1)
    yield Kernel(name="empty product", belongs="launch", work=0.0, run=lambda: torch.mm(one, one))
    yield Kernel(name="empty sum", belongs="launch", work=0.0, run=lambda: one + one)


def _projections(sizes: Sizes) -> Iterator[Kernel]:
    """Products of one size are timed once."""
    shape = sizes.shape
    occurs: dict[tuple[int, int], float] = {}
    names: dict[tuple[int, int], str] = {}

    def add(weight: Weight, times: float) -> None:
        if weight.columns > 1 and weight.role != "expert" and weight.name != "router":
            t = sizes.layout.tensor
            key = (
                weight.rows // (t if weight.split == "rows" else 1),
                weight.columns // (t if weight.split == "columns" else 1),
            )
            occurs[key] = occurs.get(key, 0.0) + times
            names.setdefault(key, weight.name)

    for kind in set(shape.kinds):
        for weight in layer_weights(shape, kind):
            add(weight, shape.kinds.count(kind))
    for weight in last_weights(shape):
        add(weight, 1.0)
    if shape.tied:
        add(Weight(name="head", rows=shape.vocab, columns=shape.d_model, split="rows", role="embedding"), 1.0)
    for size, times in occurs.items():
        name = names[size]
        tokens, rows, columns = _cut(sizes, sizes.layout.tokens, *size)
        # What was cut off counts too.
        times *= sizes.layout.tokens * size[0] * size[1] / (tokens * rows * columns)
        x_TN, w_MN, g_TM = sizes.full(tokens, columns), sizes.full(rows, columns), sizes.full(tokens, rows)
        for part, operands, use in (
            ("", (x_TN, w_MN), lambda x, w: x @ w.t()),
            (" gradient", (g_TM, w_MN), lambda g, w: g @ w),
            (" weight gradient", (g_TM, x_TN), lambda g, x: g.t() @ x),
        ):
            yield Kernel(
                name=f"{name}{part}",
                belongs="matmul",
                work=2.0 * tokens * rows * columns,
                run=_turning(operands, use),
                occurs=times,
            )


def _cut(sizes: Sizes, tokens: int, rows: int, columns: int) -> tuple[int, int, int]:
    """A product of tokens and a matrix within the limits: tokens go first, down to _FEW, then the longer side."""
    while 2.0 * tokens * rows * columns > sizes.limits.flops or rows * columns * sizes.width > sizes.limits.bytes:
        if tokens > _FEW:
            tokens = max(_FEW, tokens // 2)
        elif rows >= columns:
            rows //= 2
        else:
            columns //= 2
    return tokens, rows, columns


def _both(outputs: Callable[[], Tensor], inputs: Sequence[Tensor], grad: Tensor) -> Callable[[], object]:
    """A forward and its backward, whose gradients are dropped."""
    return lambda: torch.autograd.grad(outputs(), inputs, grad)


def _attention(sizes: Sizes) -> Iterator[Kernel]:
    """Fewer sequences, fewer heads, then shorter ones; the backward is timed with its forward, which is taken off."""
    shape, layout = sizes.shape, sizes.layout
    heads, kv_heads = shape.heads // layout.tensor, max(1, shape.kv_heads // layout.tensor)
    if shape.latent is not None:
        kv_heads = heads
    B, S, kept, kept_kv, dims = layout.micro_batch, layout.seq_len, heads, kv_heads, shape.qk_dim + shape.value_dim
    while float(B * kept * S * S * dims) > sizes.limits.flops:
        if B > 1:
            B //= 2
        elif kept_kv > 1:
            # Heads are cut in whole groups.
            kept, kept_kv = kept // kept_kv * (kept_kv // 2), kept_kv // 2
        elif S > _FEW:
            S //= 2
        else:
            break
    q, k = sizes.full(B, kept, S, shape.qk_dim), sizes.full(B, kept_kv, S, shape.qk_dim)
    v, grad = sizes.full(B, kept_kv, S, shape.value_dim), sizes.full(B, kept, S, shape.value_dim)
    for tensor in (q, k, v):
        tensor.requires_grad_()

    def attend() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=kept != kept_kv)

    flops = float(B * kept * S * S * dims)
    times = shape.layers * layout.micro_batch * heads * layout.seq_len**2 / (B * kept * S * S)
    yield Kernel(name="attention", belongs="attention", work=flops, run=attend, occurs=times)
    yield Kernel(
        name="attention both",
        belongs="attention_backward",
        work=2.5 * flops,
        run=_both(attend, (q, k, v), grad),
        occurs=times,
        less=("attention",),
    )


def _memory(sizes: Sizes) -> Iterator[Kernel]:
    shape, layout, device = sizes.shape, sizes.layout, sizes.device
    D, local = shape.d_model, layout.local_tokens
    T = max(1, min(local, int(sizes.limits.bytes / (32.0 * D))))
    scale = local / T
    residual, width = layout.residual_bytes, sizes.width
    dtype = torch.float32 if residual == 4 else sizes.dtype
    x_TD = torch.randn(T, D, device=device).to(dtype).requires_grad_()
    weight_D = torch.ones(D, device=device, requires_grad=True)

    def norm() -> Tensor:
        # As `moe/norm.py` does it.
        return rms_norm(x_TD.to(torch.float32), weight_D, 1e-6).to(sizes.dtype)

    numbers = float(T * D)
    times = 2 * shape.layers * scale
    moved = numbers * (width + residual) + numbers * (width + 2 * residual)
    grad_TD = sizes.full(T, D)
    yield Kernel(
        name="norm", belongs="memory", work=moved, run=_both(norm, (x_TD, weight_D), grad_TD), occurs=times, launches=2
    )
    branch_TD, stream_TD = sizes.full(T, D), x_TD.detach()
    yield Kernel(
        name="residual",
        belongs="memory",
        work=numbers * (2 * residual + width),
        run=lambda: stream_TD + branch_TD.to(dtype),
        occurs=times,
    )
    hidden, rows = shape.d_ff // layout.tensor, T
    if shape.experts is not None:
        hidden = shape.experts.d_expert
        received = load_of(shape.experts, layout, sizes.skew).fullest
        rows = max(1, min(received, int(sizes.limits.bytes / (12.0 * hidden * width))))
    yield replace(_activation(sizes, rows, hidden), occurs=float(shape.layers))
    if shape.experts is not None:
        K = shape.experts.top_k
        source_N = torch.randperm(T * K, device=device) // K
        position_TK = torch.argsort(source_N, stable=True).view(T, K)
        tokens_TD, grad_ND = sizes.full(T, D).requires_grad_(), sizes.full(T * K, D)
        yield Kernel(
            name="permute",
            belongs="memory",
            work=2 * numbers * (1 + K) * width,
            run=_both(lambda: permute(tokens_TD, source_N, position_TK, may_be_empty=False), (tokens_TD,), grad_ND),
            # As the weighted sum does it, too.
            occurs=2 * sum(kind == "moe" for kind in shape.kinds) * scale,
            launches=2,
        )
    yield _optimizer(sizes)


def _activation(sizes: Sizes, rows: int, hidden: int) -> Kernel:
    gate_up = sizes.full(rows, 2 * hidden).requires_grad_()
    grad = sizes.full(rows, hidden)

    def activate() -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    moved = 8.0 * rows * hidden * sizes.width
    return Kernel(name="activation", belongs="memory", work=moved, run=_both(activate, (gate_up,), grad), launches=2)


def _optimizer(sizes: Sizes) -> Kernel:
    """A step over as many numbers as this rank holds, as far as the limits allow."""
    shape, layout = sizes.shape, sizes.layout
    weights: list[Weight] = [weight for kind in shape.kinds for weight in layer_weights(shape, kind)]
    weights += outer_weights(shape)
    here = sum(w.numel / (layout.expert if w.role == "expert" else layout.tensor) for w in weights) / layout.pipeline
    number = int(max(1024, min(here, sizes.limits.bytes / 16)))
    parameters = [torch.nn.Parameter(torch.zeros(part, device=sizes.device)) for part in _parts(number)]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    step = torch.optim.AdamW(parameters, fused=True).step
    # Gradients are read, weights and two moments read and written; once a step, not once a micro-batch.
    return Kernel(
        name="AdamW", belongs="memory", work=28.0 * number, run=step, occurs=here / number / layout.micro_batches
    )


def _parts(number: int, most: int = 2**22) -> Iterator[int]:
    while number > 0:
        yield min(number, most)
        number -= most


def _experts(sizes: Sizes) -> Iterator[Kernel]:
    """Where they are too much: fewer experts, then fewer rows for each, then smaller matrices."""
    shape, layout = sizes.shape, sizes.layout
    assert shape.experts is not None
    D, hidden = shape.d_model, shape.experts.d_expert
    own = shape.experts.experts // layout.expert
    each = max(1, load_of(shape.experts, layout, sizes.skew).fullest // own)
    # Weights and their gradients.
    while (
        18.0 * own * each * D * hidden > 3 * sizes.limits.flops
        or 6.0 * own * D * hidden * sizes.width > sizes.limits.bytes
    ):
        if own > 1:
            own //= 2
        elif each > _FEW:
            each //= 2
        elif hidden <= D:
            D //= 2
        else:
            hidden //= 2
    rows = own * each
    x_RD, grad_RD = sizes.full(rows, D).requires_grad_(), sizes.full(rows, D)
    up, down = sizes.full(own, 2 * hidden, D).requires_grad_(), sizes.full(own, D, hidden).requires_grad_()
    ends = [rows * (i + 1) // own for i in range(own)]
    offsets_e = torch.tensor(ends, dtype=torch.int32, device=sizes.device)

    def apply() -> Tensor:
        return grouped_swiglu(x_RD, up, down, offsets_e)

    inside = replace(_activation(sizes, rows, hidden), name="activation of experts", belongs="none")
    yield inside
    yield Kernel(
        name="experts",
        belongs="grouped",
        work=18.0 * rows * D * hidden,
        run=_both(apply, (x_RD, up, down), grad_RD),
        occurs=float(shape.kinds.count("moe")),
        launches=6,
        less=(inside.name,),
    )
