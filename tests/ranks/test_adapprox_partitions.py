"""Adapprox under engines that cut parameters into flat partitions is the Adapprox of whole parameters."""

from __future__ import annotations

import copy
import math
import os
import random
import sys
import warnings
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from spawned import run_ranks
from torch import Tensor, nn

from wastenot.launch.optimizer_state import in_all, measure
from wastenot.parallel.optim import Adapprox
from wastenot.parallel.optim.pieces import AdapproxOfPieces, Block, Parameter, Piece

OPTIONS = {
    "lr": 0.02,
    "betas": (0.9, 0.9),
    "weight_decay": 0.1,
    "max_rank": 0.4,
    "rank_threshold": 0.05,
    "rank_every": 3,
    "seed": 3,
}
STEPS = 12


class Mixture(nn.Module):
    """Matrices, vectors, and a stack of experts; sizes that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(13, 31)
        self.experts = nn.Parameter(torch.randn(3, 31, 17) * 0.3)
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(17))
        self.last = nn.Linear(17, 29)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        mixed = torch.einsum("bm,emn->ben", hidden, self.experts).tanh().mean(1)
        return self.last(mixed * self.scale)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the ranks have: sums in more threads differ in the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(8, 13, generator=draw), torch.randn(8, 29, generator=draw)


def loss_of(model: Any, rank: int, step: int) -> Tensor:
    x, y = batch(rank, step)
    return (model(x) - y).square().mean()


def whole(world: int) -> tuple[list[float], dict[str, tuple[int, ...]], int]:
    """Losses, ranks and bytes of state of plain Adapprox, of the mean of all ranks' gradients."""
    model = Mixture()
    optimizer = Adapprox(model.named_parameters(), **OPTIONS)
    losses: list[float] = []
    for step in range(STEPS):
        parts = [loss_of(model, rank, step) / world for rank in range(world)]
        for part in parts:
            part.backward()
        losses.append(torch.stack(parts).sum().item())
        optimizer.step()
        optimizer.zero_grad()
    report = optimizer.report()
    return losses, {each.name: each.ranks for each in report}, sum(each.allocated_bytes for each in report)


SHAPES = [(30, 17), (3, 16, 20), (7,), (1,), (20, 24), (24, 20), (9, 2, 7, 3), (12, 40)]
"""No two alike: small matrices of one shape are stepped together, and rounded otherwise than one alone."""


