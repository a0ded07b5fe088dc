"""Our models against transformers' own with the same weights, and the way between the two over the disk.

Differences are measured against the largest value of the tensor, so that small gradients count as much as large.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
)
from transformers.utils import logging

from wastenot.moe.adapters.huggingface import (
    StoredWeights,
    config_from_huggingface,
    config_to_huggingface,
    disk_shapes,
    load_huggingface,
    save_huggingface,
    to_huggingface,
)
from wastenot.moe.adapters.huggingface_names import FAMILIES, Family, has_experts, pieces
from wastenot.moe.config import ModelConfig, MoEConfig, RouterConfig
from wastenot.moe.decoder import Decoder, build_decoder
from wastenot.parallel.mesh import single

logging.disable_progress_bar()
logging.set_verbosity_error()

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "eos_token_id": None,
}
CASES: dict[str, Any] = {
    "mixtral": MixtralConfig(**SHAPE, intermediate_size=64, num_local_experts=8, num_experts_per_tok=2),
    "mixtral-fine": MixtralConfig(**SHAPE, intermediate_size=16, num_local_experts=64, num_experts_per_tok=8),
    "qwen3_moe": Qwen3MoeConfig(
        **(SHAPE | {"num_hidden_layers": 4}),
        head_dim=16,
        intermediate_size=80,
        moe_intermediate_size=24,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        decoder_sparse_step=2,
    ),
    "qwen3_moe-tied": Qwen3MoeConfig(
        **SHAPE,
        intermediate_size=80,
        moe_intermediate_size=24,
        num_experts=16,
        num_experts_per_tok=4,
        mlp_only_layers=[0],
        tie_word_embeddings=True,
    ),
    "qwen3_moe-mixed": Qwen3MoeConfig(
        **(SHAPE | {"num_hidden_layers": 4}),
        intermediate_size=80,
        moe_intermediate_size=24,
        num_experts=16,
        num_experts_per_tok=4,
        mlp_only_layers=[3, 1],
    ),
    "olmoe": OlmoeConfig(**SHAPE, intermediate_size=24, num_experts=16, num_experts_per_tok=4),
    "llama": LlamaConfig(**SHAPE, intermediate_size=80, head_dim=16, rope_parameters={"rope_theta": 5e5}),
    "llama-tied": LlamaConfig(**SHAPE, intermediate_size=80, tie_word_embeddings=True),
    "mistral": MistralConfig(**SHAPE, intermediate_size=80, sliding_window=None),
}


@dataclass(frozen=True)
class Theirs:
    """A model of transformers with random weights, and what it computes."""

    folder: Path
    tokens_BS: Tensor
    targets_BS: Tensor
    logits: Tensor
    gradients: dict[str, Tensor]
    """Of the mean loss, under the names on disk."""


def randomise(model: torch.nn.Module) -> None:
    """Weights large enough that experts differ and no two of them tie."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            mean, std = (1.0, 0.1) if parameter.dim() == 1 else (0.0, 0.15)
            parameter.normal_(mean, std, generator=generator)


def on_disk(name: str, tensor: Tensor, family: str) -> Iterator[tuple[str, Tensor]]:
    """A parameter of transformers 5 under the names and shapes of checkpoints, written down independently of ours."""
    name = name.replace(".mlp.", ".block_sparse_moe.") if family == "mixtral" else name
    gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for expert in range(tensor.size(0)) if ".experts." in name else ():
        stem = f"{name.rpartition('.')[0]}.{expert}"
        if name.endswith("gate_up_proj"):
            half = tensor.size(1) // 2
            yield f"{stem}.{gate}.weight", tensor[expert, :half]
            yield f"{stem}.{up}.weight", tensor[expert, half:]
        else:
            yield f"{stem}.{down}.weight", tensor[expert]
    if ".experts." not in name:
        yield name, tensor


