"""Our MoE layer inside Megatron-Core, on two real gloo ranks: against our own layer, and against Megatron's.

Megatron runs through `megatron_cpu_shim.py`, which patches its process for good: all of it happens in ranks of their
own, one run for all tests, with EP 2 and then EP 1. Differences are measured against the largest value of the tensor.
"""

from __future__ import annotations

import importlib.util
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from spawned import run_ranks
from test_megatron_rectify import BOTH, FILL, B, E, S, megatron_config, off, our_layer, tokens, weights
from torch import Tensor, nn

from wastenot.moe.config import RectifyConfig
from wastenot.moe.ledger import check_identities
from wastenot.moe.routing import Routing
from wastenot.parallel.config import ParallelConfig
from wastenot.parallel.mesh import make_mesh
from wastenot.parallel.optim.megatron_shards import put_adapprox

ROOT = Path(__file__).parents[2]
SIGMOID = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 2.5,
}
CASES: dict[str, tuple[dict[str, Any], RectifyConfig]] = {
    "dropless": ({"moe_expert_capacity_factor": None}, RectifyConfig()),
    "both": ({}, BOTH),
    "both, padded": ({"moe_pad_expert_input_to_capacity": True}, BOTH),
    "intra, bounded": ({"moe_expert_capacity_factor": 0.4}, RectifyConfig(intra=True, capacity=0.25)),
    "top-1, recomputed": (
        {
            "moe_router_topk": 1,
            "moe_router_pre_softmax": True,
            "recompute_granularity": "selective",
            "recompute_modules": ["moe"],
        },
        BOTH,
    ),
    "sigmoid, bias, scaled": (SIGMOID, BOTH),
}
STOCK: dict[str, dict[str, Any]] = {
    "softmax, balanced, shared": {
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.3,
        "moe_z_loss_coeff": 0.2,
        "moe_shared_expert_intermediate_size": 8,
    },
    "sigmoid, groups": SIGMOID | {"moe_router_num_groups": 4, "moe_router_group_topk": 2},
}


def built(config: Any, rectify: RectifyConfig | None) -> Any:
    """A MoE layer from Megatron's own specification: ours with `rectify`, Megatron's where it is None."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.spec_utils import build_module

    from wastenot.moe.adapters.megatron_layer import wastenot_spec

    spec = get_moe_module_spec(use_te=False, num_experts=E, moe_grouped_gemm=False)
    torch.manual_seed(3)  # what is not copied below: shared experts
    layer = build_module(spec if rectify is None else wastenot_spec(spec, rectify), config=config)
    layer.set_layer_number(1)
    given, held = weights(), layer.local_expert_indices
    with torch.no_grad():
        layer.router.weight.copy_(given["gate"])
        if layer.router.expert_bias is not None:
            layer.router.expert_bias.copy_(given["bias"])
        if rectify is not None:
            layer.experts.gate_up.copy_(given["gate_up"][held])
            layer.experts.down.copy_(given["down"][held])
        else:
            for expert, own in zip(held, layer.experts.local_experts, strict=True):
                own.linear_fc1.weight.copy_(given["gate_up"][expert])
                own.linear_fc2.weight.copy_(given["down"][expert])
        for index, parameter in enumerate(layer.shared_experts.parameters() if layer.use_shared_expert else ()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) / 4)
    return layer


def gradients(layer: Any, x_SBD: Tensor) -> dict[str, Tensor]:
    """Output and gradients of one pass, those of experts as stacks."""
    found, bias = layer(x_SBD)
    assert bias is None
    found.square().sum().backward()
    stacks = layer.experts
    if hasattr(stacks, "local_experts"):
        own = stacks.local_experts
        gate_up = torch.stack([expert.linear_fc1.weight.grad for expert in own])
        down = torch.stack([expert.linear_fc2.weight.grad for expert in own])
    else:
        gate_up, down = stacks.gate_up.grad, stacks.down.grad
    named = {"output": found.detach(), "tokens": x_SBD.grad, "gate": layer.router.weight.grad}
    if layer.use_shared_expert:
        named |= {f"shared {name}": each.grad for name, each in layer.shared_experts.named_parameters()}
    return named | {"gate_up": gate_up, "down": down}


def same_bits(found: Routing, expected: Routing) -> bool:
    """Whether two routings are the same decision with the same weights, to the last bit."""
    pairs = [(getattr(found, name), getattr(expected, name)) for name in ("experts_TK", "slots_TK", "weights_TK")]
    pairs += [(found.logits_TE, expected.logits_TE), (found.probs_TE, expected.probs_TE)]
    if expected.stand_ins is not None:
        assert found.stand_ins is not None
        for name in ("expert_T", "weight_T", "slots_T"):
            pairs.append((getattr(found.stand_ins, name), getattr(expected.stand_ins, name)))
    return found.capacity == expected.capacity and all(torch.equal(*pair) for pair in pairs)


def against_ours(config: Any, rectify: RectifyConfig, rank: int, expert: int) -> dict[str, float]:
    from wastenot.moe.adapters.megatron_layer import routings_of

    theirs, ours = built(config, rectify), our_layer(config, rectify, expert)
    with routings_of(theirs) as routings:
        found = gradients(theirs, tokens(rank))
    check_identities(routings["router"])
    x_SBD = tokens(rank)
    y_SBD, routing = ours(x_SBD)
    y_SBD.square().sum().backward()
    expected = {
        "output": y_SBD,
        "tokens": x_SBD.grad,
        "gate": ours.router.weight.grad,
        "gate_up": ours.experts.gate_up.grad,
        "down": ours.experts.down.grad,
    }
    errors = {name: off(found[name], value) for name, value in expected.items()}
    one_1BD = tokens(rank)[:1]
    errors["one token"] = off(theirs.eval()(one_1BD)[0], ours.eval()(one_1BD, dropless=True)[0])
    return errors | {"routing": 0.0 if same_bits(routings["router"], routing) else 1.0}


def against_theirs(options: dict[str, Any], rank: int) -> dict[str, float]:
    """Dropless: Megatron's own layer, its losses and counts included."""
    layers = [built(megatron_config(**options, moe_expert_capacity_factor=None), r) for r in (RectifyConfig(), None)]
    ours, theirs = (gradients(layer, tokens(rank)) for layer in layers)
    errors = {name: off(ours[name], value) for name, value in theirs.items()}
    if "moe_router_enable_expert_bias" in options:
        errors["counts"] = off(*(layer.router.local_tokens_per_expert for layer in layers))
    return errors


