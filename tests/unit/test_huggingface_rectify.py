"""Rectify-Router inside transformers' models: stock where nothing is dropped, our decoder where something is.

Differences are measured against the largest value of the tensor, so that small gradients count as much as large.
"""

from __future__ import annotations

import copy
import functools
import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.utils import logging

from wastenot.moe.adapters import huggingface_rectify
from wastenot.moe.adapters.huggingface import config_from_huggingface, load_huggingface
from wastenot.moe.adapters.huggingface_names import pieces
from wastenot.moe.adapters.huggingface_rectify import rectify_, routings_of, unrectify_
from wastenot.moe.config import EmulateConfig, MoEConfig, RectifyConfig
from wastenot.moe.decoder import Decoder, build_decoder
from wastenot.moe.layer import MoELayer
from wastenot.moe.ledger import SLOTS, check_identities, count_layers
from wastenot.moe.routing import RECTIFIED, Routing
from wastenot.parallel.mesh import single

logging.disable_progress_bar()
logging.set_verbosity_error()
pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "eos_token_id": None,
    "attn_implementation": "sdpa",
}
FINE: dict[str, Any] = {"num_experts": 16, "num_experts_per_tok": 4}
CASES: dict[str, Any] = {
    "mixtral": MixtralConfig(**SHAPE, intermediate_size=64, num_local_experts=8, num_experts_per_tok=2),
    "mixtral top-1": MixtralConfig(**SHAPE, intermediate_size=64, num_local_experts=8, num_experts_per_tok=1),
    "qwen3_moe": Qwen3MoeConfig(
        **SHAPE, **FINE, head_dim=16, intermediate_size=80, moe_intermediate_size=24, norm_topk_prob=True
    ),
    "qwen3_moe some dense": Qwen3MoeConfig(
        **SHAPE, **FINE, head_dim=16, intermediate_size=80, moe_intermediate_size=24, mlp_only_layers=[0]
    ),
    "olmoe": OlmoeConfig(**SHAPE, **FINE, intermediate_size=24),
    "qwen2_moe": Qwen2MoeConfig(
        **SHAPE, **FINE, intermediate_size=80, moe_intermediate_size=24, shared_expert_intermediate_size=32
    ),
    "deepseek_v3": DeepseekV3Config(
        **SHAPE | {"num_key_value_heads": 4},
        intermediate_size=80,
        moe_intermediate_size=24,
        first_k_dense_replace=0,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.5,
    ),
}
DECODED = [case for case in CASES if case not in ("qwen2_moe", "deepseek_v3")]
"""What our decoder is, too."""
LEAVING_STOCK_ALONE = {"intra": False, "fill": False, "capacity_factor": None}


@functools.cache
def _drawn(case: str) -> nn.Module:
    model = AutoModelForCausalLM.from_config(CASES[case])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            mean, std = (1.0, 0.1) if parameter.dim() == 1 else (0.0, 0.15)
            parameter.normal_(mean, std, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.1, generator=generator)
    return model


def stock(case: str) -> Any:
    """A model of transformers whose experts differ and whose weights are large enough for no two to tie."""
    return copy.deepcopy(_drawn(case)).train()


def batch(rows: int = 4, length: int = 24) -> tuple[Tensor, Tensor]:
    tokens_BS = torch.randint(0, SHAPE["vocab_size"], (rows, length + 1), generator=torch.Generator().manual_seed(1))
    return tokens_BS[:, :-1], tokens_BS[:, 1:]


