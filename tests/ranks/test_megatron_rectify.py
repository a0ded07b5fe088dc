"""Rectify-Router inside Megatron-Core's own MoE layer, on real gloo ranks: it computes what our layer does.

Megatron runs through `megatron_cpu_shim.py`, which patches its process for good: all of it happens in ranks of their
own, two runs for all. Differences are measured against the largest value of the tensor.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from spawned import run_ranks
from torch import Tensor, nn

from wastenot.moe.config import MoEConfig, RectifyConfig
from wastenot.moe.layer import MoELayer
from wastenot.moe.ledger import SLOTS, check_identities, count_layers, count_slots
from wastenot.parallel.config import ParallelConfig
from wastenot.parallel.expert import local_experts
from wastenot.parallel.mesh import make_mesh

ROOT = Path(__file__).parents[2]
S, B, D, E, WIDTH = 12, 4, 16, 8, 24
BOTH, INTRA, FILL = RectifyConfig(intra=True, fill=True), RectifyConfig(intra=True), RectifyConfig(fill=True)

CASES: dict[str, tuple[dict[str, Any], RectifyConfig]] = {
    "capacity only": ({}, RectifyConfig()),
    "both": ({}, BOTH),
    "both, allgather": ({"moe_token_dispatcher_type": "allgather"}, BOTH),
    "intra, bounded": ({"moe_expert_capacity_factor": 0.4}, RectifyConfig(intra=True, capacity=0.25, select="all")),
    "intra, no slots": ({"moe_expert_capacity_factor": 0.0}, INTRA),
    "intra, by position": ({"moe_token_drop_policy": "position"}, INTRA),
    "fill, padded": ({"moe_pad_expert_input_to_capacity": True}, FILL),
    "top-1, softmax first": ({"moe_router_topk": 1, "moe_router_pre_softmax": True}, BOTH),
    "sigmoid, bias, scaled": (
        {
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_topk_scaling_factor": 2.5,
        },
        BOTH,
    ),
}


def megatron_config(**changes: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    usual: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": D,
        "num_attention_heads": 4,
        "ffn_hidden_size": WIDTH,
        "num_moe_experts": E,
        "moe_router_topk": 2,
        "moe_expert_capacity_factor": 0.7,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "params_dtype": torch.float32,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "apply_rope_fusion": False,
    }
    return TransformerConfig(**(usual | changes))


@functools.cache
def weights(alike: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator)
    kinds = 1 if alike else E
    return {
        "gate": draw(E, D),
        "gate_up": (draw(kinds, 2 * WIDTH, D) / 4).expand(E, -1, -1),
        "down": (draw(kinds, D, WIDTH) / 4).expand(E, -1, -1),
        "bias": draw(E) / 10,
    }


def tokens(rank: int) -> Tensor:
    return torch.randn(S, B, D, generator=torch.Generator().manual_seed(10 + rank)).requires_grad_()


def their_layer(config: Any, rectify: RectifyConfig | None, held: range, alike: bool = False) -> Any:
    """Megatron's MoELayer from its own specification, with our router in it unless `rectify` is None."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.spec_utils import build_module

    from wastenot.moe.adapters.megatron import rectify_spec

    spec = get_moe_module_spec(use_te=False, num_experts=E, moe_grouped_gemm=False)
    layer = build_module(spec if rectify is None else rectify_spec(spec, rectify), config=config)
    layer.set_layer_number(1)
    given = weights(alike)
    with torch.no_grad():
        layer.router.weight.copy_(given["gate"])
        for expert, own in zip(held, layer.experts.local_experts, strict=True):
            own.linear_fc1.weight.copy_(given["gate_up"][expert])
            own.linear_fc2.weight.copy_(given["down"][expert])
        if layer.router.expert_bias is not None:
            layer.router.expert_bias.copy_(given["bias"])
    return layer


