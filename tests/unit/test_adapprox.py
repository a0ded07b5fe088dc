"""Adapprox against its equations: exact at full rank, its own iteration at others, and safe whatever it is fed."""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from wastenot.kernels.lowrank import SecondMoment, second_moment
from wastenot.kernels.lowrank.vectorised import Tile
from wastenot.launch.peak_memory import peak_bytes
from wastenot.parallel.optim import Adapprox
from wastenot.parallel.optim import srsi as srsi_module
from wastenot.parallel.optim.momentum import new_momentum, read, write
from wastenot.parallel.optim.noise import gaussian
from wastenot.parallel.optim.rank import growth, is_factored, max_rank, search
from wastenot.parallel.optim.srsi import orthonormal, srsi

pytestmark = pytest.mark.usefixtures("one_thread")

FULL = os.environ.get("WASTENOT_GRID") == "full"
examples = settings(max_examples=200 if FULL else 25, deadline=None)
seeds = st.integers(0, 2**31)
CPU = torch.device("cpu")


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def skewed(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Gradients of which some rows and columns are far larger than others."""
    grad = draw(seed, *shape, dtype=dtype)
    if len(shape) > 1:
        grad *= draw(seed + 1, *shape[:-1], 1, dtype=dtype).exp() * draw(seed + 2, shape[-1], dtype=dtype).exp()
    return 1e-3 * grad


def steps(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], count: int, first: int = 0) -> None:
    """Steps on gradients that depend on the number of the step alone."""
    for step in range(first, first + count):
        for i, parameter in enumerate(parameters):
            parameter.grad = skewed(100 * step + 10 * i, *parameter.shape, dtype=parameter.dtype)
        optimizer.step()


def moments(state: dict[str, Tensor]) -> Tensor:
    return state["Q"] @ state["U"].mT


def fresh(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(draw(i, *shape, dtype=dtype)) for i, shape in enumerate(shapes)]


class Exact:
    """The equations of A2 with all of V kept, one matrix at a time."""

    def __init__(self, parameters: Sequence[Tensor], **options: Any) -> None:
        self.weights = [parameter.detach().clone() for parameter in parameters]
        self.average = [torch.zeros_like(weight) for weight in self.weights]
        self.moment = [torch.zeros_like(weight) for weight in self.weights]
        self.options = {"lr": 1e-2, "decay": 0.0, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "d": 1.0} | options
        self.steps = 0

    def step(self, grads: Sequence[Tensor]) -> None:
        at = self.options
        self.steps += 1
        corrects = at.get("corrects", True)
        c1, c2 = (1 - at[name] ** self.steps if corrects else 1.0 for name in ("beta1", "beta2"))
        for weight, average, moment, grad in zip(self.weights, self.average, self.moment, grads, strict=True):
            moment.mul_(at["beta2"]).add_((1 - at["beta2"]) * grad**2)
            update = grad / ((moment / c2).sqrt() + at["eps"])
            dims = tuple(range(-min(2, grad.dim()), 0))
            rms = (update**2).mean(dims, keepdim=True).sqrt() if dims else update.abs()
            update /= (rms / at["d"]).clamp(min=1)
            average.mul_(at["beta1"]).add_((1 - at["beta1"]) * update)
            factor: float | Tensor = at["lr"]
            if at.get("guidance"):
                cos = (update * average).sum(dims, keepdim=True) / (
                    (update**2).sum(dims, keepdim=True) * (average**2).sum(dims, keepdim=True)
                ).sqrt()
                factor = at["lr"] * (1 / (1 - cos + at["eps"])).clamp(0.5, 2)
            weight.sub_(factor * (average / c1 + at["decay"] * weight))


SHAPES = [(20, 31), (3, 16, 24), (40, 12)]
WHOLE = {"max_rank": 1.0, "rank_threshold": 0.0}


@pytest.fixture
def factored_at_any_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors of full rank are larger than what they stand for; by the rule such matrices are kept whole."""
    monkeypatch.setattr("wastenot.parallel.optim.adapprox.is_factored", lambda *_: True)


@pytest.mark.usefixtures("factored_at_any_rank")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"start": "gaussian"},
        {"tile": 50},
        {"bias_correction": False},
        {"bias_correction": False, "guidance": True, "weight_decay": 0.1, "eps": 1e-4},
        {"clamp": "none"},
        {"clamp": "none", "tile": 50, "start": "gaussian"},
        {"clip_threshold": 0.3, "weight_decay": 0.1, "betas": (0.8, 0.99), "eps": 1e-4},
        {"guidance": True, "weight_decay": 0.1},
        {"guidance": True, "tile": 50},
    ],
    ids=str,
)
def test_at_full_rank_it_is_the_optimizer_with_the_exact_moment(options: dict[str, Any]) -> None:
    parameters = fresh(*SHAPES)
    optimizer = Adapprox(parameters, lr=1e-2, **WHOLE, **options)
    beta1, beta2 = options.get("betas", (0.9, 0.999))
    exact = Exact(
        parameters,
        decay=options.get("weight_decay", 0.0),
        beta1=beta1,
        beta2=beta2,
        eps=options.get("eps", 1e-8),
        d=options.get("clip_threshold", 1.0),
        guidance=options.get("guidance", False),
        corrects=options.get("bias_correction", True),
    )
    for step in range(23):
        steps(optimizer, parameters, 1, step)
        exact.step([parameter.grad for parameter in parameters if parameter.grad is not None])
    for parameter, weight, moment in zip(parameters, exact.weights, exact.moment, strict=True):
        torch.testing.assert_close(parameter.detach(), weight, rtol=0, atol=1e-9)
        assert torch.dist(moments(optimizer.state[parameter]), moment) < 1e-9 * moment.norm()