class Cut:
    """Parameters one after the other, cut at random places: rank r holds what lies between the r-th and the next."""

    def __init__(self, rank: int, world: int, seed: int, nonfinite: Literal["raise", "skip"] = "raise") -> None:
        draw = random.Random(seed)
        shapes = draw.sample(SHAPES, draw.randint(3, len(SHAPES)))
        torch.manual_seed(seed)
        self.whole = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        named = [(f"p{i}", p) for i, p in enumerate(self.whole)]
        self.plain = Adapprox(named, **OPTIONS)
        starts = [0, *accumulate(p.numel() for p in self.whole)]
        cuts = [0, *sorted(draw.randrange(starts[-1] + 1) for _ in range(world - 1)), starts[-1]]
        if draw.random() < 0.5:
            # One holds nothing.
            cuts[1] = cuts[2]
        first, last = cuts[rank], cuts[rank + 1]
        self.flat = nn.Parameter(torch.full((last - first + 3,), 7.0))
        self.pieces: list[Piece] = []
        for i, (p, start) in enumerate(zip(self.whole, starts, strict=False)):
            low, high = max(first - start, 0), min(last - start, p.numel())
            if low < high:
                self.pieces.append(Piece(i, low, high, self.flat, start + low - first + 2))
                self.inside(self.flat, self.pieces[-1]).copy_(p.detach().view(-1)[low:high])
        given = Adapprox(named, **OPTIONS, nonfinite=nonfinite)
        self.parameters = [Parameter(name, tuple(p.shape), i) for i, (name, p) in enumerate(named)]
        given.param_groups[0]["params"] = [self.flat]
        self.given, self.limit = given, draw.choice([1, 500, 2**20])
        self.made = AdapproxOfPieces(given, [self.block(self.pieces)], limit=self.limit)

    def block(self, pieces: list[Piece]) -> Block:
        options = self.given.param_groups[0]
        return Block(options, self.parameters, pieces, dist.group.WORLD, torch.device("cpu"), self.flat)

    def step(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.flat.grad = torch.full_like(self.flat, 5.0)
        for p in self.whole:
            p.grad = torch.randn(p.shape).mul_(torch.rand(()))
        for piece in self.pieces:
            grad = self.whole[piece.parameter].grad
            assert grad is not None
            self.inside(self.flat.grad, piece).copy_(grad.view(-1)[piece.start : piece.stop])
        for group in (self.plain.param_groups[0], self.made.param_groups[0]):
            group["lr"] = 0.02 / (1 + seed)
        self.plain.step()
        self.made.step()

    def inside(self, flat: Tensor, piece: Piece) -> Tensor:
        return flat.detach()[piece.offset : piece.offset + piece.stop - piece.start]

    def is_equal(self) -> bool:
        return all(
            torch.equal(
                self.inside(self.flat, piece), self.whole[piece.parameter].detach().view(-1)[piece.start : piece.stop]
            )
            for piece in self.pieces
        )


def in_random_pieces(rank: int, world: int) -> Any:
    warnings.filterwarnings("ignore", message=".*factors of the largest rank")
    found: list[Any] = []
    for seed in range(6):
        cut = Cut(rank, world, seed)
        for step in range(5):
            cut.step(step)
        assert cut.is_equal(), seed
        state = copy.deepcopy(cut.made.state_dict())
        again = AdapproxOfPieces(cut.given, [cut.block(cut.pieces)], limit=cut.limit)
        again.load_state_dict(state)
        cut.made = again
        for step in range(5, 8):
            cut.step(step)
        assert cut.is_equal(), seed
        # What lies beside the pieces is not touched.
        held = sum(piece.stop - piece.start for piece in cut.pieces)
        assert (cut.flat == 7).sum() >= cut.flat.numel() - held
        states: list[Any] = [None] * world
        dist.all_gather_object(states, (measure(cut.made), again.state_dict()))
        assert in_all([each for each, _ in states]) == measure(cut.plain), seed
        assert sorted(place for _, own in states for place in own["owned"]) == [*range(len(cut.whole))]
        # All ranks' states together are the state of one optimizer of the whole.
        joined = {place: each for _, own in states for place, each in own["state"].items()}
        cut.plain = Adapprox(cut.whole)
        cut.plain.load_state_dict({"state": joined, "param_groups": states[0][1]["param_groups"]})
        cut.step(8)
        assert cut.is_equal(), seed
        if again.state_dict()["owned"]:
            with pytest.raises(
                ValueError, match="other parameters of the model than this rank owns; go on with as many"
            ):
                again.load_state_dict(state | {"owned": [], "state": {}})
        found.append((cut.limit, len(cut.pieces)))
    with pytest.raises(ValueError, match=r"the pieces of p0 are \[.*\], which is not once all of its"):
        cut = Cut(rank, world, 0)
        AdapproxOfPieces(cut.given, [cut.block([piece for piece in cut.pieces if piece.parameter != 0])])
    for nonfinite in ("raise", "skip"):
        cut = Cut(rank, world, 1, nonfinite)
        cut.step(0)
        before = cut.flat.detach().clone()
        if rank == 0:
            assert cut.flat.grad is not None
            cut.flat.grad[cut.pieces[0].offset] = math.nan
        if nonfinite == "raise":
            name = "p0" if rank == 0 else "a parameter on another rank"
            with pytest.raises(FloatingPointError, match=f"NaN or infinite gradient of {name}; lower"):
                cut.made.step()
        else:
            cut.made.step()
            assert cut.made.skipped_steps == 1
        assert torch.equal(cut.flat, before)
    # What a rank shares stacks with, it searches for ranks with: at a NaN none goes on without the others.
    alone = [dist.new_group([each]) for each in range(world)][rank]
    for nonfinite in ("raise", "skip"):
        start = torch.randn(3, 16, 20, generator=torch.Generator().manual_seed(rank))
        stack, flat = nn.Parameter(start), nn.Parameter(start.flatten())
        how: dict[str, Any] = {**OPTIONS, "rank_every": 1, "nonfinite": nonfinite}
        plain = Adapprox([("stack", stack)], **how, expert_group=dist.group.WORLD)
        given = Adapprox([("stack", stack)], **how)
        given.param_groups[0]["params"] = [flat]
        options, named, piece = given.param_groups[0], Parameter("stack", (3, 16, 20), 0), Piece(0, 0, 960, flat)
        block = Block(options, [named], [piece], alone, torch.device("cpu"), flat, dist.group.WORLD)
        made = AdapproxOfPieces(given, [block], agree=alone)
        for step in range(4):
            stack.grad = torch.randn(3, 16, 20)
            if (rank, step) == (1, 2):
                stack.grad[1, 2, 3] = math.nan
            flat.grad = stack.grad.flatten()
            for optimizer in plain, made:
                if nonfinite == "raise" and step == 2:
                    name = "stack" if rank == 1 else "a parameter on another rank"
                    with pytest.raises(FloatingPointError, match=f"NaN or infinite gradient of {name};"):
                        optimizer.step()
                else:
                    optimizer.step()
        assert torch.equal(flat, stack.flatten())
        assert made.state_dict()["state"][0]["step"] == 3
        assert made.skipped_steps == plain.skipped_steps == (nonfinite == "skip")
    return found


def test_however_parameters_are_cut_their_steps_are_those_of_whole_ones():
    first, *others = run_ranks(3, in_random_pieces, timeout=180)
    # The draws have ranks with nothing and parameters one at a time.
    assert 1 in {limit for limit, _ in first}
    assert 0 in {count for rank in others for _, count in rank}


STAGES: dict[int, dict[str, Any]] = {
    1: {},
    2: {"round_robin_gradients": True},
    3: {"stage3_param_persistence_threshold": 0, "sub_group_size": 900},
}


def start_deepspeed(rank: int) -> None:
    # Its own warnings are not ours to make errors of.
    warnings.simplefilter("ignore")
    os.environ["LOCAL_RANK"] = str(rank)
    import deepspeed
    import deepspeed.ops

    # Compiled, for a minute, at the first import anywhere; only inference gains.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)


def engine_of(model: nn.Module, optimizer: Adapprox, stage: int, extra: dict[str, Any]) -> Any:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 8,
        # Buckets of the usual size are gigabytes, which deterministic torch fills with NaN at every step.
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 4000, **STAGES.get(stage, {})},
        "zero_allow_untested_optimizer": True,
        # It is 1 by default, of a norm that stage 0 and the others do not agree about.
        "gradient_clipping": 0.0,
        **extra,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def train(engine: Any, rank: int, world: int, steps: range) -> list[float]:
    losses: list[float] = []
    for step in steps:
        loss = loss_of(engine, rank, step)
        engine.backward(loss)
        engine.step()
        total = loss.detach().float() / world
        dist.all_reduce(total)
        losses.append(total.item())
    return losses


