"""Layouts and models: every combination that cannot be is one line with the nearest that can."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from wastenot.kernels.cross_entropy import vectorised
from wastenot.launch.planner_input import from_config
from wastenot.launch.settings import load_config
from wastenot.launch.stage_sizes import layer_sizes
from wastenot.parallel import vocabulary
from wastenot.parallel.config import ParallelConfig
from wastenot.parallel.lynx.cluster import read_cluster
from wastenot.parallel.lynx.huggingface import from_huggingface
from wastenot.parallel.lynx.layout import Group, Layout, check, data_over, with_global_batch
from wastenot.parallel.lynx.memory import Share, static_bytes
from wastenot.parallel.lynx.optimizer_state import Optimizer
from wastenot.parallel.lynx.shape import Experts, ModelShape
from wastenot.parallel.lynx.weights import total
from wastenot.parallel.lynx.work import work_of
from wastenot.tools.lynx_input import read_model, shipped_models

H100 = read_cluster("h100-nvlink8-ib")
MIXTRAL = read_model("mixtral-8x7b").shape
GPT = read_model("gpt-22b").shape


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tensor": 0}, "layout.tensor: 0 is too small; use 1 or more"),
        (
            {"data": 12, "expert": 8},
            "layout.expert: 8 does not divide the 12 ranks of a stage (tensor 1 x data 12); use 6",
        ),
        ({"sequence_parallel": True}, "layout.sequence_parallel: true has no effect with tensor: 1"),
        (
            {"tensor": 8, "sequence_parallel": True, "seq_len": 100},
            "layout.tensor: 8 does not divide seq_len: 100, which sequence_parallel cuts; use 10",
        ),
        ({"chunks": 2}, "layout.chunks: 2 has no effect with pipeline: 1; use 1"),
        (
            {"chunks": 2, "pipeline": 4, "micro_batches": 6},
            "layout.micro_batches: 6 is no multiple of pipeline: 4, as chunks need it; use 8",
        ),
        ({"shard": 2, "data": 4}, "layout.shard: 2 does not divide data: 4 with zero: 0; use 0"),
        ({"shard": 3, "data": 4, "zero": 3}, "layout.shard: 3 does not divide data: 4 with zero: 3; use 2"),
        ({"zero": 2}, "layout.zero: 2 is not one of 0, 1, 3; use 1"),
        ({"compute": "bf-16"}, "layout.compute: 'bf-16' is not known; did you mean bf16?"),
        ({"padded": True}, "layout.padded: true needs a capacity_factor"),
        ({"capacity_factor": 0.0}, "layout.capacity_factor: 0.0 leaves no slot"),
        ({"loss_chunk": -1}, "layout.loss_chunk: -1 is negative"),
    ],
)
def test_wrong_layouts_are_one_line(given, message) -> None:
    with pytest.raises(ValueError) as caught:
        Layout(**given)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "layout", "message"),
    [
        (MIXTRAL, {"data": 16, "expert": 16}, "mixtral-8x7b: layout.expert: 16 does not divide 8 experts; use 8"),
        (MIXTRAL, {"data": 24, "expert": 3}, "mixtral-8x7b: layout.expert: 3 does not divide 8 experts; use 2"),
        (MIXTRAL, {"tensor": 3, "data": 1}, "mixtral-8x7b: layout.tensor: 3 does not divide 32 heads; use 2"),
        (MIXTRAL, {"tensor": 2}, "mixtral-8x7b: layout.sequence_parallel: false with tensor: 2 would send every token"),
        (
            MIXTRAL,
            {"pipeline": 33},
            "mixtral-8x7b: layout.pipeline: pipeline 33 x chunks 1 makes 33 stages of 32 layers",
        ),
        (
            MIXTRAL,
            {"pipeline": 16, "chunks": 3, "micro_batches": 16},
            "mixtral-8x7b: layout.chunks: pipeline 16 x chunks 3 makes 48 stages of 32 layers; use at most 2",
        ),
        (GPT, {"data": 2, "expert": 2}, "gpt-22b: layout.expert: 2, but the model has no experts; use 1"),
    ],
)
def test_layouts_that_do_not_fit_the_model_are_one_line(shape, layout, message) -> None:
    with pytest.raises(ValueError) as caught:
        check(shape, Layout(**layout))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_layouts_over_devices_and_batches() -> None:
    layout = Layout(tensor=2, pipeline=4, micro_batch=2, data=data_over(64, 2, 4))
    assert (layout.data, layout.devices) == (8, 64)
    assert with_global_batch(layout, 256).micro_batches == 16
    assert with_global_batch(layout, 256).global_batch == 256
    with pytest.raises(ValueError, match="devices: 60 is no multiple of tensor 2 x pipeline 4 = 8; use 64"):
        data_over(60, 2, 4)
    with pytest.raises(ValueError, match="global_batch: 250 is no multiple of data 8 x micro_batch 2 = 16; use 256"):
        with_global_batch(layout, 250)


def test_groups_of_ranks_lie_as_megatrons() -> None:
    layout = Layout(tensor=2, sequence_parallel=True, data=16, expert=8, pipeline=4)
    assert layout.devices == 128
    assert layout.tensor_group == Group(2, 1)
    assert layout.expert_group == Group(8, 1)
    assert layout.data_group == Group(16, 2)
    assert layout.expert_data_group == Group(4, 8)
    assert layout.pipeline_group == Group(4, 32)


def test_unknown_architectures_name_the_known() -> None:
    with pytest.raises(
        ValueError, match="model_type: 'qwen3moe' is no architecture known here; did you mean qwen3_moe"
    ):
        from_huggingface({"model_type": "qwen3moe"})
    with pytest.raises(
        ValueError, match="model_type: None is no architecture known here; known: deepseek, deepseek_v2"
    ):
        from_huggingface({})
    with pytest.raises(ValueError, match="hidden_size: missing, and llama needs it"):
        from_huggingface({"model_type": "llama"})
    with pytest.raises(ValueError, match="sliding_window: 4096 is not modelled; use null"):
        from_huggingface({"model_type": "mistral", "sliding_window": 4096})


def test_a_config_json_gives_the_shape_that_ships(tmp_path: Path) -> None:
    mixtral = {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
        "tie_word_embeddings": False,
    }
    shape = from_huggingface(mixtral, "mixtral-8x7b")
    assert total(shape) == total(MIXTRAL)
    assert work_of(shape, Layout(), H100, kind="moe") == work_of(MIXTRAL, Layout(), H100, kind="moe")
    folder = tmp_path / "a-model"
    folder.mkdir()
    (folder / "config.json").write_text(
        str(mixtral).replace("'", '"').replace("None", "null").replace("False", "false")
    )
    assert read_model(str(folder)).shape == replace(shape, name="a-model")


def test_every_shipped_model_is_read() -> None:
    for name in shipped_models():
        found = read_model(f"configs/models/{name}.yaml")
        assert found.shape.name == name
        assert {work_of(found.shape, replace(found.layout), H100, kind=kind).saved for kind in found.shape.kinds}
    with pytest.raises(ValueError, match="model: no file and no model is called 'mixtral'; did you mean mixtral-8x7b"):
        read_model("mixtral")


def test_shapes_are_no_configurations_of_runs() -> None:
    with pytest.raises(ValueError, match="no such file, and no configuration of that name"):
        load_config("models/deepseek-v3x")


def test_a_run_as_the_planner_sees_it() -> None:
    found = from_config(load_config("quickstart"), "quickstart")
    assert (found.shape.vocab, found.shape.layers, found.shape.qk_norm) == (2048, 3, "head")
    layout = found.layout
    assert (layout.expert, layout.data, layout.global_batch) == (2, 2, 8)
    assert (layout.compute, layout.weight_bytes, layout.residual_bytes) == ("fp32", 4, 4)
    found_bytes = static_bytes(
        found.shape, layout, read_cluster("cpu-gloo"), found.optimizer, Share(kinds=("moe",) * 3)
    )
    # Muon or Adapprox aside, AdamW in fp32: no copy, two moments.
    assert found_bytes["expert optimizer"] == 2 * found_bytes["expert weights"]
    with pytest.raises(ValueError, match=r"train\.batch: 8 in 1 micro-batches does not fit 6 ranks; use 4 ranks"):
        from_config(load_config("quickstart"), "quickstart", ranks=6)


def test_a_runs_layout_is_the_planners() -> None:
    run = load_config("quickstart", ["train.batch=16", "train.accumulate=4"])
    hybrid = ParallelConfig(data=2, shard=2, tensor=2, expert=4)
    found = from_config(replace(run, parallel=hybrid)).layout
    assert (found.data, found.zero, found.shard, found.expert_cut, found.devices) == (4, 3, 2, 1, 8)
    assert found.eager and found.loss_chunk == vocabulary.CHUNK_BYTES // (4 * 1024)
    one = from_config(replace(run, parallel=ParallelConfig(data=1)))
    assert one.layout.loss_chunk == vectorised.CHUNK_BYTES // (4 * 2048)
    assert (one.layout.zero, one.layout.shard, one.cut) == (0, 0, None)


def test_a_runs_pipeline_is_the_planners() -> None:
    run = load_config("quickstart", ["train.batch=16", "train.accumulate=4"])
    found = from_config(replace(run, parallel=ParallelConfig(pipeline=2, schedule="gpipe", cut=(1, 2))))
    assert (found.schedule, found.cut, found.layout.chunks) == ("gpipe", (1, 2), 1)
    # The embedding outweighs a layer: by layers alone the first stage would have two.
    sizes = layer_sizes(run.model, run.router, 2048)
    assert sizes[0] - sizes[1] == sizes[2] - sizes[1] == 2048 * run.model.d_model
    model = replace(run.model, vocab_size=50000, tie_embeddings=True)
    found = from_config(replace(run, model=model, parallel=ParallelConfig(pipeline=2)))
    assert found.cut == (1, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 0}, "m: heads: 0 is too small; use 1 or more"),
        ({"kv_heads": 3}, "m: kv_heads: 3 does not divide heads: 4; use 2"),
        ({"d_ff": 0}, "m: d_ff: 0, but there are dense layers"),
        ({"dense_layers": (7,)}, "m: dense_layers: 7 is no layer; they are numbered 0 to 1"),
        ({"experts": Experts(experts=2, top_k=3, d_expert=4)}, "m: top_k: 3 of 2 experts; use at least 1"),
    ],
)
def test_wrong_shapes_are_one_line(change, message) -> None:
    sizes = {"vocab": 8, "d_model": 8, "layers": 2, "heads": 4, "kv_heads": 4, "head_dim": 2, "d_ff": 8}
    with pytest.raises(ValueError) as caught:
        ModelShape(**{"name": "m", **sizes, **change})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "adamv"}, "optimizer.name: 'adamv' is not known; did you mean adamw?"),
        ({"rank": 2.0}, "optimizer.rank: 2.0 is outside (0, 1]; use 1.0"),
        ({"momentum": "int8"}, "optimizer.momentum: int8 has no effect with name: adamw; use fp32"),
    ],
)
def test_wrong_optimizers_are_one_line(given, message) -> None:
    with pytest.raises(ValueError) as caught:
        Optimizer(**given)
    assert str(caught.value) == message


def test_the_description_of_work_needs_neither_torch_nor_numpy() -> None:
    code = (
        "import sys\n"
        "from wastenot.parallel.lynx import calibration, gradient_traffic, memory, work\n"
        "from wastenot.tools.lynx_input import read_model\n"
        "read_model('mixtral-8x7b')\n"
        "assert not {'torch', 'numpy', 'scipy'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
