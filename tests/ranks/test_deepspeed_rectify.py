"""Rectify-Router inside DeepSpeed's own MoE layer, on real gloo ranks: it computes what our layer does.

DeepSpeed takes seconds to import: all of it happens in ranks of their own, two runs for all tests. Differences are
measured against the largest value of the tensor.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from spawned import run_ranks
from torch import Tensor, nn

from wastenot.moe.config import MoEConfig, RectifyConfig, RouterConfig
from wastenot.moe.layer import MoELayer
from wastenot.moe.ledger import SLOTS, check_identities, count_layers
from wastenot.moe.routing import Routing
from wastenot.parallel.config import ParallelConfig
from wastenot.parallel.expert import local_experts
from wastenot.parallel.mesh import make_mesh

B, S, D, E, WIDTH = 4, 12, 16, 8, 24
PLAIN: dict[str, Any] = {"intra": False, "fill": False}
INTRA, FILL = {"intra": True, "fill": False}, {"intra": False, "fill": True}
BOTH = {"intra": True, "fill": True}
TOP_1: dict[str, Any] = {"k": 1, "use_rts": False}

# Options of their layer, of `rectify_`, and what differs in our router's.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "top-1": (TOP_1, BOTH, {}),
    "top-1, weights of one": (TOP_1, BOTH | {"normalize": "survivors"}, {"normalize": "survivors"}),
    "top-2, capacity only": ({}, PLAIN, {}),
    "top-2": ({}, BOTH, {}),
    "top-2, no slots": ({"capacity_factor": 0.0}, INTRA, {"capacity_factor": 0.0}),
    "top-2, least capacity": ({"capacity_factor": 0.3, "min_capacity": 8}, FILL, {"capacity_factor": 0.66}),
    "top-2, by probability": ({}, BOTH | {"priority": "probability"}, {"priority": "probability"}),
    "top-4": ({"k": 4}, BOTH, {"priority": "probability"}),
    "top-4, bounded, all": (
        {"k": 4},
        INTRA | {"select": "all", "capacity": 0.25, "capacity_factor": 0.2},
        {"priority": "probability", "capacity_factor": 0.2},
    ),
}


class Network(nn.Module):
    """An expert as a user may have written it; with a bias it returns that too, as Megatron's does."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate_up = nn.Linear(D, 2 * WIDTH, bias=bias)
        self.down = nn.Linear(WIDTH, D, bias=bias)
        self.bias = bias

    def forward(self, x: Tensor) -> Any:
        gate, up = self.gate_up(x).chunk(2, -1)
        y = self.down(F.silu(gate) * up)
        return (y, self.down.bias) if self.bias else y


