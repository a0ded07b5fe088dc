"""Rectification on real ranks (METHODS R6, R10): one process decides the same, nothing more is sent, nobody waits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from spawned import run_ranks
from torch import Tensor

from wastenot.moe.config import EmulateConfig, MoEConfig, RectifyConfig, RouterConfig
from wastenot.moe.layer import MoELayer
from wastenot.moe.ledger import Ledger, check_identities
from wastenot.moe.routing import Routing
from wastenot.parallel.apply import parallelize
from wastenot.parallel.config import ParallelConfig
from wastenot.parallel.events import Recorder
from wastenot.parallel.mesh import Mesh, make_mesh, single

D, TOKENS = 8, 48
BOTH = RectifyConfig(intra=True, fill=True)
ROUTERS = {
    "top-1, stand-ins": RouterConfig(top_k=1, capacity_factor=0.5, rectify=RectifyConfig(intra=True)),
    "top-2, both": RouterConfig(top_k=2, capacity_factor=0.6, rectify=BOTH),
    "top-2, both, bounded": RouterConfig(top_k=2, capacity_factor=0.5, rectify=replace(BOTH, capacity=0.3)),
    "sigmoid, two fill ranks, only tokens that lost all": RouterConfig(
        top_k=2, score="sigmoid", capacity_factor=0.3, rectify=replace(BOTH, fill_ranks=2, select="all")
    ),
    "no slot": RouterConfig(top_k=2, capacity_factor=0.0, rectify=RectifyConfig(intra=True, capacity=1.0)),
    "fill only, by position": RouterConfig(
        top_k=3, capacity_factor=0.5, priority="position", rectify=RectifyConfig(fill=True)
    ),
    "forced logits": RouterConfig(
        kind="bursty", skew=2.0, capacity_factor=0.5, rectify=BOTH, balance_loss=0.0
    ),
}  # fmt: skip
LAYOUTS = [(2, 1), (1, 2), (4, 1), (2, 2)]
"""(expert, data)."""


@dataclass(frozen=True)
class Setting:
    """One layer to run: how it routes and dispatches, in which dtype, with which tokens and gate."""

    router: RouterConfig
    dispatch: str = "ragged"
    dtype: torch.dtype = torch.float64
    tokens: int = TOKENS
    """Of all ranks."""
    gate: str = "random"
    """`level`: all logits are equal; `peak`: expert 5 is the first choice of every token, all others are equal."""

    def layer(self, mesh: Mesh) -> MoELayer:
        def fill(name: str, tensor: Tensor, generator: torch.Generator) -> None:
            tensor.copy_(torch.randn(tensor.shape, dtype=torch.float64, generator=generator))
            if name == "router.weight" and self.gate != "random":
                tensor.zero_()
                tensor[5] = float(self.gate == "peak")

        moe = MoEConfig(experts=8, d_expert=4, shared_experts=1, dispatch=self.dispatch)  # pyright: ignore[reportArgumentType]
        with torch.device("meta"):
            layer = MoELayer(D, moe, self.router, mesh)
        parallelize(layer, mesh, fill, 0, self.dtype)
        return layer

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Tokens, and the gradient of what becomes of them; [T, D] of all ranks."""
        draw = torch.Generator().manual_seed(1)
        x, direction = (torch.randn(self.tokens, D, dtype=torch.float64, generator=draw) for _ in range(2))
        # A sum of positive numbers is what makes the peak.
        return (x.abs() if self.gate == "peak" else x).to(self.dtype), direction.to(self.dtype)

    def emulating(self, sources: int, owners: int) -> Setting:
        return replace(self, router=replace(self.router, emulate=EmulateConfig(sources=sources, owners=owners)))


SETTINGS = [
    Setting(router, dispatch, dtype)
    for router in ROUTERS.values()
    for dispatch in ("ragged", "padded")
    for dtype in (torch.float64, torch.float32)
]