def compute(model: Any, family: str, folder: Path) -> Theirs:
    generator = torch.Generator().manual_seed(1)
    tokens_BS, targets_BS = torch.randint(0, SHAPE["vocab_size"], (2, 3, 20), generator=generator)
    logits = model(input_ids=tokens_BS).logits
    F.cross_entropy(logits.flatten(0, 1), targets_BS.flatten()).backward()
    gradients = {
        disk_name: gradient
        for name, parameter in model.named_parameters()
        for disk_name, gradient in on_disk(name, parameter.grad, family)
    }
    return Theirs(folder, tokens_BS, targets_BS, logits.detach(), gradients)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def make(case: str) -> Theirs:
        model = AutoModelForCausalLM.from_config(CASES[case], attn_implementation="sdpa")
        randomise(model)
        folder = tmp_path_factory.mktemp(case)
        model.save_pretrained(folder)
        return compute(model, CASES[case].model_type, folder)

    return make


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def load(folder: Path, backend: str = "auto") -> tuple[Decoder, Family]:
    model_config, router, family = config_from_huggingface(read_config(folder))
    model = build_decoder(model_config, router, single(), seed=7, backend=backend)  # type: ignore[arg-type]
    load_huggingface(model, folder, family)
    return model, family


def assert_same(ours: Tensor, theirs: Tensor, what: str) -> None:
    error, largest = (ours - theirs).abs().max(), theirs.abs().max()
    # An expert without tokens has no gradient at all.
    assert error <= 1e-5 * largest, f"{what}: off by {error:.1e}, largest value {largest:.1e}"


def assert_computes_the_same(model: Decoder, family: Family, expected: Theirs) -> None:
    hidden = model(expected.tokens_BS).hidden_BSD
    logits = model.logits(hidden)
    torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert_same(logits, expected.logits, "logits")
    (model.loss_sum(hidden, expected.targets_BS) / expected.targets_BS.numel()).backward()
    left = dict(expected.gradients)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        for disk_name, gradient in to_huggingface(name, parameter.grad, family):
            assert_same(gradient, left.pop(disk_name), disk_name)
    assert not left


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_all_gradients_equal_those_of_transformers(case: str, backend: str, theirs: Any) -> None:
    expected = theirs(case)
    assert_computes_the_same(*load(expected.folder, backend), expected)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_shared_experts_sigmoid_scores_and_groups_equal_those_of_transformers(backend: str, tmp_path: Path) -> None:
    """GLM-4-MoE has DeepSeek's names and layers, and its later router."""
    config = Glm4MoeConfig(
        **SHAPE,
        intermediate_size=80,
        moe_intermediate_size=24,
        n_routed_experts=16,
        n_shared_experts=2,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.5,
        first_k_dense_replace=1,
        partial_rotary_factor=1.0,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    randomise(model)
    model.save_pretrained(tmp_path)
    expected = compute(model, "deepseek", tmp_path)
    moe = MoEConfig(experts=16, d_expert=24, shared_experts=2, first_dense=1)
    ours = build_decoder(
        ModelConfig(
            vocab_size=96, d_model=48, layers=2, heads=4, kv_heads=2, d_ff=80, norm_eps=config.rms_norm_eps, moe=moe
        ),
        RouterConfig(top_k=4, score="sigmoid", normalize="top_k", detach=False, scale=1.5, groups=4, top_groups=2),
        single(),
        backend=backend,  # type: ignore[arg-type]
    )
    stored = {name: tensor for name, tensor in StoredWeights(tmp_path).items() if "correction_bias" not in name}
    load_huggingface(ours, stored, "deepseek")
    assert_computes_the_same(ours, "deepseek", expected)


@pytest.mark.parametrize("case", CASES)
def test_ours_on_disk_is_theirs_and_comes_back_bit_for_bit(case: str, theirs: Any, tmp_path: Path) -> None:
    model_config, router, family = config_from_huggingface(read_config(theirs(case).folder))
    ours = build_decoder(replace(model_config, init_std=0.15), router, single(), seed=3)
    folder = tmp_path / "ours"
    # Small enough for several files.
    save_huggingface(ours, folder, family, max_positions=64, end_token=5, shard_bytes=60_000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert sorted(tmp_path.iterdir()) == [folder], "nothing is left beside it"

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert {kind: names for kind, names in info.items() if names} == {}
    # Mistral's dense models are Llama's under another name.
    kind = "llama" if case == "mistral" else CASES[case].model_type
    assert (model.config.model_type, model.config.eos_token_id) == (kind, 5)
    tokens_BS = theirs(case).tokens_BS
    with torch.no_grad():
        torch.testing.assert_close(
            ours.logits(ours(tokens_BS).hidden_BSD), model(input_ids=tokens_BS).logits, atol=1e-5, rtol=1e-5
        )

    back, _ = load(folder)
    for (name, here), (_, there) in zip(ours.named_parameters(), back.named_parameters(), strict=True):
        assert torch.equal(here, there), name


@pytest.mark.parametrize("case", CASES)
def test_names_and_shapes_on_disk_are_those_that_transformers_writes(case: str, theirs: Any) -> None:
    written = load_file(theirs(case).folder / "model.safetensors")
    model, family = load(theirs(case).folder)
    assert disk_shapes(model, family) == {name: tuple(tensor.shape) for name, tensor in written.items()}


WEIGHTS = {
    "embedding.weight": (96, 8),
    "norm.weight": (8,),
    "head.weight": (96, 8),
    "blocks.3.attention.q.weight": (16, 8),
    "blocks.3.ffn_norm.weight": (8,),
    "blocks.3.ffn.router.weight": (4, 8),
    "blocks.3.ffn.experts.gate_up": (4, 12, 8),
    "blocks.3.ffn.experts.down": (4, 8, 6),
}


@pytest.mark.parametrize("family", [*filter(has_experts, FAMILIES)])
@pytest.mark.parametrize("name", WEIGHTS)
def test_pieces_cover_every_value_once_and_no_name_twice(name: str, family: Family) -> None:
    shape = WEIGHTS[name]
    count = torch.zeros(shape)
    names = []
    for piece in pieces(name, shape, family):
        view = piece.of(count)
        assert tuple(view.shape) == piece.shape
        view += 1
        names.append(piece.name)
    assert (count == 1).all()
    assert len(set(names)) == len(names)


def test_a_share_of_the_experts_has_their_global_numbers() -> None:
    stack = torch.arange(2 * 12 * 8.0).view(2, 12, 8)
    given = dict(to_huggingface("blocks.3.ffn.experts.gate_up", stack, "mixtral", first_expert=6))
    assert list(given) == [
        f"model.layers.3.block_sparse_moe.experts.{e}.{w}.weight" for e in (6, 7) for w in ("w1", "w3")
    ]
    assert torch.equal(given["model.layers.3.block_sparse_moe.experts.7.w3.weight"], stack[1, 6:])


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("blocks.0.ffn.gate.weight", "mixtral"),
        ("blocks.0.ffn.shared.up.weight", "qwen3_moe"),
        ("blocks.0.attention.q_norm.weight", "mixtral"),
        ("blocks.0.ffn.router.bias_E", "deepseek"),
        ("blocks.0.attention.q.bias", "olmoe"),
        ("blocks.0.ffn.router.weight", "llama"),
        ("blocks.0.ffn.experts.down", "llama"),
        ("nothing", "olmoe"),
    ],
)
def test_weights_that_a_family_lacks_are_refused(name: str, family: Family) -> None:
    with pytest.raises(ValueError, match=f"{re.escape(name)}: models of the {family} family have no such weight"):
        list(pieces(name, (4, 4), family))


