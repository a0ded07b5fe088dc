"""Tensor parallelism, folded with data and expert parallelism: whatever the layout, the run is that of one process."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from spawned import run_ranks

from wastenot.kernels.cross_entropy.naive import linear_cross_entropy
from wastenot.launch.config import DataConfig, LogConfig, LoopConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from wastenot.launch.evaluate import evaluate
from wastenot.launch.optimizer import make_optimizer
from wastenot.launch.optimizer_state import measure
from wastenot.launch.precision import weight_dtype
from wastenot.launch.step import Stepper
from wastenot.moe.config import ModelConfig, MoEConfig, RouterConfig
from wastenot.moe.decoder import build_decoder
from wastenot.moe.generate import generate
from wastenot.parallel import vocabulary
from wastenot.parallel.checkpoint import Checkpointer, load, newest
from wastenot.parallel.config import ParallelConfig
from wastenot.parallel.expert import expert_parameter_names
from wastenot.parallel.gradients import Gradients
from wastenot.parallel.manifest import read_manifest
from wastenot.parallel.mesh import Mesh, make_mesh, single
from wastenot.parallel.tensor import cut, local, streams, tensor_parameters
from wastenot.parallel.training_state import load_training_state, training_state
from wastenot.tools.random_tokens import RandomTokens

pytestmark = pytest.mark.filterwarnings("ignore:.*factors of the largest rank")

FULL = os.environ.get("WASTENOT_GRID") == "full"
STEPS = 20 if FULL else 4
Layout = tuple[int, int, int]
"""Degrees of tensor, data and expert."""
ALONE: Layout = (1, 1, 1)
DROPLESS = RouterConfig(top_k=2, balance_over="global", balance_loss=0.02, z_loss=1e-3, bias_update=0.01)


def config(precision: str = "fp64", optimizer: str = "adamw", router: RouterConfig = DROPLESS, **model) -> TrainConfig:
    """A dense layer and two of experts; 61 tokens, which no number of ranks divides."""
    moe = MoEConfig(experts=8, d_expert=24, shared_experts=1, first_dense=1)
    shape: dict[str, Any] = {"heads": 4, "qk_norm": "head", "init_std": 0.1, "moe": moe, **model}
    return TrainConfig(
        model=ModelConfig(vocab_size=61, d_model=32, layers=3, **shape),
        router=router if shape["moe"] is not None else RouterConfig(),
        optimizer=OptimizerConfig(name=optimizer, lr=1e-3, clip_norm=0.5),  # pyright: ignore[reportArgumentType]
        schedule=ScheduleConfig(warmup_steps=2),
        data=DataConfig(seq_len=16),
        train=LoopConfig(steps=STEPS, batch=8, accumulate=2, precision=precision),  # pyright: ignore[reportArgumentType]
        log=LogConfig(debug=True),
    )


CASES = {
    "head norms, untied": config(),
    "all-head norms, tied, Adapprox, balance by sequence": config(
        optimizer="adapprox",
        router=replace(DROPLESS, balance_over="sequence"),
        qk_norm="full",
        tie_embeddings=True,
    ),
    "dense, no norms": config(moe=None, qk_norm="none", kv_heads=2),
}
LAYOUTS: dict[str, list[Layout]] = {
    "head norms, untied": [(2, 1, 1), (2, 1, 2), (4, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (4, 1, 4)],
    "all-head norms, tied, Adapprox, balance by sequence": [(2, 1, 2), (4, 1, 1), (2, 2, 4)],
    "dense, no norms": [(2, 1, 1), (2, 2, 1)],
}


class Run:
    """A run on this rank's part of a mesh, from the start or from a checkpoint."""

    def __init__(self, settings: TrainConfig, mesh: Mesh, start: Path | None = None) -> None:
        self.settings, self.mesh = settings, mesh
        model, train = settings.model, settings.train
        self.model = build_decoder(model, settings.router, mesh, dtype=weight_dtype(train.precision))
        self.optimizer = make_optimizer(self.model, settings.optimizer)
        self.is_expert = expert_parameter_names(self.model).__contains__
        self.done = 0
        if start is not None:
            self.done = load_training_state(start, self.model, self.optimizer, mesh, self.is_expert)["step"]
        # Small buckets, so that several are in flight at once.
        gradients = Gradients(self.model, mesh, bucket_bytes=20_000)
        windows: Any = RandomTokens(model.vocab_size, settings.data.seq_len)
        self.stepper = Stepper(settings, mesh, self.model, self.optimizer, gradients, windows)

    def train(self, steps: int) -> list[tuple[float, ...]]:
        """Loss, gradient norm and router losses of the next `steps`."""
        told = []
        for step in range(self.done, self.done + steps):
            result = self.stepper.step(step, step * self.settings.train.batch, stop=False)
            assert result.applied
            assert result.grad_norm > 0.5, "clipping is part of the test"
            told.append((result.loss, result.grad_norm, *result.auxiliary.values()))
        self.done += steps
        return told

    def use(self) -> tuple[float, int, list[list[int]]]:
        """The loss on held-out text, its tokens, and texts."""
        held_out: Any = SimpleNamespace(
            num_tokens=150, end_token=0, num_text_bytes=150, read=lambda first, count: np.arange(150) * 7 % 61
        )
        found = evaluate(self.model, held_out, self.mesh, seq_len=16, batch=4)
        texts = generate(self.model, [[5, 9, 2], [7]], max_new_tokens=5, temperature=0)
        state = measure(self.optimizer)
        assert state.num_bytes > 0
        assert state.parameters == sum(local(p).numel() for p in self.model.parameters())
        return found.loss, found.tokens, texts

    def save(self, directory: Path) -> None:
        checkpoints = Checkpointer(directory, self.mesh, keep=99, asynchronous=False)
        state = training_state(self.model, self.optimizer, self.mesh, self.is_expert)
        checkpoints.save(self.done, state, {"step": self.done})
        checkpoints.close()