def edges(world: int) -> list[Setting]:
    """One token per rank, no expert better than another, one expert for all."""
    return [
        Setting(ROUTERS[name], dispatch, tokens=tokens, gate=gate)
        for name in ("top-1, stand-ins", "top-2, both, bounded", "no slot")
        for dispatch in ("ragged", "padded")
        for tokens, gate in ((world, "random"), (TOKENS, "level"), (TOKENS, "peak"))
    ]


def decisions(routing: Routing) -> dict[str, Tensor]:
    """Whatever must be equal bit for bit."""
    found = {
        name: getattr(routing, name)
        for name in ("experts_TK", "slots_TK", "kinds_TK", "weights_TK", "logits_TE", "counts_BE", "load_E")
    }
    if routing.stand_ins is not None:
        found |= {name: getattr(routing.stand_ins, name) for name in ("expert_T", "weight_T", "slots_T", "counts_BE")}
    return {name: tensor.detach() for name, tensor in found.items()}


def pass_through(rank: int, world: int, expert: int, settings: list[Setting]) -> list[dict[str, Any]]:
    """Forward and backward of every setting on this rank's tokens."""
    mesh = make_mesh(ParallelConfig(expert=expert), "cpu") if world > 1 else single()
    results = []
    for setting in settings:
        layer = setting.layer(mesh)
        x, direction = setting.inputs()
        x_1TD = x.chunk(world)[rank].unsqueeze(0).clone().requires_grad_()
        y_1TD, routing = layer(x_1TD)
        check_identities(routing)
        loss = (y_1TD * direction.chunk(world)[rank]).sum()
        parameters = dict(layer.named_parameters())
        gradients = torch.autograd.grad(loss, [x_1TD, *parameters.values()], allow_unused=True)
        results.append(
            {
                "decisions": decisions(routing),
                "y": y_1TD.detach().squeeze(0),
                "x": gradients[0].squeeze(0),
                "parameters": dict(zip(parameters, gradients[1:], strict=True)),
            }
        )
    return results


def assert_same(ranks: list[dict[str, Any]], alone: dict[str, Any], expert: int, dtype: torch.dtype) -> None:
    """The ranks' results, put together, are those of the one process."""
    for name, whole in alone["decisions"].items():
        parts = [rank["decisions"][name] for rank in ranks]
        together = torch.stack(parts).sum(0) if name == "load_E" else torch.cat(parts)
        assert together.equal(whole), name
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    for name in ("y", "x"):
        torch.testing.assert_close(torch.cat([rank[name] for rank in ranks]), alone[name], **tolerance)
    for name, whole in alone["parameters"].items():
        parts = [rank["parameters"][name] for rank in ranks]
        if name.startswith("experts."):
            # Consecutive ranks share one copy of the experts; copies add up.
            copies = [torch.cat(parts[first : first + expert]) for first in range(0, len(parts), expert)]
        else:
            copies = parts
        torch.testing.assert_close(torch.stack(copies).sum(0), whole, **tolerance)


@pytest.mark.parametrize(("expert", "data"), [(1, 1), *LAYOUTS])
def test_one_process_decides_as_real_ranks_do(expert, data):
    """(g): nothing on the ranks is emulated; the one process emulates them."""
    world = expert * data
    settings = SETTINGS + edges(world)
    ranks = run_ranks(world, pass_through, expert, settings)
    alone = pass_through(0, 1, 1, [setting.emulating(world, expert) for setting in settings])
    for i, setting in enumerate(settings):
        assert_same([rank[i] for rank in ranks], alone[i], expert, setting.dtype)


# More ranks emulated than there are, owners that hold nothing here: stand-ins have to travel.
EMULATED = [
    *((expert, data, 8, 4) for expert, data in LAYOUTS),
    *((expert, data, 4, 4) for expert, data in LAYOUTS),
    (2, 1, 8, 2),
    (4, 1, 4, 1),
]


