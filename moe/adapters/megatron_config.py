"""Megatron's options as our ModelConfig and RouterConfig; imports neither Megatron nor torch.

Takes the names of Megatron-LM's command line, as its training loop saves them with a checkpoint, and those of
TransformerConfig where they differ. Every option that changes what the model computes is either carried over or
refused: all that is wrong is listed in one ValueError. Options about training mean less: coefficients of auxiliary
losses are carried over, their form is ours (METHODS R8).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ..config import ModelConfig, MoEConfig, RectifyConfig, RouterConfig
from .options import read_number

__all__ = ["Normalize", "config_from_megatron", "router_config"]

Normalize = Literal["survivors", "top_k", "none"]

_ONLY: dict[str, tuple[object, ...]] = {
    "normalization": ("RMSNorm",),
    "apply_layernorm_1p": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "add_bias_linear": (False,),
    "add_qkv_bias": (False,),
    "swiglu": (True,),
    "gated_linear_unit": (True,),
    "glu_linear_offset": (0, 0.0),
    "activation_func_clamp_value": (),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1, 1.0),
    "rotary_interleaved": (False,),
    "use_rope_scaling": (False,),
    "rotary_seq_len_interpolation_factor": (1, 1.0),
    "no_rope_freq": (),
    "multi_latent_attention": (False,),
    "attention_output_gate": (False,),
    "qk_l2_norm": (False,),
    "qk_clip": (False,),
    "softmax_scale": (),
    "softmax_type": ("vanilla",),
    "window_size": (),
    "apply_residual_connection_post_layernorm": (False,),
    "mtp_num_layers": (0,),
    "heterogeneous_block_specs": (False,),
    "linear_attention_freq": (),
    "moe_latent_size": (),
    "moe_apply_probs_on_input": (False,),
    "moe_shared_expert_gate": (False,),
    "moe_router_force_load_balancing": (False,),
}
"""Options whose every other value makes another model than ours; None, or absence, is always right."""

_BALANCE = {"aux_loss": "block", "seq_aux_loss": "sequence", "global_aux_loss": "global"}


def router_config(config: Any, rectify: RectifyConfig, normalize: Normalize | None = None, **more: Any) -> RouterConfig:
    """Router options of a TransformerConfig as ours, and `more` of ours; auxiliary losses, bias and noise stay away."""
    top_k = config.moe_router_topk
    if normalize is None:
        normalize = "survivors" if _divides(config) else "none"
    return RouterConfig(
        top_k=top_k,
        score=config.moe_router_score_function,
        normalize=normalize,
        # The weight of a single choice is a constant 1 otherwise, and teaches the router nothing.
        detach=top_k == 1,
        scale=config.moe_router_topk_scaling_factor or 1.0,
        capacity_factor=config.moe_expert_capacity_factor,
        priority="position" if config.moe_token_drop_policy == "position" else "probability",
        rectify=rectify,
        **more,
    )


def _divides(config: Any) -> bool:
    """Whether Megatron makes the weights of a token's choices sum to one."""
    if config.moe_router_score_function == "sigmoid":
        return config.moe_router_topk > 1
    return not config.moe_router_pre_softmax


class _Options:
    """The saved options as attributes, None where there are none; notes all that is wrong with them."""

    def __init__(self, args: Mapping[str, Any]) -> None:
        self.args = args
        self.problems: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return self.args.get(name)

    def number(self, *names: str, default: Any = None) -> Any:
        """The first of `names` that says a number; a problem where none does and there is no default."""
        return read_number(self.args, self.problems, names, default)