def test_values_are_cast_to_the_models_dtype(theirs: Any) -> None:
    folder = theirs("mixtral").folder
    halves = {name: tensor.bfloat16() for name, tensor in StoredWeights(folder).items()}
    model_config, router, family = config_from_huggingface(read_config(folder))
    model = build_decoder(model_config, router, single(), dtype=torch.float64)
    load_huggingface(model, halves, family)
    assert torch.equal(model.embedding.weight, halves["model.embed_tokens.weight"].double())


def a_model(**router: Any) -> Decoder:
    config = ModelConfig(
        vocab_size=12, d_model=8, layers=1, heads=2, init_std=0.1, moe=MoEConfig(experts=4, d_expert=8)
    )
    return build_decoder(config, RouterConfig(**router), single())


def its_weights(model: Decoder) -> dict[str, Tensor]:
    return {
        disk_name: tensor.detach().clone()
        for name, parameter in model.named_parameters()
        for disk_name, tensor in to_huggingface(name, parameter, "mixtral")
    }


def test_wrong_weights_are_all_listed_and_change_nothing() -> None:
    model = a_model()
    before = its_weights(model)
    wrong = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    del wrong["model.norm.weight"], wrong["model.layers.0.block_sparse_moe.experts.3.w2.weight"]
    wrong["model.layers.0.mlp.extra"] = torch.zeros(1)
    wrong["lm_head.weight"] = torch.zeros(13, 8)
    with pytest.raises(ValueError) as error:
        load_huggingface(model, wrong, "mixtral")
    assert str(error.value).splitlines() == [
        "these are not the weights of this model;",
        "missing (2): model.layers.0.block_sparse_moe.experts.3.w2.weight, model.norm.weight",
        "unexpected (1): model.layers.0.mlp.extra",
        "of another shape (1): lm_head.weight [13, 8] instead of [12, 8]",
    ]
    assert all(torch.equal(tensor, before[name]) for name, tensor in its_weights(model).items())


