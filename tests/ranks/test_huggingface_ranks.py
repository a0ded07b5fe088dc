"""Expert-parallel ranks with a Hugging Face checkpoint: each reads its own experts, together they are that model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from spawned import run_ranks
from torch import Tensor

from wastenot.moe.adapters.huggingface import (
    StoredWeights,
    config_from_huggingface,
    load_huggingface,
    save_huggingface,
    to_huggingface,
)
from wastenot.moe.decoder import Decoder, build_decoder
from wastenot.moe.layer import MoELayer
from wastenot.parallel.config import ParallelConfig
from wastenot.parallel.expert import expert_parameter_names, local_experts
from wastenot.parallel.gradients import Gradients
from wastenot.parallel.mesh import Mesh, make_mesh

EXPERTS = 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor, Tensor, dict[str, Tensor]]:
    """A Mixtral of transformers on disk, tokens, its logits, and its gradients under the names on disk."""
    # Here, not above: every rank imports this file, and none of them needs transformers.
    from transformers import AutoModelForCausalLM, MixtralConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    config = MixtralConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=4,
        max_position_embeddings=64,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(float(parameter.dim() == 1), 0.15, generator=generator)
    folder = tmp_path_factory.mktemp("mixtral")
    model.save_pretrained(folder)
    tokens_BS = torch.randint(0, 96, (4, 17), generator=generator)
    logits = model(input_ids=tokens_BS[:, :-1]).logits
    F.cross_entropy(logits.flatten(0, 1), tokens_BS[:, 1:].flatten()).backward()
    gradients: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        name = name.replace(".mlp.", ".block_sparse_moe.")
        assert parameter.grad is not None
        stem = name.rpartition(".")[0]
        if name.endswith("gate_up_proj"):
            for expert, (gate, up) in enumerate(g.chunk(2) for g in parameter.grad):
                gradients |= {f"{stem}.{expert}.w1.weight": gate, f"{stem}.{expert}.w3.weight": up}
        elif name.endswith("experts.down_proj"):
            gradients |= {f"{stem}.{expert}.w2.weight": g for expert, g in enumerate(parameter.grad)}
        else:
            gradients[name] = parameter.grad
    return folder, tokens_BS, logits.detach(), gradients


class Watched(StoredWeights):
    """Remembers what was read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.read: list[str] = []

    def __getitem__(self, name: str) -> Tensor:
        self.read.append(name)
        return super().__getitem__(name)


def load(folder: Path, mesh: Mesh) -> tuple[Decoder, list[str]]:
    model_config, router, family = config_from_huggingface(json.loads((folder / "config.json").read_text()))
    model = build_decoder(model_config, router, mesh, seed=5)
    source = Watched(folder)
    load_huggingface(model, source, family)
    return model, source.read


def compute(
    rank: int, world: int, expert: int, folder: Path, tokens_BS: Tensor
) -> tuple[Tensor, dict[str, Tensor], list[str]]:
    """This rank's logits, the summed gradients of what it holds, and the names it read."""
    mesh = make_mesh(ParallelConfig(expert=expert), "cpu")
    model, read = load(folder, mesh)
    gradients = Gradients(model, mesh)
    mine_BS = tokens_BS.chunk(world)[rank]
    inputs_BS, targets_BS = mine_BS[:, :-1], mine_BS[:, 1:]
    gradients.zero()
    with gradients.reduced():
        hidden = model(inputs_BS).hidden_BSD
        (model.loss_sum(hidden, targets_BS) / tokens_BS[:, 1:].numel()).backward()
    experts = expert_parameter_names(model)
    first = local_experts(EXPERTS, mesh.expert).start
    found = {
        disk_name: gradient.clone()
        for name, parameter in model.named_parameters()
        for disk_name, gradient in to_huggingface(name, parameter.grad, "mixtral", first if name in experts else 0)  # type: ignore[arg-type]
    }
    return model.logits(hidden).detach(), found, read


@pytest.mark.parametrize(("world", "expert"), [(2, 2), (4, 2)])
def test_ranks_give_the_logits_and_gradients_of_transformers(world: int, expert: int, checkpoint: tuple) -> None:
    folder, tokens_BS, logits, gradients = checkpoint
    results = run_ranks(world, compute, expert, folder, tokens_BS)
    torch.testing.assert_close(torch.cat([mine for mine, _, _ in results]), logits, atol=1e-5, rtol=1e-5)
    gathered: dict[str, Tensor] = {}
    for rank, (_, found, read) in enumerate(results):
        gathered |= found
        numbers = {int(match[1]) for name in read if (match := re.search(r"experts\.(\d+)", name))}
        share = EXPERTS // expert
        assert numbers == set(range(rank % expert * share, (rank % expert + 1) * share)), "reads its own experts only"
    assert gathered.keys() == gradients.keys()
    for name, gradient in gradients.items():
        error, largest = (gathered[name] - gradient).abs().max(), gradient.abs().max()
        assert error <= 1e-5 * largest, f"{name}: off by {error:.1e}, largest value {largest:.1e}"


def save(rank: int, world: int, source: Path, target: Path) -> str:
    """Loads and saves again; returns what went wrong."""
    model, _ = load(source, make_mesh(ParallelConfig(expert=2), "cpu"))
    if rank > 0:
        # Wrong on the other copies and never asked for: rank 0's is the one that is written.
        with torch.no_grad():
            model.embedding.weight.zero_()
    try:
        save_huggingface(model, target, "mixtral", shard_bytes=50_000)
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def test_ranks_write_together_what_they_read(checkpoint: tuple, tmp_path: Path) -> None:
    """Two copies of the experts on two ranks each; expert by expert to rank 0."""
    target = tmp_path / "out"
    assert run_ranks(4, save, checkpoint[0], target) == [""] * 4
    assert len(list(target.glob("*.safetensors"))) > 3
    before, after = StoredWeights(checkpoint[0]), StoredWeights(target)
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_no_rank_hangs_where_the_folder_cannot_be_written(checkpoint: tuple, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("")
    errors = run_ranks(2, save, checkpoint[0], tmp_path / "out")
    assert all("exists; name a new folder" in error for error in errors)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def refuse(rank: int, world: int, folder: Path) -> str:
    """What loading says where one expert, of the other rank, is missing."""
    mesh = make_mesh(ParallelConfig(expert=2), "cpu")
    model_config, router, family = config_from_huggingface(json.loads((folder / "config.json").read_text()))
    model = build_decoder(model_config, router, mesh)
    stored = dict(StoredWeights(folder))
    del stored["model.layers.1.block_sparse_moe.experts.15.w2.weight"]
    layer = model.blocks[0].ffn  # type: ignore[union-attr]
    assert isinstance(layer, MoELayer)
    before = layer.experts.down.detach().clone()
    try:
        load_huggingface(model, stored, family)
    except ValueError as error:
        assert torch.equal(layer.experts.down, before)
        return str(error)
    return ""


def test_every_rank_refuses_what_only_one_would_have_missed(checkpoint: tuple) -> None:
    first, second = run_ranks(2, refuse, checkpoint[0])
    assert first == second
    assert "missing (1): model.layers.1.block_sparse_moe.experts.15.w2.weight" in first
