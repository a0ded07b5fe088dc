"""Random stock checkpoints, and what `apply` would make of them: written out here independently of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from wastenot.moe.compress.plan import DropPlan, Shape

LAYERS, EXPERTS = 6, 8

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_GROUPED = SIZES | {"num_key_value_heads": 2}
_LATENT = SIZES | {
    "num_key_value_heads": 4,
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "mixtral": MixtralConfig(**_GROUPED, intermediate_size=24, num_local_experts=EXPERTS),
    "qwen2_moe": Qwen2MoeConfig(
        **_GROUPED,
        intermediate_size=40,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        num_experts=EXPERTS,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=5,
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **_GROUPED,
        head_dim=16,
        intermediate_size=40,
        moe_intermediate_size=16,
        num_experts=EXPERTS,
        norm_topk_prob=True,
        decoder_sparse_step=2,
    ),
    "qwen3_moe-plain": Qwen3MoeConfig(
        **_GROUPED, head_dim=16, intermediate_size=640, moe_intermediate_size=16, num_experts=EXPERTS
    ),
    "olmoe": OlmoeConfig(**_GROUPED, intermediate_size=16, num_experts=EXPERTS),
    "deepseek_v2": DeepseekV2Config(
        **_LATENT, first_k_dense_replace=1, n_group=2, topk_group=1, topk_method="group_limited_greedy"
    ),
    "deepseek_v3": DeepseekV3Config(**_LATENT, first_k_dense_replace=1, n_group=2, topk_group=1),
}


def family_of(case: str) -> str:
    return case.partition("-")[0]


def write_stock(case: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A stock checkpoint with random weights, large enough that every part matters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[case], dtype=dtype)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("e_score_correction_bias"):
                tensor.normal_(0, 0.1)
            elif not name.endswith("inv_freq"):
                tensor.normal_(*((1.0, 0.1) if tensor.dim() == 1 else (0.0, 0.15)))
    model.save_pretrained(folder, max_shard_size="60KB")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def write_applied(base: Path, folder: Path, plan: DropPlan) -> Path:
    """What is left of the stock checkpoint `base` after `plan`, in the form that `apply` gives it."""
    folder.mkdir()
    save_file(dict(_left(stored(base), plan)), folder / "model.safetensors")
    (folder / "base_config.json").write_text((base / "config.json").read_text())
    (folder / "tokenizer.json").write_text("{}")
    about = {
        "version": 1,
        "shape": asdict(plan.result),
        "origin": list(plan.survivors),
        "plans": [plan.hash],
    }
    (folder / "compressed.json").write_text(json.dumps(about))
    return folder


def plan_for(case: str, **drops: Any) -> DropPlan:
    """A plan for the checkpoint of `case`."""
    return DropPlan(base="random", shape=shape_of(case), **drops)


def shape_of(case: str) -> Shape:
    """Written down by hand: what the configurations above say."""
    dense = {"qwen3_moe": (0, 2, 4), "deepseek_v2": (0,), "deepseek_v3": (0,)}.get(case, ())
    groups = 2 if case.startswith("deepseek") else 1
    experts = tuple(0 if layer in dense else EXPERTS for layer in range(LAYERS))
    return Shape(experts=experts, top_k=2, dense=dense, groups=groups)


def _left(tensors: Mapping[str, Tensor], plan: DropPlan) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if not name.startswith("model.layers."):
            yield name, tensor
            continue
        _, _, number, *rest = name.split(".")
        layer = int(number)
        if layer in plan.blocks:
            continue
        if layer in plan.layers and rest[0] in ("mlp", "block_sparse_moe", "post_attention_layernorm"):
            continue
        kept = list(plan.kept(layer))
        if rest[1] == "experts":
            expert = int(rest[2])
            if expert not in kept:
                continue
            rest[2] = str(kept.index(expert))
            if plan.semantics == "skip" and expert in plan.experts.get(layer, ()):
                tensor = torch.zeros_like(tensor)
        elif rest[1] == "gate":
            tensor = tensor[kept]
        yield f"model.layers.{plan.survivors.index(layer)}.{'.'.join(rest)}", tensor
