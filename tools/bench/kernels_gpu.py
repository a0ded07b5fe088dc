"""Benchmark `kernels-gpu`: bandwidth of the row kernels on a CUDA device, and times of a whole MoE layer.

Every operation is held against its reference before it is timed; times are medians of CUDA events between which nothing
waits, with a cache that holds something else before each.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.combine import combine
from ...kernels.dispatch import permute
from ...moe.config import MoEConfig, RouterConfig
from ...moe.layer import MoELayer
from ...parallel.apply import parallelize
from ...parallel.mesh import single
from .machine import needs_cuda
from .report import Goal, Report, Row, at_least, at_most, environment

LEAST_BANDWIDTH = 0.8
"""Of a copy's, for dispatch and combine."""
MOST_ROUTING = 0.05
"""Part of a layer's forward pass."""
FORWARD_MS = {8192: 2.1, 16384: 3.9, 32768: 7.3}
BOTH_MS = {8192: 9.5, 16384: 15.7, 32768: 28.2}
"""Published for Liger's fused MoE on an H100, by tokens: 128 experts of width 768, top-8, d_model 2048, bf16."""
REPEATS = 30

HEADINGS = {"case": "case", "what": "what", "ms": "ms", "of_copy": "of a copy's bandwidth"}
NOTES = (
    "128 experts of width 768, top-8, d_model 2048, bf16, dropless; weights and tokens are random",
    "bandwidth: the fewest bytes that the operation moves, every row read and written once, over its time",
    "layer, both: forward and backward; their bars are what Liger published for an H100, on other machines",
)


@dataclass(frozen=True)
class Shape:
    """One layer."""

    tokens: int
    d_model: int = 2048
    experts: int = 128
    d_expert: int = 768
    top_k: int = 8


SHAPES = tuple(Shape(tokens) for tokens in FORWARD_MS)

Timer = Callable[[Callable[[], object]], float]
"""Seconds that a function takes."""


def run(*, quick: bool, command: str, say: Callable[[str], None]) -> Report:
    """Everything at every number of tokens; UserError where there is no CUDA device. There is nothing to leave out."""
    needs_cuda("kernels-gpu")
    device = torch.device("cuda", torch.cuda.current_device())
    time_of = cuda_timer(device)
    rows: list[Row] = []
    for shape in SHAPES:
        say(f"{shape.tokens} tokens on {torch.cuda.get_device_name(device)}")
        rows += rows_of(shape, device, time_of)
        torch.cuda.empty_cache()
    return Report(
        name="kernels-gpu",
        command=command,
        env=environment(["triton"]) | {"device": f"cuda: {torch.cuda.get_device_name()}"},
        rows=rows,
        goals=goals(rows),
        notes=[*NOTES],
        headings=HEADINGS,
    )


def rows_of(shape: Shape, device: torch.device, time_of: Timer) -> list[Row]:
    """Rows of one shape: copy, dispatch, combine, the layer, its router."""
    layer = make_layer(shape, device)
    x_BSD = torch.randn(1, shape.tokens, shape.d_model, device=device).bfloat16().requires_grad_()
    with torch.no_grad():
        _, routing = layer(x_BSD)
        handle = layer.dispatcher.plan(routing, 2 * shape.d_model)
    x_TD, position_TK, source_R = x_BSD.detach().flatten(0, 1), handle.position_TK, handle.source_N
    weights_TK, grad_TD = handle.weights_TK.detach(), torch.randn_like(x_TD)
    rows_RD = permute(x_TD, source_R, position_TK, False)
    check(x_TD, rows_RD, weights_TK, position_TK, source_R)
    row_bytes, T, R = 2 * shape.d_model, shape.tokens, source_R.numel()
    operations: dict[str, tuple[Callable[[], object], int]] = {
        "copy": (rows_RD.clone, 2 * R * row_bytes),
        "dispatch": (lambda: permute(x_TD, source_R, position_TK, False), (T + R) * row_bytes + 8 * R),
        "combine": (lambda: combine(rows_RD, weights_TK, position_TK, source_R, False), (T + R) * row_bytes + 12 * R),
    }
    leaves = [tensor.detach().requires_grad_() for tensor in (x_TD, rows_RD, weights_TK)]
    moved_RD = permute(leaves[0], source_R, position_TK, False)
    summed_TD = combine(leaves[1], leaves[2], position_TK, source_R, False)
    operations["dispatch backward"] = (
        lambda: torch.autograd.grad(moved_RD, leaves[0], rows_RD, retain_graph=True),
        (T + R) * row_bytes,
    )
    operations["combine backward"] = (
        lambda: torch.autograd.grad(summed_TD, leaves[1:], grad_TD, retain_graph=True),
        (T + 2 * R) * row_bytes,
    )
    found: list[Row] = [_bandwidth(shape, name, time_of(call), moved) for name, (call, moved) in operations.items()]
    copied = found[0]["bytes_per_second"]
    found = [{**row, "of_copy": row["bytes_per_second"] / copied} for row in found]

    def both() -> None:
        y_BSD, _ = layer(x_BSD)
        torch.autograd.grad(y_BSD, [x_BSD, *layer.parameters()], grad_TD.view_as(y_BSD))

    @torch.no_grad()
    def forward() -> object:
        return layer(x_BSD)[0]

    @torch.no_grad()
    def route() -> object:
        return layer.router(x_TD)

    for name, call in (("layer, forward", forward), ("layer, both", both), ("route", route)):
        found.append({**_where(shape, name), "ms": 1e3 * time_of(call)})
    return found