def test_a_long_list_of_names_is_cut() -> None:
    with pytest.raises(ValueError, match=r"missing \(22\): .*, \S+ and 10 more$"):
        load_huggingface(a_model(), {}, "mixtral")


def test_what_old_checkpoints_store_beside_weights_is_left_out() -> None:
    model = a_model()
    stored = its_weights(model) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    load_huggingface(model, stored, "mixtral")


def test_a_stored_head_of_a_tied_model_must_be_its_embedding() -> None:
    config = ModelConfig(
        vocab_size=12, d_model=8, layers=1, heads=2, tie_embeddings=True, moe=MoEConfig(experts=4, d_expert=8)
    )
    model = build_decoder(config, RouterConfig(), single())
    stored = its_weights(model)
    load_huggingface(model, stored | {"lm_head.weight": stored["model.embed_tokens.weight"]}, "mixtral")
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_huggingface(model, stored | {"lm_head.weight": torch.zeros(12, 8)}, "mixtral")


def test_loading_ends_a_selection_bias() -> None:
    model = a_model(bias_update=0.1)
    router = model.blocks[0].ffn.router  # type: ignore[union-attr]
    router.bias_E.fill_(1.0)  # type: ignore[union-attr,operator]
    load_huggingface(model, its_weights(model), "mixtral")
    assert not router.bias_E.any()  # type: ignore[union-attr,operator]


def test_folders_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor"):
        StoredWeights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"model\.safetensors: cannot be read as safetensors"):
        StoredWeights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="is no index of safetensors"):
        StoredWeights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(ValueError, match=r"gone\.safetensors: cannot be read"):
        StoredWeights(tmp_path)