def drawn(name: str, *shape: int) -> Tensor:
    """Weights by name, the same on all ranks."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(map(ord, name)))) / 3


def tokens(rank: int) -> Tensor:
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(10 + rank)).requires_grad_()


def their_layer(world: int, bias: bool = False, alike: bool = False, ready: bool = True, **changes: Any) -> Any:
    """DeepSpeed's MoE, its experts cut over all ranks; `ready`: with its groups, which an engine makes otherwise."""
    from deepspeed.moe.layer import MoE

    usual: dict[str, Any] = {
        "k": 2,
        "capacity_factor": 0.7,
        "eval_capacity_factor": 0.4,
        "min_capacity": 0,
        "top2_2nd_expert_sampling": False,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        layer = MoE(D, Network(bias), num_experts=E, ep_size=world, **(usual | changes))
        if ready:
            layer.set_deepspeed_parallelism()
    first = (E // world) * dist.get_rank()
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.copy_(3 * drawn("gate", E, D))
        for i, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
            number = 0 if alike else first + i
            for name, parameter in expert.named_parameters():
                parameter.copy_(drawn(f"{name}{'*' * number}", *parameter.shape))
        for name, parameter in layer.named_parameters():
            if not name.startswith("deepspeed_moe"):
                parameter.copy_(drawn(name, *parameter.shape))
    return layer


def our_layer(world: int, k: int, rectify: dict[str, Any], **changes: Any) -> MoELayer:
    """Our layer with the same weights."""
    names = {field.name for field in fields(RectifyConfig)}
    usual: dict[str, Any] = {
        "top_k": k,
        "normalize": "none" if k == 1 else "survivors",
        "detach": k == 1,
        "capacity_factor": 0.7,
        "priority": "position",
    }
    wanted = RectifyConfig(**{name: value for name, value in rectify.items() if name in names})
    mesh = make_mesh(ParallelConfig(expert=world), "cpu")
    config = RouterConfig(**(usual | changes), rectify=wanted)
    layer = MoELayer(D, MoEConfig(experts=E, d_expert=WIDTH), config, mesh)
    held = local_experts(E, mesh.expert)
    layer.router.weight = nn.Parameter(3 * drawn("gate", E, D))
    stacks = ("gate_up.weight", (2 * WIDTH, D)), ("down.weight", (D, WIDTH))
    gate_up, down = (torch.stack([drawn(f"{name}{'*' * i}", *shape) for i in held]) for name, shape in stacks)
    layer.experts.gate_up, layer.experts.down = nn.Parameter(gate_up), nn.Parameter(down)
    return layer


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def unlike(found: Routing, expected: Routing) -> list[str]:
    """Names of all that is not the same bits."""
    pairs = [(found, expected, "experts_TK weights_TK slots_TK counts_BE logits_TE probs_TE priority_T")]
    if expected.stand_ins is not None:
        assert found.stand_ins is not None
        pairs.append((found.stand_ins, expected.stand_ins, "expert_T weight_T slots_T counts_BE"))  # type: ignore[arg-type]
    names = [name for a, b, names in pairs for name in names.split() if not getattr(a, name).equal(getattr(b, name))]
    return names + ["capacity"] * (found.capacity != expected.capacity)


def compare(case: str, rank: int, world: int, training: bool) -> dict[str, Any]:
    """How far outputs and gradients of the two layers are apart, and what differs in their routings."""
    from wastenot.moe.adapters.deepspeed import rectify_, routings_of

    options, rectify, changes = CASES[case]
    if not training and "min_capacity" not in options:
        changes = changes | {"capacity_factor": rectify.get("capacity_factor", 0.4)}
    theirs = rectify_(their_layer(world, **options), **rectify).train(training)
    ours = our_layer(world, options.get("k", 2), rectify, **changes)
    x_BSD, y_BSD = tokens(rank), tokens(rank)
    with routings_of(theirs) as routings:
        found, _, _ = theirs(x_BSD)
    expected, routing = ours(y_BSD)
    (read,) = routings.values()
    check_identities(read)
    found.square().sum().backward()
    expected.square().sum().backward()
    local = theirs.deepspeed_moe.experts.deepspeed_experts
    pairs = {
        "output": (found, expected),
        "tokens": (x_BSD.grad, y_BSD.grad),
        "gate": (theirs.deepspeed_moe.gate.wg.weight.grad, ours.router.weight.grad),
        "gate_up": (torch.stack([each.gate_up.weight.grad for each in local]), ours.experts.gate_up.grad),
        "down": (torch.stack([each.down.weight.grad for each in local]), ours.experts.down.grad),
    }
    errors = {name: off(*pair) for name, pair in pairs.items()}
    return {"errors": errors, "unlike": unlike(read, routing), "lost": int((routing.kinds_TK >= 2).sum())}


STOCK: dict[str, dict[str, Any]] = {
    "top-1": {"k": 1, "capacity_factor": 8.0},
    "top-1, noise on logits": {"k": 1, "capacity_factor": 8.0, "noisy_gate_policy": "RSample"},
    "top-2, noise on inputs": {"capacity_factor": 8.0, "noisy_gate_policy": "Jitter"},
    "top-2, second choice drawn": {"capacity_factor": 8.0, "top2_2nd_expert_sampling": True},
    "top-2, residual, biases": {"capacity_factor": 8.0, "use_residual": True, "bias": True},
    "top-2, dropping": {"capacity_factor": 0.4},
    "top-2, least capacity": {"capacity_factor": 0.4, "min_capacity": 7},
    "top-2, nothing dropped": {"drop_tokens": False},
    "top-4": {"k": 4, "capacity_factor": 8.0},
}


def against_stock(options: dict[str, Any], rank: int, world: int) -> dict[str, float]:
    """Without fill and intra: outputs, gradients, loss and counts of DeepSpeed's own layer, random numbers included."""
    from wastenot.moe.adapters.deepspeed import rectify_

    results = []
    for change in (False, True):
        layer = their_layer(world, **options)
        if change:
            rectify_(layer, **PLAIN)
        x_BSD = tokens(rank)
        torch.manual_seed(5)
        y_BSD, loss, counts = layer(x_BSD)
        (y_BSD.square().mean() + loss).backward()
        gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
        results.append({"y": y_BSD, "x": x_BSD.grad, "loss": loss, "counts": counts.float()} | gradients)
    errors = {name: off(results[1][name], value) for name, value in results[0].items()}
    errors["loss and counts bit for bit"] = float(
        not (results[1]["loss"].equal(results[0]["loss"]) and results[1]["counts"].equal(results[0]["counts"]))
    )
    return errors


def under_autocast(rank: int, world: int) -> float:
    """How far outputs in bf16 are from the stock layer's in bf16, which divides by 0.0078 at least where it drops."""
    from wastenot.moe.adapters.deepspeed import rectify_

    outputs = []
    for change in (False, True):
        layer = their_layer(world, capacity_factor=8.0)
        if change:
            rectify_(layer, **PLAIN)
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(layer(tokens(rank))[0])
    assert outputs[1].dtype == outputs[0].dtype
    return float((outputs[1] - outputs[0]).float().norm() / outputs[0].float().norm())


def dropping_keeps_loss_and_counts(rank: int, world: int) -> list[bool]:
    """Whether loss and counts are the stock layer's, bit for bit, where choices are lost, for each k."""
    from wastenot.moe.adapters.deepspeed import rectify_

    same = []
    for k in (1, 2, 4):
        stock, layer = their_layer(world, k=k, capacity_factor=0.3), their_layer(world, k=k, capacity_factor=0.3)
        _, loss, counts = stock(tokens(rank))
        _, found, found_counts = rectify_(layer)(tokens(rank))
        same.append(loss.equal(found) and counts.equal(found_counts))
    return same


def random_selection(rank: int, world: int) -> dict[str, bool]:
    """Random Token Selection: another pass keeps other tokens, as many of them; the same seed the same."""
    from wastenot.moe.adapters.deepspeed import rectify_, routings_of

    layer = rectify_(their_layer(world, k=1, capacity_factor=0.4), **INTRA)
    slots = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        with routings_of(layer) as routings:
            layer(tokens(rank))
        (routing,) = routings.values()
        slots.append(routing)
    first, other, again = slots
    return {
        "others": not first.slots_TK.equal(other.slots_TK),
        "as many": first.counts_BE.equal(other.counts_BE),
        "repeats": first.slots_TK.equal(again.slots_TK) and first.weights_TK.equal(again.weights_TK),
    }


def dense(rank: int, world: int) -> dict[str, float]:
    """All experts equal and weights that sum to one: the dense network at any capacity with `intra`."""
    from wastenot.moe.adapters.deepspeed import rectify_

    x_BSD = tokens(rank).detach()
    gate, up = (x_BSD @ drawn("gate_up.weight", 2 * WIDTH, D).t()).chunk(2, -1)
    expected = (F.silu(gate) * up) @ drawn("down.weight", D, WIDTH).t()
    errors = {}
    for factor in (0.0, 0.3, 1.0):
        for k in (1, 2, 4):
            for name, options in (("intra", INTRA), ("both", BOTH)):
                layer = their_layer(world, alike=True, k=k, capacity_factor=factor)
                rectify_(layer, normalize="survivors", **options)
                errors[f"{name} {k} {factor}"] = off(layer(x_BSD)[0], expected)
    errors["vanilla"] = off(their_layer(world, alike=True, capacity_factor=0.3)(x_BSD)[0], expected)
    return errors


def taken_back(rank: int, world: int) -> dict[str, bool]:
    """Names, classes, attributes and outputs around rectify_ and unrectify_."""
    from wastenot.moe.adapters.deepspeed import rectify_, unrectify_

    layer, stock = their_layer(world, capacity_factor=0.3), their_layer(world, capacity_factor=0.3)
    before = {name: tensor.data_ptr() for name, tensor in layer.state_dict().items()}
    classes = [type(module) for module in layer.modules()]
    attributes = [set(vars(module)) for module in layer.modules()]
    y_BSD, _, _ = stock(tokens(rank))
    rectify_(layer)
    rectify_(layer, capacity_factor=0.5)
    state = {name: tensor.data_ptr() for name, tensor in layer.state_dict().items()}
    changed = layer(tokens(rank))[0]
    unrectify_(layer)
    back = layer(tokens(rank))[0]
    made = {"l_aux", "exp_counts"}
    return {
        "state": list(state.items()) == list(before.items()),
        "changed": off(changed, y_BSD) > 1e-3,
        "back": back.equal(y_BSD),
        "classes": [type(module) for module in layer.modules()] == classes,
        "attributes": [set(vars(module)) - made for module in layer.modules()] == attributes,
    }


class Model(nn.Module):
    def __init__(self, world: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, D)
        self.mixture = their_layer(world, k=1, capacity_factor=0.6, bias=True, ready=False)
        self.head = nn.Linear(D, 32)

    def forward(self, inputs_BS: Tensor, targets_BS: Tensor) -> Tensor:
        x_BSD = self.embedding(inputs_BS)
        y_BSD, loss, _ = self.mixture(x_BSD)
        logits = self.head(x_BSD + y_BSD)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets_BS.flatten()) + 0.01 * loss


def engine_of(model: nn.Module, stage: int, bf16: bool) -> Any:
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    groups = split_params_into_different_moe_groups_for_optimizer(
        [{"params": list(model.parameters()), "name": "parameters"}]
    )
    config = {
        "train_micro_batch_size_per_gpu": B,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 10_000},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16},
    }
    return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=config)[0]


