"""Which row of our weights is which of Megatron's: by hand, then both ways over a whole model; without Megatron."""

from __future__ import annotations

import pytest
import torch

from wastenot.moe.adapters.megatron_names import gpt_links, to_megatron, to_ours
from wastenot.moe.config import ModelConfig, MoEConfig, RouterConfig
from wastenot.moe.decoder import build_decoder
from wastenot.parallel.mesh import single


def config(**changes) -> ModelConfig:
    moe = MoEConfig(experts=4, d_expert=8, first_dense=1, shared_experts=1)
    usual = {"vocab_size": 11, "d_model": 8, "layers": 3, "heads": 4, "kv_heads": 2, "d_ff": 16, "moe": moe}
    return ModelConfig(**(usual | {"qk_norm": "head"} | changes))


def test_rows_of_fused_matrices_by_hand():
    """Two groups of two query heads, each of two rows: queries of a group, then its key, then its value."""
    model = config()
    qkv = torch.zeros(16, 8)
    ours = {f"blocks.0.attention.{name}.weight": torch.zeros(rows, 8) for name, rows in (("q", 8), ("k", 4), ("v", 4))}
    for start, tensor in zip((100, 200, 300), ours.values(), strict=True):
        tensor += torch.arange(start, start + len(tensor)).unsqueeze(1)
    links = [link for link in gpt_links(model, [0], 4, (False, False)) if "linear_qkv" in link.theirs]
    to_megatron(links, ours, {links[0].theirs: qkv})
    first = [100, 101, 102, 103, 200, 201, 300, 301]
    assert qkv[:, 0].tolist() == [*first, 104, 105, 106, 107, 202, 203, 302, 303]
    gate, up = torch.full((16, 8), 1.0), torch.full((16, 8), 2.0)
    fused = torch.zeros(32, 8)
    links = [link for link in gpt_links(model, [0], 4, (False, False)) if "linear_fc1" in link.theirs]
    to_megatron(links, {"blocks.0.ffn.gate.weight": gate, "blocks.0.ffn.up.weight": up}, {links[0].theirs: fused})
    assert fused.equal(torch.cat([gate, up]))


def test_both_ways_is_the_identity_and_nothing_is_left_over():
    model = config()
    decoder = build_decoder(model, RouterConfig(), single())
    ours = dict(decoder.named_parameters())
    links = gpt_links(model, range(3), 4, (True, True))
    assert {link.ours for link in links} == set(ours)
    # Megatron's shapes, here of what it fuses and of what it takes apart; NaN where nothing is written.
    rows = {"linear_qkv": (16, 8), "linear_fc1": (16, 8), "mlp.linear_fc1": (32, 8)}
    theirs = {}
    for link in links:
        shape = next((rows[key] for key in sorted(rows, key=len, reverse=True) if key in link.theirs), None)
        theirs[link.theirs] = torch.full(shape or link.part(ours[link.ours]).shape, torch.nan)
    to_megatron(links, ours, theirs)
    assert all(tensor.isfinite().all() for tensor in theirs.values())
    back = {name: torch.full_like(tensor, torch.nan) for name, tensor in ours.items()}
    to_ours(links, theirs, back)
    assert all(back[name].equal(ours[name]) for name in ours)


def test_a_stage_counts_its_layers_from_zero():
    links = gpt_links(config(), [1, 2], 2, (False, True))
    pairs = {(link.ours, link.theirs) for link in links}
    assert ("blocks.2.ffn.router.weight", "decoder.layers.1.mlp.router.weight") in pairs
    assert ("blocks.1.ffn.experts.down", "decoder.layers.0.mlp.experts.local_experts.1.linear_fc2.weight") in pairs
    assert not [link for link in links if link.ours == "embedding.weight"]


def test_what_megatron_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"qk_norm: full .* use head or none"):
        gpt_links(config(qk_norm="full"), range(3), 4, (True, True))
    alone = config(moe=MoEConfig(experts=4, d_expert=8, per_layer=(4, 0, 4)))
    with pytest.raises(ValueError, match="per_layer: layer 1 only attends"):
        gpt_links(alone, range(3), 4, (True, True))