def under_zero(rank: int, world: int, path: str) -> Any:
    start_deepspeed(rank)
    from wastenot.parallel.optim.zero import follow_zero

    def start(stage: int) -> Any:
        model = Mixture()
        return engine_of(model, Adapprox(model.named_parameters(), **OPTIONS), stage, {})

    with pytest.raises(RuntimeError, match="stands in the place of the matrices"):
        train(start(1), rank, world, range(1))
    model = Mixture()
    for told, optimizer, zero in (
        ("the engine's optimizer is SGD; give deepspeed.initialize", torch.optim.SGD, {}),
        ("offload_optimizer and offload_param keep", Adapprox, {"offload_optimizer": {"device": "cpu"}}),
        ("elastic_checkpoint wants flat state", Adapprox, {"elastic_checkpoint": True}),
    ):
        extra = {
            "zero_optimization": {"stage": 2, "reduce_bucket_size": 4000, **zero},
            "zero_force_ds_cpu_optimizer": False,
        }
        with pytest.raises(ValueError, match=told):
            follow_zero(engine_of(model, optimizer(model.parameters(), lr=0.1), 2, extra))
    found: dict[int, Any] = {}
    for stage in STAGES:
        engine = start(stage)
        optimizer = follow_zero(engine)
        losses = train(engine, rank, world, range(8))
        engine.save_checkpoint(f"{path}/{stage}")
        losses += train(engine, rank, world, range(8, STEPS))
        again = start(stage)
        follow_zero(again)
        again.load_checkpoint(f"{path}/{stage}")
        assert train(again, rank, world, range(8, STEPS)) == losses[8:], stage
        report = optimizer.report()
        found[stage] = losses, {each.name: each.ranks for each in report}, sum(each.allocated_bytes for each in report)
    return found


def test_under_zero_losses_and_ranks_are_those_of_whole_parameters(tmp_path: Path):
    expected, ranks, num_bytes = whole(2)
    first, second = run_ranks(2, under_zero, str(tmp_path), timeout=180)
    for stage in STAGES:
        (losses, *own), (_, *other) = first[stage], second[stage]
        assert losses == expected, stage
        assert own[0].keys().isdisjoint(other[0]), stage
        assert own[0] | other[0] == ranks, stage
        assert own[1] + other[1] == num_bytes, stage
        assert min(own[1], other[1]) > num_bytes / 3, stage