def make_layer(shape: Shape, device: torch.device) -> MoELayer:
    """A dropless layer in bf16 with an fp32 gate's arithmetic, its experts used about evenly."""

    def fill(name: str, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.normal_(0, 0.02, generator=generator)

    mesh = single(device)
    with torch.device("meta"):
        moe = MoEConfig(experts=shape.experts, d_expert=shape.d_expert)
        layer = MoELayer(shape.d_model, moe, RouterConfig(top_k=shape.top_k), mesh)
    parallelize(layer, mesh, fill, 0, torch.bfloat16)
    return layer


def check(x_TD: Tensor, rows_RD: Tensor, weights_TK: Tensor, position_TK: Tensor, source_R: Tensor) -> None:
    """Raises AssertionError where the kernels do not compute what their references do at this size."""
    assert rows_RD.equal(permute(x_TD, source_R, position_TK, False, backend="reference"))
    found, expected = (
        combine(rows_RD, weights_TK, position_TK, source_R, False, backend=backend) for backend in ("auto", "reference")
    )
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def cuda_timer(device: torch.device) -> Timer:
    """Times by events on `device`: medians, each round after the cache was filled with zeros."""
    scratch = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)

    def time_of(call: Callable[[], object]) -> float:
        for _ in range(3):
            call()
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPEATS)]
        for start, end in events:
            # Long enough that the host is ahead: what is timed is the device, not the starting of kernels.
            for _ in range(8):
                scratch.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(device)
        return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3

    return time_of


def goals(rows: list[Row]) -> list[Goal]:
    """The bars of the rows that are there."""
    found: list[Goal] = []
    for tokens in dict.fromkeys(row["tokens"] for row in rows):
        at = {row["what"]: row for row in rows if row["tokens"] == tokens}
        for name in ("dispatch", "combine", "dispatch backward", "combine backward"):
            metric = f"{tokens} tokens: bandwidth of {name} relative to a copy's"
            found.append(at_least(metric, at[name]["of_copy"], LEAST_BANDWIDTH))
        for name, bounds in (("layer, forward", FORWARD_MS), ("layer, both", BOTH_MS)):
            if tokens in bounds:
                found.append(at_most(f"{tokens} tokens: {name}, ms", at[name]["ms"], bounds[tokens]))
        part = at["route"]["ms"] / at["layer, forward"]["ms"]
        found.append(at_most(f"{tokens} tokens: part of the forward pass that routing takes", part, MOST_ROUTING))
    return found


def _bandwidth(shape: Shape, name: str, seconds: float, moved: int) -> dict[str, Any]:
    return {**_where(shape, name), "ms": 1e3 * seconds, "bytes_per_second": moved / seconds}


def _where(shape: Shape, name: str) -> dict[str, Any]:
    return {"case": f"T {shape.tokens}", "tokens": shape.tokens, "what": name, "dtype": "bf16"}
