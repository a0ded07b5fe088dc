"""The Rectify-Router (arXiv 2402.12399) is what METHODS R1-R10 say, and holds what they promise.

`rectify_reference.py` is the definition, token by token; the properties are those named "must hold" there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from rectify_reference import COUNTS, Rank, output, route, swiglu
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode

from wastenot.kernels.backend import Backend
from wastenot.moe.config import EmulateConfig, MoEConfig, RectifyConfig, RouterConfig
from wastenot.moe.layer import MoELayer
from wastenot.moe.ledger import SLOTS, check_identities, count_slots
from wastenot.moe.rectify import Rectifier, own_experts
from wastenot.moe.routing import DROPPED, FILLED, KEPT, RECTIFIED, SPARE, Routing
from wastenot.moe.weights import combine_weights, weights_with_stand_in
from wastenot.parallel.apply import parallelize
from wastenot.parallel.mesh import single

FULL = os.environ.get("WASTENOT_GRID") == "full"
KINDS = {"kept": KEPT, "filled": FILLED, "rectified": RECTIFIED, "dropped": DROPPED, "spare": SPARE}
D, F = 3, 2


def examples(number: int):
    return settings(max_examples=20 * number if FULL else number, deadline=None)


@dataclass(frozen=True)
class Case:
    """A layer and the tokens of its emulated ranks."""

    router: RouterConfig
    moe: MoEConfig
    tokens: int
    """Of each rank."""
    seed: int = 0
    gate: str = "random"
    """`ties`: tokens and gate on a grid, so that logits tie exactly; `equal`: all logits are; `one`: one expert is
    everybody's first choice; `close`: tokens so alike that their priorities tie."""
    backend: Backend = "auto"

    @property
    def emulate(self) -> EmulateConfig:
        assert self.router.emulate is not None
        return self.router.emulate

    def own(self, source: int) -> range:
        """Experts of the rank that a source stands for."""
        share = self.moe.experts // self.emulate.owners
        first = source % self.emulate.owners * share
        return range(first, first + share)

    def layer(self, dtype: torch.dtype = torch.float64, width: int = D) -> MoELayer:
        def fill(name: str, tensor: Tensor, generator: torch.Generator) -> None:
            drawn = torch.randn(tensor.shape, dtype=torch.float64, generator=generator)
            if name == "router.weight":
                drawn = {"ties": (2 * drawn).round() / 2, "equal": 0 * drawn}.get(self.gate, drawn)
            tensor.copy_(drawn)

        with torch.device("meta"):
            moe = self.moe if width == D else replace(self.moe, d_expert=width)
            layer = MoELayer(width, moe, self.router, single(), backend=self.backend)
        parallelize(layer, single(), fill, self.seed, dtype)
        if self.gate == "one":
            with torch.no_grad():
                layer.router.weight[self.moe.experts // 2] += 20.0
        return layer

    def x(self, dtype: torch.dtype = torch.float64) -> Tensor:
        shape = (self.emulate.sources * self.tokens, D)
        x_TD = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(self.seed))
        if self.gate == "ties":
            x_TD = (2 * x_TD).round() / 2
        if self.gate == "close":
            x_TD = x_TD[:1] + 1e-5 * x_TD
        return (x_TD.abs() if self.gate == "one" else x_TD).to(dtype)


def by_hand(
    experts: int = 4, tokens: int = 8, sources: int = 1, owners: int = 1, gate: str = "random", seed: int = 0, **router
) -> Case:
    """A case written out; `router` is of RouterConfig, with the fields of `rectify` and `moe` beside its own."""
    rectify = {
        name: router.pop(name) for name in ("intra", "fill", "fill_ranks", "select", "capacity") if name in router
    }
    moe = {name: router.pop(name) for name in ("shared_experts", "dispatch") if name in router}
    config = RouterConfig(
        **router, rectify=RectifyConfig(**rectify), emulate=EmulateConfig(sources=sources, owners=owners)
    )
    return Case(config, MoEConfig(experts=experts, d_expert=F, **moe), tokens, seed, gate)


