"""Work of layers: Megatron's formula of kept bytes, shape of the planner's layers, FLOPs, static memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from wastenot.parallel.lynx.cluster import read_cluster
from wastenot.parallel.lynx.gradient_traffic import reduction_seconds
from wastenot.parallel.lynx.layout import Layout
from wastenot.parallel.lynx.memory import COMPONENTS, Share, optimizer_seconds, static_bytes, total
from wastenot.parallel.lynx.optimizer_state import Optimizer, state_bytes
from wastenot.parallel.lynx.problem import Backward, Layer, Window
from wastenot.parallel.lynx.routing_skew import UNIFORM, parse_skew
from wastenot.parallel.lynx.shape import Experts, ModelShape
from wastenot.parallel.lynx.weights import Weight, active
from wastenot.parallel.lynx.weights import total as parameters
from wastenot.parallel.lynx.work import embedding_of, head_of, hop_seconds, layer_of, model_flops, work_of
from wastenot.tools.lynx_input import read_model

H100 = read_cluster("h100-nvlink8-ib")
GPT = read_model("gpt-22b").shape
MIXTRAL = read_model("mixtral-8x7b").shape
DEEPSEEK = read_model("deepseek-v3").shape


@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize(
    ("tensor", "sequence_parallel", "formula"),
    [
        (1, False, lambda a, s, h, t: 34 + 5 * a * s / h),
        (8, False, lambda a, s, h, t: 10 + 24 / t + 5 * a * s / (h * t)),
        (8, True, lambda a, s, h, t: 34 / t + 5 * a * s / (h * t)),
    ],
)
def test_kept_bytes_are_megatrons(micro_batch, tensor, sequence_parallel, formula) -> None:
    """Korthikanti et al., arXiv 2205.05198, equations 1, 2 and 4: s b h (...) per layer."""
    layout = Layout(
        tensor=tensor,
        sequence_parallel=sequence_parallel,
        seq_len=2048,
        micro_batch=micro_batch,
        compute="fp16",
        flash=False,
    )
    s, b, h, a = 2048, micro_batch, GPT.d_model, GPT.heads
    saved = work_of(GPT, layout, H100, kind="dense").saved
    assert saved == pytest.approx(s * b * h * formula(a, s, h, tensor), rel=1e-9)


def test_flash_attention_keeps_no_square() -> None:
    """34 s b h, without the softmax and its dropout, and four bytes a row and head more."""
    layout = Layout(seq_len=2048, compute="fp16")
    saved = work_of(GPT, layout, H100, kind="dense").saved
    assert saved == 34 * 2048 * GPT.d_model + 4 * 2048 * GPT.heads


def test_kept_bytes_of_a_mixture_counted_by_hand() -> None:
    """Mixtral, one rank, 1024 tokens, 16 bits."""
    T, D, k = 1024, 4096, 2
    attention = 2 * T * D * 2 + T * (32 + 8) * 128 * 2 + T * 8 * 128 * 2 + T * D * 2 + T * 32 * 4
    norms = 2 * T * D * 2
    routing = T * 8 * 4 + T * k * 28 + 8 * 8
    experts = T * k * (D + 2 * 14336 + 14336) * 2
    layout = Layout(seq_len=T)
    assert work_of(MIXTRAL, layout, H100, kind="moe").saved == attention + norms + routing + experts


@pytest.mark.parametrize(
    ("name", "billions", "used"),
    [("mixtral-8x7b", 46.7, 12.9), ("qwen3-30b-a3b", 30.5, 3.3), ("deepseek-v3", 671, 37), ("gpt-22b", 22, 22)],
)
def test_parameters_are_those_published(name: str, billions: float, used: float) -> None:
    shape = read_model(name).shape
    assert parameters(shape) / 1e9 == pytest.approx(billions, abs=0.1 if billions < 100 else 0.5)
    # Authors round, and DeepSeek's leaves the embedding out.
    assert active(shape) / 1e9 == pytest.approx(used, abs=0.1 if used < 20 else 1)


def test_parameters_are_those_of_published_checkpoints() -> None:
    """To the last one; DeepSeek's selection biases, 256 in each of 58 layers, are no parameters here."""
    exact = {name: parameters(read_model(name).shape) for name in ("mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3")}
    assert exact == {
        "mixtral-8x7b": 46_702_792_704,
        "qwen3-30b-a3b": 30_532_122_624,
        "deepseek-v3": 671_026_419_200 - 58 * 256,
    }