def gpt(config: Any, rectify: RectifyConfig | None, **ends: bool) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron_cpu_shim import devices_on_cpu

    from wastenot.moe.adapters.megatron_layer import wastenot_spec

    spec = get_gpt_layer_local_spec(E, moe_grouped_gemm=False, normalization="RMSNorm")
    torch.manual_seed(5)
    with devices_on_cpu():
        spec = spec if rectify is None else wastenot_spec(spec, rectify)
        return GPTModel(config, spec, vocab_size=32, max_sequence_length=S, position_embedding_type="rope", **ends)


def logits_of(model: Any, tokens_BS: Tensor, labels: Tensor | None = None) -> Tensor:
    from megatron_cpu_shim import devices_on_cpu

    length = tokens_BS.size(1)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    with devices_on_cpu():
        return model(tokens_BS, torch.arange(length).expand(len(tokens_BS), -1), mask, labels=labels)


def step(model: Any, optimizer: Any, tokens_BS: Tensor) -> float:
    """One step of Megatron's; the mean loss of the ranks, each of which has sequences of its own."""
    import torch.distributed as dist
    from megatron.core.distributed import finalize_model_grads
    from megatron_cpu_shim import devices_on_cpu

    model.zero_grad_buffer()
    optimizer.zero_grad()
    loss = F.cross_entropy(logits_of(model, tokens_BS[:, :-1]).flatten(0, 1), tokens_BS[:, 1:].flatten())
    loss.backward()
    with devices_on_cpu():
        finalize_model_grads([model])
        optimizer.step()
    both = loss.detach().clone()
    dist.all_reduce(both)
    return both.item() / 2


def in_ddp(config: Any, distributed: bool = False) -> Any:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron_cpu_shim import devices_on_cpu

    model = gpt(config, FILL)
    with devices_on_cpu():
        how = DistributedDataParallelConfig(use_distributed_optimizer=distributed)
        return DistributedDataParallel(config, how, model)


