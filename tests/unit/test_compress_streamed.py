"""Models read layer by layer against transformers' own and our decoder with the same weights.

Differences are measured against the largest logit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.utils import logging

from wastenot.moe.compress.families import FAMILIES
from wastenot.moe.compress.forward import run_layers
from wastenot.moe.compress.open import open_model
from wastenot.moe.compress.plan import DropPlan, Shape

logging.disable_progress_bar()
logging.set_verbosity_error()
pytestmark = pytest.mark.usefixtures("one_thread")

SAME = 5e-6
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "eos_token_id": None,
}
LATENT = SHAPE | {
    "num_key_value_heads": 4,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 16,
}
CASES: dict[str, Any] = {
    "mixtral": MixtralConfig(**SHAPE, intermediate_size=64, num_local_experts=8, num_experts_per_tok=2),
    "mixtral-window": MixtralConfig(
        **SHAPE, intermediate_size=64, num_local_experts=8, num_experts_per_tok=2, sliding_window=5
    ),
    "qwen2_moe": Qwen2MoeConfig(
        **SHAPE,
        intermediate_size=80,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        num_experts=8,
        num_experts_per_tok=3,
        mlp_only_layers=[1],
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=3,
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **SHAPE,
        head_dim=16,
        intermediate_size=80,
        moe_intermediate_size=24,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        mlp_only_layers=[0],
        tie_word_embeddings=True,
    ),
    "olmoe": OlmoeConfig(**SHAPE, intermediate_size=32, num_experts=16, num_experts_per_tok=4, clip_qkv=0.5),
    "deepseek_v2": DeepseekV2Config(
        **LATENT, q_lora_rank=20, n_group=3, topk_group=2, topk_method="group_limited_greedy"
    ),
    "deepseek_v2-greedy": DeepseekV2Config(**LATENT, q_lora_rank=None),
    "deepseek_v3": DeepseekV3Config(**LATENT, q_lora_rank=20, n_group=3, topk_group=2, num_nextn_predict_layers=0),
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Callable[[str], tuple[Path, Any]]:
    """Makes, once, the folder of a case and transformers' model of it, with weights that make every part count."""
    made: dict[str, tuple[Path, Any]] = {}

    def make(case: str) -> tuple[Path, Any]:
        if case not in made:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CASES[case], attn_implementation="sdpa").eval()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
                for name, buffer in model.named_buffers():
                    if name.endswith("e_score_correction_bias"):
                        buffer.normal_(0.0, 0.3)
            folder = tmp_path_factory.mktemp(case)
            model.save_pretrained(folder)
            made[case] = folder, model
        return made[case]

    return make


def tokens(seed: int = 1) -> Tensor:
    return torch.randint(0, 96, (3, 17), generator=torch.Generator().manual_seed(seed))


def difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def streamed_logits(folder: Path, plan: DropPlan | None = None) -> Tensor:
    model = open_model(folder)
    return model.logits(run_layers(model, tokens(), plan, batch=2))


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model(tokens()).logits