LAYOUTS = {
    "one": Layout(seq_len=1024),
    "experts": Layout(seq_len=1024, expert=8, data=8),
    "both": Layout(seq_len=1024, tensor=4, sequence_parallel=True, data=4, expert=8),
}


@pytest.mark.parametrize("shape", [MIXTRAL, DEEPSEEK], ids=lambda shape: shape.name)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layers_hold_together(shape: ModelShape, layout: Layout) -> None:
    for kind in set(shape.kinds):
        work = work_of(shape, layout, H100, kind=kind)
        layer = work.layer
        assert isinstance(layer, Layer)
        assert layer == layer_of(shape, layout, H100, UNIFORM, kind)
        needed = {op.name for op, is_needed in zip(layer.operators, layer.is_needed, strict=True) if is_needed}
        # Nothing that communication gave is kept beside what it was sorted into.
        assert "combine" not in needed
        assert {"input", "norm 1", "residual 1", "norm 2"} <= needed
        names = {each.name for each in layer.backward if isinstance(each, Backward)}
        assert set(work.weight_gradients) <= names
        windows = (*layer.forward, *layer.backward_windows)
        assert {window.name for window in windows} == set(work.axes)
        assert {op.name for op in layer.operators if op.kind == "collective"} == {each.name for each in layer.forward}
        assert all(window.seconds > 0 and 0 < window.speed <= 1 for window in windows)
        assert work.backward > work.forward > 0


def test_windows_of_a_mixture_in_their_order() -> None:
    layer = work_of(MIXTRAL, LAYOUTS["both"], H100, kind="moe").layer
    assert [window.name for window in layer.forward] == [
        "attention gather",
        "attention reduce-scatter",
        "dispatch",
        "combine",
    ]
    assert [window.name for window in layer.backward_windows] == [
        "combine gradient",
        "dispatch gradient",
        "attention reduce-scatter gradient",
        "attention gather again",
        "attention gather gradient",
    ]


def test_windows_of_tensor_parallelism_without_sequence_parallelism() -> None:
    layer = work_of(GPT, Layout(seq_len=2048, tensor=8), H100, kind="dense").layer
    assert [window.name for window in layer.forward] == ["attention all-reduce", "feed-forward all-reduce"]
    assert [window.name for window in layer.backward_windows] == [
        "feed-forward copy gradient",
        "attention copy gradient",
    ]
    lengths = {window.seconds for window in (*layer.forward, *layer.backward_windows)}
    assert len(lengths) == 1


def test_backward_reads_what_it_meets_in_order() -> None:
    """The combine gradient arrives before the experts' backward, the dispatch gradient leaves after it."""
    layer = work_of(MIXTRAL, LAYOUTS["experts"], H100, kind="moe").layer
    names = [each.name for each in layer.backward]
    order = ["combine gradient", "expert down backward", "expert up backward", "dispatch gradient", "router backward"]
    assert [name for name in names if name in order] == order
    assert not [each for each in layer.backward if isinstance(each, Window) and not each.seconds]


