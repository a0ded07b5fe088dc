"""Files of Megatron's: its datasets, read and written as it does, and its checkpoints, whose models become runs.

Megatron runs through `megatron_cpu_shim.py`, which patches its process for good: in ranks of their own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spawned import run_ranks
from test_megatron_rectify import E, megatron_config
from torch import Tensor

from wastenot.launch.engine_config import MegatronConfig
from wastenot.launch.indexed import IndexedTokens, write_indexed
from wastenot.launch.saved_run import open_run
from wastenot.launch.tokenizer import byte_tokenizer
from wastenot.moe.adapters.megatron_checkpoint import MegatronCheckpoint
from wastenot.moe.config import RectifyConfig
from wastenot.tools.cli import main

# Megatron-Core warns about CUDA libraries that a CPU does not have.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="needs megatron-core"),
]

DOCUMENTS = st.lists(st.lists(st.lists(st.integers(0, 127), min_size=1, max_size=5), max_size=3), max_size=5)


def datasets(rank: int, world: int) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

    @settings(deadline=None, max_examples=25, database=None)
    @given(st.lists(st.lists(st.integers(0, 2**15 - 1), max_size=9), max_size=6), st.sampled_from([65499, 65500]))
    def megatron_reads_what_we_write(documents: list[list[int]], vocab_size: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            prefix = Path(folder) / "name.with.dots"
            counts = write_indexed(prefix, documents, vocab_size)
            assert counts == {"documents": len(documents), "tokens": sum(map(len, documents))}
            if counts["tokens"]:  # Megatron maps no empty file.
                theirs = IndexedDataset(str(prefix))
                assert theirs.index.dtype == DType.optimal_dtype(vocab_size)
                assert [theirs[index].tolist() for index in range(len(theirs))] == documents
                assert theirs.document_indices.tolist() == list(range(len(documents) + 1))
            assert [ids.tolist() for ids in IndexedTokens.open(prefix)] == documents

    @settings(deadline=None, max_examples=25, database=None)
    @given(DOCUMENTS, st.sampled_from(["uint8", "int8", "int16", "int32", "int64", "uint16"]))
    def we_read_what_megatron_writes(documents: list[list[list[int]]], dtype: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            prefix = Path(folder) / "theirs"
            builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=getattr(np, dtype))
            for sequences in documents:
                for sequence in sequences:
                    builder.add_item(torch.tensor(sequence))
                builder.end_document()
            builder.finalize(f"{prefix}.idx")
            ours = IndexedTokens.open(prefix)
            assert ours.tokens.dtype == np.dtype(dtype)
            expected = [[token for sequence in sequences for token in sequence] for sequences in documents]
            assert [ids.tolist() for ids in ours] == expected

    megatron_reads_what_we_write()
    we_read_what_megatron_writes()


def test_megatron_reads_the_datasets_we_write_and_we_read_its():
    run_ranks(1, datasets, timeout=120.0)


VOCABULARY = 264  # bytes and the end token, padded
FULL = {
    "num_query_groups": 2,
    "kv_channels": 8,
    "qk_layernorm": True,
    "moe_ffn_hidden_size": 12,
    "moe_shared_expert_intermediate_size": 24,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 2.5,
}
# Whose layer, its options, how it is saved, expert-parallel and pipeline ranks.
SAVED: dict[str, tuple[str, dict[str, Any], dict[str, Any], int, int]] = {
    "layers in one": ("sequential", {}, {}, 2, 1),
    "layers apart": ("sequential", FULL | {"moe_layer_freq": [0, 1]}, {}, 2, 1),
    "experts apart": ("sequential", {}, {"singleton_local_shards": True}, 2, 1),
    "grouped": ("grouped", {}, {}, 2, 1),
    "ours": ("ours", FULL, {}, 2, 1),
    "two stages": ("sequential", {}, {"non_homogeneous_layers": True}, 1, 2),
}


def gpt(kind: str, options: dict[str, Any], stage: int = 0, stages: int = 1) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron_cpu_shim import devices_on_cpu

    from wastenot.moe.adapters.megatron_layer import wastenot_spec

    torch.manual_seed(5)
    grouped = {"moe_grouped_gemm": True, "moe_use_legacy_grouped_gemm": True} if kind == "grouped" else {}
    config = megatron_config(
        moe_expert_capacity_factor=None, pipeline_model_parallel_size=stages, pipeline_dtype=torch.float32, **options
    )
    with devices_on_cpu():
        spec = get_gpt_layer_local_spec(
            E, qk_layernorm=config.qk_layernorm, normalization="RMSNorm", **{"moe_grouped_gemm": False, **grouped}
        )
        if isinstance(config.moe_layer_freq, list):
            spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
        if kind == "ours":
            spec = wastenot_spec(spec, RectifyConfig())
        ends = {"pre_process": stage == 0, "post_process": stage == stages - 1}
        model = GPTModel(
            config, spec, VOCABULARY, max_sequence_length=12, position_embedding_type="rope", **ends
        ).eval()
    generator = torch.Generator().manual_seed(stage)
    for name, tensor in model.state_dict().items():
        if name.endswith(("norm.weight", "expert_bias")):  # ones and zeros otherwise
            tensor.copy_(1 + torch.randn(tensor.shape, generator=generator) / 4)
    return model


def command_line(config: Any) -> argparse.Namespace:
    """What Megatron-LM would have been called with: among it values of classes that are only Megatron's."""
    from megatron.core.transformer.enums import AttnBackend

    same = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "kv_channels", "num_query_groups")
    same += ("normalization", "add_bias_linear", "qk_layernorm", "params_dtype", "init_method_std")
    same += tuple(name for name in vars(config) if name.startswith("moe_"))
    return argparse.Namespace(
        **{name: getattr(config, name) for name in same},
        group_query_attention=config.num_query_groups != config.num_attention_heads,
        norm_epsilon=config.layernorm_epsilon,
        num_experts=config.num_moe_experts,
        swiglu=True,
        position_embedding_type="rope",
        rotary_base=10000,
        rotary_percent=1.0,
        untie_embeddings_and_output_weights=True,
        seq_length=12,
        attention_backend=AttnBackend.auto,
        save=Path("somewhere"),
    )


