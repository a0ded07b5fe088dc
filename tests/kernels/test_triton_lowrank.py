"""Triton's pass over the second moment, and whole steps with it, equal their reference."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from wastenot.kernels.backend import Backend
from wastenot.kernels.lowrank import fused_moment, second_moment
from wastenot.kernels.lowrank.step import Step
from wastenot.parallel.optim import Adapprox

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FULL = os.environ.get("WASTENOT_GRID") == "full"
examples = settings(max_examples=200 if FULL else 15, deadline=None)
BETA2, EPS = 0.9, 1e-6


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@examples
@given(
    st.sampled_from([(1, 5, 3), (2, 33, 130), (3, 70, 257), (1, 300, 40)]), st.sampled_from([(1, 1), (3, 5), (17, 2)]),
    st.sampled_from(["none", "fp32", "bf16"]), st.booleans(), st.integers(0, 2**20),
)  # fmt: skip
@example((2, 300, 300), (16, 40), "fp32", True, 0)
def test_a_pass_equals_the_whole_second_moment(shape, columns, kind, apply, seed):
    (b, m, n), (k, c) = shape, columns
    q, u = draw(seed, b, m, k), draw(seed + 1, b, n, k)
    # Rows of other gradients and weights lie between: what a kernel is told of strides must be right.
    grads = [draw(seed + 2, 2 * b, m, n)[::2]]
    weights = [draw(seed + 3, b, m, 2 * n)[:, :, :n]]
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    momenta = [{} if kind == "none" else {"exp_avg": draw(seed + 4, b, m, n).to(dtype)}]
    moment = fused_moment(q, u, grads, weights, momenta, BETA2, EPS, "triton")
    assert moment is not None
    v = second_moment(q.double(), u.double(), grads[0].double(), BETA2)
    update = grads[0] / (v.sqrt() + EPS)
    x, y = draw(seed + 5, b, n, c), draw(seed + 6, b, m, c)
    y_found, updates_b, squares_b = moment.times(x, True, True)
    close(y_found, v @ x.double())
    close(updates_b, update.square().sum((1, 2)))
    close(squares_b, v.square().sum((1, 2)))
    close(moment.times(x)[0], v @ x.double())
    clip_b = torch.rand(b, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    average = clip_b.view(-1, 1, 1) * update
    if kind != "none":
        before = momenta[0]["exp_avg"].double()
        average = before + 0.1 * (average - before)
    stepped = 0.9 * weights[0].double() - 0.01 * average
    old = weights[0].clone()
    step = Step(clip_b, 1.0 if kind == "none" else 0.1, 0.9, 0.01) if apply else None
    close(moment.transposed_times(y, step), v.mT @ y.double())
    if not apply:
        assert weights[0].equal(old)
        return
    close(weights[0], stepped)
    if kind != "none":
        torch.testing.assert_close(momenta[0]["exp_avg"].double(), average.double(), rtol=1e-2, atol=1e-2) if (
            kind == "bf16"
        ) else close(momenta[0]["exp_avg"], average)


def close(found: Tensor, expected: Tensor) -> None:
    """To fp32 noise of the largest entry."""
    scale = expected.double().abs().max().clamp(min=1e-30)
    torch.testing.assert_close(found.double() / scale, expected.double() / scale, rtol=0, atol=2e-5)


def run(backend: Backend, shapes: list[tuple[int, ...]], steps: int, **options) -> tuple[Adapprox, list[nn.Parameter]]:
    parameters = [nn.Parameter(draw(i, *shape)) for i, shape in enumerate(shapes)]
    optimizer = Adapprox(parameters, weight_decay=0.1, lr=1e-2, betas=(0.9, 0.95), backend=backend, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(steps):
            for i, p in enumerate(parameters):
                p.grad = draw(100 * step + i, *p.shape) * (
                    1 + torch.arange(len(p), device=DEVICE).view(-1, *[1] * (p.dim() - 1))
                )
            optimizer.step()
    return optimizer, parameters


@pytest.mark.parametrize("momentum", ["fp32", "bf16", "int8", "none"])
@pytest.mark.parametrize("start", ["warm", "gaussian"])
def test_steps_equal_those_without_kernels(momentum, start):
    """Stacks of experts, single matrices that are stepped together, and searches for the rank on the way."""
    shapes = [(3, 40, 64), (48, 64), (48, 64), (64,)]
    options = {"momentum": momentum, "start": start, "rank_every": 2, "rounds": 2}
    (fast, found), (plain, expected) = (run(backend, shapes, 4, **options) for backend in ("triton", "torch"))
    for here, there in zip(fast.report(), plain.report(), strict=True):
        assert here.ranks == there.ranks
    for here, there in zip(found, expected, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-4 if momentum in ("fp32", "none") else 2e-3)
    assert any(max(each.ranks, default=0) > 1 for each in fast.report())


def test_steps_repeat_to_the_last_bit():
    (_, one), (_, other) = (run("triton", [(2, 40, 64)], 3) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(one, other, strict=True))


def test_what_kernels_do_not_take_goes_on_without_them():
    """Guidance, doubles, wide factors, a clamp of none."""
    q, u, g = draw(0, 1, 300, 70), draw(1, 1, 300, 70), [draw(2, 1, 300, 300)]
    assert fused_moment(q, u, g, g, [{}], BETA2, EPS, "triton") is None
    q, u = q[..., :2], u[..., :2]
    assert fused_moment(q, u, [g[0].mT], g, [{}], BETA2, EPS, "triton") is None
    assert fused_moment(q.double(), u.double(), [g[0].double()], [g[0].double()], [{}], BETA2, EPS, "triton") is None
    assert fused_moment(q, u, g, g, [{}], BETA2, EPS, "torch") is None
    for options in ({"guidance": True}, {"clamp": "none"}):
        (_, found), (_, expected) = (run(backend, [(40, 64)], 2, **options) for backend in ("triton", "torch"))
        assert found[0].equal(expected[0])