@pytest.mark.parametrize("shape", [MIXTRAL, GPT, DEEPSEEK], ids=lambda shape: shape.name)
def test_the_backward_of_a_product_is_two_products(shape: ModelShape) -> None:
    """Of its input and of its weight, as long as the forward where compute is the bound; half may be put off."""
    work = work_of(shape, Layout(seq_len=4096), H100, kind=shape.kinds[-1])
    seconds = {each.name: each.seconds for each in work.layer.backward}
    products = [op for op in work.layer.operators if f"{op.name} backward" in work.weight_gradients]
    assert {"query and key", "value", "projection"} - {op.name for op in products} <= {"query and key"}
    for op in products:
        name = f"{op.name} backward"
        # Scores of a router are also softmaxed, which has no weights.
        assert seconds[name] == pytest.approx(2 * op.seconds, rel=0.15 if op.name == "router" else 0.02)
        assert work.weight_gradients[name] == pytest.approx(seconds[name] / 2, rel=0.15)


def test_fewer_bytes_and_seconds_on_more_tensor_parallel_ranks() -> None:
    works = [
        work_of(GPT, Layout(seq_len=2048, tensor=t, sequence_parallel=t > 1), H100, kind="dense") for t in (1, 2, 4, 8)
    ]
    saved = [work.saved for work in works]
    assert saved == sorted(saved, reverse=True)
    assert [work.forward for work in works] == sorted((work.forward for work in works), reverse=True)


def test_time_and_memory_follow_the_fullest_rank() -> None:
    layout = replace(LAYOUTS["experts"], data=16, expert=8)
    even = work_of(MIXTRAL, layout, H100, UNIFORM, "moe")
    skewed = work_of(MIXTRAL, layout, H100, parse_skew("zipf:0.8"), "moe")
    assert skewed.saved > 1.5 * even.saved
    assert skewed.forward > 1.5 * even.forward
    assert skewed.forward_exchange > 1.5 * even.forward_exchange
    assert skewed.layer.operators[0] == even.layer.operators[0]


def test_flops_are_those_of_the_formula() -> None:
    """Megatron's count for GPT (arXiv 2104.04473, equation 3 without recomputation), with the causal half of
    attention: 72 B s L h^2 (1 + s/(12 h) + V/(12 L h))."""
    s, h, L, V = 2048, GPT.d_model, GPT.layers, GPT.vocab
    layout = Layout(seq_len=s, micro_batch=2, data=4, micro_batches=3)
    assert model_flops(GPT, layout) == pytest.approx(72 * 24 * s * L * h**2 * (1 + s / (12 * h) + V / (12 * L * h)))


def test_a_rank_computes_its_part_of_the_models_flops() -> None:
    layout = Layout(seq_len=1024, expert=8, data=8)
    layers = MIXTRAL.layers * work_of(MIXTRAL, layout, H100, kind="moe").flops
    here = 3 * (layers + head_of(MIXTRAL, layout, H100).flops)
    assert here * layout.devices == pytest.approx(model_flops(MIXTRAL, layout), rel=1e-9)


def test_ends_of_the_model() -> None:
    layout = Layout(seq_len=2048, compute="fp16")
    head = head_of(GPT, layout, H100)
    # Input of the norm and of the output layer, and logits in fp32: 4 s b h (1 + v/h).
    assert head.saved == 4 * 2048 * GPT.d_model + 4 * 2048 * GPT.vocab
    assert embedding_of(GPT, layout, H100).saved == 2048 * GPT.d_model + 8 * 2048
    chunked = head_of(GPT, replace(layout, loss_chunk=128), H100)
    assert chunked.saved < head.saved / 5
    assert chunked.working == head.working // 16
    total_seconds = head.forward + head.backward
    assert chunked.forward + chunked.backward == pytest.approx(total_seconds, rel=1e-9)
    assert hop_seconds(GPT, replace(layout, pipeline=2), H100) > 0


def test_static_bytes_of_a_dense_model_counted_by_hand() -> None:
    """16-bit weights, fp32 gradients, master copy and two moments: 2 + 4 + 12 bytes a parameter."""
    share = Share(kinds=GPT.kinds, first=True, last=True)
    found = static_bytes(GPT, Layout(seq_len=2048), H100, Optimizer(), share)
    assert tuple(found) == COMPONENTS
    P = parameters(GPT)
    assert (found["dense weights"], found["dense gradients"], found["dense optimizer"]) == (2 * P, 4 * P, 12 * P)
    assert not found["expert weights"] + found["expert optimizer"] + found["all-to-all"]
    assert found["context"] == 3 * 2**30
    assert total(found) == sum(found.values())