def train(rank: int, expert: int, folder: str) -> tuple[list[list[float]], list[float], Any]:
    """Losses of 6 steps with Adapprox, in Megatron's plain and in its distributed optimizer; of 4 with its Adam; and a
    model of the first.

    The optimizer of the last two steps with Adam is what EP 2 saved before them.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron_cpu_shim import devices_on_cpu

    from wastenot.moe.adapters.megatron_mesh import mesh_of

    losses_on = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01, "moe_z_loss_coeff": 1e-3}
    config = megatron_config(**losses_on, expert_model_parallel_size=expert)
    mesh = mesh_of(ProcessGroupCollection.use_mpu_process_groups(), "cpu")
    assert mesh.layout == make_mesh(ParallelConfig(expert=expert), "cpu").layout
    assert (mesh.expert_data.size, mesh.stage.size, mesh.batch.rank) == (2 // expert, 2, rank)
    tokens_BS = torch.randint(0, 32, (B, S + 1), generator=torch.Generator().manual_seed(rank))
    losses, models = [], []
    for distributed in (False, True):
        models.append(in_ddp(config, distributed))
        settings = {"clip_grad": 1.0, "weight_decay": 0.1, "use_distributed_optimizer": distributed}
        with devices_on_cpu():
            optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-2, **settings), models[-1:])
            put_adapprox(optimizer, models[-1:], expert_group=mesh.expert.group)
        losses.append([step(models[-1], optimizer, tokens_BS) for _ in range(6)])

    other = in_ddp(config)
    with devices_on_cpu():
        adam = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-2, clip_grad=1.0), [other])
    with_adam = [step(other, adam, tokens_BS) for _ in range(2)]
    described = other.module.sharded_state_dict()
    state = {"model": described, "optimizer": adam.sharded_state_dict(described, is_loading=expert == 1)}
    if expert == 2:
        dist_checkpointing.save(state, f"{folder}/adam")
    else:
        state = dist_checkpointing.load(state, f"{folder}/adam")
        other.module.load_state_dict(state["model"])
        adam.load_state_dict(state["optimizer"])
    with_adam += [step(other, adam, tokens_BS) for _ in range(2)]
    return losses, with_adam, models[0].module


def tensor_parallel_too(rank: int) -> dict[str, float]:
    """Attention by two tensor ranks, each with its part of every sequence; experts whole, by the same two ranks."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron_cpu_shim import devices_on_cpu

    from wastenot.moe.adapters.megatron_mesh import default_groups, mesh_of

    def lay_out(expert_tensor: int) -> dict[str, Any]:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=2,
            expert_model_parallel_size=2 // expert_tensor,
            expert_tensor_parallel_size=expert_tensor,
        )
        with devices_on_cpu():
            tensor_parallel.model_parallel_cuda_manual_seed(1)
        return {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2 // expert_tensor}

    options = lay_out(1)
    mesh = mesh_of(default_groups(), "cpu")
    assert (mesh.tensor.size, mesh.stage.size, mesh.batch.size, mesh.expert.size, mesh.expert_data.size) == (
        2,
        2,
        1,
        2,
        1,
    )
    found = against_ours(megatron_config(**options, sequence_parallel=True), BOTH, rank, 2)
    said = [refusal(lambda: built(megatron_config(**options), BOTH))]
    parallel_state.destroy_model_parallel()
    options = lay_out(2)
    said.append(refusal(lambda: built(megatron_config(**options, sequence_parallel=True), BOTH)))
    parallel_state.destroy_model_parallel()
    assert said[0].startswith("sequence_parallel: False") and said[1].startswith("expert_tensor_parallel_size: 2"), said
    return found


def in_stages(rank: int, stages: int) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of three micro-batches under Megatron's schedule, and gradients of this rank's MoE layers."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron_cpu_shim import devices_on_cpu

    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=stages)
    with devices_on_cpu():
        tensor_parallel.model_parallel_cuda_manual_seed(1)
    # A number of the whole process, which the schedule sets in another shape than losses without one.
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    losses_on = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01, "moe_z_loss_coeff": 1e-3}
    config = megatron_config(**losses_on, pipeline_model_parallel_size=stages, pipeline_dtype=torch.float32)
    stage = rank if stages > 1 else 0
    model = gpt(config, BOTH, pre_process=stage == 0, post_process=stage == stages - 1)
    named = {name.replace("layers.0", f"layers.{stage}"): p for name, p in model.named_parameters()}
    if stages == 1:
        named = dict(model.named_parameters())
    for name, p in named.items():
        # Whatever stage it is on.
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        p.data.copy_(torch.randn(p.shape, generator=generator) / 4)
    batches = [torch.randint(0, 32, (B, S + 1), generator=torch.Generator().manual_seed(k)) for k in range(3)]

    def forward(data: Any, model: Any) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Any]]]:
        tokens_BS = next(data)
        nats_BS = logits_of(model, tokens_BS[:, :-1], labels=tokens_BS[:, 1:])
        return nats_BS, lambda nats_BS: (nats_BS.mean(), nats_BS.mean().item())

    with devices_on_cpu():
        losses = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(batches),
            model=model,
            num_microbatches=3,
            seq_length=S,
            micro_batch_size=B,
            forward_only=False,
        )
    parallel_state.destroy_model_parallel()
    return losses, {name: p.grad for name, p in named.items() if ".mlp." in name}