def train(rank: int, world: int, stage: int, bf16: bool, folder: str) -> dict[str, Any]:
    """Losses under a DeepSpeed engine, the slots of its last step, and whether a stock engine loads what it saved."""
    from wastenot.moe.adapters.deepspeed import rectify_, routings_of

    torch.manual_seed(0)
    engine = engine_of(rectify_(Model(world)), stage, bf16)
    batch_BS = torch.randint(0, 32, (B, S + 1), generator=torch.Generator().manual_seed(rank))
    losses, slots = [], {}
    for _ in range(8):
        with routings_of(engine.module) as routings:
            loss = engine(batch_BS[:, :-1], batch_BS[:, 1:])
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        slots = dict(zip(SLOTS, count_layers(list(routings.values()))[:, -len(SLOTS) :].sum(0).tolist(), strict=True))
    engine.save_checkpoint(f"{folder}/{world}-{stage}")
    stock = engine_of(Model(world), stage, bf16)
    stock.load_checkpoint(f"{folder}/{world}-{stage}")
    saved, loaded = engine.module.state_dict(), stock.module.state_dict()
    same = list(saved) == list(loaded) and all(saved[name].equal(tensor) for name, tensor in loaded.items())
    return {"losses": losses, "slots": slots, "same": same}


def refusals(rank: int, world: int) -> dict[str, str]:
    """What is said of each thing that cannot be."""
    from deepspeed.moe.layer import MoE

    from wastenot.moe.adapters.deepspeed import rectify_

    said = {}

    def refused(name: str, model: nn.Module, **options: Any) -> None:
        classes = [type(module) for module in model.modules()]
        with pytest.raises(ValueError) as caught:
            rectify_(model, **options)
        assert [type(module) for module in model.modules()] == classes
        said[name] = str(caught.value)

    refused("no deepspeed.moe.layer.MoE", nn.Linear(2, 2))
    refused("drop_tokens", nn.ModuleList([their_layer(world), their_layer(world, drop_tokens=False)]))
    refused("enable_expert_tensor_parallelism", their_layer(world, enable_expert_tensor_parallelism=True))
    refused("fill_ranks", their_layer(world), fill_ranks=7)
    refused("priority: 'chance'", their_layer(world), priority="chance")
    refused("capacity: 2.0 is outside", their_layer(world), capacity=2.0)
    refused("capacity_factor: 0.0", their_layer(world, capacity_factor=0.0), intra=False)
    tutel = their_layer(world)
    tutel.deepspeed_moe.use_tutel = True  # as it is where tutel is installed
    refused("use_tutel", tutel)
    hooked = their_layer(world)
    hooked.deepspeed_moe.gate.forward = hooked.deepspeed_moe.gate.forward
    refused("forward of its TopKGate was replaced", hooked)
    some = torch.ones(B * S)
    with pytest.raises(ValueError) as caught:
        rectify_(their_layer(world, k=1))(tokens(rank), some)
    said["used_token"] = str(caught.value)
    early = rectify_(MoE(D, Network(), num_experts=E, ep_size=2))
    with pytest.raises(ValueError) as caught:
        early(tokens(rank))
    said["ep_group"] = str(caught.value)
    return said