def test_zero_cuts_what_it_says() -> None:
    share = Share(kinds=("moe",) * 4)
    plain = Layout(seq_len=1024, tensor=2, sequence_parallel=True, data=8, expert=4)
    none, state, everything = (
        static_bytes(MIXTRAL, replace(plain, zero=zero), H100, Optimizer(), share) for zero in (0, 1, 3)
    )
    assert plain.expert_data == 4
    for name, copies in (("dense", 8), ("expert", 4)):
        assert state[f"{name} weights"] == none[f"{name} weights"]
        assert state[f"{name} optimizer"] == pytest.approx(none[f"{name} optimizer"] / copies, abs=1)
        for what in ("weights", "gradients", "optimizer"):
            key = f"{name} {what}"
            assert everything[key] == pytest.approx(none[key] / copies, abs=1)
    assert everything["gathered weights"] > 0 == none["gathered weights"]
    # A quarter of the experts on each rank.
    assert none["expert weights"] == 4 * 8 * 3 * 4096 * 14336 * 2 // 4


def test_fp32_weights_need_no_master_copy() -> None:
    share = Share(kinds=("moe",))
    found = static_bytes(MIXTRAL, Layout(seq_len=64, weights="fp32"), H100, Optimizer(), share)
    assert found["expert optimizer"] == 2 * found["expert weights"]


