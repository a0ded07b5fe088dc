"""Adapprox takes the bytes that the paper prints (arXiv 2403.14958): the formula, the two ends, eight percentages.

`wastenot bench adapprox-memory` allocates the models whole.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from wastenot.parallel.optim import Adapprox
from wastenot.tools.bench.adapprox_memory import PUBLISHED, bytes_of
from wastenot.tools.bench.adapprox_shapes import MODELS, expected_bytes, gpt2


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*factors of the largest rank", category=UserWarning)
        yield


@pytest.mark.parametrize(("model", "rank", "momentum"), PUBLISHED)
def test_the_formula_gives_the_published_percentages(model, rank, momentum):
    shapes = MODELS[model]
    ours = sum(expected_bytes(shape, rank, momentum) * count for shape, count in shapes.items())
    adamw = sum((8 * math.prod(shape) + 4) * count for shape, count in shapes.items())
    assert f"{100 * (1 - ours / adamw):.1f}" == f"{PUBLISHED[model, rank, momentum]:.1f}"


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (3, 40, 24), (2, 3, 4, 24)])
@pytest.mark.parametrize("momentum", ["fp32", "none"])
def test_state_is_m_plus_n_times_k_numbers_at_every_rank(shape, momentum):
    matrices, m, n = (3, 40, 24) if len(shape) == 3 else (1, shape[0], math.prod(shape[1:]))
    for rank in range(1, 1 + min(m, n)):
        parameter = nn.Parameter(torch.zeros(shape))
        optimizer = Adapprox([parameter], momentum=momentum, max_rank=rank, rank_threshold=0.0)
        parameter.grad = torch.rand(shape, generator=torch.Generator().manual_seed(rank))
        optimizer.step()
        [found] = optimizer.report()
        factored = (m + n) * rank < m * n
        second = matrices * (m + n) * rank if factored else parameter.numel()
        assert found.ranks == ((rank,) * matrices if factored else ())
        first = 4 * parameter.numel() if momentum == "fp32" else 0
        # A stack's ranks and errors are tensors of their own.
        counters = 12 * matrices if factored and len(shape) == 3 else 0
        assert found.allocated_bytes == found.logical_bytes == 4 * second + first + counters


@pytest.mark.parametrize("rank", ["k = 1", "k_max"])
def test_a_layer_of_gpt2_takes_the_formulas_bytes(rank):
    layer = {shape for name, shape in gpt2(768, 1).items() if name.startswith("h.")}
    assert len(layer) == 7
    for shape in layer:
        parameter = nn.Parameter(torch.zeros(shape))
        parameter.grad = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        for momentum in ("fp32", "none"):
            assert bytes_of(parameter, (rank, momentum)).state == expected_bytes(shape, rank, momentum), shape