class Bypassed:
    """While it lasts, transformers' model computes what a plan would leave of it."""

    def __init__(self, model: Any, plan: DropPlan) -> None:
        self.model, self.plan = model, plan
        self.undo: list[Any] = []

    def __enter__(self) -> None:
        layers, plan = self.model.model.layers, self.plan
        for number in plan.blocks:
            self._after(layers[number], lambda module, given, made: given[0])
        for number in plan.layers:
            self._after(layers[number].mlp, lambda module, given, made: torch.zeros_like(made))
        for number, gone in plan.experts.items():
            feed = layers[number].mlp
            if plan.semantics == "skip":
                self._zero(feed.experts.down_proj, gone)
            else:
                self._never(feed.gate, gone)

    def __exit__(self, *error: object) -> None:
        for undo in self.undo:
            undo()

    def _after(self, module: Any, hook: Any) -> None:
        self.undo.append(module.register_forward_hook(hook).remove)

    @torch.no_grad()
    def _zero(self, weight: Tensor, gone: tuple[int, ...]) -> None:
        before = weight.clone()
        weight[list(gone)] = 0
        self.undo.append(lambda: weight.data.copy_(before))

    def _never(self, gate: Any, gone: tuple[int, ...]) -> None:
        """The gate's logits of those experts become -inf, inside its forward."""
        import torch.nn.functional as F

        linear, weight = F.linear, gate.weight

        def masked(x: Tensor, given: Tensor, bias: Tensor | None = None) -> Tensor:
            out = linear(x, given, bias)
            if given.shape == weight.shape and torch.equal(given, weight):
                out[:, list(gone)] = -torch.inf
            return out

        forward = gate.forward

        def changed(x: Tensor) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(F, "linear", masked)
                return forward(x)

        gate.forward = changed
        self.undo.append(lambda: gate.__dict__.pop("forward"))
        bias = gate._buffers.get("e_score_correction_bias")
        if bias is not None:
            # A sigmoid score of 0 could still be chosen for its bias.
            before = bias.clone()
            bias[list(gone)] = -1e4
            self.undo.append(lambda: bias.copy_(before))


def plan_for(shape: Shape, **cuts: Any) -> DropPlan:
    return DropPlan(base="", shape=shape, **cuts)


def gone_of(shape: Shape) -> tuple[int, ...]:
    """The first of each group, or two of a single one."""
    experts = max(shape.experts)
    return tuple(range(0, experts, experts // shape.groups)) if shape.groups > 1 else (1, experts - 1)


@pytest.mark.parametrize("case", CASES)
def test_streamed_logits_are_those_of_transformers(case: str, stock) -> None:
    folder, model = stock(case)
    assert difference(streamed_logits(folder), logits_of(model)) < SAME


def test_every_family_has_a_case() -> None:
    assert {config.model_type for config in CASES.values()} == set(FAMILIES)


@pytest.mark.parametrize("semantics", ["reroute", "skip"])
@pytest.mark.parametrize("case", CASES)
def test_a_plan_is_the_model_with_those_modules_bypassed(case: str, semantics: str, stock) -> None:
    folder, model = stock(case)
    shape = open_model(folder).shape
    last = shape.layers - 1
    plan = plan_for(shape, blocks=(1,), layers=(2,), experts={last: gone_of(shape)}, semantics=semantics)
    whole = logits_of(model)
    with Bypassed(model, plan):
        wanted = logits_of(model)
    assert difference(logits_of(model), whole) == 0
    assert difference(wanted, whole) > 0.05
    assert difference(streamed_logits(folder, plan), wanted) < SAME


@pytest.mark.parametrize("case", CASES)
def test_each_kind_of_cut_alone_is_the_bypass(case: str, stock) -> None:
    folder, model = stock(case)
    shape = open_model(folder).shape
    for cuts in ({"blocks": (0, 3)}, {"layers": (0,)}, {"experts": {3: gone_of(shape)}}):
        plan = plan_for(shape, **cuts)
        with Bypassed(model, plan):
            wanted = logits_of(model)
        assert difference(streamed_logits(folder, plan), wanted) < SAME, cuts


@pytest.mark.parametrize("semantics", ["reroute", "skip"])
def test_the_order_in_which_experts_are_kept_does_not_matter(semantics: str, stock) -> None:
    folder, _ = stock("qwen2_moe")
    shape = open_model(folder).shape
    gone, left = (2, 5), [0, 1, 3, 4, 6, 7] if semantics == "reroute" else list(range(8))
    plain = plan_for(shape, experts={3: gone}, semantics=semantics)
    order = {3: tuple(reversed(left))}
    turned = plan_for(shape, experts={3: gone}, order=order, semantics=semantics)
    assert difference(streamed_logits(folder, turned), streamed_logits(folder, plain)) < SAME