def refusal(make: Callable[[], object]) -> str:
    """What is said of it; nothing where nothing is."""
    try:
        make()
    except ValueError as error:
        return str(error)
    return ""


def save(model: Any, folder: str) -> None:
    from megatron.core import dist_checkpointing

    dist_checkpointing.save(model.sharded_state_dict(), folder)


def loaded(model: Any, folder: str) -> Any:
    from megatron.core import dist_checkpointing

    # Megatron's linears ask for an empty state of their own as well, which ours does not save.
    state = dist_checkpointing.load(model.sharded_state_dict(), folder, strict="log_unexpected")
    model.load_state_dict(state)
    return model


def refusals() -> dict[str, str]:
    """What is said of each thing that cannot be."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.process_groups_config import ProcessGroupCollection

    from wastenot.moe.adapters.megatron import rectify_spec
    from wastenot.moe.adapters.megatron_layer import wastenot_spec
    from wastenot.moe.adapters.megatron_mesh import mesh_of

    said = {}
    bad: dict[str, tuple[dict[str, Any], RectifyConfig]] = {
        "moe_expert_capacity_factor": ({"moe_expert_capacity_factor": None}, BOTH),
        "moe_token_dispatcher_type": ({"moe_token_dispatcher_type": "flex"}, BOTH),
        "moe_router_num_groups": ({"moe_router_num_groups": 4, "moe_router_group_topk": 2}, BOTH),
        "moe_router_load_balancing_type": (
            {"moe_router_load_balancing_type": "sinkhorn", "moe_expert_capacity_factor": None},
            RectifyConfig(),
        ),
        "fill_ranks": ({}, replace(BOTH, fill_ranks=7)),
        "activation_func": ({"activation_func": F.gelu}, BOTH),
        "add_bias_linear": ({"add_bias_linear": True}, BOTH),
        "moe_shared_expert_overlap": (
            {"moe_shared_expert_overlap": True, "moe_shared_expert_intermediate_size": 8},
            BOTH,
        ),
    }
    for name, (options, rectify) in bad.items():
        said[name] = refusal(lambda options=options, rectify=rectify: built(megatron_config(**options), rectify))
    before = get_gpt_layer_local_spec(E)
    for name, spec in (
        ("spec: has no MoE layer", get_gpt_layer_local_spec()),
        ("spec: has <class 'wastenot.moe.adapters.megatron.RectifyRouter'>", rectify_spec(before, BOTH)),
        ("spec: has <class 'torch.nn.modules.linear.Linear'>", replace(before.submodules.mlp, module=nn.Linear)),
    ):
        said[name] = refusal(lambda spec=spec: wastenot_spec(spec, BOTH))
    said["pg_collection"] = refusal(lambda: mesh_of(ProcessGroupCollection(), "cpu"))
    after = wastenot_spec(before, BOTH)
    assert before.submodules.mlp.module.__name__ == "MoELayer", "the given spec was changed"
    assert after.submodules.self_attention is before.submodules.self_attention
    return said


def everything(rank: int, world: int, folder: str) -> dict[int, dict[str, Any]]:
    sys.path.append(str(ROOT / "tests"))  # where the shim lies, beside the folders of tests
    import megatron_cpu_shim

    megatron_cpu_shim.install()
    from megatron.core import parallel_state, tensor_parallel

    found: dict[int, dict[str, Any]] = {}
    tokens_BS = torch.randint(0, 32, (B, S), generator=torch.Generator().manual_seed(7))
    dropless = megatron_config(moe_expert_capacity_factor=None)
    for expert in (2, 1):
        parallel_state.initialize_model_parallel(expert_model_parallel_size=expert)
        with megatron_cpu_shim.devices_on_cpu():
            tensor_parallel.model_parallel_cuda_manual_seed(1)
        losses, with_adam, model = train(rank, expert, folder)
        found[expert] = {
            "ours": {name: against_ours(megatron_config(**o), r, rank, expert) for name, (o, r) in CASES.items()},
            "stock": {name: against_theirs(options, rank) for name, options in STOCK.items()},
            "losses": losses,
            "with adam": with_adam,
            "trained": logits_of(model.eval(), tokens_BS).detach(),
            "stack": model.decoder.layers[0].mlp.experts.gate_up.detach().clone(),
        }
        if expert == 2:
            found[2]["refused"] = refusals()
            save(model, f"{folder}/ours")
            stock = gpt(dropless, None)
            save(stock, f"{folder}/stock")
            found[2]["dropless"] = logits_of(stock.eval(), tokens_BS).detach()
        else:
            # EP 1 of what EP 2 saved; then each layer of what the other saved.
            again = loaded(gpt(megatron_config(), FILL), f"{folder}/ours")
            found[1]["loaded"] = logits_of(again.eval(), tokens_BS).detach()
            found[1]["stack"] = again.decoder.layers[0].mlp.experts.gate_up.detach().clone()
            theirs = loaded(gpt(dropless, None), f"{folder}/ours").eval()
            found[1]["theirs of ours"] = logits_of(theirs, tokens_BS).detach()
            ours = loaded(gpt(dropless, RectifyConfig()), f"{folder}/ours").eval()
            found[1]["ours of ours"] = logits_of(ours, tokens_BS).detach()
            ours = loaded(gpt(dropless, RectifyConfig()), f"{folder}/stock").eval()
            found[1]["ours of theirs"] = logits_of(ours, tokens_BS).detach()
        parallel_state.destroy_model_parallel()
    found[1]["ours"]["tensor parallel"] = tensor_parallel_too(rank)
    found[1]["in one stage"], found[1]["in two stages"] = in_stages(rank, 1), in_stages(rank, 2)
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[int, dict[str, Any]]]:
    """Per rank and number of expert-parallel ranks, all that the tests look at."""
    if importlib.util.find_spec("megatron") is None:  # Importing it takes seconds, and the ranks do.
        pytest.skip("needs megatron-core")
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in ("adam", "ours", "stock"):
        (folder / name).mkdir()
    return run_ranks(2, everything, str(folder), timeout=240.0)


# Megatron-Core warns about CUDA libraries that a CPU does not have.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("case", [*CASES, "tensor parallel"])
def test_inside_megatron_it_routes_as_ours_to_the_bit_and_computes_the_same(results, case):
    for result in results:
        for cases in (result[1]["ours"], result[2]["ours"]):
            errors = dict(cases.get(case, {"routing": 0}))
            assert errors.pop("routing") == 0
            assert all(error <= 1e-6 for error in errors.values()), errors


@pytest.mark.parametrize("case", STOCK)
def test_dropless_it_is_megatrons_own_layer_with_its_losses(results, case):
    for result in results:
        for expert in (1, 2):
            errors = result[expert]["stock"][case]
            assert all(error <= 2e-6 for error in errors.values()), errors


def test_it_trains_under_megatrons_ddp_with_adapprox_alike_at_any_ep(results):
    """In Megatron's distributed optimizer too, which cuts stacks of experts anywhere."""
    plain, *others = (losses for expert in (1, 2) for losses in results[0][expert]["losses"])
    assert plain[-1] < 0.9 * plain[0], plain
    for losses in others:
        assert losses == pytest.approx(plain, rel=1e-5)