def logits_of(model: Any, tokens_BS: Tensor) -> Tensor:
    from megatron_cpu_shim import devices_on_cpu

    length = tokens_BS.size(1)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    with torch.no_grad(), devices_on_cpu():
        return model(tokens_BS, torch.arange(length).expand(len(tokens_BS), -1), mask)


def checkpoints(rank: int, world: int, folder: str, tokens_BS: Tensor) -> dict[str, Tensor]:
    """Saves a model in every way, and says what each makes of the tokens."""
    sys.path.append(str(Path(__file__).parents[1]))  # where the shim lies, beside the folders of tests
    import megatron_cpu_shim

    megatron_cpu_shim.install()
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel

    found = {}
    for expert, pipeline in ((1, 2), (2, 1)):
        parallel_state.initialize_model_parallel(
            expert_model_parallel_size=expert, pipeline_model_parallel_size=pipeline
        )
        with megatron_cpu_shim.devices_on_cpu():
            tensor_parallel.model_parallel_cuda_manual_seed(1)
        for name, (kind, options, metadata, *layout) in SAVED.items():
            if layout != [expert, pipeline]:
                continue
            model = gpt(kind, options, rank if pipeline > 1 else 0, pipeline)
            if kind == "grouped":  # The same model as "layers in one": it computes in bf16 alone.
                as_grouped(model, gpt("sequential", options))
            state = {"model": model.sharded_state_dict(metadata=metadata), "iteration": 7}
            if kind != "ours":
                state["args"] = command_line(model.config)
            (Path(folder) / name / "iter_0000007").mkdir(parents=True, exist_ok=True)
            dist_checkpointing.save(state, f"{folder}/{name}/iter_0000007")
            if pipeline == 1 and kind != "grouped":
                found[name] = logits_of(model, tokens_BS)
        parallel_state.destroy_model_parallel()
        if pipeline > 1:
            parallel_state.initialize_model_parallel()
            whole = gpt("sequential", {})
            state = {"model": whole.sharded_state_dict(metadata={"non_homogeneous_layers": True})}
            state = dist_checkpointing.load(state, f"{folder}/two stages/iter_0000007")
            whole.load_state_dict(state["model"])
            found["two stages"] = logits_of(whole, tokens_BS)
            parallel_state.destroy_model_parallel()
    return found | {"grouped": found["layers in one"]}