def our_layer(config: Any, rectify: RectifyConfig, expert: int) -> MoELayer:
    from wastenot.moe.adapters.megatron import router_config

    mesh = make_mesh(ParallelConfig(expert=expert), "cpu")
    layer = MoELayer(D, MoEConfig(experts=E, d_expert=WIDTH), router_config(config, rectify), mesh)
    held = slice(local_experts(E, mesh.expert).start, local_experts(E, mesh.expert).stop)
    layer.router.weight = nn.Parameter(weights()["gate"].clone())
    layer.experts.gate_up = nn.Parameter(weights()["gate_up"][held].clone())
    layer.experts.down = nn.Parameter(weights()["down"][held].clone())
    if config.moe_router_enable_expert_bias:
        layer.router.bias_E.copy_(weights()["bias"])
    return layer


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def compare(config: Any, rectify: RectifyConfig, rank: int, expert: int, held: range) -> dict[str, float]:
    """How far outputs, gradients and slots of the two layers are apart."""
    from wastenot.moe.adapters.megatron import routings_of

    x_SBD, y_SBD = tokens(rank), tokens(rank)
    theirs, ours = their_layer(config, rectify, held), our_layer(config, rectify, expert)
    with routings_of(theirs) as routings:
        found, _ = theirs(x_SBD)
    expected, routing = ours(y_SBD)
    check_identities(routings["router"])
    found.square().sum().backward()
    expected.square().sum().backward()
    local = theirs.experts.local_experts
    pairs = {
        "output": (found, expected),
        "tokens": (x_SBD.grad, y_SBD.grad),
        "gate": (theirs.router.weight.grad, ours.router.weight.grad),
        "gate_up": (torch.stack([e.linear_fc1.weight.grad for e in local]), ours.experts.gate_up.grad),
        "down": (torch.stack([e.linear_fc2.weight.grad for e in local]), ours.experts.down.grad),
    }
    errors = {name: off(*pair) for name, pair in pairs.items()}
    errors["slots"] = float((count_slots(routings["router"]) - count_slots(routing)).abs().sum())
    return errors


def generated_by_padded_experts(rank: int, expert: int, held: range) -> float:
    """How far apart the layers are in a pass of one token per sequence for which padded experts have too few rows."""
    config = megatron_config(moe_expert_capacity_factor=0.3, moe_pad_expert_input_to_capacity=True)
    one_1BD = tokens(rank).view(1, S * B, D)
    found, _ = their_layer(config, FILL, held).eval()(one_1BD)
    return off(found, our_layer(config, FILL, expert).eval()(one_1BD)[0])


def rows_sent(config: Any, rectify: RectifyConfig, rank: int, held: range) -> list[int]:
    """Rows that this rank sends to each."""
    layer = their_layer(config, rectify, held)
    layer(tokens(rank))
    splits = layer.token_dispatcher.input_splits
    return [S * B * 2] if splits is None else list(map(int, splits))