class Experts(nn.Module):
    """What DeepSpeed makes copies of: here a stack of two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Parameter(torch.randn(2, 13, 13) * 0.3)
        self.bias = nn.Parameter(torch.zeros(13))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.both[0]).tanh() @ self.both[1] + self.bias


class Sparse(nn.Module):
    def __init__(self) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__()
        torch.manual_seed(1)
        self.moe = MoE(13, Experts(), num_experts=2, ep_size=2, k=1, drop_tokens=False)
        self.stack = nn.Parameter(torch.randn(3, 13, 29) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.stack.dtype)
        return torch.einsum("bm,emn->bn", self.moe(x)[0] + x, self.stack)


def with_experts_under_zero(rank: int, world: int) -> Any:
    start_deepspeed(rank)
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
    from deepspeed.utils import groups

    from wastenot.parallel.optim.zero import follow_zero

    groups._create_expert_and_data_parallel(2)
    in_bf16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    found: list[Any] = []
    for stage, extra in (0, {}), (1, {}), (2, {}), (1, in_bf16):
        model = Sparse()
        grouped = split_params_into_different_moe_groups_for_optimizer(
            [{"params": [*model.parameters()], "name": "all"}]
        )
        experts = groups._get_expert_parallel_group("ep_size_2")
        engine = engine_of(model, Adapprox(grouped, **OPTIONS, expert_group=experts), stage, extra)
        optimizer = follow_zero(engine)
        losses = train(engine, rank, world, range(8))
        found.append((losses, sorted((each.shape, each.ranks) for each in optimizer.report())))
        if stage and rank == 1:
            stack = next(parameter for name, parameter in model.named_parameters() if name.endswith("both"))
            stack.register_hook(lambda grad: grad * math.nan)
        if stage:
            # DeepSpeed leaves out the whole step, on all ranks, before Adapprox is asked.
            train(engine, rank, world, range(8, 9))
            assert engine.skipped_steps == 1
            assert {each["step"].item() for each in optimizer.state.values() if each} == {8.0}
    return found


def test_experts_of_deepspeed_are_stepped_by_owners_within_their_own_group():
    ranks = run_ranks(4, with_experts_under_zero, timeout=180)
    (whole, all_ranks), *cut = ranks[0]
    for losses, _ in cut[:2]:
        assert losses == pytest.approx(whole, rel=1e-6)
    assert cut[2][0] == pytest.approx(whole, rel=0.02)
    # Each replica of the two halves of the experts owns a part at most, and together they own what each has at stage 0.
    experts = {(2, 13, 13), (13,)}
    for first, second in (ranks[0], ranks[2]), (ranks[1], ranks[3]):
        for (_, own), (_, other) in zip(first[1:], second[1:], strict=True):
            both = sorted(each for each in own + other if each[0] in experts)
            assert both == [each for each in first[0][1] if each[0] in experts]
    for stage in 1, 2:
        dense = sorted(each for rank in ranks for each in rank[stage][1] if each[0] not in experts)
        assert dense == [each for each in all_ranks if each[0] not in experts]


MEGATRON: dict[str, tuple[bool, bool]] = {
    "whole": (False, False),
    "distributed": (True, False),
    "in bf16": (True, True),
}
"""Whether its distributed optimizer is used, and bf16."""


def under_megatron(rank: int, world: int, path: str) -> Any:
    warnings.simplefilter("ignore")
    sys.path.append(str(Path(__file__).parents[1]))  # where the shim lies, beside the folders of tests
    import megatron_cpu_shim

    megatron_cpu_shim.install()
    with megatron_cpu_shim.devices_on_cpu():
        found = {name: in_megatron(rank, world, *how, f"{path}/{name}") for name, how in MEGATRON.items()}
        for distributed in False, True:
            with_a_nan(rank, distributed)
        return found


def start_megatron(distributed: bool, in_bf16: bool, **own: Any) -> Any:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.transformer_config import TransformerConfig

    from wastenot.parallel.optim.megatron_shards import put_adapprox

    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, bf16=in_bf16)
    dtype = torch.bfloat16 if in_bf16 else torch.float32
    model = Mixture().to(dtype)
    model.experts.allreduce = False  # pyright: ignore[reportAttributeAccessIssue]
    how = DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True)
    wrapped = DistributedDataParallel(config, how, model)
    settings = OptimizerConfig(
        optimizer="adam",
        lr=OPTIONS["lr"],
        weight_decay=OPTIONS["weight_decay"],
        adam_beta1=OPTIONS["betas"][0],
        adam_beta2=OPTIONS["betas"][1],
        clip_grad=0.0,
        bf16=in_bf16,
        params_dtype=dtype,
        use_distributed_optimizer=distributed,
    )
    optimizer = get_megatron_optimizer(settings, [wrapped], config_overrides={})
    options = {key: value for key, value in OPTIONS.items() if key not in {"lr", "betas", "weight_decay"}}
    return wrapped, optimizer, put_adapprox(optimizer, [wrapped], **options | own)


def with_a_nan(rank: int, distributed: bool) -> None:
    """In one expert of one rank of expert parallelism: no rank steps anything, and all go on together."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    experts = parallel_state.get_expert_model_parallel_group()
    for nonfinite in ("raise", "skip"):
        wrapped, optimizer, parts = start_megatron(
            distributed, False, expert_group=experts, rank_every=1, nonfinite=nonfinite
        )
        assert len(parts) == 2
        for step in range(5):
            wrapped.zero_grad_buffer()
            optimizer.zero_grad()
            loss_of(wrapped, rank, step).backward()
            wrapped.finish_grad_sync()
            before = copy.deepcopy(wrapped.state_dict())
            if step != 2:
                assert optimizer.step()[0], step
                continue
            if rank == 1:
                wrapped.module.experts.main_grad[1, 2, 3] = math.nan
            if nonfinite == "raise":
                name = "experts" if rank == 1 else "a parameter on another rank"
                with pytest.raises(FloatingPointError, match=f"gradient of {name}; nothing was stepped"):
                    optimizer.step()
            else:
                assert optimizer.step() == (False, None, None)
            assert all(torch.equal(value, before[name]) for name, value in wrapped.state_dict().items())
        for part in parts:
            assert part.skipped_steps == (nonfinite == "skip")
        steps = {each["step"].item() for part in parts for each in part.state.values() if each}
        assert steps == {4.0}


