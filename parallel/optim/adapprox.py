"""Adapprox: AdamW whose second moment is a low-rank product of adaptive rank (METHODS A1-A9; arXiv 2403.14958)."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement

from ...kernels.backend import Backend
from .factored import FactoredStep, Matrices
from .factors import as_matrices, is_stack, matrix_size, new_factors, placements_of, wide
from .finite import are_too_large, not_finite
from .full import step_full
from .momentum import Momentum, new_momentum
from .rank import is_factored, max_rank
from .report import ParameterReport, report_of
from .shards import WHOLE, align_gradient, local, shards_of
from .true_moment import new_true_moment

_OWN = ("nonfinite", "expert_group", "tile", "backend", "skipped_steps")
"""Options of the whole optimizer, and what it counts."""

_FACTORS = ("Q", "U", "rank", "xi", "true_xi")
"""State that is shaped as the factors are; all else is shaped as the parameter."""

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class Given:
    """A parameter as the optimizer was given it; engines may put others in its place."""

    name: str
    place: int
    """Among all parameters of the model: what its random columns are drawn by."""
    is_matrix: bool


class Adapprox(torch.optim.Optimizer):
    """AdamW's update, clipped, with its second moment in (m + n) k numbers a matrix instead of m n.

        V = beta2 max(Q U^T, 0) + (1 - beta2) G^2        M^ = G / (sqrt(V / c2) + eps),   M^ /= max(1, RMS(M^) / d)
        M = beta1 M + (1 - beta1) M^                     W -= lr (M / c1 + weight_decay W),   c = 1 - beta^t
        Q, U = the best factors of V that a subspace iteration finds, of a rank that grows until they are near enough

    Matrices [m, n] and stacks of them [E, m, n] (experts, each with a rank of its own) are factored wherever factors
    of the largest rank are smaller: (m + n) max_rank < m n. All else keeps its second moment whole. More than three
    dims count as [first, all others].

    Parameters may be plain tensors or DTensors sharded by rows, columns or experts (FSDP2, tensor and expert
    parallel). Randomness is a function of (seed, place of the parameter, step): replicas stay equal without
    communication, and state holds tensors only. A group may say the `places` of its parameters itself, where the model
    has parameters that are not this optimizer's, or in another order.

    Engines that put flat partitions in the place of parameters (DeepSpeed's ZeRO, Megatron's distributed optimizer)
    need `zero.follow_zero` or `megatron_shards.put_adapprox`, beside this module: a vector has no factors.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        clip_threshold: float = 1.0,
        bias_correction: bool = True,
        momentum: Momentum = "fp32",
        start: Literal["warm", "gaussian"] = "warm",
        rounds: int = 5,
        max_rank: float | int = 0.25,
        rank_threshold: float = 0.01,
        rank_every: int = 10,
        clamp: Literal["exact", "none"] = "exact",
        guidance: bool = False,
        sharding: Literal["exact", "local"] = "exact",
        true_error: bool = False,
        nonfinite: Literal["raise", "skip"] = "raise",
        expert_group: dist.ProcessGroup | None = None,
        seed: int = 0,
        tile: int = 2**22,
        backend: Backend = "auto",
    ) -> None:
        """All but the last five may be set by parameter group.

        Args:
            params: parameters, groups of them, or (name, parameter) pairs: errors and reports then have names.
            lr: learning rate.
            betas: decay of both moments.
            eps: added to the square root.
            weight_decay: decoupled.
            clip_threshold: d, the largest root mean square of one matrix's update.
            bias_correction: divides both moments by what they lack in the first steps, as AdamW does; the paper does
                not, and the first 1 / (1 - beta2) steps are longer then, up to the clip.
            momentum: storage of the first moment: `fp32`, `bf16`, `int8` (blocks of 128), or `none`, which makes
                beta1 0.
            start: `gaussian` is the paper's: `rounds` from random columns each step. `warm` takes one round from the
                last factors.
            rounds: l, of a random start.
            max_rank: a part of the smaller side, or a number of columns where it is an int.
            rank_threshold: relative error of one step's factors at which the rank stops growing.
            rank_every: steps between searches for the rank.
            clamp: `none` factors V with the product's negative entries, without forming it.
            guidance: longer steps where the update agrees with the first moment (METHODS A4).
            sharding: `exact` makes the factors of whole matrices; `local` takes each shard as a matrix.
            true_error: keeps the average of squares whole as well, only to report how far the factors are from it.
            nonfinite: what a NaN or infinite gradient does: FloatingPointError before anything changed, or no step.
            expert_group: ranks that hold other experts of stacks [e, m, n]: their factors get room for the largest
                rank of all, as a checkpoint of [E, m, k] wants.
            seed: of the random columns.
            tile: elements of the second moment that exist at once; one row at least. Kernels hold a block.
            backend: what runs a step's passes: Triton kernels on a CUDA device (`auto`), or `torch`.

        Raises:
            ValueError: options or dtypes that cannot be.
        """
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "clip_threshold": clip_threshold,
            "bias_correction": bias_correction,
            "momentum": momentum,
            "start": start,
            "rounds": rounds,
            "max_rank": max_rank,
            "rank_threshold": rank_threshold,
            "rank_every": rank_every,
            "clamp": clamp,
            "guidance": guidance,
            "sharding": sharding,
            "true_error": true_error,
            "seed": seed,
        }
        if nonfinite not in ("raise", "skip"):
            raise ValueError(f"nonfinite: {nonfinite!r} is unknown; use raise or skip")
        if tile < 1:
            raise ValueError(f"tile: {tile} holds no element; use for example 262144")
        self.nonfinite, self.expert_group, self.tile = nonfinite, expert_group, tile
        self.backend: Backend = backend
        self.skipped_steps = 0
        self._seconds: dict[Tensor, float] = {}
        self._warned: set[Tensor] = set()
        self.given: dict[Tensor, Given] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; raises ValueError for options or dtypes that cannot be."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_options(group)
            for parameter in group["params"]:
                if not parameter.is_floating_point():
                    raise ValueError(f"a parameter of {parameter.dtype} cannot be stepped; use floating point")
        except ValueError:
            self.param_groups.pop()
            raise
        names = group.get("param_names") or [""] * len(group["params"])
        for parameter, name, place in zip(group["params"], names, self._places(group), strict=True):
            self.given[parameter] = Given(name, place, parameter.dim() >= 2)

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in _OWN}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Also what loading a state_dict comes through: options that it lacks are this optimizer's own.
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self.__dict__.setdefault("_seconds", {})
        self.__dict__.setdefault("_warned", set())
        self.__dict__.setdefault("given", {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; state keeps its own dtypes. Raises ValueError for state of other shapes, and changes nothing."""
        check_state(self.param_groups, state_dict)
        super().load_state_dict(state_dict)
        # torch casts state to the dtype of its parameter: what was saved is put back.
        for parameter, saved in _saved_state(self.param_groups, state_dict):
            for key, value in saved.items():
                device = value.device if key == "step" else local(parameter).device
                self.state[parameter][key] = value.detach().clone().to(device)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step over all parameters that have a gradient.

        Raises FloatingPointError for a NaN or infinite gradient (unless they are skipped) and RuntimeError for a
        sparse one; nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._gradients_are_finite():
            self.skipped_steps += 1
            return loss
        with torch.autocast(self._device().type, enabled=False):
            self.step_checked()
        return loss

    def step_checked(self) -> None:
        """As `step`, of gradients that the caller knows to be finite, where no gradient is recorded."""
        for group in self.param_groups:
            places = dict(zip(group["params"], self._places(group), strict=True))
            present = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in present:
                if not self.state[parameter]:
                    self._create(group, parameter)
                self.state[parameter]["step"] += 1
            for parameter in present:
                if "Q" not in self.state[parameter]:
                    start = time.perf_counter()
                    shards = shards_of(parameter, group["sharding"] == "exact")
                    step_full(parameter, self.state[parameter], group, shards)
                    self._took(parameter, start)
            for matrices in self._matrices(group, [p for p in present if "Q" in self.state[p]], places):
                start = time.perf_counter()
                FactoredStep(matrices, group, self.tile, self.backend).run()
                for parameter in matrices.parameters:
                    self._took(parameter, start, len(matrices.parameters))
                self._warn(matrices, group)

    def report(self) -> list[ParameterReport]:
        """Rank, error, bytes and seconds of each parameter that has state, in their order."""
        return [
            report_of(self._name(parameter), parameter, self.state[parameter], self._seconds.get(parameter, 0.0))
            for group in self.param_groups
            for parameter in group["params"]
            if parameter in self.state
        ]

    def placements(self, parameter: DTensor, key: str) -> Sequence[Placement]:
        """How the state of `parameter` under `key` lies over its ranks."""
        return placements_of(parameter, key) if key in _FACTORS else parameter.placements

    def _places(self, group: dict[str, Any]) -> Sequence[int]:
        """Of a group's parameters among those of the whole model."""
        if "places" in group:
            return group["places"]
        before = next(i for i, other in enumerate(self.param_groups) if other is group)
        first = sum(len(other["params"]) for other in self.param_groups[:before])
        return range(first, first + len(group["params"]))

    def _create(self, group: dict[str, Any], parameter: Tensor) -> None:
        if parameter not in self.given:
            self._refuse_partitions(parameter)
        state = self.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32)
        size = matrix_size(parameter)
        if size is not None and is_factored(*size, group["max_rank"]):
            state.update(new_factors(parameter, shards_of(parameter, group["sharding"] == "exact")))
            if group["true_error"]:
                state.update(new_true_moment(parameter, state["xi"]))
        else:
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=wide(parameter.dtype))
        state.update(new_momentum(parameter, group["momentum"], as_matrix="Q" in state))

    def _refuse_partitions(self, parameter: Tensor) -> None:
        there = any(other.dim() >= 2 for group in self.param_groups for other in group["params"])
        if not there and any(given.is_matrix for given in self.given.values()):
            raise RuntimeError(
                f"a vector of {parameter.numel()} numbers stands in the place of the matrices this optimizer was made "
                f"of, as flat partitions do, and has no factors; call wastenot.parallel.optim.zero.follow_zero(engine) "
                f"after deepspeed.initialize, or see docs/adapprox.md for Megatron"
            )

    def _matrices(self, group: dict[str, Any], present: list[Tensor], places: dict[Tensor, int]) -> list[Matrices]:
        """What is stepped together: small matrices of one shape as a stack, all else by itself."""
        exact = group["sharding"] == "exact"
        found: list[Matrices] = []
        together: dict[Any, list[Tensor]] = {}
        for parameter in present:
            shards = shards_of(parameter, exact)
            if is_stack(parameter) and self.expert_group is not None:
                shards = replace(shards, matrices=(*shards.matrices, self.expert_group))
            if parameter.dim() != 2 or shards != WHOLE or 2 * parameter.numel() > self.tile:
                found.append(Matrices([parameter], [self.state[parameter]], [places[parameter]], shards))
                continue
            step = self.state[parameter]["step"].item()
            together.setdefault((parameter.shape, parameter.dtype, parameter.device, step), []).append(parameter)
        for same in together.values():
            count = self.tile // same[0].numel()
            for i in range(0, len(same), count):
                some = same[i : i + count]
                found.append(Matrices(some, [self.state[p] for p in some], [places[p] for p in some], WHOLE))
        return found

    def _device(self) -> torch.device:
        return next(local(p).device for group in self.param_groups for p in group["params"])

    def _gradients_are_finite(self) -> bool:
        """Whether all ranks may step; False where the step is to be skipped.

        Raises on all ranks alike. A gradient whose square overflows counts as infinite.
        """
        present: list[tuple[Tensor, Tensor]] = []
        stacks: list[tuple[Tensor, bool]] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                align_gradient(parameter)
                grad = parameter.grad
                if grad is not None and (grad.is_sparse or grad.layout != torch.strided):
                    raise RuntimeError(f"{self._name(parameter)} has a sparse gradient; make it dense first")
                if grad is not None:
                    present.append((parameter, grad))
                if self.expert_group is not None and is_stack(parameter):
                    stacks.append((parameter, grad is not None))
        device = self._device()
        bad = are_too_large([local(grad) for _, grad in present], device)
        for flag, (parameter, _) in zip(bad[1:], present, strict=True):
            shards_of(parameter, True).largest(flag)
        wrong = bad.amax()
        if self.expert_group is not None:
            has = torch.tensor([float(there) for _, there in stacks], device=device)
            told = torch.cat([wrong.view(1), has, 1 - has])
            dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self.expert_group)
            wrong, (some, others) = told[0], told[1:].view(2, -1)
            torn = [name for (name, _), both in zip(stacks, (some * others).tolist(), strict=True) if both]
            if torn:
                raise RuntimeError(
                    f"{self._name(torn[0])} has a gradient on some ranks of expert_group only; give the others zeros"
                )
        if not wrong.item():
            return True
        if self.nonfinite == "skip":
            return False
        names = [self._name(present[i][0]) for i, value in enumerate(bad[1:].tolist()) if value]
        raise not_finite(names, " nothing was stepped;")

    def _warn(self, matrices: Matrices, group: dict[str, Any]) -> None:
        """Says once per parameter that the largest rank is too small for it, when V is the average of many squares."""
        settled = matrices.steps * (1 - group["betas"][1]) >= 1
        if not settled or (matrices.steps - 1) % group["rank_every"]:
            return
        for parameter, state in zip(matrices.parameters, matrices.states, strict=True):
            if parameter in self._warned:
                continue
            size = matrix_size(parameter) if matrices.shards.exact else as_matrices(parameter).shape[1:]
            assert size is not None
            most = max_rank(*size, group["max_rank"])
            if most == min(size):
                continue
            rank, xi = local(state["rank"]), local(state["xi"])
            short = (rank >= most) & (xi > group["rank_threshold"])
            if bool(short.any()):
                self._warned.add(parameter)
                warnings.warn(
                    f"{self._name(parameter)}: factors of the largest rank, {most}, leave an error of "
                    f"{xi.max().item():.2g}, above {group['rank_threshold']:g}; a larger max_rank would hold more",
                    stacklevel=6,
                )

    def _took(self, parameter: Tensor, start: float, shared: int = 1) -> None:
        took = (time.perf_counter() - start) / shared
        self._seconds[parameter] = self._seconds.get(parameter, 0.0) + took

    def _name(self, parameter: Tensor) -> str:
        for number, group in enumerate(self.param_groups):
            for i, other in enumerate(group["params"]):
                if other is parameter:
                    names = group.get("param_names")
                    return names[i] if names else f"parameter {i} of group {number}, {list(parameter.shape)}"
        return f"a parameter {list(parameter.shape)}"


