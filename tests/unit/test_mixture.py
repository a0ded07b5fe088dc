"""A gate and experts of one's own between which tokens go as in our layer, rectified or not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from wastenot.moe.config import EmulateConfig, MoEConfig, RectifyConfig, RouterConfig
from wastenot.moe.layer import MoELayer
from wastenot.moe.ledger import check_identities, count_slots
from wastenot.moe.mixture import Mixer, mixture
from wastenot.parallel.mesh import single

pytestmark = pytest.mark.usefixtures("one_thread")

D, E = 12, 8
BOTH = RectifyConfig(intra=True, fill=True)
RANKS = EmulateConfig(sources=4, owners=4)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Own(nn.Module):
    """Somebody's mixture: a gate with a bias, and experts that are matrices with a tanh."""

    def __init__(self, seed: int = 0, experts_alike: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E).double()
        with torch.no_grad():
            self.gate.weight.copy_(draw(seed, E, D))
        matrices = draw(seed + 1, 1 if experts_alike else E, D, D).expand(E, D, D)
        self.matrices_EDD = nn.Parameter(matrices.clone())

    def experts(self, rows_RD: Tensor, offsets_e: Tensor) -> Tensor:
        parts = rows_RD.tensor_split(offsets_e[:-1].tolist())
        return torch.cat([(rows @ matrix).tanh() for rows, matrix in zip(parts, self.matrices_EDD, strict=True)])