def everything(rank: int, world: int, folder: str) -> dict[str, Any]:
    import deepspeed

    os.environ["LOCAL_RANK"] = str(rank)  # as torchrun has it
    # It would compile an exchange through shared memory at first, for most of a minute, and does without.
    deepspeed.ops.__compatible_ops__.clear()
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    return {
        "compared": {
            (case, training): compare(case, rank, world, training) for case in CASES for training in (True, False)
        },
        "stock": {name: against_stock(options, rank, world) for name, options in STOCK.items()},
        "autocast": under_autocast(rank, world),
        "losses": dropping_keeps_loss_and_counts(rank, world),
        "random": random_selection(rank, world),
        "dense": dense(rank, world),
        "back": taken_back(rank, world),
        "refused": refusals(rank, world),
        "trained": [train(rank, world, 1, False, folder), train(rank, world, 2, True, folder)],
    }


@pytest.fixture(scope="module", params=[1, 2], ids=["EP=1", "EP=2"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Per rank, all that the tests look at."""
    if importlib.util.find_spec("deepspeed") is None:  # Importing it takes seconds, and the ranks do.
        pytest.skip("needs deepspeed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        return run_ranks(request.param, everything, str(tmp_path_factory.mktemp("saved")), timeout=180.0)


# DeepSpeed warns about CUDA libraries that a CPU does not have.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("case", CASES)
def test_deepspeeds_layer_computes_what_ours_does(results, case, training):
    for result in results:
        found = result["compared"][case, training]
        assert found["unlike"] == []
        assert all(error <= 1e-5 for error in found["errors"].values()), found["errors"]
        assert found["lost"] > 0


@pytest.mark.parametrize("case", STOCK)
def test_without_fill_and_intra_it_is_deepspeeds_own(results, case):
    for result in results:
        errors = result["stock"][case]
        assert all(error <= 1e-5 for error in errors.values()), errors


def test_under_autocast_it_computes_as_deepspeeds_own(results):
    assert all(result["autocast"] <= 0.01 for result in results), [result["autocast"] for result in results]


def test_balancing_loss_and_counts_see_all_choices(results):
    assert all(result["losses"] == [True] * 3 for result in results)


def test_random_token_selection_stays_random(results):
    for result in results:
        assert all(result["random"].values()), result["random"]


def test_equal_experts_give_the_dense_network_where_vanilla_does_not(results):
    for result in results:
        errors = dict(result["dense"])
        assert errors.pop("vanilla") > 0.1
        assert all(error <= 1e-5 for error in errors.values()), errors


def test_unrectify_gives_the_stock_layer_back(results):
    for result in results:
        assert all(result["back"].values()), result["back"]


@pytest.mark.parametrize("run", [0, 1], ids=["ZeRO-1", "ZeRO-2 bf16"])
def test_it_trains_under_a_deepspeed_engine_and_a_stock_one_loads_what_it_saved(results, run):
    for result in results:
        trained = result["trained"][run]
        losses, slots = trained["losses"], trained["slots"]
        assert losses[-1] < 0.8 * losses[0], losses
        assert slots["kept"] + slots["rectified"] + slots["dropped"] == B * S
        assert slots["rectified"] > 0 == slots["unserved"]
        assert trained["same"]


def test_what_cannot_be_is_refused_by_its_name(results):
    said = results[0]["refused"]
    assert len(said) == 11
    for name, message in said.items():
        assert name in message and "\n" not in message, message


def test_without_deepspeed_the_adapter_says_what_to_install():
    code = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "try:\n    import wastenot.moe.adapters.deepspeed\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'wastenot[deepspeed]'" in done.stdout