@pytest.mark.parametrize("guidance", [False, True])
def test_vectors_and_what_would_not_profit_keep_their_second_moment(guidance: bool) -> None:
    shapes = [(), (7,), (1, 9), (2, 2), (5, 3, 1)]
    parameters = fresh(*shapes)
    optimizer = Adapprox(parameters, lr=1e-2, weight_decay=0.1, guidance=guidance)
    exact = Exact(parameters, decay=0.1, guidance=guidance)
    for step in range(12):
        steps(optimizer, parameters, 1, step)
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        exact.step(grads)
    for parameter, weight in zip(parameters, exact.weights, strict=True):
        torch.testing.assert_close(parameter.detach(), weight, rtol=0, atol=1e-12)
        assert {"exp_avg_sq", "exp_avg", "step"} == set(optimizer.state[parameter])


def plain_srsi(a: Tensor, start: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Algorithm 1 as it is printed, by Householder QR."""
    u = start
    for _ in range(rounds):
        # Orthonormal for the sake of rounding alone: products of sizes far apart are lost otherwise.
        q = torch.linalg.qr(a @ torch.linalg.qr(u).Q).Q
        u = a.T @ q
    return q, u  # pyright: ignore[reportPossiblyUnboundVariable]


class Dense:
    def __init__(self, a_bmn: Tensor) -> None:
        self.a_bmn = a_bmn

    def times(self, x_bnc: Tensor) -> Tensor:
        return self.a_bmn @ x_bnc

    def transposed_times(self, y_bmc: Tensor) -> Tensor:
        return self.a_bmn.mT @ y_bmc


@examples
@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 8), st.integers(1, 5), seeds)
def test_iteration_is_the_papers_also_when_it_cuts_off_oversampled_columns(m, n, k, rounds, seed):
    k = min(k, m, n)
    a_bmn = skewed(seed, 2, m, n).square()
    wider = min(k + 5, m, n)
    noise = gaussian((n, wider), seed, CPU, torch.float64)
    q_bmk, u_bnk = srsi(Dense(a_bmn), noise[:, :k].expand(2, -1, -1), rounds)
    for a, q, u in zip(a_bmn, q_bmk, u_bnk, strict=True):
        paper_q, paper_u = plain_srsi(a, noise, rounds)
        product = paper_q[:, :k] @ paper_u[:, :k].T
        assert torch.dist(q @ u.T, product) < 1e-6 * a.norm()
        torch.testing.assert_close(q.T @ q, torch.eye(k, dtype=q.dtype), rtol=0, atol=1e-10)


@examples
@given(st.integers(1, 60), st.integers(1, 12), st.sampled_from(["random", "dependent", "zero", "scaled"]), seeds)
def test_columns_become_orthonormal_whatever_they_were(m, c, kind, seed):
    c = min(c, m)
    y = draw(seed, 2, m, c).float()
    if kind == "dependent":
        y = y[..., :1].expand(-1, -1, c).clone()
    elif kind == "zero":
        y[0] = 0
    elif kind == "scaled":
        y *= 10.0 ** -torch.arange(c)
    q = orthonormal(y)
    torch.testing.assert_close(q.mT @ q, torch.eye(c).expand(2, -1, -1), rtol=0, atol=1e-5)
    # The span stays: what the columns were is made of them.
    assert torch.dist(q @ (q.mT @ y), y) <= 1e-4 * y.norm() + 1e-30


def test_noise_is_a_function_of_its_place():
    whole = gaussian((3000, 32), 5, CPU, torch.float64)
    assert whole[7:50, :9].equal(gaussian((43, 9), 5, CPU, torch.float64, first_row=7))
    assert abs(whole.mean()) < 0.02 and abs(whole.std() - 1) < 0.02 and abs((whole**4).mean() - 3) < 0.1
    correlation = torch.corrcoef(torch.cat([whole, gaussian((3000, 32), 6, CPU, torch.float64)], 1).T)
    assert correlation.fill_diagonal_(0).abs().max() < 0.1


@examples
@given(
    st.integers(1, 3),
    st.integers(1, 30),
    st.integers(1, 30),
    st.integers(1, 4),
    st.integers(1, 200),
    st.booleans(),
    seeds,
)
def test_second_moment_in_tiles_equals_the_whole(b, m, n, k, tile, clamp, seed):
    q, u, grad = draw(seed, b, m, k), draw(seed + 1, b, n, k), draw(seed + 2, b, m, n)
    whole = second_moment(q, u, grad, 0.9, clamp)
    moment = SecondMoment(q, u, [grad[:1], grad[1:]] if b > 1 else [grad], 0.9, clamp=clamp, tile=tile)
    x, y = draw(seed + 3, b, n, 2), draw(seed + 4, b, m, 2)
    seen = torch.zeros_like(grad)

    def visit(t: Tile) -> None:
        assert t.moment_brn.numel() <= max(tile, n)
        seen[t.where] += t.moment_brn

    torch.testing.assert_close(moment.times(x, visit), whole @ x)
    torch.testing.assert_close(moment.transposed_times(y), whole.mT @ y)
    clamped = second_moment(q, u, grad, 0.9, True)
    torch.testing.assert_close(seen, clamped)
    assert (clamped >= 0.1 * grad.square() * (1 - 1e-12)).all()


def test_growth_and_search_are_the_published_schedule():
    assert [growth(xi) for xi in (0, 0.01, 0.05, 0.1, 0.25, 1)] == [6, 7, 14, 27, 91, 190]
    # From rank 1 with error 0.1 to 28, where it is 0.009.
    errors = [0.1] * 27 + [0.009] * 73
    assert search(errors, 0.01, 100) == (28, True)
    assert search(errors[:10], 0.01, 100) == (28, False)
    assert search([0.1], 0.01, 5) == (5, False)
    assert search([0.1] * 5, 0.01, 5) == (5, True)
    assert search([math.nan], 0.01, 5) == (1, True)


def test_rank_grows_where_it_must_and_stays_small_where_it_may():
    flat, one = fresh((64, 96), (64, 96))
    optimizer = Adapprox([flat, one], lr=0.0)
    row, column = draw(1, 64, 1).abs(), draw(2, 1, 96).abs()
    for step in range(11):
        flat.grad, one.grad = draw(step, 64, 96), row * column
        optimizer.step()
    report = optimizer.report()
    assert report[0].ranks == (16,) and report[0].xi[0] > 0.01
    assert report[1].ranks == (1,) and report[1].xi[0] < 1e-5


def test_true_error_is_that_against_the_average_kept_whole_and_changes_no_step():
    shapes = [(40, 24), (40, 24), (3, 30, 20), (16, 3, 5, 5), (9,)]
    parameters, others = fresh(*shapes), fresh(*shapes)
    optimizer = Adapprox(parameters, lr=1e-2, true_error=True, tile=500, betas=(0.9, 0.95))
    other = Adapprox(others, lr=1e-2, tile=500, betas=(0.9, 0.95))
    averages = [torch.zeros_like(parameter) for parameter in parameters]
    searched: list[tuple[Tensor, Tensor]] = []
    for step in range(15):
        steps(optimizer, parameters, 1, step)
        steps(other, others, 1, step)
        for average, parameter in zip(averages, parameters, strict=True):
            assert parameter.grad is not None
            average.mul_(0.95).add_((1 - 0.95) * parameter.grad**2)
        if step == 10:
            states = [optimizer.state[parameter] for parameter in parameters[:-1]]
            searched = [
                (moments(state), average.clone().view_as(moments(state)))
                for state, average in zip(states, averages, strict=False)
            ]
    assert all(one.equal(two) for one, two in zip(parameters, others, strict=True))
    reports = optimizer.report()
    for report, plain, (product, average) in zip(reports, other.report(), searched, strict=False):
        expected = (average - product).flatten(-2).norm(dim=-1) / average.flatten(-2).norm(dim=-1)
        assert report.true_xi == pytest.approx(expected.reshape(-1).tolist(), rel=1e-9)
        assert report.xi == plain.xi and plain.true_xi == ()
        assert all(true > xi for true, xi in zip(report.true_xi, report.xi, strict=True)), "history was lost too"
        more = average.numel() + (len(report.ranks) if report.shape[0] == 3 else 0)
        assert report.allocated_bytes == plain.allocated_bytes + 8 * more
    assert reports[-1].true_xi == () and "true_xi" not in optimizer.state[parameters[-1]]
    for parameter, average in zip(parameters, averages, strict=True):
        torch.testing.assert_close(optimizer.state[parameter]["exp_avg_sq"], average, rtol=1e-12, atol=0)


def literal_steps(grads: Sequence[Tensor], seed: int, rounds: int) -> list[tuple[int, Tensor]]:
    """Ranks and products of A3 as it is printed: the iteration anew for every rank that is tried."""
    m, n = grads[0].shape
    most = max_rank(m, n, 0.25)
    q, u, rank = torch.zeros(m, 1).double(), torch.zeros(n, 1).double(), 1
    found = []
    for step, grad in enumerate(grads, 1):
        v = 0.999 * (q @ u.T).clamp(min=0) + 0.001 * grad**2
        noise = gaussian((n, most), (seed * 1_000_003 * 1_000_003 + step) % 2**40, CPU, torch.float64)

        def fit(v: Tensor, k: int, noise: Tensor) -> tuple[Tensor, Tensor, float]:
            q, u = plain_srsi(v, noise[:, :k], rounds)
            return q, u, (torch.dist(v, q @ u.T) / v.norm()).item()

        if (step - 1) % 10 == 0:
            rank = 1
            q, u, xi = fit(v, rank, noise)
            while xi > 0.01 and rank < most:
                rank = min(rank + growth(xi), most)
                q, u, xi = fit(v, rank, noise)
        else:
            q, u, xi = fit(v, rank, noise)
        found.append((rank, q @ u.T))
    return found


def test_one_walk_finds_the_ranks_and_factors_of_the_papers_loop():
    (parameter,) = fresh((48, 80))
    optimizer = Adapprox([parameter], start="gaussian", rounds=3, seed=7)
    grads = [skewed(step, 48, 80) for step in range(22)]
    for grad, (rank, product) in zip(grads, literal_steps(grads, 7, 3), strict=True):
        parameter.grad = grad
        optimizer.step()
        assert optimizer.state[parameter]["rank"].item() == rank
        assert torch.dist(moments(optimizer.state[parameter]), product) < 1e-6 * product.norm()


@pytest.mark.parametrize("start", ["warm", "gaussian"])
def test_experts_of_a_stack_are_matrices_of_their_own(start: Any):
    (stack,) = fresh((3, 32, 48))
    alone = [nn.Parameter(matrix.detach().clone()) for matrix in stack]
    together = Adapprox([stack], start=start)
    # Each first and only parameter: random columns are drawn by place.
    apart = [Adapprox([parameter], start=start) for parameter in alone]
    for step in range(21):
        # The last expert is nearly of rank one, the first is not.
        grad = skewed(step, 3, 32, 48) * torch.tensor([1.0, 1.0, 1e-4]).view(3, 1, 1).double()
        grad[2] += draw(1, 32, 1) * draw(2, 48)
        stack.grad = grad
        together.step()
        for parameter, own, optimizer in zip(alone, grad, apart, strict=True):
            parameter.grad = own.clone()
            optimizer.step()
    ranks = together.report()[0].ranks
    assert ranks == tuple(optimizer.report()[0].ranks[0] for optimizer in apart)
    assert ranks[2] < ranks[0]
    state = together.state[stack]
    for e, (parameter, optimizer) in enumerate(zip(alone, apart, strict=True)):
        torch.testing.assert_close(stack[e].detach(), parameter.detach(), rtol=0, atol=1e-7)
        product = moments(optimizer.state[parameter])
        assert torch.dist(moments(state)[e], product) < 1e-6 * product.norm()
        assert state["Q"][e, :, ranks[e] :].eq(0).all() and state["U"][e, :, ranks[e] :].eq(0).all()
        q = state["Q"][e, :, : ranks[e]]
        torch.testing.assert_close(q.T @ q, torch.eye(ranks[e], dtype=q.dtype), rtol=0, atol=1e-10)


def test_matrices_of_one_shape_step_together_as_they_do_alone():
    results = []
    for tile in (2**18, 2000):
        parameters = fresh((24, 40), (24, 40), (24, 40), (10, 20))
        optimizer = Adapprox(parameters, lr=1e-2, tile=tile)
        steps(optimizer, parameters, 21)
        results.append((parameters, optimizer))
    (one, first), (other, second) = results
    assert [r.ranks for r in first.report()] == [r.ranks for r in second.report()]
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


@examples
@given(st.integers(1, 5), st.integers(1, 300), seeds)
def test_int8_momentum_keeps_small_entries_beside_large_ones(rows, columns, seed):
    value = draw(seed, rows, columns, dtype=torch.float32).exp() * draw(seed + 1, rows, columns, dtype=torch.float32)
    state = new_momentum(value, "int8")
    write(state, slice(None), value)
    assert state["exp_avg"].dtype == torch.int8
    found = read(state, slice(None), torch.float32)
    # Roots are 127 steps apart: half a step of the root, twice the root itself.
    padded = torch.nn.functional.pad(value.abs(), (0, -columns % 128)).unflatten(1, (-1, 128))
    largest = padded.amax(-1, keepdim=True).expand_as(padded).flatten(1)[:, :columns]
    bound = (value.abs() * largest).sqrt() / 127 + largest / (4 * 127**2)
    assert ((found - value).abs() <= bound * 1.01 + 1e-30).all()


@pytest.mark.parametrize("momentum", ["fp32", "bf16", "int8", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_tensors_and_goes_on_bit_for_bit(momentum: Any, dtype: torch.dtype):
    shapes = [(40, 24), (2, 30, 20), (9,), ()]

    def run(parameters: list[nn.Parameter]) -> Adapprox:
        return Adapprox(parameters, lr=1e-2, momentum=momentum, weight_decay=0.1, true_error=momentum == "bf16")

    parameters = fresh(*shapes, dtype=dtype)
    optimizer = run(parameters)
    steps(optimizer, parameters, 13)
    file = io.BytesIO()
    torch.save({"weights": parameters, "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = [nn.Parameter(parameter.detach().clone()) for parameter in saved["weights"]]
    second = run(again)
    second.load_state_dict(saved["optimizer"])
    steps(optimizer, parameters, 9, 13)
    steps(second, again, 9, 13)
    for one, other in zip(parameters, again, strict=True):
        assert one.equal(other)
        assert set(optimizer.state[one]) == set(second.state[other])
        for key, value in optimizer.state[one].items():
            assert isinstance(value, Tensor) and value.equal(second.state[other][key]), key
            assert value.dtype == second.state[other][key].dtype
    factors = optimizer.state[parameters[0]]
    assert factors["Q"].dtype == torch.float32
    expected = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
    assert ("exp_avg" in factors) == (momentum != "none")
    assert momentum == "none" or factors["exp_avg"].dtype == expected[momentum]


def test_replicas_stay_equal():
    both = []
    for _ in range(2):
        parameters = fresh((40, 24), (2, 30, 20))
        optimizer = Adapprox(parameters, start="gaussian")
        steps(optimizer, parameters, 12)
        both.append(parameters)
    assert all(a.equal(b) for a, b in zip(*both, strict=True))


def test_places_make_a_part_of_a_model_step_as_it_does_in_the_whole():
    whole, part = [[nn.Parameter(draw(i, 20, 30)) for i in range(2)] for _ in range(2)]
    optimizer = Adapprox(whole, start="gaussian", rounds=1, tile=1)
    by_itself = Adapprox([{"params": part[1:], "places": [1]}], start="gaussian", rounds=1, tile=1)
    for step in range(3):
        for p in (whole[1], part[1]):
            p.grad = skewed(step, 20, 30)
        optimizer.step()
        by_itself.step()
    assert torch.equal(whole[1], part[1])


def test_vectors_in_the_place_of_matrices_are_refused():
    matrix, vector = nn.Parameter(draw(1, 20, 30)), nn.Parameter(draw(2, 600))
    optimizer = Adapprox([matrix])
    optimizer.param_groups[0]["params"] = [vector]
    vector.grad = draw(3, 600)
    with pytest.raises(RuntimeError, match=r"a vector of 600 numbers .* has no factors; call .*follow_zero"):
        optimizer.step()
    assert torch.equal(vector, draw(2, 600))


def test_bytes_are_the_formula_and_what_is_held():
    parameters = fresh((64, 96), (4, 40, 80), (33,), dtype=torch.float32)
    optimizer = Adapprox(parameters, momentum="bf16")
    steps(optimizer, parameters, 11)
    matrix, stack, vector = optimizer.report()
    k = matrix.ranks[0]
    count = 8 + 4  # rank and error
    assert matrix.allocated_bytes == (64 + 96) * k * 4 + 64 * 96 * 2 + count - 12 == matrix.logical_bytes
    assert stack.allocated_bytes == 4 * (40 + 80) * max(stack.ranks) * 4 + 4 * 40 * 80 * 2 + 4 * count
    assert stack.logical_bytes == (40 + 80) * sum(stack.ranks) * 4 + 4 * 40 * 80 * 2 + 4 * count
    assert vector.allocated_bytes == 33 * (4 + 2) and vector.ranks == ()
    assert matrix.adamw_bytes == 64 * 96 * 8


@pytest.mark.parametrize("clamp", ["exact", "none"])
def test_a_step_never_holds_the_second_moment(clamp: Any):
    (parameter,) = fresh((1024, 512), dtype=torch.float32)
    optimizer = Adapprox([parameter], max_rank=4, clamp=clamp, tile=2**14)
    steps(optimizer, [parameter], 11)
    whole = parameter.numel() * 4
    assert peak_bytes(optimizer.step) < 0.25 * whole


def test_99_of_100_zero_rows_stay_finite():
    parameters = fresh((200, 32), (2, 100, 24), dtype=torch.float32)
    optimizer = Adapprox(parameters, lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        for parameter in parameters:
            rows = torch.rand(parameter.shape[:-1], generator=generator) < 0.01
            parameter.grad = torch.randn(parameter.shape, generator=generator) * rows.unsqueeze(-1)
        optimizer.step()
    for parameter in parameters:
        assert parameter.isfinite().all()
        assert all(value.isfinite().all() for value in optimizer.state[parameter].values())


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12])
def test_gradients_of_any_scale_make_the_same_steps(scale: float):
    """But for eps, which is far below them here."""
    parameters, others = fresh((40, 24), dtype=torch.float32), fresh((40, 24), dtype=torch.float32)
    plain = Adapprox(parameters, eps=1e-40)
    scaled = Adapprox(others, eps=1e-40)
    for step in range(12):
        grad = draw(step, 40, 24, dtype=torch.float32)
        parameters[0].grad, others[0].grad = grad, grad * scale
        plain.step()
        scaled.step()
    if scale == 1e-30:
        # Its squares are below fp32: nothing but finite is asked for.
        assert others[0].isfinite().all()
        return
    assert plain.report()[0].ranks == scaled.report()[0].ranks
    torch.testing.assert_close(parameters[0], others[0], rtol=0, atol=1e-4)


def test_zero_gradients_change_nothing_but_decay():
    parameters = fresh((40, 24), (5,))
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = Adapprox(parameters, lr=0.1, weight_decay=0.5)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    for parameter, weight in zip(parameters, before, strict=True):
        torch.testing.assert_close(parameter.detach(), weight * 0.95**3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_gradients_that_are_no_numbers_are_refused_by_name_or_left_out(bad: float):
    def state_of(optimizer: Adapprox) -> list[Tensor]:
        return [value for state in optimizer.state.values() for value in state.values()]

    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 24))
    optimizer = Adapprox(model.named_parameters(), lr=1e-2)
    careless = Adapprox(model.parameters(), lr=1e-2, nonfinite="skip")
    steps(optimizer, list(model.parameters()), 3)
    before = [value.clone() for value in (*model.parameters(), *state_of(optimizer))]
    grad = model[1].weight.grad
    assert grad is not None
    grad[3, 5] = bad
    with pytest.raises(FloatingPointError, match=r"1\.weight; nothing was stepped"):
        optimizer.step()
    careless.step()
    assert careless.skipped_steps == 1
    after = [*model.parameters(), *state_of(optimizer)]
    assert all(a.equal(b) for a, b in zip(before, after, strict=True))


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(30, 20, sparse=True)
    optimizer = Adapprox(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradient; make it dense"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr: -1.0 is not 0 or more"),
        ({"eps": 0.0}, "eps: 0.0 is not positive"),
        ({"betas": (0.9, 1.0)}, r"beta2: 1.0 is outside \[0, 1\)"),
        ({"momentum": "fp8"}, "momentum: 'fp8' is unknown; use one of fp32, bf16, int8, none"),
        ({"start": "cold"}, "use one of warm, gaussian"),
        ({"clamp": "abs"}, "use one of exact, none"),
        ({"sharding": "all"}, "use one of exact, local"),
        ({"nonfinite": "ignore"}, "use raise or skip"),
        ({"max_rank": 0}, "max_rank: 0 is neither"),
        ({"max_rank": 1.5}, "max_rank: 1.5 is neither"),
        ({"max_rank": True}, "max_rank: True is neither"),
        ({"rounds": 0}, "rounds: 0 is not a whole number"),
        ({"rank_every": 2.5}, "rank_every: 2.5 is not a whole number"),
        ({"tile": 0}, "tile: 0 holds no element"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Adapprox(fresh((4, 4)), **options)


def test_dtypes_that_cannot_be_stepped_are_refused():
    with pytest.raises(ValueError, match="complex64 cannot be stepped"):
        Adapprox([nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))])


def test_a_rank_larger_than_the_matrix_is_its_smaller_side():
    assert max_rank(8, 20, 100) == 8 and max_rank(8, 20, 0.25) == 2 and max_rank(3, 20, 0.25) == 1
    assert not is_factored(8, 20, 100) and is_factored(8, 20, 0.25) and not is_factored(1, 20, 0.25)


def test_state_of_other_shapes_is_refused_and_changes_nothing():
    parameters = fresh((40, 24), (5,))
    optimizer = Adapprox(parameters)
    steps(optimizer, parameters, 2)
    before = {key: value.clone() for key, value in optimizer.state[parameters[0]].items()}
    for shapes in ([(24, 40), (5,)], [(40, 24), (6,)]):
        others = fresh(*shapes)
        other = Adapprox(others)
        steps(other, others, 2)
        with pytest.raises(ValueError, match="does not belong to parameter"):
            optimizer.load_state_dict(other.state_dict())
    few = fresh((40, 24))
    with pytest.raises(ValueError, match=r"groups of \[1\] parameters, these are \[2\]"):
        optimizer.load_state_dict(Adapprox(few).state_dict())
    assert all(value.equal(optimizer.state[parameters[0]][key]) for key, value in before.items())


def test_the_warning_about_a_rank_that_is_too_small_comes_once():
    (parameter,) = fresh((32, 48))
    optimizer = Adapprox([("w", parameter)], betas=(0.9, 0.9), max_rank=2)
    # The first ten steps say nothing: V is no average yet.
    steps(optimizer, [parameter], 10)
    with pytest.warns(UserWarning, match="w: factors of the largest rank, 2, leave an error"):
        steps(optimizer, [parameter], 1, 10)
    steps(optimizer, [parameter], 20, 11)


def test_schedulers_groups_closures_and_missing_gradients_work_as_in_torch():
    first, second, third = fresh((20, 16), (3,), (20, 16))
    optimizer = Adapprox([{"params": [first, third], "lr": 0.1}, {"params": [second], "momentum": "none"}], lr=0.2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def closure() -> float:
        optimizer.zero_grad()
        loss = first.square().sum() + second.square().sum()
        loss.backward()
        return loss.item()

    losses = [float(optimizer.step(closure) or 0.0) for _ in range(5)]
    scheduler.step()
    assert losses == sorted(losses, reverse=True)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.1]
    assert third not in optimizer.state and "exp_avg" not in optimizer.state[second]


def test_convolutions_count_as_one_matrix():
    convolution = nn.Conv2d(16, 32, 3)
    optimizer = Adapprox(convolution.parameters())
    steps(optimizer, list(convolution.parameters()), 2)
    assert optimizer.state[convolution.weight]["Q"].shape[0] == 32
    assert optimizer.state[convolution.weight]["U"].shape[0] == 16 * 9


def test_it_trains_beside_adamw():
    losses = {}
    for name in ("adamw", "adapprox"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
        optimizer = (
            torch.optim.AdamW(model.parameters(), lr=3e-3) if name == "adamw" else Adapprox(model.parameters(), lr=3e-3)
        )
        generator = torch.Generator().manual_seed(1)
        target = torch.randn(64, 64, generator=generator) / 8
        for _ in range(150):
            x = torch.randn(64, 64, generator=generator)
            loss = (model(x) - torch.tanh(x @ target)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()  # pyright: ignore[reportPossiblyUnboundVariable]
    assert losses["adapprox"] < 1.15 * losses["adamw"] < 0.1


def test_it_needs_nothing_else_of_wastenot():
    code = (
        "import sys; from wastenot.parallel.optim import Adapprox; "
        "print(*sorted(m for m in sys.modules if m.startswith('wastenot')))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    # And what chooses and starts its kernels.
    allowed = ("wastenot.parallel.optim", *(f"wastenot.kernels.{name}" for name in ("lowrank", "backend", "launching")))
    others = [name for name in found if not name.startswith(allowed)]
    assert others == ["wastenot", "wastenot.kernels", "wastenot.parallel"]


def test_an_expert_without_tokens_costs_a_few_turns_not_one_a_column(monkeypatch: pytest.MonkeyPatch):
    turns = []
    orthonormalise = srsi_module._cholesky_qr

    def counted(*arguments: Any) -> Any:
        turns.append(1)
        return orthonormalise(*arguments)

    monkeypatch.setattr(srsi_module, "_cholesky_qr", counted)
    (stack,) = fresh((3, 64, 96), dtype=torch.float32)
    optimizer = Adapprox([stack])
    steps(optimizer, [stack], 1)
    turns.clear()
    for step in range(1, 4):
        stack.grad = skewed(step, 3, 64, 96, dtype=torch.float32)
        stack.grad[1] = 0
        optimizer.step()
    assert len(turns) <= 3 * 6
    y = draw(0, 2, 30, 8).float()
    y[1] = 0
    turns.clear()
    orthonormal(y)
    assert len(turns) <= 4


def test_what_is_no_number_ends_and_does_not_turn_for_ever():
    with pytest.raises(FloatingPointError, match="second moment is not finite"):
        orthonormal(torch.full((1, 5, 3), math.nan))
    (parameter,) = fresh((20, 16), dtype=torch.float32)
    optimizer = Adapprox([("w", parameter)])
    parameter.grad = torch.full_like(parameter, 1e25)
    with pytest.raises(FloatingPointError, match="infinite gradient of w"):
        optimizer.step()


def test_neighbours_and_history_of_other_sizes_do_not_hide_an_error():
    small, alone, large = fresh((64, 48), (64, 48), (64, 48), dtype=torch.float32)
    with torch.no_grad():
        alone.copy_(small)
    together, apart = Adapprox([small, large]), Adapprox([alone])
    for step in range(2):
        grad = draw(step, 64, 48, dtype=torch.float32)
        small.grad, alone.grad, large.grad = 1e-11 * grad, 1e-11 * grad, 1e-3 * grad
        together.step()
        apart.step()
    assert together.report()[0].ranks == apart.report()[0].ranks == (12,)
    assert together.report()[0].xi == pytest.approx(apart.report()[0].xi, rel=1e-4)
    spiky = Adapprox([large], betas=(0.9, 0.9))
    for step in range(31):
        large.grad = (1e10 if step == 2 else 1.0) * torch.ones(64, 1) * draw(0, 48, dtype=torch.float32)
        spiky.step()
    assert spiky.report()[0].ranks == (1,) and spiky.report()[0].xi[0] < 1e-2


def test_int8_momentum_of_convolutions():
    convolution = nn.Conv2d(32, 64, 3)
    optimizer = Adapprox(convolution.parameters(), momentum="int8")
    steps(optimizer, list(convolution.parameters()), 3)
    assert optimizer.state[convolution.weight]["exp_avg"].shape == (64, 32, 3, 3)
    assert optimizer.state[convolution.weight]["exp_avg_scale"].shape == (64, 3)
    convolution.to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="no longer contiguous"):
        steps(optimizer, list(convolution.parameters()), 1)


def test_copies_step_as_the_original_does():
    model = nn.Linear(24, 40)
    optimizer = Adapprox(model.named_parameters(), tile=500)
    steps(optimizer, list(model.parameters()), 3)
    both, optimizer_too = copy.deepcopy((model, optimizer))
    again = pickle.loads(pickle.dumps(optimizer))
    assert again.tile == 500 and again.skipped_steps == 0
    steps(optimizer, list(model.parameters()), 3, 3)
    steps(optimizer_too, list(both.parameters()), 3, 3)
    steps(again, again.param_groups[0]["params"], 3, 3)
    for a, b, c in zip(model.parameters(), both.parameters(), again.param_groups[0]["params"], strict=True):
        assert a.equal(b) and a.equal(c)


def test_autocast_and_empty_groups_do_not_matter():
    one, other = fresh((24, 40), dtype=torch.float32), fresh((24, 40), dtype=torch.float32)
    plain, wrapped = Adapprox(one), Adapprox([{"params": []}, {"params": other}])
    steps(plain, one, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        steps(wrapped, other, 2)
    assert one[0].equal(other[0])


def test_state_of_adamw_is_refused():
    parameters = fresh((24, 40), (3,))
    adamw = torch.optim.AdamW(parameters)
    steps(adamw, parameters, 1)
    with pytest.raises(ValueError, match="another optimizer"):
        Adapprox(parameters).load_state_dict(adamw.state_dict())