CONFIGS = {
    "dropless": RouterConfig(top_k=2),
    "capacity": RouterConfig(top_k=2, capacity_factor=0.7),
    "both": RouterConfig(top_k=2, capacity_factor=0.7, rectify=BOTH, emulate=RANKS),
    "bounded": RouterConfig(top_k=1, capacity_factor=0.5, rectify=RectifyConfig(intra=True, capacity=0.25)),
    "sigmoid": RouterConfig(top_k=2, score="sigmoid", capacity_factor=0.7, rectify=BOTH, normalize="none"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_gate_and_experts_of_ones_own_are_summed_by_the_routing(name):
    """Against the definition: token by token, choice by choice, stand-in last; with gradients."""
    own, x_TD = Own(), draw(5, 64, D).requires_grad_()
    y_TD, routing = mixture(x_TD, own.gate(x_TD), own.experts, CONFIGS[name])
    check_identities(routing)

    all_TED = torch.einsum("td,edf->tef", x_TD, own.matrices_EDD).tanh()
    weights_TE = torch.zeros(64, E, dtype=torch.float64).scatter_add(1, routing.experts_TK, routing.weights_TK)
    if (stand_ins := routing.stand_ins) is not None:
        local_T1 = stand_ins.expert_T.clamp(min=0).unsqueeze(1)
        weights_TE = weights_TE.scatter_add(1, local_T1, stand_ins.weight_T.unsqueeze(1))
    expected_TD = torch.einsum("te,ted->td", weights_TE, all_TED)

    torch.testing.assert_close(y_TD, expected_TD)
    inputs = [x_TD, *own.parameters()]
    found = torch.autograd.grad(y_TD.square().sum(), inputs, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(expected_TD.square().sum(), inputs))


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_what_our_layer_does_bit_for_bit(name):
    layer = MoELayer(D, MoEConfig(experts=E, d_expert=16), CONFIGS[name], single())
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data = draw(seed, *parameter.shape).float()
    x_BSD = draw(9, 4, 16, D).float()
    expected_BSD, expected = layer(x_BSD)
    logits_TE = layer.router.logits(x_BSD.flatten(0, 1), layer.mixer.blocks)
    y_TD, routing = mixture(x_BSD.flatten(0, 1), logits_TE, layer.experts, CONFIGS[name])
    assert torch.equal(y_TD.view_as(x_BSD), expected_BSD)
    assert torch.equal(count_slots(routing), count_slots(expected))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.sampled_from([0.0, 0.2, 0.7, 1.3]), st.sampled_from([1, 2, 4]), st.integers(0, 10**6))
def test_equal_experts_give_the_dense_network_at_any_capacity(k, factor, ranks, seed):
    own, x_TD = Own(seed, experts_alike=True), draw(seed, 24, D)
    rectify = RectifyConfig(intra=True, fill=seed % 2 == 0)
    emulate = EmulateConfig(sources=ranks, owners=ranks)
    config = RouterConfig(top_k=k, capacity_factor=factor, rectify=rectify, emulate=emulate)
    y_TD, _ = mixture(x_TD, own.gate(x_TD), own.experts, config)
    torch.testing.assert_close(y_TD, (x_TD @ own.matrices_EDD[0]).tanh())


def test_dropless_lifts_the_capacity():
    own, x_TD = Own(), draw(5, 64, D)
    config = RouterConfig(top_k=2, capacity_factor=0.3, rectify=BOTH, emulate=RANKS)
    free_TD, routing = mixture(x_TD, own.gate(x_TD), own.experts, config, dropless=True)
    assert routing.capacity is None and routing.stand_ins is None
    assert torch.equal(free_TD, mixture(x_TD, own.gate(x_TD), own.experts, RouterConfig(top_k=2))[0])


def test_logits_of_half_precision_are_routed_in_fp32():
    logits_TE = draw(0, 16, E).bfloat16()
    _, routing = mixture(draw(1, 16, D).float(), logits_TE, lambda rows, _: rows, RouterConfig(top_k=2))
    assert routing.weights_TK.dtype == routing.probs_TE.dtype == torch.float32


def test_rows_travel_in_the_dtype_of_autocast():
    seen = []

    def experts(rows_RD: Tensor, offsets_e: Tensor) -> Tensor:
        seen.append(rows_RD.dtype)
        return rows_RD

    with torch.autocast("cpu", torch.bfloat16):
        mixture(draw(1, 16, D).float(), draw(0, 16, E).float(), experts, RouterConfig(top_k=2))
    assert seen == [torch.bfloat16]


def refused(x_TD: Tensor, logits_TE: Tensor, config: RouterConfig) -> str:
    with pytest.raises(ValueError) as caught:
        mixture(x_TD, logits_TE, lambda rows, _: rows, config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_is_refused_in_one_line():
    x_TD, logits_TE = torch.zeros(18, D), torch.zeros(18, E)
    assert "flatten" in refused(x_TD.view(2, 9, D), logits_TE, RouterConfig())
    assert "[17, 8]" in refused(x_TD, logits_TE[:17], RouterConfig())
    assert "kind: uniform" in refused(x_TD, logits_TE, RouterConfig(kind="uniform"))
    assert "jitter: 0.1" in refused(x_TD, logits_TE, RouterConfig(jitter=0.1))
    assert "among 8 experts" in refused(x_TD, logits_TE, RouterConfig(top_k=9))
    eight_and_one = RouterConfig(top_k=8, capacity_factor=1.0, rectify=RectifyConfig(fill=True))
    assert "with its fill_ranks makes 9 choices" in refused(x_TD, logits_TE, eight_and_one)
    assert "use 2" in refused(x_TD, logits_TE, RouterConfig(groups=3))
    assert "use 2" in refused(x_TD, logits_TE, RouterConfig(top_k=3, groups=4))
    assert "use 2" in refused(x_TD, logits_TE, RouterConfig(emulate=EmulateConfig(sources=3, owners=3)))
    assert "18 tokens cannot be cut into 4 emulated ranks; use 3" in refused(
        x_TD, logits_TE, RouterConfig(emulate=RANKS)
    )


def test_the_largest_capacity_factor_works():
    x_TD, logits_TE = draw(1, 64, D), draw(0, 64, E)
    config = RouterConfig(top_k=2, capacity_factor=1e6, rectify=BOTH, emulate=RANKS)
    y_TD, routing = mixture(x_TD, logits_TE, lambda rows, _: rows, config)
    check_identities(routing)
    torch.testing.assert_close(y_TD, x_TD)


def test_a_mixer_holds_nothing_of_a_forward_pass():
    mixer = Mixer(E, CONFIGS["both"], single())
    before = {name: id(value) for name, value in vars(mixer).items()}
    x_TD = draw(5, 64, D)
    mixer(x_TD, mixer.route(F.linear(x_TD, draw(2, E, D))), lambda rows, _: rows)
    assert {name: id(value) for name, value in vars(mixer).items()} == before
