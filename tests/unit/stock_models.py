"""Tiny random models of every family that compression knows, as transformers saves them; for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    MixtralConfig,
    OlmoeConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.utils import logging

logging.disable_progress_bar()
logging.set_verbosity_error()

_SIZE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "num_experts_per_tok": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LATENT: dict[str, Any] = {
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
}
_FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "mixtral": (MixtralConfig, {"intermediate_size": 8, "num_local_experts": 6}),
    "qwen2_moe": (
        Qwen2MoeConfig,
        {
            "intermediate_size": 24,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
            "num_experts": 6,
            "mlp_only_layers": [0],
        },
    ),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"head_dim": 8, "intermediate_size": 24, "moe_intermediate_size": 8, "num_experts": 6},
    ),
    "olmoe": (OlmoeConfig, {"intermediate_size": 8, "num_experts": 6}),
    "deepseek_v2": (DeepseekV2Config, {**_LATENT, "topk_method": "group_limited_greedy"}),
    "deepseek_v3": (DeepseekV3Config, {**_LATENT, "num_mtp_layers": 0}),
}
CONFIGS: dict[str, PretrainedConfig] = {family: kind(**_SIZE, **own) for family, (kind, own) in _FAMILIES.items()}


def save_stock(family: str, folder: Path, *, max_shard_size: str = "5GB", **changes: Any) -> Path:
    """Saves a model of `family` with random weights, none of them zero or one, and returns `folder`."""
    kind, its_own = _FAMILIES[family]
    config = kind(**(_SIZE | its_own | changes))
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_(0.0, 0.3, generator=generator)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