@torch.no_grad()
def as_grouped(model: Any, sequential: Any) -> None:
    for name, parameter in sequential.named_parameters():
        if ".local_experts." not in name:
            model.get_parameter(name).copy_(parameter)
    for theirs, own in zip(sequential.decoder.layers, model.decoder.layers, strict=True):
        stacks = own.mlp.experts
        for number, expert in enumerate(theirs.mlp.experts.local_experts):
            stacks.weight1.view(stacks.num_local_experts, 16, -1)[number].copy_(expert.linear_fc1.weight.t())
            stacks.weight2.view(stacks.num_local_experts, -1, 16)[number].copy_(expert.linear_fc2.weight.t())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor, dict[str, Tensor]]:
    """Folders of checkpoints and a tokenizer, tokens, and Megatron's logits of them."""
    folder = tmp_path_factory.mktemp("megatron")
    byte_tokenizer().save(folder)
    tokens_BS = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(0))
    return folder, tokens_BS, run_ranks(2, checkpoints, str(folder), tokens_BS, timeout=150.0)[0]


@pytest.mark.parametrize("name", SAVED)
def test_megatrons_checkpoints_become_runs_with_the_same_logits(saved, tmp_path, name, capsys):
    folder, tokens_BS, logits = saved
    (folder / name / "latest_checkpointed_iteration.txt").write_text("7")
    words = ["convert", "from-megatron", str(folder / name), str(tmp_path / "run"), "--tokenizer", str(folder)]
    if name == "ours":  # saved without options
        config = tmp_path / "model.yaml"
        config.write_text(
            "model: {d_model: 16, layers: 2, heads: 4, kv_heads: 2, d_head: 8, norm_eps: 1e-5, qk_norm: head,\n"
            f"        moe: {{experts: {E}, d_expert: 12, shared_experts: 2}}}}\n"
            "router: {top_k: 2, score: sigmoid, scale: 2.5, bias_update: 1e-3}\n"
            # Of a machine that this is not: with GPUs and the corpus.
            "engine: megatron\nmegatron: {layer: wastenot}\ndata: {corpus: elsewhere/text, tokenizer: elsewhere}\n"
        )
        words += ["--config", str(config)]
    assert main([*words, "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    run = open_run(tmp_path / "run")
    assert done["parameters"] == sum(parameter.numel() for parameter in run.model.parameters())
    with torch.no_grad():
        found = run.model.logits(run.model(tokens_BS).hidden_BSD)
    assert (found - logits[name]).abs().max() <= 1e-6 * logits[name].abs().max()
    assert run.config.engine == "native" and run.config.megatron == MegatronConfig()
    assert run.step == 0 and "iter_0000007" in json.dumps(json.loads((run.checkpoint / "meta.json").read_text()))


class Scripted(torch.nn.Module):
    """Does something while torch.jit.load makes it: it fails, and so would the reading."""

    @torch.jit.export
    def __getstate__(self) -> bool:
        return self.training

    @torch.jit.export
    def __setstate__(self, state: bool) -> None:
        self.training = state
        raise ValueError("a script ran")


class Evil:
    """Does something while it is unpickled."""

    def __reduce__(self):
        return (sys.exit, ("a pickle ran",))


def test_what_is_no_such_checkpoint_is_said_and_nothing_in_it_runs(saved, tmp_path, capsys):
    folder, _, _ = saved
    source, target = tmp_path / "source", tmp_path / "run"
    words = ["convert", "from-megatron", str(source), str(target), "--tokenizer", str(folder)]

    def said(*more: str) -> str:
        assert main([*words, *more]) == 2
        assert not target.exists()
        return capsys.readouterr().err

    assert "metadata.json: cannot be read" in said()
    source.mkdir()
    (source / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    assert "was saved in the format zarr" in said()
    for file in (folder / "layers in one" / "iter_0000007").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    common = torch.load(source / "common.pt", weights_only=False)
    args = common["args"]
    for name, value, expected in (
        ("swiglu", False, "swiglu: False makes another model than ours; only True carries over"),
        ("num_layers", 3, "linear_qkv.layer_norm_weight: holds 2 weights of layers or experts, and the model has 3"),
        ("num_experts", 4, "linear_fc1.weight: holds 2 x 8 weights of layers or experts, and the model has 8"),
        ("qk_layernorm", True, "self_attention.q_layernorm.weight: is not in"),
        (
            "untie_embeddings_and_output_weights",
            False,
            "output_layer.weight: is in the checkpoint and not in the model",
        ),
        ("ffn_hidden_size", None, "ffn_hidden_size: missing"),
        ("kv_channels", 8, "linear_qkv.weight: has shape [48, 16], which does not make"),
    ):
        torch.save({**common, "args": argparse.Namespace(**{**vars(args), name: value})}, source / "common.pt")
        assert expected in said(), name
    torch.save(common, source / "common.pt")
    largest = max(source.glob("*.distcp"), key=lambda path: path.stat().st_size)
    whole = largest.read_bytes()
    largest.write_bytes(whole[: len(whole) // 2])
    assert "cannot be read; a file of it is missing or cut short" in said()
    largest.write_bytes(whole)
    torch.save({**common, "args": Evil()}, source / "common.pt")
    assert "holds no options of Megatron-LM" in said()
    (source / "common.pt").write_bytes(pickle.dumps(["no", "zip"]))
    assert "common.pt: cannot be read" in said()
    torch.jit.save(torch.jit.script(Scripted()), source / "common.pt")
    with pytest.raises(torch.jit.Error, match="a script ran"):
        torch.jit.load(source / "common.pt")
    assert "common.pt: cannot be read (it is a TorchScript archive, not saved values)" in said()
    torch.save({**common, "rng": torch.ones(3)}, source / "common.pt")
    assert MegatronCheckpoint(source).args() == {**vars(args), "attention_backend": ANY, "save": ANY}
    words[-2:] = []
    assert "--tokenizer: Megatron's checkpoints hold none" in said()
    words += ["--tokenizer", str(folder)]
    described = (source / ".metadata").read_bytes()
    (source / ".metadata").write_bytes(pickle.dumps(Evil()))
    assert "its .metadata cannot be read" in said()
    weight = "embedding.word_embeddings.weight"
    for damage, expected in (
        (lambda metadata: delattr(metadata.state_dict_metadata[weight], "size"), "its .metadata cannot be read"),
        (lambda metadata: setattr(metadata.state_dict_metadata[weight], "size", None), "its .metadata cannot be read"),
        (lambda metadata: setattr(metadata.state_dict_metadata[weight], "size", ["a"]), "its .metadata cannot be read"),
        (lambda metadata: setattr(metadata, "state_dict_metadata", 3), "its .metadata cannot be read"),
        (lambda metadata: setattr(metadata.state_dict_metadata[weight], "size", torch.Size([])), "of shape []: holds"),
        (lambda metadata: metadata.storage_data.clear(), f"{weight} cannot be read"),
        (lambda metadata: delattr(metadata, "storage_data"), "cannot be read; a file of it is missing"),
        (lambda metadata: delattr(metadata.state_dict_metadata[weight], "properties"), f"{weight} cannot be read"),
    ):
        metadata = pickle.loads(described)
        damage(metadata)
        (source / ".metadata").write_bytes(pickle.dumps(metadata))
        assert expected in said()
    (source / ".metadata").write_bytes(described)
    for latest in (b"\xff", b"9" * 5000):
        (source / "latest_checkpointed_iteration.txt").write_bytes(latest)
        error = said()
        assert "latest_checkpointed_iteration.txt: cannot be read" in error and error.count("\n") == 1
