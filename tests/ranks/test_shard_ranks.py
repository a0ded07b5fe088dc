"""FSDP2: weights, gradients and optimizer state in parts, and the same training as one process."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from spawned import run_ranks
from test_parallel_parity import CASES, config
from torch import Tensor

from wastenot.launch.config import OptimizerConfig, TrainConfig
from wastenot.launch.engines.decoder import stages_of
from wastenot.launch.evaluate import evaluate
from wastenot.launch.optimizer import make_optimizer
from wastenot.launch.optimizer_config import AdapproxConfig
from wastenot.launch.optimizer_state import measure
from wastenot.launch.precision import compute_dtype, weight_dtype
from wastenot.launch.shards import TokenShards
from wastenot.launch.step import Stepper, make_stepper
from wastenot.moe.config import RouterConfig
from wastenot.moe.decoder import build_decoder
from wastenot.moe.generate import generate
from wastenot.parallel.checkpoint import Checkpointer, load
from wastenot.parallel.config import ParallelConfig
from wastenot.parallel.expert import expert_parameter_names
from wastenot.parallel.gradients import Gradients
from wastenot.parallel.manifest import read_manifest
from wastenot.parallel.mesh import Mesh, make_mesh, single
from wastenot.parallel.tensor import local
from wastenot.parallel.training_state import load_training_state, training_state
from wastenot.tools.random_tokens import RandomTokens

pytestmark = pytest.mark.filterwarnings("ignore:.*factors of the largest rank")

ALONE = ParallelConfig()
LAYOUTS = [
    ParallelConfig(shard=2),
    ParallelConfig(shard=2, expert=2),
    ParallelConfig(shard=4),
    ParallelConfig(shard=4, expert=2),
    ParallelConfig(data=2, shard=2),
    ParallelConfig(data=2, shard=2, expert=4),
]


@dataclass
class Heard:
    """Bytes and waits by kind of collective."""

    num_bytes: dict[str, int] = field(default_factory=dict)
    waited: dict[str, float] = field(default_factory=dict)

    def collective_entered(self, name: str, num_bytes: int) -> None:
        self.num_bytes[name] = self.num_bytes.get(name, 0) + num_bytes

    def collective_left(self, name: str, waited: float, hidden: float = 0.0) -> None:  # pyright: ignore
        self.waited[name] = self.waited.get(name, 0) + waited


def mesh_of(layout: ParallelConfig, heard: Heard | None = None) -> Mesh:
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]
    return make_mesh(layout, "cpu", heard) if layout.world() > 1 else single(recorder=heard)


def gathered_in(precision: str) -> torch.dtype | None:
    """Dtype that experts are gathered in."""
    return None if "GATHER_WHOLE" in os.environ else compute_dtype(precision)


def stepper_of(settings: TrainConfig, mesh: Mesh) -> Stepper:
    precision = settings.train.precision
    model = build_decoder(
        settings.model,
        settings.router,
        mesh,
        dtype=weight_dtype(precision),
        compute_dtype=gathered_in(precision),
        stages=stages_of(settings, mesh),
    )
    windows = RandomTokens(settings.model.vocab_size, settings.data.seq_len)
    # Small buckets, so that several are in flight at once.
    gradients = Gradients(model, mesh, bucket_bytes=20_000)
    return make_stepper(settings, mesh, model, make_optimizer(model, settings.optimizer), gradients, windows)  # pyright: ignore[reportArgumentType]


def steps(stepper: Stepper, first: int, last: int) -> list[tuple[float, float]]:
    """Losses and gradient norms."""
    results = [stepper.step(i, i * stepper.config.train.batch, stop=False) for i in range(first, last)]
    assert all(result.applied for result in results)
    return [(result.loss, result.grad_norm) for result in results]


def is_expert_of(stepper: Stepper) -> Callable[[str], bool]:
    return expert_parameter_names(stepper.model).__contains__


def state_of(stepper: Stepper, optimizer: bool = True) -> dict[str, Tensor]:
    return training_state(stepper.model, stepper.optimizer if optimizer else None, stepper.mesh, is_expert_of(stepper))


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # pyright: ignore[reportAttributeAccessIssue]


def train(rank: int, world: int, settings: TrainConfig, layout: ParallelConfig):
    """Losses and gradient norms of a few steps, the weights before and after them, and what the recorder heard."""
    heard = Heard()
    stepper = stepper_of(settings, mesh_of(layout, heard))
    before = {name: full(tensor).clone().numpy() for name, tensor in state_of(stepper, optimizer=False).items()}
    curve = steps(stepper, 0, settings.train.steps)
    after = {name: full(tensor).numpy() for name, tensor in state_of(stepper, optimizer=False).items()}
    return curve, before, after, heard


# Each mode at the layouts that could go wrong in a way of their own.
GRID = {
    "dropless with bias": LAYOUTS,
    "capacity": [LAYOUTS[2], LAYOUTS[4]],
    "rectified": [LAYOUTS[0], LAYOUTS[3], LAYOUTS[5]],
    # Some ranks compute rows of stand-ins of their own while tokens travel, others do not.
    "top-1, rectified": [LAYOUTS[3], LAYOUTS[5]],
}


def settings_for(name: str, precision: str = "fp64", steps: int = 3) -> TrainConfig:
    """Two micro-batches a step, clipped; embeddings tied in one mode."""
    router, moe = CASES[name]
    settings = config(router, precision, **moe)
    return replace(
        settings,
        model=replace(settings.model, tie_embeddings="bias" in name),
        optimizer=replace(settings.optimizer, clip_norm=0.1),
        train=replace(settings.train, steps=steps),
    )


@pytest.mark.parametrize("name", GRID)
def test_fp64_training_is_that_of_one_process(name):
    """From the very same weights, and to the same."""
    settings = settings_for(name)
    curve, before, after, _ = train(0, 1, settings, ALONE)
    assert min(norm for _, norm in curve) > 0.1
    for layout in GRID[name]:
        for curve_here, before_here, after_here, heard in run_ranks(layout.world(), train, settings, layout):
            np.testing.assert_allclose(curve_here, curve, rtol=1e-9, atol=0, err_msg=str(layout))
            assert before_here.keys() == before.keys()
            for key, value in before.items():
                assert np.array_equal(before_here[key], value), (key, layout)
                np.testing.assert_allclose(after_here[key], after[key], rtol=1e-9, atol=1e-12, err_msg=key)
            assert {"dense-weights", "dense-gradients"} <= heard.num_bytes.keys()
            assert ("expert-weights" in heard.num_bytes) == (layout.expert_shard > 1)
            assert min(heard.waited.values()) > 0


PIPELINES = [
    ParallelConfig(pipeline=2, shard=2),
    ParallelConfig(pipeline=2, shard=2, expert=2, schedule="gpipe"),
    ParallelConfig(pipeline=2, shard=2, schedule="interleaved"),
]


@pytest.mark.parametrize("layout", PIPELINES, ids=lambda layout: f"{layout.schedule} over {layout.expert}")
def test_fp64_training_in_a_pipeline_is_that_of_one_process(layout):
    """Several micro-batches are on their way at once; each rank has the weights of its stages."""
    settings = settings_for("rectified" if layout.expert == 1 else "dropless")
    settings = replace(
        settings, model=replace(settings.model, layers=4), train=replace(settings.train, steps=2, accumulate=4)
    )
    curve, before, after, _ = train(0, 1, settings, ALONE)
    seen = set()
    for curve_here, before_here, after_here, heard in run_ranks(4, train, replace(settings, parallel=layout), layout):
        np.testing.assert_allclose(curve_here, curve, rtol=1e-9, atol=0)
        seen |= before_here.keys()
        for key, value in before_here.items():
            assert np.array_equal(value, before[key]), key
            np.testing.assert_allclose(after_here[key], after[key], rtol=1e-9, atol=1e-12, err_msg=key)
        assert {"dense-weights", "dense-gradients"} <= heard.num_bytes.keys()
    assert seen == before.keys()


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("bf16", 5e-3)])
def test_fp32_and_bf16_training_are_close_to_one_process(precision, bound):
    settings = settings_for("dropless", precision)
    curve, *_ = train(0, 1, settings, ALONE)
    for curve_here, *_ in run_ranks(4, train, settings, LAYOUTS[3]):
        np.testing.assert_allclose(np.array(curve_here)[:, 0], np.array(curve)[:, 0], rtol=bound)


@pytest.mark.parametrize(("name", "bound"), [("dropless with bias", 0.0), ("rectified", 2e-3)])
def test_bf16_experts_travel_as_bf16_and_train_as_if_gathered_in_fp32(monkeypatch, name, bound):
    settings = settings_for(name, "bf16")
    narrow = run_ranks(4, train, settings, LAYOUTS[3])
    monkeypatch.setenv("GATHER_WHOLE", "1")
    for (curve, _, after, heard), (whole_curve, _, whole_after, whole_heard) in zip(
        narrow, run_ranks(4, train, settings, LAYOUTS[3]), strict=True
    ):
        np.testing.assert_allclose(curve, whole_curve, rtol=bound)
        assert bound or all(np.array_equal(value, whole_after[key]) for key, value in after.items())
        sent = heard.num_bytes.pop("expert-weights"), whole_heard.num_bytes.pop("expert-weights")
        assert 0 < 2 * sent[0] == sent[1]
        reduced = heard.num_bytes["expert-gradients"], whole_heard.num_bytes["expert-gradients"]
        assert reduced[0] == reduced[1], "gradients are reduced in fp32"


def test_experts_without_tokens_never_hang():
    """Skewed to a few experts of one rank: others see no token, and still meet in every collective."""
    settings = replace(
        settings_for("dropless"), router=RouterConfig(kind="skewed", skew=30.0, top_k=1, balance_loss=0.0)
    )
    curve, *_ = train(0, 1, settings, ALONE)
    for layout in (LAYOUTS[3], LAYOUTS[5]):
        for curve_here, *_ in run_ranks(4, train, settings, layout):
            np.testing.assert_allclose(curve_here, curve, rtol=1e-9)


def skipped(rank: int, world: int, settings: TrainConfig, layout: ParallelConfig) -> None:
    stepper = stepper_of(settings, mesh_of(layout))
    if rank == 0:
        local(stepper.model.norm.weight.detach()).fill_(torch.inf)
    before = [local(p.detach()).clone() for p in stepper.model.parameters()]
    assert not stepper.step(0, 0, stop=False).applied
    assert all(local(p.detach()).equal(kept) for p, kept in zip(stepper.model.parameters(), before, strict=True))


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all():
    run_ranks(4, skipped, settings_for("dropless"), LAYOUTS[3])


def sharers(rank: int, world: int, layout: ParallelConfig) -> list[list[int]]:
    mesh = mesh_of(layout)
    groups = (mesh.shard.group, mesh.expert_shard.group, mesh.data.group)
    return [[rank] if group is None else dist.get_process_group_ranks(group) for group in groups]


@pytest.mark.parametrize(
    ("layout", "shard", "expert_shard", "data"),
    [
        (ParallelConfig(shard=4), [0, 1, 2, 3], [0, 1, 2, 3], [1]),
        (ParallelConfig(shard=4, expert=2), [0, 1, 2, 3], [1, 3], [1]),
        (ParallelConfig(data=2, shard=2), [0, 1], [0, 1], [1, 3]),
        (ParallelConfig(data=2, shard=2, expert=2), [0, 1], [1], [1, 3]),
        (ParallelConfig(data=2, shard=2, expert=4), [0, 1], [1], [1, 3]),
        # What ranks of `tensor` keep twice of the experts is storage to share.
        (ParallelConfig(shard=2, tensor=2, expert=2), [1, 3], [1, 3], [1]),
    ],
)
def test_storage_is_shared_by_those_who_hold_the_same(layout, shard, expert_shard, data):
    assert run_ranks(4, sharers, layout)[1] == [shard, expert_shard, data]


# Memory


def bytes_held(rank: int, world: int, settings: TrainConfig, layout: ParallelConfig) -> tuple[int, int]:
    stepper = stepper_of(settings, mesh_of(layout))
    steps(stepper, 0, 1)
    held = [local(p) for p in stepper.model.parameters()]
    assert all(part.untyped_storage().nbytes() <= 1.1 * part.nbytes + 1024 for part in held), "parts of wholes"
    return sum(part.nbytes for part in held), measure(stepper.optimizer).num_bytes


def test_a_rank_holds_its_part_of_weights_and_optimizer_state():
    settings = settings_for("dropless", "fp32")
    alone = bytes_held(0, 1, settings, ALONE)
    for layout in LAYOUTS:
        for held in run_ranks(layout.world(), bytes_held, settings, layout):
            for here, there in zip(held, alone, strict=True):
                # Rows that do not split evenly leave some ranks a row more.
                assert here < 1.05 * there / layout.shard, layout


# Forward passes that no backward follows


def text() -> TokenShards:
    tokens = np.random.default_rng(1).integers(0, 61, 500)
    return TokenShards(Path(), "val", (tokens,), vocab_size=61, end_token=60, num_text_bytes=500, num_documents=1)


def interrupted(rank: int, world: int, settings: TrainConfig, layout: ParallelConfig, looks: bool):
    """Losses of training, with evaluations and texts between the steps or without."""
    mesh = mesh_of(layout)
    stepper = stepper_of(settings, mesh)
    seen = []
    curve = []
    for step in range(3):
        curve += steps(stepper, step, step + 1)
        if looks:
            seen.append(evaluate(stepper.model, text(), mesh, seq_len=16, batch=8, precision="fp64").loss)
            seen.append(generate(stepper.model, [[1, 2, 3], [4]], max_new_tokens=6, seed=step))
            assert sum(local(p).nbytes for p in stepper.model.parameters()) < 1.1 * whole_bytes(stepper) / layout.shard
    return curve, seen


def whole_bytes(stepper: Stepper) -> int:
    return sum(full(tensor).nbytes for tensor in state_of(stepper, optimizer=False).values())


def test_evaluation_and_generation_are_those_of_one_process_and_leave_nothing_behind():
    settings = replace(settings_for("capacity"), model=settings_for("dropless with bias").model)
    _, seen = interrupted(0, 1, settings, ALONE, True)
    untied = replace(settings, model=replace(settings.model, tie_embeddings=False))
    assert settings.model.tie_embeddings, "one weight for both ends, where one rank has both"
    for layout in (LAYOUTS[0], LAYOUTS[3], PIPELINES[0]):
        if layout.pipeline > 1:
            settings = replace(untied, parallel=layout)
            _, seen = interrupted(0, 1, untied, ALONE, True)
        for (curve, seen_here), (plain, _) in zip(
            run_ranks(layout.world(), interrupted, settings, layout, True),
            run_ranks(layout.world(), interrupted, settings, layout, False),
            strict=True,
        ):
            assert curve == plain
            np.testing.assert_allclose(seen_here[::2], seen[::2], rtol=1e-9)
            assert seen_here[1::2] == seen[1::2]


# Checkpoints

# The second keeps state of every kind: factors, ranks, moments whole.
OPTIMIZERS = {
    "adamw": OptimizerConfig(lr=1e-2),
    "adapprox": OptimizerConfig(
        name="adapprox", lr=1e-2, adapprox=AdapproxConfig(momentum="bf16", true_error=True, rank_every=2)
    ),
}
WORLDS = {
    1: [ALONE],
    2: [ParallelConfig(shard=2)],
    4: [
        ParallelConfig(data=4, expert=4),
        ParallelConfig(data=2, shard=2, expert=2),
        ParallelConfig(shard=4, expert=2),
        ParallelConfig(shard=4),
        ParallelConfig(data=2, shard=2, expert=4),
        ParallelConfig(pipeline=2, shard=2, expert=2),
    ],
}


def settings_of(optimizer: str) -> TrainConfig:
    settings = settings_for("dropless", "fp32")
    return replace(settings, model=replace(settings.model, layers=2), optimizer=OPTIMIZERS[optimizer])


def save_all(rank: int, world: int, directory: Path, optimizer: str) -> None:
    """A checkpoint of two steps of every layout of this world."""
    for number, layout in enumerate(WORLDS[world]):
        stepper = stepper_of(replace(settings_of(optimizer), parallel=layout), mesh_of(layout))
        steps(stepper, 0, 2)
        checkpointer = Checkpointer(directory / f"{world}-{number}", stepper.mesh, asynchronous=False)
        checkpointer.save(2, state_of(stepper), {})
        checkpointer.close()


def load_all(rank: int, world: int, directory: Path, optimizer: str) -> None:
    """Every checkpoint into every layout of this world: the bits of the file."""
    paths = sorted(directory.glob("*/step-00000002"))
    for layout in WORLDS[world]:
        stepper = stepper_of(replace(settings_of(optimizer), parallel=layout), mesh_of(layout))
        for path in paths:
            entries = read_manifest(path).tensors
            expected = {name: torch.zeros(entry.shape, dtype=entry.dtype) for name, entry in entries.items()}
            load(path, expected, single())
            load_training_state(path, stepper.model, stepper.optimizer, stepper.mesh, is_expert_of(stepper))
            state = state_of(stepper)
            assert state.keys() <= expected.keys() and (layout.pipeline > 1 or len(state) == len(expected))
            for name, tensor in state.items():
                assert full(tensor).equal(expected[name]), (path, layout, name)
            for parameter, held in stepper.optimizer.state.items():
                kinds = {type(held[key]) for key in ("exp_avg", "exp_avg_sq", "Q", "U") if key in held}
                assert kinds <= {type(parameter.detach())}, "state is cut as its parameter is"
        steps(stepper, 2, 3)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_layout_loads_what_every_other_saved(tmp_path, optimizer):
    for job in (save_all, load_all):
        job(0, 1, tmp_path, optimizer)
        for world in (2, 4):
            run_ranks(world, job, tmp_path, optimizer, timeout=240)


def resumed(rank: int, world: int, directory: Path, optimizer: str, layout: ParallelConfig):
    """Whether four steps and two, saved, loaded by a new run, and two more come to the same bits."""
    settings = settings_of(optimizer)
    straight = stepper_of(settings, mesh_of(layout))
    curve = steps(straight, 0, 4)
    half = stepper_of(settings, straight.mesh)
    steps(half, 0, 2)
    checkpointer = Checkpointer(directory / f"{optimizer}-{layout.shard}-{layout.expert}", straight.mesh)
    checkpointer.save(2, state_of(half), {})
    path = checkpointer.latest()
    assert path is not None
    again = stepper_of(settings, straight.mesh)
    load_training_state(path, again.model, again.optimizer, again.mesh, is_expert_of(again))
    assert steps(again, 2, 4) == curve[2:]
    for name, tensor in state_of(again).items():
        assert local(tensor).equal(local(state_of(straight)[name])), name
    checkpointer.close()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resumed_training_ends_with_the_same_bits(tmp_path, optimizer):
    for layout in (LAYOUTS[3], LAYOUTS[5]):
        run_ranks(4, resumed, tmp_path, optimizer, layout)