def config_from_megatron(args: Mapping[str, Any]) -> tuple[ModelConfig, RouterConfig]:
    """Our configuration of the GPT model that `args` describe; its vocabulary is left to the weights.

    Raises ValueError listing every option that is missing, or says what our model cannot compute.
    """
    options = _Options(args)
    for name, legal in _ONLY.items():
        value = args.get(name)
        if value is not None and value not in legal:
            allowed = " or ".join(map(repr, legal)) or "None"
            options.problems.append(f"{name}: {value!r} makes another model than ours; only {allowed} carries over")
    layers, d_model = options.number("num_layers"), options.number("hidden_size")
    heads, d_ff = options.number("num_attention_heads"), options.number("ffn_hidden_size")
    # Megatron-LM's command line has a number of groups even where it does not use it.
    grouped = options.group_query_attention is not False
    kv_heads = options.number("num_query_groups", default=heads) if grouped else heads
    experts = options.number("num_experts", "num_moe_experts", default=0)
    moe = _experts(options, layers, experts, d_ff) if experts else None
    router = _router(options) if experts else RouterConfig()
    untied = options.untie_embeddings_and_output_weights
    untied = not options.share_embeddings_and_output_weights if untied is None else untied
    found = {
        "rope_theta": float(options.number("rotary_base", default=10000)),
        "norm_eps": float(options.number("norm_epsilon", "layernorm_epsilon", default=1e-5)),
        "init_std": float(options.number("init_method_std", default=0.02)),
        "d_head": options.number("kv_channels", default=0),
    }
    if options.problems:
        raise ValueError("\n".join(["Megatron's options cannot be carried over:", *options.problems]))
    model = ModelConfig(
        d_model=d_model,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        d_ff=d_ff,
        qk_norm="head" if options.qk_layernorm else "none",
        tie_embeddings=not untied,
        moe=MoEConfig(**moe) if moe else None,
        **found,
    )
    return model, router


def _experts(options: _Options, layers: int, experts: int, d_ff: int) -> dict[str, Any]:
    """Fields of MoEConfig."""
    d_expert = options.number("moe_ffn_hidden_size", default=d_ff)
    shared = options.number("moe_shared_expert_intermediate_size", default=0)
    if shared % d_expert:
        nearest = max(1, round(shared / d_expert)) * d_expert
        options.problems.append(
            f"moe_shared_expert_intermediate_size: {shared} is no multiple of moe_ffn_hidden_size: {d_expert}, as ours "
            f"is; {nearest} would be"
        )
    found = {"experts": experts, "d_expert": d_expert, "shared_experts": shared // d_expert}
    every = options.moe_layer_freq or 1
    pattern = [int(layer % every == 0) for layer in range(layers)] if isinstance(every, int) else list(every)
    if len(pattern) != layers or not set(pattern) <= {0, 1}:
        options.problems.append(f"moe_layer_freq: {every!r} is neither a number nor {layers} zeros and ones")
    elif not all(pattern):
        dense = tuple(layer for layer, is_moe in enumerate(pattern) if not is_moe)
        found |= {"per_layer": tuple(experts * is_moe for is_moe in pattern), "dense": dense}
    return found


def _router(options: _Options) -> RouterConfig:
    more: dict[str, Any] = {"balance_loss": 0.0, "z_loss": options.number("moe_z_loss_coeff", default=0.0)}
    kinds, weights = options.moe_router_load_balancing_type or "none", options.moe_aux_loss_coeff or 0.0
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    weights = list(weights) if isinstance(weights, list | tuple) else [weights] * len(kinds)
    for kind, weight in zip(kinds, weights, strict=False):
        if kind == "sinkhorn":
            options.problems.append("moe_router_load_balancing_type: sinkhorn makes other choices than ours")
        elif kind in _BALANCE and weight and not more["balance_loss"]:
            more |= {"balance_loss": float(weight), "balance_over": _BALANCE[kind]}
    if options.moe_router_enable_expert_bias:
        more["bias_update"] = float(options.number("moe_router_bias_update_rate", default=1e-3))
    if options.moe_input_jitter_eps:
        more["jitter"] = float(options.number("moe_input_jitter_eps"))
    top_k = options.number("moe_router_topk", default=2)
    if options.moe_router_num_groups:
        groups, top_groups = options.number("moe_router_num_groups"), options.number("moe_router_group_topk", default=1)
        if top_k // top_groups != 2:
            options.problems.append(
                f"moe_router_group_topk: {top_groups} rates a group by its best {top_k // top_groups} experts, ours by "
                f"its best 2; only {max(1, top_k // 2)} carries over"
            )
        more |= {"groups": groups, "top_groups": top_groups}
    if options.problems:
        return RouterConfig()
    usual = {"moe_router_score_function": "softmax", "moe_token_drop_policy": "probs"}
    named = _Options({**usual, **options.args, "moe_router_topk": top_k})
    # Megatron divides before it drops.
    return router_config(named, RectifyConfig(), "top_k" if _divides(named) else "none", **more)