factors = st.sampled_from([0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 2.0, 3.0]) | st.floats(0.02, 3)


@st.composite
def cases(draw, intra: bool | None = None, fill: bool | None = None, dropless: bool = False) -> Case:
    """Any legal case; `intra` and `fill` may be given."""
    experts = draw(st.sampled_from([8, 4, 6, 9, 3, 2, 1]))
    top_k = min(draw(st.sampled_from([2, 1, 3, 4])), experts)
    intra = draw(st.booleans()) if intra is None else intra
    most = min(2, experts - top_k)
    fill_ranks = draw(st.integers(1 if fill else 0, most)) if fill is not False and most else 0
    rectify = RectifyConfig(
        intra=intra,
        fill=fill_ranks > 0,
        fill_ranks=max(1, fill_ranks),
        select=draw(st.sampled_from(["any", "all"])) if intra else "any",
        capacity=draw(st.none() | st.sampled_from([0.05, 0.25, 0.5, 1.0])) if intra else None,
    )
    choices = top_k + fill_ranks
    groups = draw(st.sampled_from([g for g in (1, 1, 2, 3, 4) if experts % g == 0]))
    normalize = draw(st.sampled_from(["survivors", "survivors", "top_k", "none"]))
    factor: float | None = draw(st.just(0.0) | factors if intra else factors)
    if dropless and not rectify.is_on and draw(st.booleans()):
        factor = None
    router = RouterConfig(
        top_k=top_k,
        score=draw(st.sampled_from(["softmax", "sigmoid"])),
        normalize=normalize,
        detach=True if choices == 1 and normalize != "none" else draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 2.5])),
        groups=groups,
        top_groups=draw(st.integers(min(groups, -(-choices * groups // experts)), groups)),
        capacity_factor=factor,
        priority=draw(st.sampled_from(["probability", "position"])),
        rectify=rectify,
        emulate=EmulateConfig(
            sources=draw(st.integers(1, 4)),
            owners=draw(st.sampled_from([g for g in (1, 2, 3, 4, 8) if experts % g == 0])),
        ),
    )
    moe = MoEConfig(
        experts=experts,
        d_expert=F,
        shared_experts=draw(st.integers(0, 1)),
        dispatch="ragged" if factor is None else draw(st.sampled_from(["ragged", "padded"])),
    )
    return Case(
        router,
        moe,
        tokens=draw(st.sampled_from([9, 12, 5, 2, 1])),
        seed=draw(st.integers(0, 2**31)),
        gate=draw(st.sampled_from(["random", "ties", "close", "equal", "one"])),
        backend=draw(st.sampled_from(["auto", "reference"])),
    )


def by_the_book(case: Case, layer: MoELayer, x_TD: Tensor) -> list[Rank]:
    """The reference's routing of every emulated rank."""
    gate, sources = layer.router.weight.tolist(), case.emulate.sources
    return [
        route(block.tolist(), gate, case.own(source), case.router) for source, block in enumerate(x_TD.chunk(sources))
    ]


def run(layer: MoELayer, x_TD: Tensor) -> tuple[Tensor, Routing]:
    y_1TD, routing = layer(x_TD.unsqueeze(0))
    return y_1TD.squeeze(0), routing


# Hand-picked: what random cases seldom are.
CORNERS = {
    "one token a rank": by_hand(tokens=1, sources=4, owners=4, intra=True, capacity_factor=0.5, top_k=2),
    "no slot at all": by_hand(sources=2, owners=2, intra=True, fill=True, capacity_factor=0.0),
    "no slot, padded, bounded": by_hand(intra=True, capacity_factor=0.0, capacity=0.25, dispatch="padded", top_k=1),
    "experts without tokens": by_hand(experts=9, tokens=2, intra=True, capacity_factor=3.0, top_k=1),
    "everybody wants one expert": by_hand(sources=2, owners=4, intra=True, fill=True, capacity_factor=0.5, gate="one"),
    "everybody wants one expert, top-1": by_hand(owners=2, intra=True, capacity_factor=1.0, gate="one", top_k=1),
    "equal logits": by_hand(sources=2, owners=2, intra=True, fill=True, capacity_factor=0.5, gate="equal"),
    "few rows, some tokens unserved": by_hand(
        tokens=12, owners=2, intra=True, capacity=0.2, capacity_factor=0.5, seed=1
    ),
    "stand-ins that hold their token": by_hand(tokens=12, top_k=3, intra=True, capacity=0.1, capacity_factor=0.5),
    "spare choices beside lost ones": by_hand(tokens=12, fill=True, capacity_factor=0.4, normalize="top_k"),
    "tokens alike": by_hand(tokens=12, intra=True, fill=True, capacity_factor=0.5, gate="close"),
    "all experts chosen": by_hand(experts=3, intra=True, fill=True, capacity_factor=0.3, top_k=2),
}


def on_corners(test):
    """Runs a property on `CORNERS` too."""
    for corner in CORNERS.values():
        test = example(corner)(test)
    return test


@examples(120)
@given(cases(dropless=True))
@on_corners
def test_layer_is_the_definition_token_by_token(case):
    layer, x_TD = case.layer(), case.x()
    y_TD, routing = run(layer, x_TD)
    ranks = by_the_book(case, layer, x_TD)
    tokens = [token for rank in ranks for token in rank.tokens]
    assert routing.capacity == ranks[0].capacity
    chosen = len(tokens[0].experts)
    assert routing.experts_TK.tolist() == [token.experts for token in tokens]
    assert routing.kinds_TK.tolist() == [[KINDS[kind] for kind in token.kinds] for token in tokens]
    assert routing.counts_BE.tolist() == [rank.taken() for rank in ranks]
    if routing.capacity is not None:
        assert routing.slots_TK.tolist() == [token.slots for token in tokens]
    weights_TK = torch.tensor([token.weights for token in tokens], dtype=torch.float64).view(-1, chosen)
    if case.router.rectify.intra:
        stand_ins = routing.stand_ins
        assert stand_ins is not None
        assert stand_ins.expert_T.tolist() == [token.stand_in for token in tokens]
        assert (stand_ins.slots_T >= 0).tolist() == [token.has_row for token in tokens]
        # Deviation: a stand-in that holds its token in a slot adds to that slot's weight.
        joined = torch.tensor([[e == token.stand_in and not token.has_row for e in token.experts] for token in tokens])
        weight_T = torch.tensor([token.stand_in_weight for token in tokens], dtype=torch.float64)
        row_T = torch.tensor([token.has_row for token in tokens])
        torch.testing.assert_close(stand_ins.weight_T, weight_T * row_T)
        weights_TK = weights_TK + joined * (routing.slots_TK >= 0) * weight_T.unsqueeze(1)
    else:
        assert routing.stand_ins is None
    torch.testing.assert_close(routing.weights_TK, weights_TK)

    experts = [swiglu(*pair) for pair in zip(layer.experts.gate_up.tolist(), layer.experts.down.tolist(), strict=True)]
    expected = [
        y
        for rank, block in zip(ranks, x_TD.chunk(len(ranks)), strict=True)
        for y in output(block.tolist(), rank, experts)
    ]
    expected_TD = torch.tensor(expected, dtype=torch.float64)
    if layer.shared is not None:
        expected_TD = expected_TD + layer.shared(x_TD)
    torch.testing.assert_close(y_TD, expected_TD)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nobody wrote holds NaN."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")
    yield
    torch.set_deterministic_debug_mode(before)


@pytest.mark.parametrize("capacity", [None, 0.3, 1.0])
@pytest.mark.parametrize("dispatch", ["ragged", "padded"])
def test_fast_kernels_compute_what_their_references_do(dispatch, capacity, poisoned):
    """Rows of slots that stayed empty, and of a bound that nobody reached, leave no trace in fp32 either."""
    made = by_hand(
        experts=8, tokens=16, sources=2, owners=4, capacity_factor=0.6, intra=True, fill=True, capacity=capacity,
        dispatch=dispatch,
    )  # fmt: skip
    x_TD = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    results = []
    for backend in ("torch", "reference"):
        case = replace(made, backend=backend)
        inputs = [x_TD.clone().requires_grad_(), *(layer := case.layer(torch.float32, width=8)).parameters()]
        y_TD, routing = run(layer, inputs[0])
        handle = layer.dispatcher.plan(routing, 8)
        assert handle.offsets_e[-1] == handle.source_N.numel(), "a row belongs to no expert"
        if handle.local is not None:
            assert handle.local.offsets_e[-1] == handle.local.source_L.numel(), "a row belongs to no expert"
        results.append([y_TD, *torch.autograd.grad((y_TD * x_TD).sum(), inputs)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@examples(60)
@given(cases(dropless=True))
@on_corners
def test_counts_are_those_of_the_definition_and_add_up(case):
    """(f): exactly, on every rank."""
    layer, x_TD = case.layer(), case.x()
    _, routing = run(layer, x_TD)
    check_identities(routing)
    total = dict.fromkeys(COUNTS, 0)
    for rank in by_the_book(case, layer, x_TD):
        found = rank.counts()
        assert found["kept"] + found["rectified"] + found["dropped"] == case.tokens * case.router.top_k
        if rank.capacity is not None:
            assert found["kept"] + found["filled"] + found["padding"] == case.moe.experts * rank.capacity
        total = {name: total[name] + found[name] for name in COUNTS}
    assert dict(zip(SLOTS, count_slots(routing).tolist(), strict=True)) == total


def survivors_only(case: Case) -> Case:
    """The case with weights that sum to one over what serves a token."""
    return replace(case, router=replace(case.router, normalize="survivors", scale=1.0, detach=True))


def unbounded(case: Case) -> Case:
    """The case with a stand-in for everybody who needs one."""
    return replace(case, router=replace(case.router, rectify=replace(case.router.rectify, intra=True, capacity=None)))


@examples(60)
@given(cases(intra=True))
@on_corners
def test_equal_experts_make_the_dense_network_at_any_capacity(case):
    """(a): with every expert the same, nobody can tell who was served by whom."""
    case = unbounded(survivors_only(case))
    layer, x_TD = case.layer(), case.x()
    with torch.no_grad():
        for weight in (layer.experts.gate_up, layer.experts.down):
            weight.copy_(weight[:1].expand_as(weight).clone())
    y_TD, routing = run(layer, x_TD)
    gate_TF, up_TF = (x_TD @ layer.experts.gate_up[0].t()).chunk(2, -1)
    dense_TD = (torch.nn.functional.silu(gate_TF) * up_TF) @ layer.experts.down[0].t()
    if layer.shared is not None:
        dense_TD = dense_TD + layer.shared(x_TD)
    torch.testing.assert_close(y_TD, dense_TD)
    assert count_slots(routing)[SLOTS.index("unserved")] == 0


@examples(40)
@given(cases(intra=True))
def test_nothing_lost_means_nothing_rectified(case):
    """(b): bit for bit, for each token that lost nothing, whatever became of the others."""
    # Without rectification a capacity of no slot is refused.
    case = replace(case, router=replace(case.router, capacity_factor=max(case.router.capacity_factor or 0, 0.02)))
    plain = replace(case.router, rectify=replace(case.router.rectify, intra=False, select="any", capacity=None))
    x_TD = case.x()
    _, routing = run(case.layer(), x_TD)
    _, expected = run(replace(case, router=plain).layer(), x_TD)
    for name in ("experts_TK", "slots_TK", "counts_BE"):
        assert getattr(routing, name).equal(getattr(expected, name)), name
    assert routing.stand_ins is not None
    untouched_T = routing.stand_ins.expert_T < 0
    lost_nothing_T = (expected.slots_TK >= 0).sum(1) >= case.router.top_k
    assert untouched_T[lost_nothing_T].all()
    assert routing.weights_TK[untouched_T].equal(expected.weights_TK[untouched_T])
    assert routing.kinds_TK[untouched_T].equal(expected.kinds_TK[untouched_T])
    # And where there is room for everybody, nobody is touched at all.
    roomy = replace(case, router=replace(case.router, capacity_factor=float(case.moe.experts)))
    _, routing = run(roomy.layer(), x_TD)
    assert routing.stand_ins is not None
    assert (routing.stand_ins.expert_T == -1).all()
    assert not routing.stand_ins.counts_BE.any()


@examples(60)
@given(cases(fill=True, intra=False))
def test_filling_evicts_nobody_and_leaves_no_slot_that_somebody_could_use(case):
    """(c) and (d)."""
    rectify = case.router.rectify
    assume(rectify.fill)  # not where all experts are chosen already
    case = replace(case, router=replace(case.router, detach=True))
    x_TD = case.x()
    fewer = RectifyConfig(fill=rectify.fill_ranks > 1, fill_ranks=max(1, rectify.fill_ranks - 1))
    _, filled = run(case.layer(), x_TD)
    _, before = run(replace(case, router=replace(case.router, rectify=fewer)).layer(), x_TD)
    K = before.experts_TK.size(1)
    assert filled.experts_TK[:, :K].equal(before.experts_TK)
    assert filled.slots_TK[:, :K].equal(before.slots_TK)
    assert filled.kinds_TK[:, :K].equal(before.kinds_TK)
    assert (filled.counts_BE >= before.counts_BE).all()
    # A fill-in choice is turned away by full experts only.
    spare_T, source_T = filled.slots_TK[:, -1] < 0, torch.arange(len(x_TD)) // case.tokens
    assert (filled.counts_BE[source_T, filled.experts_TK[:, -1]][spare_T] == filled.capacity).all()


@examples(40)
@given(cases(intra=True, fill=False))
def test_a_single_route_has_weight_one_and_teaches_the_router(case):
    """(e)."""
    router = replace(case.router, top_k=1, normalize="survivors", scale=1.0, detach=True, top_groups=case.router.groups)
    case = unbounded(replace(case, router=router))
    layer, x_TD = case.layer(), case.x()
    y_TD, routing = run(layer, x_TD)
    stand_ins = routing.stand_ins
    assert stand_ins is not None
    stood_in_T = stand_ins.expert_T >= 0
    assert routing.weights_TK.eq((routing.slots_TK >= 0).double()).all()
    assert stand_ins.weight_T.eq(stood_in_T.double()).all()
    # dw/dz of the chosen expert: p (1 - p) of a kept choice (R4), 1 - p of a stand-in (R6); 1 - p = 0 only for E = 1.
    used_T = torch.where(stood_in_T, stand_ins.expert_T, routing.experts_TK[:, 0])
    weight_T = torch.where(stood_in_T, stand_ins.weight_T, routing.weights_TK[:, 0])
    (grad_TE,) = torch.autograd.grad(weight_T.sum(), routing.logits_TE, retain_graph=True)
    slope_T = grad_TE.gather(1, used_T.unsqueeze(1)).squeeze(1)
    if case.router.score == "softmax":
        p_T = routing.probs_TE.gather(1, used_T.unsqueeze(1)).squeeze(1)
    else:
        p_T = routing.logits_TE.gather(1, used_T.unsqueeze(1)).squeeze(1).sigmoid()
    torch.testing.assert_close(slope_T, torch.where(stood_in_T, 1 - p_T, p_T * (1 - p_T)))
    # And so does the output itself: dy/dp_l is the expert's output over p_l.
    teaches_T = stood_in_T & (x_TD != 0).any(1)
    if teaches_T.any() and case.moe.experts > 1 and case.gate != "one":
        direction_TD = torch.randn(x_TD.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        (grad_TE,) = torch.autograd.grad((y_TD * direction_TD).sum(), routing.logits_TE)
        assert (grad_TE.gather(1, used_T.unsqueeze(1)).squeeze(1)[teaches_T] != 0).all()


def probabilities(logits_TE: Tensor, score: str) -> Tensor:
    return logits_TE.softmax(-1) if score == "softmax" else logits_TE.sigmoid()


@dataclass(frozen=True)
class Decided:
    """The integer parts of a routing as masks: constants of R4 and R6."""

    survives_TE: Tensor
    counted_TE: Tensor
    """What `normalize: top_k` sums over."""
    local_TE: Tensor
    """m at the stand-in of tokens that have one, 0 elsewhere."""
    single: bool
    """K = 1."""


def decided(routing: Routing, router: RouterConfig) -> Decided:
    T, E = routing.logits_TE.shape
    has_slot_TK = routing.slots_TK >= 0
    K = has_slot_TK.size(1)
    survives_TE = torch.zeros(T, E, dtype=torch.float64).scatter_(1, routing.experts_TK, has_slot_TK.double())
    first_TK = (torch.arange(K) < router.top_k).expand(T, K)
    counted_TE = torch.zeros(T, E, dtype=torch.float64).scatter_(
        1, routing.experts_TK, (has_slot_TK | first_TK).double()
    )
    local_TE = torch.zeros(T, E, dtype=torch.float64)
    if routing.stand_ins is not None:
        at_T = routing.stand_ins.expert_T
        m_T = torch.where(at_T >= 0, K - has_slot_TK.sum(1), 0).double()
        local_TE.scatter_(1, at_T.clamp(min=0).unsqueeze(1), m_T.unsqueeze(1))
    return Decided(survives_TE, counted_TE, local_TE, K == 1)


def stopped(p_TE: Tensor, d: Decided, router: RouterConfig) -> Tensor:
    """The value under sg(.) in R4 and R6, per token [T, 1]."""
    with_local_T1 = d.local_TE.sum(1, keepdim=True) > 0
    counted_TE = d.counted_TE if router.normalize == "top_k" else d.survives_TE
    mass_T1 = torch.where(
        with_local_T1, ((d.survives_TE + d.local_TE) * p_TE).sum(1, True), (counted_TE * p_TE).sum(1, True)
    )
    return torch.where(mass_T1 == 0, 1.0, mass_T1)  # nobody serves the token: no weight to divide


def weights_of(logits_TE: Tensor, sg_T1: Tensor | None, d: Decided, router: RouterConfig) -> Tensor:
    """R4 and R6: each token's weight for each expert [T, E]; `sg_T1` is a constant, None where detach is off."""
    p_TE = probabilities(logits_TE, router.score)
    numerator_TE = (d.survives_TE + d.local_TE) * p_TE
    if router.normalize == "none":
        weights_TE = numerator_TE
    elif d.single and sg_T1 is not None:
        kept_T1 = d.survives_TE.sum(1, keepdim=True)
        # R4 for K = 1: p - sg(p) + 1; R6 as for any other K.
        weights_TE = torch.where(kept_T1 > 0, numerator_TE + d.survives_TE * (1 - sg_T1), numerator_TE / sg_T1)
    else:
        weights_TE = numerator_TE / (stopped(p_TE, d, router) if sg_T1 is None else sg_T1)
    return router.scale * weights_TE


def implemented(routing: Routing) -> Tensor:
    """The weights a routing holds, per token and expert [T, E]."""
    weights_TE = torch.zeros_like(routing.logits_TE).scatter_add(1, routing.experts_TK, routing.weights_TK)
    if routing.stand_ins is not None:
        at_T1 = routing.stand_ins.expert_T.clamp(min=0).unsqueeze(1)
        weights_TE = weights_TE.scatter_add(1, at_T1, routing.stand_ins.weight_T.unsqueeze(1))
    return weights_TE


@examples(60)
@given(cases(dropless=True))
@on_corners
def test_gradient_is_that_of_the_equations_with_their_constants_held(case):
    """R4 and R6 with every sg(.) as an argument of its own, and the layer's gradient at the same point."""
    layer, x_TD = case.layer(), case.x().requires_grad_()
    y_TD, routing = run(layer, x_TD)
    d, router = decided(routing, case.router), case.router
    probe = torch.Generator().manual_seed(1)
    direction_TE = torch.randn(routing.logits_TE.shape, dtype=torch.float64, generator=probe)
    weights_TE = implemented(routing)
    inputs = [routing.logits_TE]
    (found_TE,) = torch.autograd.grad((weights_TE * direction_TE).sum(), inputs, retain_graph=True)

    logits_TE = routing.logits_TE.detach().requires_grad_()
    sg_T1 = stopped(probabilities(logits_TE.detach(), router.score), d, router) if router.detach else None
    by_equation_TE = weights_of(logits_TE, sg_T1, d, router)
    (expected_TE,) = torch.autograd.grad((by_equation_TE * direction_TE).sum(), logits_TE)
    torch.testing.assert_close(weights_TE, by_equation_TE)
    torch.testing.assert_close(found_TE, expected_TE)

    # The whole layer: every expert on every token, weighted by the equations.
    gate_TE2F = torch.einsum("td,eod->teo", x_TD, layer.experts.gate_up)
    gate_TEF, up_TEF = gate_TE2F.chunk(2, -1)
    outputs_TED = torch.einsum("tef,edf->ted", torch.nn.functional.silu(gate_TEF) * up_TEF, layer.experts.down)
    dense_TD = torch.einsum("te,ted->td", weights_of(x_TD @ layer.router.weight.t(), sg_T1, d, router), outputs_TED)
    if layer.shared is not None:
        dense_TD = dense_TD + layer.shared(x_TD)
    direction_TD = torch.randn(x_TD.shape, dtype=torch.float64, generator=probe)
    parameters = [x_TD, *layer.parameters()]
    found = torch.autograd.grad((y_TD * direction_TD).sum(), parameters)
    expected = torch.autograd.grad((dense_TD * direction_TD).sum(), parameters)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_equations_pass_gradcheck_with_constants_for_stopped_gradients(score, top_k, detach):
    made = by_hand(tokens=5, top_k=top_k, fill=top_k == 1, intra=True, capacity_factor=0.5, score=score, detach=detach)
    _, routing = run(made.layer(), made.x())
    d = decided(routing, made.router)
    assert d.local_TE.any(), "nobody was rectified"
    assert (d.local_TE.sum(1) == 0).any(), "nobody was not"
    logits_TE = routing.logits_TE.detach().requires_grad_()
    constant_T1 = stopped(probabilities(logits_TE.detach(), score), d, made.router)
    if detach:
        assert torch.autograd.gradcheck(lambda z, c: weights_of(z, c, d, made.router), (logits_TE, constant_T1))
    else:
        assert torch.autograd.gradcheck(lambda z: weights_of(z, None, d, made.router), (logits_TE,))
        # Without a stop the library's own weights are an ordinary function too.
        experts_TK, slots_TK = routing.experts_TK, routing.slots_TK

        def library(z_TE: Tensor) -> Tensor:
            return combine_weights(z_TE, experts_TK, slots_TK, made.router)

        assert torch.autograd.gradcheck(library, (logits_TE,))


def test_a_lost_choice_of_any_probability_leaves_gradients_finite():
    """exp(log p - log of a sum without it) is infinite for a lost choice 200 nats above the survivors."""
    slots_TK, config = torch.tensor([[-1, 0]]), RouterConfig(top_k=2)
    logits_TE = torch.tensor([[0.0, -200.0, -250.0]], requires_grad=True)
    weights_TK = combine_weights(logits_TE, torch.tensor([[0, 1]]), slots_TK, config)
    assert weights_TK.tolist() == [[0, 1]]
    # Of log p of the survivor: 1; so of the logits, whose softmax is all expert 0.
    assert torch.autograd.grad(weights_TK.sum(), logits_TE)[0].tolist() == [[-1, 1, 0]]
    weights_TL = weights_with_stand_in(logits_TE, torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 1]]), config)
    assert weights_TL.tolist() == [[0, 1, pytest.approx(0, abs=1e-20)]]
    (gradient,) = torch.autograd.grad(weights_TL.sum(), logits_TE)
    assert gradient.tolist() == [[-1, 1, pytest.approx(0, abs=1e-20)]]


class NoHostData(TorchFunctionMode):
    """Refuses what takes numbers from the host to a device or back: either waits for the device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        assert name not in {"tensor", "as_tensor", "asarray", "from_numpy", "item", "tolist", "cpu", "numpy"}, name
        return func(*args, **(kwargs or {}))


def without_values(capacity: float | None, dispatch: str, priority: str) -> tuple[Case, MoELayer, Tensor]:
    """A layer with every option that rectification has, and tokens, of fake tensors."""
    made = by_hand(
        experts=8, tokens=6, sources=2, owners=4, priority=priority, groups=4, top_groups=3, shared_experts=1,
        intra=True, fill=True, fill_ranks=2, capacity=capacity, capacity_factor=0.5, dispatch=dispatch,
    )  # fmt: skip
    width = 8  # grouped products want rows of whole 16 bytes
    layer = MoELayer(width, replace(made.moe, d_expert=width), made.router, single(), backend="torch")
    return made, layer, torch.empty(1, 2 * made.tokens, width, requires_grad=True)


@pytest.mark.parametrize("priority", ["probability", "position"])
@pytest.mark.parametrize("capacity", [None, 0.25])
def test_routing_and_rectification_never_wait_for_the_device(capacity, priority):
    """Fake tensors have shapes and no values, as those on `meta`, which they are inside: whatever must know a value
    on the host, for a branch or for the shape of a result, raises. Other than by that and by copies (`NoHostData`)
    PyTorch never makes the host wait for a device."""
    with FakeTensorMode(), NoHostData():
        made, layer, x_1TD = without_values(capacity, "padded", priority)
        rectifier = Rectifier(made.router, own_experts(8, range(8), 2, 0, made.router.emulate))
        routing = rectifier(layer.router(x_1TD.flatten(0, 1), 2))
        assert routing.stand_ins is not None
        assert count_slots(routing).shape == (len(SLOTS),)
        assert routing.kinds_TK.shape == (12, 4)
        total = routing.weights_TK.sum() + routing.stand_ins.weight_T.sum()
        torch.autograd.grad(total, layer.router.weight)


def test_a_padded_layer_with_bounded_stand_ins_never_waits_for_the_device():
    """Forward and backward, experts and all; every other layout asks how many rows there are, and is caught at it."""
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        with NoHostData():
            _, layer, x_1TD = without_values(0.25, "padded", "probability")
            y_1TD, _ = layer(x_1TD)
            torch.autograd.grad(y_1TD.sum(), [x_1TD, *layer.parameters()])
        for capacity, dispatch in [(None, "padded"), (0.25, "ragged")]:
            _, layer, x_1TD = without_values(capacity, dispatch, "probability")
            with pytest.raises(DataDependentOutputException):
                layer(x_1TD)