def losses_of_stock(rank: int, held: range) -> dict[str, float]:
    """Megatron's own losses and counts are of all choices: the same through our router as through its dropless one."""
    errors = {}
    for kind in ("aux_loss", "seq_aux_loss", "global_aux_loss"):
        options = {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": 0.3, "moe_z_loss_coeff": 0.2}
        gradients = []
        for factor, rectify in ((None, None), (0.4, BOTH)):
            router = their_layer(megatron_config(**options, moe_expert_capacity_factor=factor), rectify, held).router
            weights_TE, _ = router(tokens(rank))
            (0 * weights_TE).sum().backward()
            gradients.append(router.weight.grad)
        errors[kind] = off(gradients[1], gradients[0])
    options = CASES["sigmoid, bias, scaled"][0]
    counts = []
    for factor, rectify in ((None, None), (0.4, BOTH)):
        router = their_layer(megatron_config(**options, moe_expert_capacity_factor=factor), rectify, held).router
        router(tokens(rank))
        counts.append(router.local_tokens_per_expert)
    errors["bias counts"] = off(counts[1], counts[0])
    return errors


def stock_where_nothing_is_dropped(rank: int, held: range) -> dict[str, float]:
    """With room for all, and for one token per sequence in evaluation: Megatron's own weights, map and gradients."""
    errors = {}
    for name, options in (("softmax", {}), ("softmax first", {"moe_router_pre_softmax": True})):
        results = []
        for factor, rectify in ((None, None), (8.0, INTRA)):
            router = their_layer(megatron_config(**options, moe_expert_capacity_factor=factor), rectify, held).router
            weights_TE, map_TE = router(tokens(rank))
            (weights_TE * torch.arange(E)).square().sum().backward()
            results.append((weights_TE, map_TE.float(), router.weight.grad))
        errors[name] = max(off(ours, theirs) for ours, theirs in zip(results[1], results[0], strict=True))
    one_1BD = tokens(rank)[:1]
    stock = their_layer(megatron_config(moe_expert_capacity_factor=None), None, held).eval()
    rectified = their_layer(megatron_config(moe_expert_capacity_factor=0.1), BOTH, held).eval()
    errors["one token"] = off(rectified(one_1BD)[0], stock(one_1BD)[0])
    return errors


def dense(rank: int, held: range) -> dict[str, float]:
    """All experts equal: the dense network at any capacity with `intra`; how far from it without."""
    given = weights(alike=True)
    x_SBD = tokens(rank).detach()
    gate, up = (x_SBD @ given["gate_up"][0].t()).chunk(2, -1)
    expected = (F.silu(gate) * up) @ given["down"][0].t()
    errors = {}
    for factor in (0.0, 0.3, 1.0):
        for name, rectify in (("intra", INTRA), ("both", BOTH)):
            config = megatron_config(moe_expert_capacity_factor=factor)
            errors[f"{name} {factor}"] = off(their_layer(config, rectify, held, alike=True)(x_SBD)[0], expected)
    config = megatron_config(moe_expert_capacity_factor=0.3)
    errors["vanilla"] = off(their_layer(config, None, held, alike=True)(x_SBD)[0], expected)
    return errors


def train() -> tuple[list[float], dict[str, int]]:
    """Losses of a GPTModel whose specification we changed, and the slots of its last step."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron_cpu_shim import devices_on_cpu

    from wastenot.moe.adapters.megatron import rectify_spec, routings_of

    spec = rectify_spec(get_gpt_layer_local_spec(E, moe_grouped_gemm=False, normalization="RMSNorm"), BOTH)
    config = megatron_config(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.01)
    with devices_on_cpu():
        model = GPTModel(config, spec, vocab_size=32, max_sequence_length=S, position_embedding_type="rope")
    # The same tokens everywhere: no gradient of dense weights needs to be summed over ranks.
    tokens_BS = torch.randint(0, 32, (B, S + 1), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 1, S, S, dtype=torch.bool).triu(1)
    positions = torch.arange(S).expand(B, -1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    losses, slots = [], {}
    for _ in range(6):
        optimizer.zero_grad()
        with routings_of(model) as routings, devices_on_cpu():
            logits = model(tokens_BS[:, :-1], positions, mask)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens_BS[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        slots = dict(zip(SLOTS, count_layers(list(routings.values()))[:, -len(SLOTS) :].sum(0).tolist(), strict=True))
    return losses, slots


def refusals() -> dict[str, str]:
    """What is said of each thing that cannot be."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.moe.moe_layer import MoESubmodules

    from wastenot.moe.adapters.megatron import rectify_spec

    said = {}
    bad: dict[str, tuple[dict[str, Any], RectifyConfig]] = {
        "moe_expert_capacity_factor": ({"moe_expert_capacity_factor": None}, BOTH),
        "moe_pad_expert_input_to_capacity": ({"moe_pad_expert_input_to_capacity": True}, BOTH),
        "moe_token_dispatcher_type": ({"moe_token_dispatcher_type": "flex"}, BOTH),
        "moe_router_num_groups": ({"moe_router_num_groups": 4, "moe_router_group_topk": 2}, BOTH),
        "fill_ranks": ({}, replace(BOTH, fill_ranks=7)),
    }
    for name, (options, rectify) in bad.items():
        try:
            their_layer(megatron_config(**options), rectify, range(E))
        except ValueError as error:
            said[name] = str(error)
    for name, spec in (("dense", get_gpt_layer_local_spec()), ("other", MoESubmodules(router=nn.Linear))):  # type: ignore[arg-type]
        try:
            rectify_spec(spec, BOTH)
        except ValueError as error:
            said[name] = str(error)
    before = get_gpt_layer_local_spec(E)
    after = rectify_spec(before, BOTH)
    assert before.submodules.mlp.submodules.router is MoESubmodules().router, "the given spec was changed"
    assert after.submodules.self_attention is before.submodules.self_attention
    assert rectify_spec([before, get_gpt_layer_local_spec()], BOTH)[0] == after, "lists of layers too"
    assert rectify_spec(after, INTRA).submodules.mlp.submodules.router.params["rectify"] == INTRA
    return said


def everything(rank: int, world: int, expert: int) -> dict[str, Any]:
    sys.path.append(str(ROOT / "tests"))  # where the shim lies, beside the folders of tests
    import megatron_cpu_shim

    megatron_cpu_shim.install()
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(expert_model_parallel_size=expert)
    with megatron_cpu_shim.devices_on_cpu():
        tensor_parallel.model_parallel_cuda_manual_seed(1)
    held = local_experts(E, make_mesh(ParallelConfig(expert=expert), "cpu").expert)
    named = {name: (megatron_config(**options), rectify) for name, (options, rectify) in CASES.items()}
    return {
        "compared": {name: compare(*case, rank, expert, held) for name, case in named.items()},
        "generated": generated_by_padded_experts(rank, expert, held),
        "sent": [rows_sent(megatron_config(), rectify, rank, held) for rectify in (RectifyConfig(), INTRA, FILL, BOTH)],
        "losses": losses_of_stock(rank, held),
        "stock": stock_where_nothing_is_dropped(rank, held),
        "dense": dense(rank, held),
        "trained": train(),
        "refused": refusals(),
    }


@pytest.fixture(scope="module", params=[1, 2], ids=["EP=1", "EP=2"])
def results(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Per rank, all that the tests look at."""
    if importlib.util.find_spec("megatron") is None:  # Importing it takes seconds, and the ranks do.
        pytest.skip("needs megatron-core")
    return run_ranks(request.param, everything, request.param, timeout=120.0)


# Megatron-Core warns about CUDA libraries that a CPU does not have.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("case", CASES)
def test_megatrons_layer_computes_what_ours_does(results, case):
    for result in results:
        errors = result["compared"][case]
        assert all(error <= 1e-5 for error in errors.values()), errors


def test_padded_experts_are_filled_by_our_slots_in_generation_too(results):
    errors = [result["generated"] for result in results]
    assert all(error <= 1e-5 for error in errors), errors


def test_stand_ins_stay_on_their_rank(results):
    for rank, result in enumerate(results):
        plain, intra, fill, both = result["sent"]
        for without, with_stand_ins in ((plain, intra), (fill, both)):
            others = [(a, b) for to, (a, b) in enumerate(zip(without, with_stand_ins, strict=True)) if to != rank]
            assert all(a == b for a, b in others)
            if others:
                assert with_stand_ins[rank] > without[rank]


def test_megatrons_losses_and_bias_see_all_choices(results):
    for result in results:
        assert all(error <= 1e-6 for error in result["losses"].values()), result["losses"]


def test_without_drops_it_is_megatrons_own_router(results):
    for result in results:
        assert all(error <= 1e-5 for error in result["stock"].values()), result["stock"]


def test_equal_experts_give_the_dense_network_where_vanilla_does_not(results):
    for result in results:
        errors = dict(result["dense"])
        assert errors.pop("vanilla") > 0.1
        assert all(error <= 1e-5 for error in errors.values()), errors


def test_a_gpt_model_of_megatron_trains_rectified(results):
    for result in results:
        losses, slots = result["trained"]
        assert losses[-1] < 0.8 * losses[0], losses
        assert slots["kept"] + slots["rectified"] + slots["dropped"] == 2 * S * B * 2
        assert slots["rectified"] > 0 == slots["unserved"]


def test_what_cannot_be_is_refused_by_its_name(results):
    said = results[0]["refused"]
    assert said.pop("dense").startswith("spec: has no MoE layer")
    assert "Linear" in said.pop("other")
    assert len(said) == 5
    for name, message in said.items():
        assert message.startswith(f"{name}: ") and "\n" not in message


def test_without_megatron_the_adapters_say_what_to_install():
    code = (
        "import importlib, sys; sys.modules['megatron'] = None\n"
        "for name in ('megatron', 'megatron_layer', 'megatron_mesh'):\n"
        "    try:\n        importlib.import_module(f'wastenot.moe.adapters.{name}')\n"
        "    except ImportError as error:\n        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("pip install 'wastenot[megatron]'") == 3


WITHOUT = ("megatron_names", "megatron_config", "megatron_checkpoint")
"""What reads its checkpoints, for which nobody needs to install it."""


def test_nothing_else_of_the_library_imports_megatron():
    """But for what has it in its name: its adapters, which import it at once, and what trains in it."""
    for floor in ("kernels", "parallel", "moe", "launch", "tools"):
        for path in (ROOT / floor).rglob("*.py"):
            nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
            named = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
            named += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
            if not path.name.startswith("megatron") or path.stem in WITHOUT:
                assert not [name for name in named if name.split(".")[0] == "megatron"], path