def test_a_file_that_the_index_does_not_name_is_not_read(tmp_path: Path) -> None:
    """As beside Mixtral's own files, which hold the same weights under other names."""
    save_file({"a": torch.ones(1)}, tmp_path / "model-00001-of-00001.safetensors")
    save_file({"b": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert list(StoredWeights(tmp_path)) == ["a"]


def test_a_folder_that_holds_something_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("")
    with pytest.raises(ValueError, match="exists; name a new folder"):
        save_huggingface(a_model(), tmp_path, "mixtral")
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_what_a_killed_save_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "old").write_text("")
    (tmp_path / "out").mkdir()
    save_huggingface(a_model(), tmp_path / "out", "mixtral")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.json", "model.safetensors", "out"]


def test_a_selection_bias_is_not_silently_lost(tmp_path: Path) -> None:
    model = a_model()
    model.blocks[0].ffn.router.bias_E[2] = 1.0  # type: ignore[union-attr,index,operator]
    with pytest.raises(ValueError, match=r"blocks\.0\.ffn: its selection bias is not zero"):
        save_huggingface(model, tmp_path / "out", "mixtral")
    assert not list(tmp_path.iterdir())


def test_a_dense_model_is_of_no_family_with_experts(tmp_path: Path) -> None:
    config = ModelConfig(vocab_size=12, d_model=8, layers=1, heads=2, moe=None)
    with pytest.raises(ValueError, match="null has no experts; use the llama family"):
        save_huggingface(build_decoder(config, RouterConfig(), single()), tmp_path / "out", "qwen3_moe")
    with pytest.raises(ValueError, match="4 experts are more than this family's null"):
        save_huggingface(a_model(), tmp_path / "out", "llama")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", FAMILIES)
def test_configurations_come_back_as_they_went(family: Family) -> None:
    qk_norm = {"qwen3_moe": "head", "olmoe": "full"}.get(family, "none")
    some = MoEConfig(
        experts=6,
        d_expert=24,
        shared_experts=2 if family == "deepseek" else 0,
        first_dense={"deepseek": 2, "qwen3_moe": 3}.get(family, 0),
        every=2 if family == "qwen3_moe" else 1,
    )
    moe = some if has_experts(family) else None
    model = ModelConfig(
        vocab_size=99,
        d_model=48,
        layers=6,
        heads=4,
        kv_heads=2,
        d_head=10 if family in ("mixtral", "qwen3_moe", "llama") else 12,
        d_ff=64 if family in ("qwen3_moe", "deepseek", "llama") else 0,
        rope_theta=5e5,
        norm_eps=1e-4,
        qk_norm=qk_norm,  # type: ignore[arg-type]
        tie_embeddings=True,
        init_std=0.03,
        init_residual="plain",
        moe=moe,
    )
    normalize = "top_k" if family != "olmoe" else "none"
    router = RouterConfig(top_k=3, normalize=normalize, detach=False, balance_loss=0.125) if moe else RouterConfig()
    config = json.loads(json.dumps(config_to_huggingface(model, router, family)))
    assert config_from_huggingface(config) == (model, router, family)
    # transformers 5 keeps theta inside, 4 outside; either alone will do.
    for outside in (True, False):
        half = {key: value for key, value in config.items() if key != ("rope_parameters" if outside else "rope_theta")}
        assert config_from_huggingface(half)[0].rope_theta == 5e5


@pytest.mark.parametrize("step", [1, 2])
def test_dense_layers_anywhere_come_back_as_they_went(step: int) -> None:
    changes = {"num_hidden_layers": 6, "decoder_sparse_step": step, "mlp_only_layers": [3, 2]}
    model, router, family = config_from_huggingface(CASES["qwen3_moe-mixed"].to_dict() | changes)
    assert model.moe is not None
    dense = (2, 3) if step == 1 else (0, 2, 3, 4)
    assert model.moe.dense == dense
    assert model.moe.per_layer == tuple(0 if layer in dense else 16 for layer in range(6))
    back = config_to_huggingface(model, router, family)
    assert (back["decoder_sparse_step"], back["mlp_only_layers"], back["num_experts"]) == (1, list(dense), 16)
    assert config_from_huggingface(back) == (model, router, family)


def test_what_is_dense_in_every_layer_is_of_the_llama_family() -> None:
    shape = {"vocab_size": 10, "layers": 2}
    dense = ModelConfig(**shape, moe=MoEConfig(per_layer=(0, 0), dense=(0, 1)))
    expected = config_to_huggingface(ModelConfig(**shape, moe=None), RouterConfig(), "llama")
    assert config_to_huggingface(dense, RouterConfig(), "llama") == expected


def test_a_single_normalised_choice_keeps_its_gradient() -> None:
    config = CASES["mixtral"].to_dict() | {"num_experts_per_tok": 1}
    _, router, _ = config_from_huggingface(config)
    assert (router.normalize, router.detach) == ("top_k", True)


@pytest.mark.parametrize(
    ("case", "changes", "messages"),
    [
        ("mixtral", {"model_type": "gpt2"}, ["model_type: 'gpt2' is no family known here; use one of mixtral"]),
        ("mixtral", {"model_type": None}, ["model_type: None is no family known here", "llama, mistral"]),
        ("mixtral", {"hidden_act": "gelu"}, ["hidden_act: 'gelu' is another activation"]),
        ("mixtral", {"sliding_window": 4096}, ["sliding_window: 4096 hides older tokens", "only null"]),
        ("mixtral", {"router_jitter_noise": 0.1}, ["router_jitter_noise: 0.1 disturbs"]),
        (
            "mixtral",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
            ["rope_parameters.rope_type: 'yarn'"],
        ),
        ("mixtral", {"rope_parameters": None, "rope_scaling": {"type": "linear"}}, ["type: 'linear' stretches"]),
        ("mixtral", {"quantization_config": {"bits": 4}}, ["quantization_config: {'bits': 4} stores quantized"]),
        ("mixtral", {"hidden_size": None, "vocab_size": "many"}, ["hidden_size: missing", "vocab_size: 'many' is not"]),
        ("mixtral", {"num_local_experts": 8.5}, ["num_local_experts: 8.5 is not a whole number"]),
        ("qwen3_moe", {"attention_bias": True}, ["attention_bias: True adds biases"]),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 64}, ["sliding_window: 64 hides"]),
        ("qwen3_moe", {"decoder_sparse_step": 9}, ["decoder_sparse_step: 9 no layer has experts"]),
        ("qwen3_moe", {"mlp_only_layers": 3}, ["mlp_only_layers: 3 is no list"]),
        ("llama", {"mlp_bias": True, "attention_bias": True}, ["mlp_bias: True adds", "attention_bias: True adds"]),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, ["rope_type: 'llama3' stretches"]),
        ("llama", {"intermediate_size": None}, ["intermediate_size: missing"]),
        ("mistral", {"sliding_window": 4096}, ["sliding_window: 4096 hides older tokens", "only null"]),
        ("olmoe", {"rope_parameters": [1]}, ["rope_parameters: [1] is no mapping"]),
        ("olmoe", {"clip_qkv": 8.0, "attention_dropout": 0.1}, ["clip_qkv: 8.0 clips", "attention_dropout: 0.1 drops"]),
    ],
)
def test_what_our_models_cannot_compute_is_refused(case: str, changes: dict, messages: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        config_from_huggingface(CASES[case].to_dict() | changes)
    assert all(message in str(error.value) for message in messages), error.value


@pytest.mark.parametrize(
    ("family", "model", "router", "messages"),
    [
        ("mixtral", {"qk_norm": "head"}, {}, ["model.qk_norm: head is not this family's none"]),
        ("mixtral", {"moe": None}, {}, ["model.moe: null has no experts; use the llama family"]),
        ("llama", {}, {}, ["model.moe: 8 experts are more than this family's null"]),
        ("llama", {"moe": None, "qk_norm": "head"}, {}, ["model.qk_norm: head is not this family's none"]),
        ("llama", {"moe": None, "heads": 3, "d_head": 64}, {}, ["model.heads: 3 does not divide d_model: 256"]),
        ("mixtral", {}, {"normalize": "none"}, ["router.normalize: none is not"]),
        ("mixtral", {"moe": MoEConfig(every=2)}, {}, ["layers [0, 2] are dense"]),
        ("mixtral", {"moe": MoEConfig(shared_experts=1)}, {}, ["shared_experts: 1 is more"]),
        ("deepseek", {"moe": MoEConfig(every=2)}, {}, ["model.moe.every: 2 has no key"]),
        (
            "deepseek",
            {"moe": MoEConfig(per_layer=(8, 0, 8, 8), dense=(1,))},
            {},
            ["dense: [1] are not the first layers"],
        ),
        ("mixtral", {"moe": MoEConfig(per_layer=(8, 0, 8, 8), dense=(1,))}, {}, ["layers [1] are dense"]),
        (
            "mixtral",
            {"moe": MoEConfig(per_layer=(8, 0, 8, 0))},
            {},
            ["layers [1, 3] have no feed-forward network", "`wastenot compress export` writes such models"],
        ),
        (
            "qwen3_moe",
            {"qk_norm": "head", "moe": MoEConfig(per_layer=(8, 6, 8, 4))},
            {},
            ["layers have 4 to 8 experts, stock layers equally many; `wastenot compress export` writes such models"],
        ),
        (
            "mixtral",
            {"moe": MoEConfig(per_layer=(0, 0, 0, 0), dense=(0, 1, 2, 3))},
            {},
            ["no layer has experts; use the llama family"],
        ),
        ("deepseek", {"d_head": 32}, {}, ["model.d_head: 32 is not this family's d_model / heads"]),
        ("olmoe", {"qk_norm": "full"}, {"score": "sigmoid", "scale": 2.0}, ["score: sigmoid", "router.scale: 2.0"]),
        ("olmoe", {"qk_norm": "full"}, {"groups": 2, "bias_update": 0.1}, ["router.groups: 2", "bias_update: 0.1"]),
        ("olmoe", {"qk_norm": "full"}, {"kind": "uniform"}, ["router.kind: uniform is for benchmarks"]),
    ],
)
def test_what_a_family_cannot_say_is_refused(family: Family, model: dict, router: dict, messages: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        config_to_huggingface(ModelConfig(**{"vocab_size": 10, **model}), RouterConfig(**router), family)
    assert all(message in str(error.value) for message in messages), error.value


def test_a_mistral_that_does_not_name_its_window_has_one() -> None:
    """transformers takes 4096 for it."""
    config = {key: value for key, value in CASES["mistral"].to_dict().items() if key != "sliding_window"}
    with pytest.raises(ValueError, match="sliding_window: missing, which is 4096 in this family"):
        config_from_huggingface(config)


def test_of_a_dense_model_nothing_is_said_about_a_router() -> None:
    odd = RouterConfig(kind="uniform", score="sigmoid", scale=2.0)
    dense = ModelConfig(vocab_size=10, moe=None)
    config = config_to_huggingface(dense, odd, "llama")
    assert config == config_to_huggingface(dense, RouterConfig(), "llama")
    assert not [key for key in config if "expert" in key or "router" in key]


def test_the_adapter_does_without_transformers() -> None:
    code = "import sys, wastenot.moe.adapters.huggingface; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