def in_megatron(rank: int, world: int, distributed: bool, in_bf16: bool, path: str) -> Any:
    from megatron.core import dist_checkpointing, parallel_state

    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel()
    dtype = torch.bfloat16 if in_bf16 else torch.float32

    def go_on(wrapped: Any, optimizer: Any, steps: range) -> list[float]:
        losses: list[float] = []
        for step in steps:
            wrapped.zero_grad_buffer()
            optimizer.zero_grad()
            x, y = batch(rank, step)
            loss = (wrapped(x.to(dtype)) - y).square().mean()
            loss.backward()
            wrapped.finish_grad_sync()
            optimizer.step()
            total = loss.detach().float() / world
            dist.all_reduce(total)
            losses.append(total.item())
        return losses

    wrapped, optimizer, parts = start_megatron(distributed, in_bf16)
    losses = go_on(wrapped, optimizer, range(8))
    weights, state = copy.deepcopy(wrapped.state_dict()), copy.deepcopy(optimizer.state_dict())
    if rank == 0:
        Path(path).mkdir()
    dist.barrier()
    dist_checkpointing.save({"optimizer": optimizer.sharded_state_dict({})}, path)
    losses += go_on(wrapped, optimizer, range(8, STEPS))
    again, restored, _ = start_megatron(distributed, in_bf16)
    again.load_state_dict(weights)
    restored.load_state_dict(state)
    assert go_on(again, restored, range(8, STEPS)) == losses[8:], (distributed, in_bf16)
    again, restored, _ = start_megatron(distributed, in_bf16)
    again.load_state_dict(weights)
    wanted = {"optimizer": restored.sharded_state_dict({}, is_loading=True)}
    restored.load_state_dict(dist_checkpointing.load(wanted, path)["optimizer"])
    assert go_on(again, restored, range(8, STEPS)) == losses[8:], (distributed, in_bf16)
    report = [each for part in parts for each in part.report()]
    return losses, {each.name: each.ranks for each in report}, sum(each.allocated_bytes for each in report)


def test_under_megatron_losses_and_ranks_are_those_of_whole_parameters(tmp_path: Path):
    expected, ranks, num_bytes = whole(2)
    first, second = run_ranks(2, under_megatron, str(tmp_path), timeout=180)
    for name, (distributed, in_bf16) in MEGATRON.items():
        (losses, *own), (_, *other) = first[name], second[name]
        assert losses == (pytest.approx(expected, rel=0.02) if in_bf16 else expected), name
        assert own[0] | other[0] == ranks or in_bf16, name
        if distributed:
            assert own[0].keys().isdisjoint(other[0]), name
            assert own[0].keys() | other[0].keys() == ranks.keys(), name
            # The stack, three fifths of the model, is one rank's.
            assert num_bytes / 6 < own[1] < num_bytes * 5 / 6, name