def test_in_a_pipeline_of_megatrons_it_is_the_same_layer_with_its_losses(results):
    expected, gradients = results[0][1]["in one stage"]
    assert results[1][1]["in two stages"][0] == pytest.approx(expected, rel=1e-6)
    found = results[0][1]["in two stages"][1] | results[1][1]["in two stages"][1]
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert off(found[name], gradient) <= 1e-6, name


def test_megatrons_own_adam_goes_on_at_another_ep_from_its_saved_state(results):
    one, two = results[0][1]["with adam"], results[0][2]["with adam"]
    assert two[-1] < two[0]
    assert one == pytest.approx(two, rel=1e-5)


def test_megatrons_checkpoints_load_at_another_ep_and_in_the_other_layer(results):
    for rank, result in enumerate(results):
        assert torch.equal(result[1]["stack"], torch.cat([other[2]["stack"] for other in results])), rank
        assert off(result[1]["loaded"], result[2]["trained"]) <= 1e-5
        assert off(result[1]["theirs of ours"], result[1]["ours of ours"]) <= 1e-5
        assert off(result[1]["ours of theirs"], result[2]["dropless"]) <= 1e-5


def test_what_cannot_be_is_refused_by_its_name(results):
    said = results[0][2]["refused"]
    assert len(said) == 12
    for name, message in said.items():
        assert message.startswith(name) and "\n" not in message and "; " in message, message