_CHOICES = {
    "momentum": ("fp32", "bf16", "int8", "none"),
    "start": ("warm", "gaussian"),
    "clamp": ("exact", "none"),
    "sharding": ("exact", "local"),
}


def _check_options(group: dict[str, Any]) -> None:
    for name, choices in _CHOICES.items():
        if group[name] not in choices:
            raise ValueError(f"{name}: {group[name]!r} is unknown; use one of {', '.join(choices)}")
    for name in ("lr", "weight_decay", "rank_threshold"):
        if not group[name] >= 0:
            raise ValueError(f"{name}: {group[name]} is not 0 or more")
    for name in ("eps", "clip_threshold"):
        if not group[name] > 0:
            raise ValueError(f"{name}: {group[name]} is not positive; use for example {1e-8 if name == 'eps' else 1.0}")
    for name, beta in zip(("beta1", "beta2"), group["betas"], strict=True):
        if not 0 <= beta < 1:
            raise ValueError(f"{name}: {beta} is outside [0, 1); use for example 0.9")
    for name in ("rounds", "rank_every"):
        if not (isinstance(group[name], int) and group[name] >= 1):
            raise ValueError(f"{name}: {group[name]} is not a whole number of 1 or more")
    limit = group["max_rank"]
    if isinstance(limit, bool) or not (limit >= 1 if isinstance(limit, int) else 0 < limit <= 1):
        raise ValueError(f"max_rank: {limit} is neither a part in (0, 1] nor a number of columns; use 0.25")