@pytest.mark.parametrize("expert", [1, 2, 4])
def test_emulated_ranks_decide_the_same_on_any_number_of_real_ones(expert):
    for _, data, sources, owners in (row for row in EMULATED if row[0] == expert):
        settings = [setting.emulating(sources, owners) for setting in SETTINGS if setting.dispatch == "ragged"]
        ranks = run_ranks(expert * data, pass_through, expert, settings)
        alone = pass_through(0, 1, 1, settings)
        for i, setting in enumerate(settings):
            assert_same([rank[i] for rank in ranks], alone[i], expert, setting.dtype)


def sent_bytes(rank: int, world: int, settings: list[Setting]) -> list[dict[str, int]]:
    """Bytes this rank sends, by collective, forward and backward."""
    found = []
    for setting in settings:
        ledger = Ledger()
        layer = setting.layer(make_mesh(ParallelConfig(expert=world), "cpu", ledger))
        x_1TD = torch.randn(1, TOKENS, D, dtype=setting.dtype, requires_grad=True)
        y_1TD, routing = layer(x_1TD)
        torch.autograd.grad(y_1TD.sum(), x_1TD)
        stand_ins = routing.stand_ins
        assert stand_ins is None or stand_ins.counts_BE.sum() > 0, "nothing was rectified"
        found.append({name: total.num_bytes for name, total in ledger.by_name.items()})
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_stand_ins_send_nothing(world):
    without = RouterConfig(top_k=2, capacity_factor=0.5, rectify=RectifyConfig(fill=True))
    with_intra = replace(without, rectify=BOTH)
    settings = [Setting(router, dispatch) for dispatch in ("ragged", "padded") for router in (without, with_intra)]
    # Where emulated owners are other ranks, their stand-ins do travel.
    settings.append(Setting(with_intra).emulating(4 * world, 4))
    for ragged, ragged_intra, padded, padded_intra, travelling in run_ranks(world, sent_bytes, settings):
        assert ragged["layer0.dispatch"] > 0
        assert ragged_intra == ragged
        assert padded_intra == padded
        assert travelling["layer0.dispatch"] > ragged["layer0.dispatch"]


class Diary(Recorder):
    """Writes down what happens, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def collective_entered(self, name: str, num_bytes: int) -> None:
        self.events.append(f"{name.removeprefix('layer0.')} leaves")

    def collective_left(self, name: str, waited_s: float, hidden: float = 0.0) -> None:
        self.events.append(f"{name.removeprefix('layer0.')} arrived")


def order_of_events(rank: int, world: int, dispatch: str) -> list[list[str]]:
    """What happens in a forward and in a backward pass."""
    diary = Diary()
    mesh = make_mesh(ParallelConfig(expert=world), "cpu", diary)
    layer = Setting(ROUTERS["top-2, both"], dispatch).layer(mesh)

    def write_down(module: torch.nn.Module, inputs: tuple[Tensor, ...], rows_RD: Tensor) -> None:
        diary.events.append("experts")
        rows_RD.register_hook(lambda grad: diary.events.append("experts' gradient"))

    layer.experts.register_forward_hook(write_down)
    diary.events.clear()
    y_1TD, _ = layer(torch.randn(1, TOKENS, D, dtype=torch.float64, requires_grad=True))
    forward = diary.events.copy()
    diary.events.clear()
    y_1TD.sum().backward()
    return [forward, diary.events]


@pytest.mark.parametrize("dispatch", ["ragged", "padded"])
def test_stand_ins_are_computed_while_tokens_travel_in_both_directions(dispatch):
    counted = ["dispatch-counts leaves", "dispatch-counts arrived"] if dispatch == "ragged" else []
    forward = ["dispatch leaves", "experts", "dispatch arrived", "experts", "combine leaves", "combine arrived"]
    backward = [
        "combine-gradient leaves",
        "combine-gradient arrived",
        "experts' gradient",
        "dispatch-gradient leaves",
        "experts' gradient",
        "dispatch-gradient arrived",
    ]
    assert run_ranks(2, order_of_events, dispatch) == [[counted + forward, backward]] * 2
