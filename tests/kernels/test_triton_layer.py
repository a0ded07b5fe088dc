"""A whole MoE layer on Triton kernels: the reference's routing and numbers, the same bits run after run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wastenot.kernels.backend import Backend
from wastenot.kernels.combine import combine
from wastenot.kernels.dispatch import permute
from wastenot.kernels.grouped_mm import grouped_swiglu
from wastenot.kernels.route import assign, choose
from wastenot.moe.config import EmulateConfig, MoEConfig, RectifyConfig, RouterConfig
from wastenot.moe.layer import MoELayer
from wastenot.moe.ledger import check_identities
from wastenot.moe.routing import Routing
from wastenot.parallel.apply import parallelize
from wastenot.parallel.mesh import single

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
D, TOKENS = 24, 16
BOTH = RectifyConfig(intra=True, fill=True)
ROUTERS = {
    "dropless, top-2": RouterConfig(top_k=2),
    "capacity, top-1": RouterConfig(top_k=1, capacity_factor=0.5),
    "both, top-1, two ranks": RouterConfig(
        top_k=1, capacity_factor=0.6, rectify=BOTH, emulate=EmulateConfig(sources=2, owners=2)
    ),
    "both, top-2, sigmoid, groups": RouterConfig(
        top_k=2, capacity_factor=0.5, score="sigmoid", groups=4, top_groups=3, rectify=BOTH
    ),
    "no slot": RouterConfig(top_k=1, capacity_factor=0.0, rectify=RectifyConfig(intra=True)),
}


def layer_of(router: RouterConfig, dispatch: str, backend: Backend) -> MoELayer:
    def fill(name: str, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator, device=generator.device))

    mesh = single(DEVICE)
    with torch.device("meta"):
        layer = MoELayer(D, MoEConfig(experts=8, d_expert=16, dispatch=dispatch), router, mesh, backend=backend)  # pyright: ignore[reportArgumentType]
    parallelize(layer, mesh, fill, 0, torch.float32)
    return layer


def run(layer: nn.Module, recomputed: bool = False) -> tuple[Routing, list[Tensor]]:
    """The routing; the output and all gradients."""
    x_TD = torch.randn(1, TOKENS, D, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()
    y_TD, routing = checkpoint(layer, x_TD, use_reentrant=False) if recomputed else layer(x_TD)
    inputs = [x_TD, *layer.parameters()]
    return routing, [y_TD, *torch.autograd.grad((y_TD * x_TD.detach()).sum() + routing.probs_TE.square().sum(), inputs)]


@pytest.mark.parametrize("dispatch", ["ragged", "padded"])
@pytest.mark.parametrize("name", ROUTERS)
def test_a_layer_is_that_of_the_reference(name, dispatch):
    if ROUTERS[name].capacity_factor is None:
        dispatch = "ragged"
    (found, fast), (expected, plain) = (run(layer_of(ROUTERS[name], dispatch, b)) for b in ("triton", "reference"))
    check_identities(found)
    assert found.experts_TK.equal(expected.experts_TK)
    assert found.kinds_TK.equal(expected.kinds_TK)
    assert found.counts_BE.equal(expected.counts_BE)
    for here, there in zip(fast, plain, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4 * max(1.0, there.abs().max().item()))


def test_a_layer_repeats_to_the_last_bit_and_under_recomputation():
    layer = layer_of(ROUTERS["both, top-2, sigmoid, groups"], "padded", "triton")
    (_, one), (_, other), (_, recomputed) = run(layer), run(layer), run(layer, recomputed=True)
    assert all(a.equal(b) for a, b in zip(one, other, strict=True))
    assert all(a.equal(b) for a, b in zip(one, recomputed, strict=True))


def kernels(x_TD: Tensor, gate_ED: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Every kernel after the other: a dropless top-2 layer."""
    T, E = x_TD.size(0), gate_ED.size(0)
    scores_TE, chosen_TK = choose(x_TD @ gate_ED.t(), 2, backend="triton")
    nobody_first_T = torch.zeros(T, dtype=torch.int32, device=x_TD.device)
    slots_TK, counts_1E = assign(chosen_TK, nobody_first_T, E, backend="triton")
    ends_E = counts_1E[0].cumsum(0)
    position_TK = (ends_E - counts_1E[0])[chosen_TK] + slots_TK
    token_TK = torch.arange(T, device=x_TD.device).unsqueeze(1).expand(T, 2)
    source_R = torch.empty(2 * T, dtype=torch.int64, device=x_TD.device)
    source_R = source_R.scatter(0, position_TK.reshape(-1), token_TK.reshape(-1))
    rows_RD = permute(x_TD, source_R, position_TK, backend="triton")
    rows_RD = grouped_swiglu(rows_RD, gate_up, down, ends_E.int(), backend="triton")
    return combine(rows_RD, scores_TE.gather(1, chosen_TK), position_TK, source_R, backend="triton")


def test_kernels_stay_whole_under_torch_compile():
    """One graph without a break, and the same bits."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(TOKENS, D), (4, D), (4, 32, D), (4, D, 16)]
    inputs = [torch.randn(shape, generator=draw).to(DEVICE).requires_grad_() for shape in shapes]
    results = []
    for function in (kernels, torch.compile(kernels, backend="aot_eager", fullgraph=True)):
        y_TD = function(*inputs)
        results.append([y_TD, *torch.autograd.grad(y_TD.square().sum(), inputs)])
    torch.testing.assert_close(*results, rtol=0, atol=0)