def mesh_of(layout: Layout) -> Mesh:
    tensor, data, expert = layout
    return make_mesh(ParallelConfig(tensor=tensor, data=data, expert=expert), "cpu")


def saved(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint, whole."""
    path = newest(directory)
    assert path is not None
    entries = read_manifest(path).tensors
    tensors = {name: torch.zeros(entry.shape, dtype=entry.dtype) for name, entry in entries.items()}
    load(path, tensors, single())
    return tensors


def train_layouts(
    rank: int, world: int, cases: dict[str, TrainConfig], layouts: dict[str, list[Layout]], folder: Path
) -> dict[tuple[str, Layout], Any]:
    """Each case under those of its layouts that `world` ranks make."""
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]
    told = {}
    for name, settings in cases.items():
        for layout in layouts[name]:
            if layout[0] * layout[1] == world:
                run = Run(settings, mesh_of(layout))
                told[name, layout] = run.train(STEPS), run.use()
                run.save(folder / name / str(layout))
    return told


def test_fp64_training_evaluation_and_texts_are_those_of_one_process(tmp_path):
    [alone] = run_ranks(1, train_layouts, CASES, {name: [ALONE] for name in CASES}, tmp_path)
    for world in (2, 4):
        for told in run_ranks(world, train_layouts, CASES, LAYOUTS, tmp_path, timeout=200):
            for (name, layout), (steps, (loss, tokens, texts)) in told.items():
                alone_steps, (alone_loss, alone_tokens, alone_texts) = alone[name, ALONE]
                where = f"{name}, {layout}"
                np.testing.assert_allclose(steps, alone_steps, rtol=1e-9, atol=0, err_msg=where)
                np.testing.assert_allclose(loss, alone_loss, rtol=1e-9, err_msg=where)
                assert (tokens, texts) == (alone_tokens, alone_texts), where
    for name, layouts in LAYOUTS.items():
        expected = saved(tmp_path / name / str(ALONE))
        for layout in layouts:
            there = saved(tmp_path / name / str(layout))
            assert there.keys() == expected.keys()
            for key, tensor in expected.items():
                if key.startswith("model."):
                    np.testing.assert_allclose(there[key], tensor, 1e-9, 1e-12, err_msg=f"{name}, {layout} {key}")


def test_fp32_and_bf16_training_come_close_to_one_process(tmp_path):
    cases = {precision: config(precision) for precision in ("fp32", "bf16")}
    [alone] = run_ranks(1, train_layouts, cases, {name: [ALONE] for name in cases}, tmp_path)
    layouts: dict[str, list[Layout]] = {name: [(4, 1, 1), (2, 2, 4)] for name in cases}
    for told in run_ranks(4, train_layouts, cases, layouts, tmp_path, timeout=100):
        assert len(told) == 4
        for (precision, layout), (steps, _) in told.items():
            near = {"fp32": 1e-5, "bf16": 2e-2}[precision]
            np.testing.assert_allclose(steps, alone[precision, ALONE][0], near, err_msg=f"{precision}, {layout}")


# Checkpoints


CHAIN: dict[int, list[Layout]] = {
    1: [ALONE],
    2: [(2, 1, 1), (1, 2, 2), (2, 1, 2)],
    4: [(4, 1, 1), (1, 4, 4), (2, 2, 2), (4, 1, 4)],
}


def set_out(rank: int, world: int, settings: TrainConfig, folder: Path) -> list[tuple[float, ...]]:
    """One process: saves after two steps, and tells of the two that follow."""
    run = Run(settings, mesh_of(ALONE))
    run.train(2)
    run.save(folder)
    return run.train(2)


def pass_on(rank: int, world: int, settings: TrainConfig, folder: Path) -> list[list[tuple[float, ...]]]:
    """Each layout loads what the one before saved; what two more steps would be, on the way."""
    told = []
    for layout in CHAIN[world]:
        path = newest(folder)
        assert path is not None
        run = Run(settings, mesh_of(layout), start=path)
        run.save(folder)
        told.append(run.train(2))
    return told


@pytest.mark.parametrize("optimizer", ["adamw", "adapprox"])
def test_checkpoints_pass_through_all_layouts_without_changing_a_bit(optimizer, tmp_path):
    settings = config(optimizer=optimizer)
    [after] = run_ranks(1, set_out, settings, tmp_path)
    before = saved(tmp_path)
    for world in (2, 4, 2, 1):
        for told in run_ranks(world, pass_on, settings, tmp_path, timeout=100):
            np.testing.assert_allclose(told, [after] * len(told), rtol=1e-9)
        end = saved(tmp_path)
        assert end.keys() == before.keys()
        assert all(tensor.equal(end[name]) and tensor.dtype == end[name].dtype for name, tensor in before.items())
    path = newest(tmp_path)
    assert path is not None
    # Written once however many ranks hold it.
    held = sum(tensor.numel() * tensor.element_size() for tensor in before.values())
    assert sum(read_manifest(path).files.values()) < 1.2 * held


# Parts


def kept_for_backward(rank: int, world: int, layout: Layout) -> int:
    """Bytes of activations that a dense model keeps between forward and backward on this rank."""
    settings = config(moe=None, qk_norm="none", d_ff=96)
    model = Run(settings, mesh_of(layout)).model
    weights = {local(p).untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model(torch.arange(8 * 64).view(8, 64) % 61).hidden_BSD
    assert hidden.requires_grad
    return sum(kept.values())


def test_each_rank_keeps_its_part_of_the_activations():
    [whole] = run_ranks(1, kept_for_backward, ALONE)
    for kept in run_ranks(4, kept_for_backward, (4, 1, 1)):
        assert kept < 1.1 * whole / 4


def weights_of(rank: int, world: int, layout: Layout) -> tuple[int, int, set[str]]:
    """Bytes of what is cut, of all weights but experts, and names of what is cut."""
    mesh = mesh_of(layout)
    model = Run(config(), mesh).model
    dense = {name: p for name, p in model.named_parameters() if ".experts." not in name}
    parts = {name: local(p).numel() * p.element_size() for name, p in dense.items()}
    names = set(tensor_parameters(model, mesh))
    return sum(parts[name] for name in names), sum(parts.values()), names


def test_each_rank_holds_its_part_of_every_dense_matrix():
    model = Run(config(), single()).model
    dense = {name: p for name, p in model.named_parameters() if ".experts." not in name}
    matrices = {name for name, p in dense.items() if p.dim() == 2 and "router" not in name}
    whole = sum(dense[name].nbytes for name in matrices)
    replicated = sum(p.nbytes for p in dense.values()) - whole
    found = run_ranks(4, weights_of, (4, 1, 2))
    assert [names for *_, names in found] == [matrices] * 4
    assert sum(part for part, *_ in found) == whole
    # The vocabulary of 61 is cut into 16, 16, 16 and 13 rows.
    assert all(abs(part - whole / 4) <= 2 * 3 * 32 * 8 for part, *_ in found)
    assert all(total - part == replicated for part, total, _ in found)


class Names:
    """A recorder that keeps what it heard."""

    def __init__(self) -> None:
        self.entered: list[tuple[str, int]] = []
        self.left: list[str] = []

    def collective_entered(self, name: str, num_bytes: int) -> None:
        self.entered.append((name, num_bytes))

    def collective_left(self, name: str, waited: object, hidden: float = 0.0) -> None:
        self.left.append(name)


def move(rank: int, world: int) -> None:
    names: Any = Names()
    mesh = make_mesh(ParallelConfig(tensor=world), "cpu", names)
    stream, _ = streams(mesh)
    torch.manual_seed(1)
    for shape in ((6, 4), (2, 6, 4)):
        dim = len(shape) - 2
        x, first, second, last = (torch.randn(size, dtype=torch.float64) for size in (shape, (6, 4), (12, 4), (4, 6)))
        whole = [tensor.clone().requires_grad_() for tensor in (x, first, second, last)]
        x_, first_, second_, last_ = whole
        y = (torch.sin(x_ @ first_.t()) * (x_ @ second_.t())[..., ::2]) @ last_.t()
        y.square().sum().backward()
        # Rows of `second` belong to the columns that they meet.
        cuts = [(x, dim), (first, 0), (second, 0), (last, 1)]
        parts = [tensor.chunk(world, at)[rank].clone().requires_grad_() for tensor, at in cuts]
        part, rows_1, rows_2, columns = parts
        a, b = stream.project(part, rows_1, rows_2)
        own = stream.leave((torch.sin(a) * b[..., ::2]) @ columns.t())
        torch.testing.assert_close(own, y.chunk(world, dim)[rank], rtol=1e-12, atol=1e-12)
        own.square().sum().backward()
        for tensor, mine, (_, at) in zip(whole, parts, cuts, strict=True):
            assert tensor.grad is not None
            torch.testing.assert_close(mine.grad, tensor.grad.chunk(world, at)[rank], rtol=1e-12, atol=1e-12)
    once = ["tensor-gather", "tensor-scatter", "tensor-scatter-gradient", "tensor-gather-again"]
    assert [name for name, _ in names.entered] == [*once, "tensor-gather-gradient"] * 2
    assert sorted(names.left) == sorted(name for name, _ in names.entered)
    assert [num_bytes for _, num_bytes in names.entered] == [24 // world * 8 * (world - 1)] * 5 + [
        48 // world * 8 * (world - 1)
    ] * 5


def test_a_layer_that_ranks_share_is_the_whole_one_in_values_and_gradients():
    run_ranks(2, move)
    run_ranks(3, move)


def spread_loss(rank: int, world: int, dtype: torch.dtype, chunk_bytes: int, scale: float) -> None:
    vocabulary.CHUNK_BYTES = chunk_bytes
    torch.manual_seed(3)
    T, V, D = 7, 41, 12
    hidden = torch.randn(world * T, D).to(dtype).requires_grad_()
    # Logits far beyond what an exponential holds.
    weight = (torch.randn(V, D) * scale).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (world * T,))
    targets[::5] = -100
    expected = linear_cross_entropy(hidden, weight, targets)
    (expected * 0.3).backward()
    mesh = make_mesh(ParallelConfig(tensor=world), "cpu")
    own = hidden.detach()[rank * T : (rank + 1) * T].clone().requires_grad_()
    rows = torch.nn.Parameter(cut(weight.detach(), 0, mesh))
    loss = vocabulary.linear_cross_entropy(own, rows, targets.view(world, T), mesh)
    (loss * 0.3).backward()
    alone = linear_cross_entropy(own, weight, targets.view(world, T)[rank])
    near = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert loss.dtype == expected.dtype
    assert hidden.grad is not None
    assert weight.grad is not None
    assert own.grad is not None
    assert rows.grad is not None
    torch.testing.assert_close(loss, alone, rtol=near, atol=near)
    torch.testing.assert_close(own.grad, hidden.grad[rank * T : (rank + 1) * T], rtol=near, atol=near * scale)
    torch.testing.assert_close(local(rows.grad), local(cut(weight.grad, 0, mesh)), rtol=near, atol=near)
    with torch.no_grad():
        assert vocabulary.linear_cross_entropy(own, rows, targets.view(world, T), mesh).equal(loss.detach())


@pytest.mark.parametrize("world", [2, 3])
def test_the_loss_over_a_spread_vocabulary_is_that_of_the_whole_one(world):
    # A chunk of one token, of three, and all at once.
    for dtype, chunk_bytes, scale in (
        (torch.float64, 1, 200.0),
        (torch.float64, 3 * world * 21 * 8, 1.0),
        (torch.float32, 2**20, 1.0),
        (torch.bfloat16, 2**20, 1.0),
    ):
        run_ranks(world, spread_loss, dtype, chunk_bytes, scale)
