"""Adapprox on real ranks: however a parameter is cut up, the optimizer is that of whole matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from spawned import run_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import Placement
from torch.nn.parallel import DistributedDataParallel

from wastenot.parallel.checkpoint import Checkpointer
from wastenot.parallel.config import ParallelConfig
from wastenot.parallel.mesh import make_mesh
from wastenot.parallel.optim import Adapprox
from wastenot.parallel.optim.layout import make_room
from wastenot.parallel.training_state import load_training_state, training_state

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*factors of the largest rank"),
    pytest.mark.filterwarnings("ignore:.*sequential all_gather"),
]

R, S0, S1, S2 = Replicate(), Shard(0), Shard(1), Shard(2)
OPTIONS = {
    "lr": 0.1,
    "betas": (0.9, 0.8),
    "weight_decay": 0.1,
    "max_rank": 0.45,
    "rank_threshold": 0.01,
    "rank_every": 3,
    "rounds": 2,
}

Cut = tuple[tuple[int, ...], tuple[Placement, ...]]
LINE: list[Cut] = [
    ((30, 34), (S0,)),
    ((30, 34), (S1,)),
    # Fewer rows or columns than ranks: some hold none.
    ((3, 40), (S0,)),
    ((40, 3), (S1,)),
    ((5, 20, 24), (S0,)),
    ((5, 20, 24), (S1,)),
    ((5, 24, 20), (S2,)),
    # Kept whole.
    ((7,), (S0,)),
    ((), (R,)),
    ((5, 1), (S0,)),
    ((1, 5), (S1,)),
    ((5, 2, 2), (S0,)),
    ((2, 5, 1), (S1,)),
]
SQUARE: list[Cut] = [
    ((30, 34), (S0, S1)),
    ((30, 34), (S1, S0)),
    ((30, 34), (R, S0)),
    ((30, 34), (S1, R)),
    ((30, 34), (S0, S0)),
    ((30, 34), (R, R)),
    ((5, 20, 24), (S0, S1)),
    ((5, 20, 24), (S2, S0)),
    ((5, 20, 24), (S1, S2)),
    ((7,), (R, S0)),
]


def weights_of(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def gradient(shape: tuple[int, ...], number: int, step: int) -> Tensor:
    """Of which the square has rank one, then more and, by even number, less; experts differ, one gets nothing."""
    fixed = torch.Generator().manual_seed(number)
    drawn = torch.Generator().manual_seed(1000 * number + step)
    noise = torch.randn(shape, generator=drawn, dtype=torch.float64)
    if len(shape) < 2:
        return noise
    left = torch.randn((*shape[:-1], 1), generator=fixed, dtype=torch.float64).mul(0.5).exp()
    right = torch.randn((*shape[:-2], 1, shape[-1]), generator=fixed, dtype=torch.float64).mul(0.5).exp()
    less = number % 2 == 0 and step == 6
    start, most = ((3, 0.1), (4, 0.05))[number % 2]
    spread = torch.tensor(0.0 if less or step < start else most * (1 if step > start else 0.5), dtype=torch.float64)
    if len(shape) == 3:
        spread = spread * torch.arange(shape[0]).view(-1, 1, 1) / 4
    grad = left * right * (1 + spread * noise) * (3 if less else 1)
    if len(shape) == 3 and shape[0] > 3:
        grad[1] = 0
        grad[2, 2:] = 0
    return grad


def placed(tensor: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    # Every rank has all of it: nothing is sent.
    return distribute_tensor(tensor.clone(), mesh, placements, src_data_rank=None)


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def moment(state: dict[str, Tensor]) -> Tensor:
    return full(state["Q"]) @ full(state["U"]).mT


def take_steps(optimizer: Adapprox, parameters: Sequence[Tensor], first: int, last: int) -> None:
    for step in range(first, last):
        for number, parameter in enumerate(parameters):
            grad = gradient(tuple(parameter.shape), number, step).to(parameter.dtype)
            if isinstance(parameter, DTensor):
                grad = placed(grad, parameter.device_mesh, parameter.placements)
            parameter.grad = grad
        optimizer.step()


def relative(here: Tensor, there: Tensor) -> float:
    return (torch.dist(here.double(), there.double()) / there.double().norm().clamp(min=1e-30)).item()


def check_equal(
    optimizer: Adapprox, parameters: Sequence[Tensor], other: Adapprox, expected: Sequence[Tensor], tolerance: float
) -> None:
    for number, (parameter, whole) in enumerate(zip(parameters, expected, strict=True)):
        name = f"parameter {number}, {list(whole.shape)} as {getattr(parameter, 'placements', 'whole')}"
        state, reference = optimizer.state[parameter], other.state[whole]
        assert state.keys() == reference.keys(), name
        errors = {"weight": relative(full(parameter), full(whole))}
        if "Q" in state:
            ranks, expected_ranks = full(state["rank"]), full(reference["rank"])
            assert ranks.equal(expected_ranks), f"{name}: ranks {ranks.tolist()}, not {expected_ranks.tolist()}"
            assert full(state["Q"]).size(-1) == ranks.max()
            # By column it is as near as the columns are far apart.
            errors["Q"] = relative(full(state["Q"]), full(reference["Q"])) * tolerance**0.5
            errors["Q U^T"] = relative(moment(state), moment(reference))
            # The root of what rounding leaves is far larger than it.
            for key in {"xi", "true_xi"} & state.keys():
                errors[f"{key}^2"] = torch.dist(full(state[key]).square(), full(reference[key]).square()).item()
        for key in {"exp_avg", "exp_avg_sq"} & state.keys():
            errors[key] = relative(full(state[key]), full(reference[key]))
        for key, error in errors.items():
            assert error <= tolerance, f"{name}: {key} is off by {error:.2g}"


def check_same_bits(tensor: Tensor, group: dist.ProcessGroup | None = None) -> None:
    copies = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(copies, tensor.contiguous(), group=group)
    assert all(copy.equal(tensor) for copy in copies)


# Shards of whole matrices


def step_both(mesh: DeviceMesh, cuts: list[Cut], dtype: torch.dtype, tolerance: float, **options: Any) -> set[int]:
    """Steps shards and whole matrices; returns the ranks that were met."""
    expected = weights_of([shape for shape, _ in cuts], dtype)
    parameters = [placed(weight, mesh, placements) for weight, (_, placements) in zip(expected, cuts, strict=True)]
    optimizer, other = (Adapprox(some, **OPTIONS | options) for some in (parameters, expected))
    met = set()
    for first, last in ((0, 4), (4, 7)):
        take_steps(optimizer, parameters, first, last)
        take_steps(other, expected, first, last)
        check_equal(optimizer, parameters, other, expected, tolerance)
        for state in other.state.values():
            met |= set(state["rank"].reshape(-1).tolist()) if "rank" in state else set()
    for parameter in parameters:
        for dim, placement in enumerate(parameter.placements):
            if placement == R and "Q" in optimizer.state[parameter]:
                for key in ("Q", "U", "rank", "xi"):
                    check_same_bits(local(optimizer.state[parameter][key]), mesh.get_group(dim))
    return met


def cut_in_two(rank: int, world: int) -> set[int]:
    mesh = init_device_mesh("cpu", (world,))
    double = torch.float64
    met = step_both(mesh, LINE, double, 1e-12, start="warm", clamp="exact", momentum="fp32", true_error=True)
    met |= step_both(mesh, LINE, double, 1e-12, start="gaussian", clamp="none", momentum="bf16", guidance=True)
    met |= step_both(mesh, LINE, torch.float32, 1e-5, start="gaussian", clamp="exact", momentum="fp32")
    return met | step_both(mesh, LINE, torch.float32, 1e-5, start="warm", clamp="none", momentum="none")


def cut_in_four(rank: int, world: int) -> set[int]:
    line, square = init_device_mesh("cpu", (world,)), init_device_mesh("cpu", (2, 2))
    double = torch.float64
    met = step_both(line, LINE, double, 1e-12, start="warm", clamp="none", guidance=True, tile=60)
    met |= step_both(line, LINE, double, 1e-12, start="gaussian", clamp="exact", momentum="none", rounds=1)
    return met | step_both(
        square, SQUARE, double, 1e-12, start="warm", clamp="exact", clip_threshold=0.3, true_error=True
    )


@pytest.mark.parametrize(("world", "cut"), [(2, cut_in_two), (4, cut_in_four)])
def test_shards_are_stepped_as_whole_matrices_are(world: int, cut: Any):
    met, *_ = run_ranks(world, cut)
    assert len(met) > 3, f"ranks grew and shrank, met were {met}"


def quantized(rank: int, world: int) -> None:
    """Blocks of 128 columns do not reach over ranks."""
    mesh = init_device_mesh("cpu", (world,))
    same: list[Cut] = [((30, 34), (S0,)), ((8, 256), (S1,)), ((5, 20, 24), (S0,)), ((5, 20, 24), (S1,)), ((), (R,))]
    step_both(mesh, same, torch.float64, 1e-12, momentum="int8")
    shapes = [(30, 34), (5, 20, 24), (1, 1), (7,)]
    expected = weights_of(shapes)
    parameters = [placed(weight, mesh, [Shard(weight.dim() - 1)]) for weight in expected]
    optimizer, other = (Adapprox(some, **OPTIONS, momentum="int8") for some in (parameters, expected))
    take_steps(optimizer, parameters, 0, 7)
    take_steps(other, expected, 0, 7)
    for parameter, whole in zip(parameters, expected, strict=True):
        state = optimizer.state[parameter]
        blocks = full(state["exp_avg_scale"])
        assert blocks.shape == (*whole.shape[:-1], min(world, whole.size(-1)))
        if "Q" in state:
            assert relative(moment(state), moment(other.state[whole])) < 1e-12
        error = relative(full(parameter), whole)
        assert error < 1e-2
        assert (error > 1e-6) == (whole.numel() > 1), "smaller blocks are finer"


def test_moments_in_eight_bits_are_those_of_whole_rows_where_128_columns_stay_together():
    run_ranks(2, quantized)


# Shards as matrices of their own


def apart(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    cuts: list[Cut] = [
        ((61, 40), (S0,)),
        ((40, 61), (S1,)),
        ((6, 40, 24), (S0,)),
        ((5, 40, 24), (S1,)),
        ((5, 24, 40), (S2,)),
        ((7,), (S0,)),
    ]
    wholes = weights_of([shape for shape, _ in cuts])
    shards = [placed(weight, mesh, placements) for weight, (_, placements) in zip(wholes, cuts, strict=True)]
    alone = [local(shard).clone() for shard in shards]
    sent: list[int] = []
    all_reduce = dist.all_reduce

    def record(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    for start in ("warm", "gaussian"):
        options = OPTIONS | {"start": start, "max_rank": 0.3}
        optimizer, other = Adapprox(shards, **options, sharding="local"), Adapprox(alone, **options)
        for step in range(7):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(dist, "all_reduce", record)
                take_steps(optimizer, shards, step, step + 1)
            for shard, part in zip(shards, alone, strict=True):
                assert shard.grad is not None
                part.grad = local(shard.grad)
            other.step()
        for shard, part in zip(shards, alone, strict=True):
            state, reference = optimizer.state[shard], other.state[part]
            assert relative(local(shard), part) < 1e-12
            if "Q" in state:
                assert local(state["rank"]).reshape(-1).equal(reference["rank"].reshape(-1))
                product = local(state["Q"]) @ local(state["U"]).mT
                assert relative(product, reference["Q"] @ reference["U"].mT) < 1e-12
                check_same_bits(torch.tensor(local(state["Q"]).size(-1)))
    assert set(sent) == {1}, "only the largest gradient and the largest rank are agreed on"


def test_local_shards_are_stepped_as_matrices_of_their_own_without_sending_any():
    run_ranks(2, apart)


# Data parallel


class Net(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(5)
        super().__init__(nn.Linear(20, 48), nn.Tanh(), nn.Linear(48, 24), nn.LayerNorm(24))
        self.double()


def train(net: nn.Module, optimizer: Adapprox, part: slice) -> list[float]:
    """Steps on the mean over a batch of 8, of which this rank has `part`."""
    generator = torch.Generator().manual_seed(9)
    x, target = (torch.randn(8, n, generator=generator, dtype=torch.float64)[part] for n in (20, 24))
    losses = []
    for _ in range(8):
        loss = (net(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def part_of(rank: int, world: int) -> slice:
    return slice(rank * 8 // world, (rank + 1) * 8 // world)


def train_replicas(rank: int, world: int) -> None:
    net = DistributedDataParallel(Net())
    optimizer = Adapprox(net.parameters(), **OPTIONS)
    step = optimizer.step

    def step_alone() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(dist, "all_reduce")
            step()

    optimizer.step = step_alone
    train(net, optimizer, part_of(rank, world))
    for parameter in net.parameters():
        for tensor in (parameter.detach(), *optimizer.state[parameter].values()):
            check_same_bits(tensor)


def test_replicas_keep_the_same_bits_without_communication():
    run_ranks(2, train_replicas)


def train_fully_sharded(rank: int, world: int) -> None:
    whole = Net()
    other = Adapprox(whole.parameters(), **OPTIONS)
    expected = train(whole, other, slice(None))
    assert expected[-1] < 0.7 * expected[0]
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    kinds = set()
    for kind in ("data", "hybrid", "tensor"):
        net, mesh, part = Net(), init_device_mesh("cpu", (world,)), part_of(rank, world)
        layers = [net[0], net[2], net]
        if kind == "hybrid":
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        if kind == "tensor":
            parallelize_module(net, square["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
            mesh, part, layers = square["data"], part_of(square["data"].get_local_rank(), 2), [net]
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        kinds |= {str(parameter.placements) for parameter in net.parameters() if isinstance(parameter, DTensor)}
        optimizer = Adapprox(net.parameters(), **OPTIONS)
        train(net, optimizer, part)
        parameters, wholes = list(net.parameters()), list(whole.parameters())
        check_equal(optimizer, parameters, other, wholes, 1e-9)
    assert any("StridedShard" in kind for kind in kinds), kinds


def test_fully_sharded_modules_train_as_whole_ones_do():
    run_ranks(4, train_fully_sharded)


# Gradients


def refuse(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))

    def fresh(**options: Any) -> tuple[list[Tensor], Adapprox]:
        cut = [placed(weight, mesh, [S0]) for weight in weights_of([(30, 34), (40, 24), (7,)])]
        parameters = [*cut, *weights_of([(2, 20, 24)])]
        named = list(zip(("left", "right", "vector", "experts"), parameters, strict=True))
        optimizer = Adapprox(named, **OPTIONS, expert_group=dist.group.WORLD, **options)
        take_steps(optimizer, parameters, 0, 2)
        return parameters, optimizer

    for bad in (1, 2, 3):
        for options in ({}, {"nonfinite": "skip"}):
            parameters, optimizer = fresh(**options)
            before = [local(parameter).clone() for parameter in parameters]
            state = {key: local(value).clone() for s in optimizer.state.values() for key, value in s.items()}
            grad = parameters[bad].grad
            assert grad is not None
            if rank == world - 1:
                local(grad).view(-1)[-1] = math.nan if bad == 1 else -math.inf
            if options:
                optimizer.step()
                assert optimizer.skipped_steps == 1
            else:
                known = bad < 3 or rank == world - 1
                name = ("left", "right", "vector", "experts")[bad] if known else "a parameter on another rank"
                with pytest.raises(FloatingPointError, match=f"gradient of {name};"):
                    optimizer.step()
            after = {key: local(value) for s in optimizer.state.values() for key, value in s.items()}
            assert all(value.equal(after[key]) for key, value in state.items())
            assert all(local(p).equal(old) for p, old in zip(parameters, before, strict=True))

    # Gradients need not be placed as their parameters are: autograd leaves sums to be made.
    whole = weights_of([(30, 34), (30, 34)])
    parameters = [placed(weight, mesh, [placement]) for weight, placement in zip(whole, (R, S0), strict=True)]
    optimizer, other = Adapprox(parameters, **OPTIONS), Adapprox(whole, **OPTIONS)
    for step in range(4):
        for number, weight in enumerate(whole):
            weight.grad = gradient((30, 34), number, step)
            part = weight.grad * (0.25 if rank else 1 - 0.25 * (world - 1))
            parameters[number].grad = DTensor.from_local(part, mesh, [Partial()])
        optimizer.step()
        other.step()
    check_equal(optimizer, parameters, other, whole, 1e-12)


def test_a_bad_gradient_on_one_rank_stops_all_and_partial_sums_are_summed():
    run_ranks(2, refuse)


# Experts as plain stacks


class Experts(nn.Module):
    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        self.dense, whole = (nn.Parameter(weight) for weight in weights_of([(30, 34), (8, 20, 24)]))
        self.own = slice(rank * 8 // world, (rank + 1) * 8 // world)
        self.experts = nn.Parameter(whole[self.own].detach().clone())

    def train_steps(self, optimizer: Adapprox, first: int, last: int) -> None:
        for step in range(first, last):
            self.dense.grad = gradient((30, 34), 0, step)
            self.experts.grad = gradient((8, 20, 24), 2, step)[self.own].clone()
            optimizer.step()


def is_expert(name: str) -> bool:
    return name == "experts"


def train_experts(rank: int, world: int, directory: Path) -> None:
    whole = Experts(0, 1)
    other = Adapprox(whole.parameters(), **OPTIONS)
    meshes = {expert: make_mesh(ParallelConfig(expert=expert), "cpu") for expert in (4, 2)}

    def check(experts: Experts, optimizer: Adapprox) -> None:
        state, reference = optimizer.state[experts.experts], other.state[whole.experts]
        assert state["Q"].size(-1) == reference["Q"].size(-1) == reference["rank"].max()
        assert state["rank"].equal(reference["rank"][experts.own])
        assert relative(experts.experts.detach(), whole.experts[experts.own].detach()) < 1e-12
        assert relative(moment(state), moment(reference)[experts.own]) < 1e-12

    def new(expert: int) -> tuple[Experts, Adapprox]:
        mesh = meshes[expert]
        experts = Experts(mesh.expert.rank, mesh.expert.size)
        return experts, Adapprox(experts.parameters(), **OPTIONS, expert_group=mesh.expert.group)

    straight, optimizer = new(4)
    checkpointer = Checkpointer(directory, meshes[4])
    for first, last in ((0, 4), (4, 7)):
        straight.train_steps(optimizer, first, last)
        whole.train_steps(other, first, last)
        check(straight, optimizer)
        assert optimizer.state[straight.experts]["Q"].size(-1) > 1 or last == 7
        checkpointer.save(last, training_state(straight, optimizer, meshes[4], is_expert), {})
    checkpointer.close()
    moved, optimizer = new(2)
    load_training_state(directory / "step-00000004", moved, optimizer, meshes[2], is_expert)
    moved.train_steps(optimizer, 4, 7)
    check(moved, optimizer)


def test_experts_on_their_ranks_have_the_factors_of_the_whole_stack_at_any_expert_parallel_degree(tmp_path: Path):
    run_ranks(4, train_experts, tmp_path)


# Checkpoints of torch's own kind


class Parts(nn.Module):
    """Parameters cut up over all ranks; whole ones on a single rank."""

    def __init__(self, world: int) -> None:
        super().__init__()
        cuts: list[Cut] = [
            ((30, 34), (S0,)),
            ((34, 30), (S1,)),
            ((6, 20, 24), (S0,)),
            ((6, 20, 24), (S1,)),
            ((7,), (S0,)),
        ]
        weights = weights_of([shape for shape, _ in cuts])
        if world > 1:
            mesh = init_device_mesh("cpu", (world,))
            weights = [placed(weight, mesh, placements) for weight, (_, placements) in zip(weights, cuts, strict=True)]
        self.parts = nn.ParameterList(weights)

    def optimizer(self, **options: Any) -> Adapprox:
        first, *others = self.parts
        return Adapprox([{"params": [first], "momentum": "int8"}, {"params": others}], **OPTIONS | options)


def states(parts: Parts, optimizer: Adapprox) -> dict[str, Any]:
    return {"model": get_model_state_dict(parts), "optimizer": get_optimizer_state_dict(parts, optimizer)}


def restore(parts: Parts, optimizer: Adapprox, directory: Path) -> None:
    state = states(parts, optimizer)
    make_room(state, FileSystemReader(directory).read_metadata())
    load(state, checkpoint_id=directory)
    set_model_state_dict(parts, state["model"])
    set_optimizer_state_dict(parts, optimizer, state["optimizer"])


def ends(parts: Parts, optimizer: Adapprox) -> list[Tensor]:
    found = [full(parameter.detach()) for parameter in parts.parts]
    return found + [moment(state) for state in optimizer.state.values() if "Q" in state]


def save_and_go_on(rank: int, world: int, directory: Path) -> list[Tensor]:
    for sharding in ("local", "exact"):
        parts = Parts(world)
        optimizer = parts.optimizer(sharding=sharding)
        take_steps(optimizer, list(parts.parts), 0, 4)
        save(states(parts, optimizer), checkpoint_id=directory / sharding)
        take_steps(optimizer, list(parts.parts), 4, 7)
        again = Parts(world)
        other = again.optimizer(sharding=sharding)
        restore(again, other, directory / sharding)
        take_steps(other, list(again.parts), 4, 7)
        for old, new in zip(parts.parts, again.parts, strict=True):
            assert local(old).equal(local(new))
            assert optimizer.state[old].keys() == other.state[new].keys()
            for key, value in optimizer.state[old].items():
                assert local(value).equal(local(other.state[new][key])), key
    return ends(parts, optimizer)  # pyright: ignore[reportPossiblyUnboundVariable]


def load_and_go_on(rank: int, world: int, directory: Path, stepped: bool) -> list[Tensor]:
    parts = Parts(world)
    optimizer = parts.optimizer()
    if stepped:
        take_steps(optimizer, list(parts.parts), 0, 7)
    restore(parts, optimizer, directory / "exact")
    take_steps(optimizer, list(parts.parts), 4, 7)
    return ends(parts, optimizer)


def test_training_goes_on_from_torchs_checkpoints_with_the_same_bits_and_on_fewer_ranks(tmp_path: Path):
    straight, *_ = run_ranks(4, save_and_go_on, tmp_path)
    for world, stepped in ((2, True), (1, False)):
        moved, *_ = run_ranks(world, load_and_go_on, tmp_path, stepped)
        for expected, found in zip(straight, moved, strict=True):
            assert relative(found, expected) < 1e-12