@pytest.mark.parametrize(
    ("optimizer", "matrix", "vector"),
    [
        (Optimizer(name="adamw"), 8 * 768 * 3072, 8 * 768),
        (Optimizer(name="adapprox", rank=0.25), 4 * 768 * 3072 + 4 * 192 * (768 + 3072), 8 * 768),
        (Optimizer(name="adapprox", rank=0.001, momentum="none"), 4 * (768 + 3072), 4 * 768),
        (Optimizer(name="adapprox", rank=0.001, momentum="bf16"), 2 * 768 * 3072 + 4 * (768 + 3072), 6 * 768),
        (
            Optimizer(name="adapprox", rank=0.001, momentum="int8"),
            768 * (3072 + 4 * 24) + 4 * (768 + 3072),
            4 * 768 + 768 + 4 * 6,
        ),
        (Optimizer(name="adafactor"), 4 * (768 + 3072), 4 * 768),
        (Optimizer(name="came"), 4 * 768 * 3072 + 8 * (768 + 3072), 8 * 768),
        (Optimizer(name="muon"), 4 * 768 * 3072, 8 * 768),
        (Optimizer(name="apollo", rank=0.25), 8 * 192 * 3072, 8 * 768),
        (Optimizer(name="adamw8bit"), 2 * 768 * 3072 + 2 * 768 * 3072 // 64, 8 * 768),
    ],
    ids=lambda value: f"{value.name}-{value.momentum}-{value.rank}" if isinstance(value, Optimizer) else "",
)
def test_bytes_of_optimizers(optimizer: Optimizer, matrix: float, vector: float) -> None:
    assert state_bytes(optimizer, Weight(name="up", rows=768, columns=3072)) == matrix
    assert state_bytes(optimizer, Weight(name="norm", rows=768, role="vector")) == vector


def test_stacked_experts_and_cut_factors() -> None:
    experts = Weight(name="up", rows=64, columns=256, copies=8, role="expert")
    one = replace(experts, copies=1)
    for name in ("adamw", "adapprox", "adafactor", "muon"):
        optimizer = Optimizer(name=name)
        assert state_bytes(optimizer, experts) == 8 * state_bytes(optimizer, one)
    # Muon leaves stacks to AdamW.
    assert state_bytes(Optimizer(name="muon"), one) == 8 * one.numel
    # Rows on four ranks: a quarter of Q, all of U.
    cut = state_bytes(Optimizer(name="adapprox", momentum="none"), replace(one, role="hidden"), 4, 1)
    assert cut == 4 * 16 * (64 // 4 + 256)


def test_optimizers_that_save_do() -> None:
    share, layout = Share(kinds=DEEPSEEK.kinds[:5]), Layout(seq_len=1024, expert=8, data=8)
    sizes = {}
    for name in ("adamw", "adapprox", "adamw8bit", "adafactor"):
        found = static_bytes(DEEPSEEK, layout, H100, Optimizer(name=name, master=False), share)
        sizes[name] = found["dense optimizer"] + found["expert optimizer"]
        assert optimizer_seconds(found, H100) > 0
    assert sizes["adafactor"] < sizes["adamw8bit"] < sizes["adapprox"] < sizes["adamw"]


def test_gradients_are_reduced_over_those_who_repeat_them() -> None:
    share = Share(kinds=("moe",))
    alone = reduction_seconds(MIXTRAL, Layout(seq_len=64), H100, share)
    assert set(alone.values()) == {0.0}
    layout = Layout(seq_len=64, data=8, expert=8)
    found = reduction_seconds(MIXTRAL, layout, H100, share)
    assert found["dense gradients"] > 0 == found["expert gradients"]
    cut = reduction_seconds(MIXTRAL, replace(layout, zero=1), H100, share)
    assert cut["dense gradients"] == pytest.approx(found["dense gradients"] / 2, rel=0.01)
    assert cut["dense weights"] == pytest.approx(cut["dense gradients"] / 2, rel=0.1)


def test_what_does_not_go_together_is_said() -> None:
    with pytest.raises(ValueError, match="gpt-22b: no layer is moe; its layers are dense"):
        work_of(GPT, Layout(), H100, kind="moe")
    with pytest.raises(ValueError, match=r"skew: zipf is of 3 experts, the model has 8"):
        work_of(MIXTRAL, Layout(), H100, replace(UNIFORM, name="zipf", counts=(1.0, 2.0, 3.0)), "moe")
    with pytest.raises(ValueError, match=r"h100-nvlink8-ib: device\.peak has no fp64; did you mean fp"):
        H100.peak("fp64")


def test_a_model_without_a_shared_expert_or_rotation_is_described_too() -> None:
    shape = ModelShape(
        name="tiny",
        vocab=64,
        d_model=8,
        layers=2,
        heads=2,
        kv_heads=2,
        head_dim=4,
        d_ff=16,
        rotary=False,
        qk_norm="head",
        experts=Experts(experts=4, top_k=1, d_expert=16, shared_width=16),
        dense_layers=(0,),
    )
    layout = Layout(seq_len=8, tensor=2, sequence_parallel=True, data=2, expert=4)
    names = [op.name for op in work_of(shape, layout, H100, kind="moe").layer.operators]
    assert "rotary" not in names
    assert "shared gather" in names
    assert "sort rows" not in names


EAGER = replace(LAYOUTS["one"], compute="bf16", residual="fp32", weights="fp32", eager=True)


def test_an_eager_layer_keeps_what_autograd_keeps() -> None:
    """Beside what a fused one does: weights that were cast, and what experts gave."""
    T, D, k = 1024, 4096, 2
    fused = work_of(MIXTRAL, replace(EAGER, eager=False), H100, kind="moe").saved
    weights = 2 * (2 * D * D + 2 * D * 1024 + 8 * 3 * D * 14336)
    assert work_of(MIXTRAL, EAGER, H100, kind="moe").saved == fused + weights + T * k * D * 2
    dense = replace(MIXTRAL, experts=None, d_ff=14336)
    fused = work_of(dense, replace(EAGER, eager=False, compute="fp32"), H100, kind="dense").saved
    assert work_of(dense, replace(EAGER, compute="fp32"), H100, kind="dense").saved == fused + T * 14336 * 4


def test_an_eager_backward_forms_the_gradient_beside_the_sum() -> None:
    """Of the experts' first matrix: gradients of its output and input, and its own, cast and as computed."""
    rows, D, F = 2048, 4096, 14336
    assert work_of(MIXTRAL, EAGER, H100, kind="moe").working == rows * (2 * F + D) * 2 + 8 * 2 * F * D * (4 + 2)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_fsdp_gathers_and_accumulates_whole(micro_batches) -> None:
    layout = replace(EAGER, compute="fp32", data=4, zero=3, shard=2, micro_batches=micro_batches, loss_chunk=1)
    share = Share(kinds=("moe",), first=True, last=True)
    found = static_bytes(MIXTRAL, layout, H100, Optimizer(), share)
    ends, dense, experts = 2 * 32000 * 4096 + 4096, 2 * 4096 * (4096 + 1024 + 1) + 8 * 4096, 8 * 3 * 4096 * 14336
    # Two copies only: what two of the four ranks share is a half.
    assert found["dense weights"] == 4 * (ends + dense) / 2 and found["expert weights"] == 4 * experts / 2
    # Whole ones instead of halves, or a layer's beside them.
    gradients = (ends + dense + experts) / 2 if micro_batches > 1 else dense + experts
    arriving = max(0, 2 * 4 * experts - found["working"])
    assert found["gathered weights"] == 4 * (ends + dense + experts + gradients) + arriving
    assert found["loss"] == 0, "a layer's backward takes more"


@pytest.mark.parametrize(
    ("tensor", "expert", "ranks"), [(1, 1, 2), (1, 2, 1), (1, 4, 1), (2, 1, 4), (2, 2, 2), (2, 4, 1)]
)
def test_experts_share_storage_within_one_dense_copy(tensor, expert, ranks) -> None:
    layout = Layout(tensor=tensor, sequence_parallel=tensor > 1, data=4, expert=expert, zero=3, shard=2)
    assert layout.expert_cut == ranks and layout.dense_cut == 2
    assert replace(layout, shard=0).expert_cut == layout.expert_data


def test_an_eager_loss_is_not_there_while_a_layer_goes_back() -> None:
    """The larger of the two counts."""
    share = Share(kinds=("moe",), last=True)
    layout = replace(EAGER, compute="fp32", loss_chunk=64)
    found = static_bytes(MIXTRAL, layout, H100, Optimizer(), share)
    V, D = MIXTRAL.vocab, 4096
    loss = head_of(MIXTRAL, layout, H100).working
    # The weight's gradient twice, and a chunk's logits.
    assert loss == 2 * 4 * V * D + 64 * V * 4
    assert found["working"] + found["loss"] == max(loss, found["working"])


def test_small_matrices_are_not_factored() -> None:
    """As Adapprox has it: where factors of the largest rank are no smaller than the second moment."""
    weight = Weight(name="router", rows=2, columns=64)
    assert state_bytes(Optimizer(name="adapprox", rank=1.0, momentum="none"), weight) == 4 * 2 * 64
    assert state_bytes(Optimizer(name="adapprox", rank=0.5, momentum="none"), weight) == 4 * 66


def test_fsdp_leaves_each_rank_the_factors_of_the_side_that_is_not_cut() -> None:
    """Adapprox's (METHODS A6): of a matrix [m, n] over r ranks k (m / r + n), and not 1 / r of all."""
    share, optimizer = Share(kinds=("moe",)), Optimizer(name="adapprox", momentum="none")
    layout = Layout(data=2, zero=3)
    found = static_bytes(MIXTRAL, layout, H100, optimizer, share)["expert optimizer"] - 4 * 8 * 3 * 4096 * 14336 / 2
    k = 1024
    assert found == 8 * 4 * k * ((14336 + 4096) + (2048 + 14336))