def loss_of(model: Any) -> tuple[Tensor, Tensor]:
    """Logits and the mean loss, its gradients left in the parameters."""
    inputs_BS, targets_BS = batch()
    logits = model(input_ids=inputs_BS).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets_BS.flatten())
    loss.backward()
    return logits.detach(), loss.detach()


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def slots_of(routings: dict[str, Routing]) -> dict[str, int]:
    """What became of all choices and slots, over layers."""
    totals = count_layers(list(routings.values()))[:, -len(SLOTS) :].sum(0)
    return dict(zip(SLOTS, totals.tolist(), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_without_capacity_it_is_the_stock_model(case):
    model, changed = stock(case), rectify_(stock(case), **LEAVING_STOCK_ALONE)
    expected, _ = loss_of(model)
    logits, _ = loss_of(changed)
    assert close(logits, expected)
    theirs, ours = gradients(model), gradients(changed)
    assert theirs.keys() == ours.keys()
    if case == "mixtral top-1":  # Theirs weighs a single choice p / p, which teaches the gate nothing; ours does.
        return
    for name, gradient in theirs.items():
        assert close(ours[name], gradient), name


@pytest.mark.parametrize("case", CASES)
def test_with_room_for_all_nothing_changes(case):
    logits, _ = loss_of(rectify_(stock(case), fill=False, capacity_factor=8.0))
    assert close(logits, loss_of(stock(case))[0])


@functools.cache
def _ours(case: str, folder: Path, options: tuple) -> Decoder:
    """Our decoder with the weights of the model in `folder`."""
    shape, router, family = config_from_huggingface(json.loads((folder / "config.json").read_text()))
    names = {"capacity_factor", "ranks"}
    rectify = RectifyConfig(**{name: value for name, value in options if name not in names})
    ranks = dict(options).get("ranks", 1)
    emulate = EmulateConfig(sources=ranks, owners=ranks)
    router = replace(
        router,
        capacity_factor=dict(options)["capacity_factor"],
        normalize="none" if router.normalize == "none" else "survivors",
        rectify=rectify,
        emulate=emulate,
    )
    model = build_decoder(shape, router, single())
    load_huggingface(model, folder, family)
    return model


OPTIONS = {
    "capacity only": {"intra": False, "fill": False, "capacity_factor": 0.7},
    "intra, 4 ranks": {"intra": True, "fill": False, "capacity_factor": 0.5, "ranks": 4},
    "both, 2 ranks": {"intra": True, "fill": True, "capacity_factor": 1.0, "ranks": 2},
    "all, bounded": {"intra": True, "fill": True, "capacity_factor": 0.4, "select": "all", "capacity": 0.25},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", DECODED)
def test_it_computes_what_our_decoder_does(case, options, tmp_path):
    model = stock(case)
    model.save_pretrained(tmp_path)
    ours = _ours(case, tmp_path, tuple(OPTIONS[options].items()))
    rectify_(model, **OPTIONS[options])
    with routings_of(model) as routings:
        logits, _ = loss_of(model)

    inputs_BS, targets_BS = batch()
    output = ours(inputs_BS)
    (ours.loss_sum(output.hidden_BSD, targets_BS) / targets_BS.numel()).backward()
    assert close(logits, ours.logits(output.hidden_BSD).detach())
    assert count_layers(list(routings.values())).equal(count_layers(output.routings))
    slots = slots_of(routings)
    assert slots["dropped"] + slots["rectified"] > 0

    theirs = {}
    for name, parameter in model.named_parameters():
        for part, value in _as_on_disk(name, parameter.grad, case.split()[0]):
            theirs[part] = value
    family = case.split()[0]
    for name, parameter in ours.named_parameters():
        for piece in pieces(name, parameter.shape, family):  # type: ignore[arg-type]
            assert close(theirs[piece.name], piece.of(parameter.grad)), piece.name  # type: ignore[arg-type]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_a_block_routes_as_our_layer_does_bit_for_bit(case, options):
    """Beside the experts that all tokens share, which stay the model's own."""
    block = rectify_(stock(case), **OPTIONS[options]).model.layers[1].mlp
    gate, experts, config = block.gate, block.experts, block.mixer.config
    E, D, F = gate.num_experts, gate.weight.size(1), experts.down_proj.size(-1)
    layer = MoELayer(D, MoEConfig(experts=E, d_expert=F), config, single())
    layer.router.weight = nn.Parameter(gate.weight.detach().clone())
    layer.experts.gate_up = nn.Parameter(experts.gate_up_proj.detach().clone())
    layer.experts.down = nn.Parameter(experts.down_proj.detach().clone())
    if case == "deepseek_v3":
        layer.router.bias_E.copy_(gate.e_score_correction_bias)
        assert (config.score, config.groups, config.top_groups, config.scale) == ("sigmoid", 4, 2, 1.5)
    x_BSD = torch.randn(4, 24, D, generator=torch.Generator().manual_seed(3)).requires_grad_()
    y_BSD = x_BSD.detach().clone().requires_grad_()
    with routings_of(block) as routings:
        found = block(x_BSD)
    expected, routing = layer(y_BSD)
    if case == "qwen2_moe":
        expected = expected + block.shared_expert_gate(y_BSD).sigmoid() * block.shared_expert(y_BSD)
    elif case == "deepseek_v3":
        expected = expected + block.shared_experts(y_BSD)
    (read,) = routings.values()
    for name in ("experts_TK", "slots_TK", "weights_TK", "counts_BE"):
        assert torch.equal(getattr(read, name), getattr(routing, name)), name
    for name in ("expert_T", "slots_T", "weight_T", "counts_BE") if routing.stand_ins else ():
        assert torch.equal(getattr(read.stand_ins, name), getattr(routing.stand_ins, name)), name
    assert (read.kinds_TK >= RECTIFIED).any()
    found.square().sum().backward()
    expected.square().sum().backward()
    assert close(found, expected)
    theirs = (x_BSD, gate.weight, experts.gate_up_proj, experts.down_proj)
    ours = (y_BSD, layer.router.weight, layer.experts.gate_up, layer.experts.down)
    assert all(close(a.grad, b.grad) for a, b in zip(theirs, ours, strict=True))


def _as_on_disk(name: str, tensor: Tensor, family: str):
    name = name.replace(".mlp.", ".block_sparse_moe.") if family == "mixtral" else name
    gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    stem = name.rpartition(".")[0]
    if name.endswith("experts.gate_up_proj"):
        for expert, matrix in enumerate(tensor):
            yield f"{stem}.{expert}.{gate}.weight", matrix.chunk(2)[0]
            yield f"{stem}.{expert}.{up}.weight", matrix.chunk(2)[1]
    elif name.endswith("experts.down_proj"):
        for expert, matrix in enumerate(tensor):
            yield f"{stem}.{expert}.{down}.weight", matrix
    else:
        yield name, tensor


def with_equal_experts(case: str) -> Any:
    model = stock(case)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.copy_(parameter[:1].expand_as(parameter))
    return model


@pytest.mark.parametrize("case", ["mixtral", "mixtral top-1", "qwen3_moe", "deepseek_v3"])
def test_upcycled_experts_compute_the_dense_model_where_vanilla_does_not(case):
    """All experts equal, weights that sum to one: the stock model without drops is the dense one."""
    dense, _ = loss_of(with_equal_experts(case))
    for factor in (0.25, 1.0):
        rectified = rectify_(with_equal_experts(case), capacity_factor=factor, ranks=2)
        assert close(loss_of(rectified)[0], dense)
    vanilla = rectify_(with_equal_experts(case), intra=False, fill=False, capacity_factor=0.25, ranks=2)
    assert not close(loss_of(vanilla)[0], dense, 1e-2)


@pytest.mark.parametrize("case", CASES)
def test_weights_stay_under_their_names_and_come_back_from_disk(case, tmp_path):
    model = stock(case)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    rectify_(model, ranks=2)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(
        after[name].data_ptr() == pointer and after[name].equal(value) for name, (pointer, value) in before.items()
    )

    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(back) is type(model)
    assert all(tensor.equal(before[name][1]) for name, tensor in back.state_dict().items())
    with torch.no_grad():
        rectify_(back.train(), ranks=2)
        inputs_BS, _ = batch()
        assert close(back(input_ids=inputs_BS).logits, model(input_ids=inputs_BS).logits)


def test_unrectify_gives_the_stock_model_back():
    model = stock("mixtral")
    classes = [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    rectify_(model, ranks=2)
    rectify_(model, capacity_factor=0.3)
    assert not close(loss_of(model)[0], loss_of(stock("mixtral"))[0], 1e-3)
    unrectify_(model)
    assert [type(module) for module in model.modules()] == classes
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert torch.equal(loss_of(model)[0], loss_of(stock("mixtral"))[0])


def test_a_copy_is_rectified_and_apart():
    model = rectify_(stock("mixtral"), ranks=2)
    twin = copy.deepcopy(model)
    unrectify_(model)
    with routings_of(twin) as routings:
        loss_of(twin)
    assert list(routings) == ["model.layers.0.mlp", "model.layers.1.mlp"]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_layers_give_the_same_gradients_and_count_once(use_reentrant):
    plain = rectify_(stock("qwen3_moe"), capacity_factor=0.7, ranks=2)
    loss_of(plain)
    checkpointed = rectify_(stock("qwen3_moe"), capacity_factor=0.7, ranks=2)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    if use_reentrant:
        checkpointed.enable_input_require_grads()
    with routings_of(checkpointed) as routings:
        loss_of(checkpointed)
    assert len(routings) == 2
    for name, gradient in gradients(plain).items():
        assert torch.equal(gradients(checkpointed)[name], gradient), name


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe some dense", "olmoe"])
def test_the_models_own_balancing_loss_sees_all_choices(case):
    inputs_BS, targets_BS = batch()
    config = copy.deepcopy(CASES[case])
    config.num_hidden_layers = 2 if "dense" in case else 1  # one MoE layer, whose input no drop has touched
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    arguments = {"input_ids": inputs_BS, "labels": targets_BS, "output_router_logits": True}
    expected = model(**arguments)
    expected.aux_loss.backward()
    gates = {name: gradient.clone() for name, gradient in gradients(model).items() if ".gate." in name}
    model.zero_grad(set_to_none=True)
    found = rectify_(model, capacity_factor=0.5)(**arguments)
    found.aux_loss.backward()
    assert len(found.router_logits) == 1
    assert torch.equal(found.router_logits[0], expected.router_logits[0])
    assert torch.equal(found.aux_loss, expected.aux_loss)
    assert not torch.equal(found.loss, expected.loss)
    assert gates and all(torch.equal(gradients(model)[name], gradient) for name, gradient in gates.items())


@pytest.mark.parametrize("training", [True, False])
def test_generated_tokens_are_never_dropped(training):
    """With the cache, one new token per sequence: as the stock model, whatever the capacity."""
    inputs_BS, _ = batch(rows=3, length=1)
    arguments = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = stock("mixtral").eval().generate(inputs_BS, **arguments)
    model = rectify_(stock("mixtral"), capacity_factor=0.1, drop_in_eval=True).train(training)
    found = model.generate(inputs_BS, **arguments)
    assert found.sequences.equal(expected.sequences)
    assert all(close(a, b) for a, b in zip(found.logits, expected.logits, strict=True))


@torch.no_grad()
def test_evaluation_drops_only_where_asked_to():
    inputs_BS, _ = batch()
    expected = stock("olmoe").eval()(input_ids=inputs_BS).logits
    model = rectify_(stock("olmoe"), capacity_factor=0.3)
    trained = model(input_ids=inputs_BS).logits
    assert close(model.eval()(input_ids=inputs_BS).logits, expected)
    assert not close(trained, expected, 1e-3)
    rectify_(model, capacity_factor=0.3, drop_in_eval=True)
    assert torch.equal(model(input_ids=inputs_BS).logits, trained)


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe", "olmoe"])
def test_bf16_stays_near_the_stock_model_and_trains(case):
    expected, _ = loss_of(stock(case).bfloat16())
    model = stock(case).bfloat16()
    logits, _ = loss_of(rectify_(model, **LEAVING_STOCK_ALONE))
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).float().norm() <= 0.1 * expected.float().norm()
    rectify_(model, ranks=2)
    model.zero_grad()
    loss_of(model)
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_autocast_computes_experts_in_bf16():
    model = rectify_(stock("mixtral"), ranks=2)
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = loss_of(model)
    assert (logits - loss_of(rectify_(stock("mixtral"), ranks=2))[0]).float().norm() <= 0.2 * logits.float().norm()


@pytest.mark.parametrize("case", ["mixtral top-1", "qwen3_moe", "olmoe", "qwen2_moe", "deepseek_v3"])
def test_a_few_steps_lower_the_loss_and_slots_add_up(case):
    model = rectify_(stock(case), capacity_factor=0.7, ranks=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        with routings_of(model) as routings:
            losses.append(loss_of(model)[1].item())
        for routing in routings.values():
            check_identities(routing)
        assert slots_of(routings)["rectified"] > 0 == slots_of(routings)["unserved"]
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]


def test_routings_hold_no_graph():
    model = rectify_(stock("mixtral"), ranks=2)
    hidden: list[weakref.ref] = []
    handle = model.model.layers[0].register_forward_hook(lambda _, __, output: hidden.append(weakref.ref(output)))
    with routings_of(model) as routings:
        loss = model(input_ids=batch()[0]).logits.sum()
    handle.remove()
    assert not any(routing.weights_TK.requires_grad or routing.logits_TE.requires_grad for routing in routings.values())
    del loss
    gc.collect()
    assert hidden[0]() is None
    after = dict(routings)
    model(input_ids=batch()[0])
    assert all(routings[name] is routing for name, routing in after.items()), "what comes after is not read"
    with routings_of(model), pytest.raises(RuntimeError, match="being read already"), routings_of(model):
        pass


def test_jitter_noise_is_drawn_as_mixtral_draws_it():
    def drawn(options: dict | None) -> Tensor:
        config = copy.deepcopy(CASES["mixtral"])
        config.router_jitter_noise = 0.2
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).train()
        if options is not None:
            rectify_(model, **options)
        torch.manual_seed(1)
        return loss_of(model)[0]

    assert close(drawn(LEAVING_STOCK_ALONE), drawn(None))


def test_what_cannot_be_rectified_is_refused_in_one_line_and_left_alone(monkeypatch):
    def refused(model: nn.Module, **options: Any) -> str:
        classes = [type(module) for module in model.modules()]
        with pytest.raises(ValueError) as caught:
            rectify_(model, **options)
        assert [type(module) for module in model.modules()] == classes
        assert "\n" not in str(caught.value)
        return str(caught.value)

    dense = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, intermediate_size=80))
    assert "LlamaForCausalLM has no mixture-of-experts block" in refused(dense)
    config = copy.deepcopy(CASES["mixtral"])
    config.hidden_act = "gelu"
    assert "hidden_act is GELU" in refused(AutoModelForCausalLM.from_config(config))
    model = stock("mixtral")
    assert "ranks: 3 does not divide the 8 experts" in refused(model, ranks=3)
    assert "use 2" in refused(model, ranks=3)
    assert "without a capacity_factor" in refused(model, capacity_factor=None)
    assert "capacity_factor: nan is not a number" in refused(model, capacity_factor=float("nan"))
    assert "select: 'al' is not one of any, all; nearest: all" in refused(model, select="al")
    assert "capacity: 2.0 is outside" in refused(model, capacity=2.0)
    assert "8 experts" in refused(model, fill_ranks=7)
    with monkeypatch.context() as another:
        another.setattr(huggingface_rectify, "version", lambda name: "5.8rc1")
        assert "transformers: 5.8rc1 is too old; pip install 'transformers>=5.9'" in refused(model)
        for later in ("5.9rc0", "5.10.0.dev0", "6rc1"):
            another.setattr(huggingface_rectify, "version", lambda name, found=later: found)
            unrectify_(rectify_(model))
    model.model.layers[1].mlp.forward = model.model.layers[1].mlp.forward
    assert "model.layers.1.mlp: its forward was replaced" in refused(model)
    del model.model.layers[1].mlp.forward
    half = model.model.layers[0].mlp.experts
    half.gate_up_proj = nn.Parameter(half.gate_up_proj[:4].detach())
    assert "whole, unquantized experts" in refused(model)
    with pytest.raises(ValueError, match="nothing in this"), routings_of(model):
        pass
    with pytest.raises(ValueError, match="96 tokens cannot be cut into 5 emulated ranks"):
        config.num_local_experts = 10
        config.hidden_act = "silu"
        rectify_(AutoModelForCausalLM.from_config(config).train(), ranks=5)(input_ids=batch()[0])