def _saved_state(groups: list[dict[str, Any]], state_dict: dict[str, Any]) -> list[tuple[Tensor, dict[str, Any]]]:
    """Each parameter with the state that was saved of the one in its place."""
    saved_groups = state_dict["param_groups"]
    return [
        (parameter, state_dict["state"][number])
        for group, saved in zip(groups, saved_groups, strict=True)
        for parameter, number in zip(group["params"], saved["params"], strict=True)
        if number in state_dict["state"]
    ]


def check_state(groups: list[dict[str, Any]], state_dict: dict[str, Any]) -> None:
    """Raises ValueError where saved state is not that of parameters of these shapes."""
    counts = [len(group["params"]) for group in groups]
    saved_counts = [len(group["params"]) for group in state_dict["param_groups"]]
    if counts != saved_counts:
        raise ValueError(f"the state is of groups of {saved_counts} parameters, these are {counts}")
    if not all("rank_threshold" in group for group in state_dict["param_groups"]):
        raise ValueError("the state is that of another optimizer; load the state of an Adapprox")
    for place, (parameter, saved) in enumerate(_saved_state(groups, state_dict)):
        part = as_matrices(parameter) if "Q" in saved and parameter.dim() >= 2 else None
        shapes = {key: tuple(local(value).shape) for key, value in saved.items()}
        parameter_shape = tuple(local(parameter).shape)
        fits = True
        if part is not None:
            lead = tuple(part.shape[:1]) if is_stack(parameter) else ()
            k = shapes["Q"][-1]
            fits = shapes["Q"] == (*lead, part.size(1), k) and shapes["U"] == (*lead, part.size(2), k)
        elif "exp_avg_sq" not in saved:
            fits = False
        for key in ("exp_avg", "exp_avg_sq"):
            fits = fits and shapes.get(key, parameter_shape) == parameter_shape
        if not fits:
            raise ValueError(
                f"state {shapes} does not belong to parameter {place}, {list(parameter.shape)}; load the state of the "
                f"same model"
            )
