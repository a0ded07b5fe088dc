"""Adapprox: AdamW whose second moment is a low-rank product of adaptive rank (METHODS A1-A9; arXiv 2403.14958)."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .factored import FactoredStep, Matrices
from .factors import as_matrices, matrix_size, new_factors, wide
from .full import step_full
from .momentum import Momentum, new_momentum
from .rank import is_factored, max_rank
from .report import ParameterReport, report_of
from .shards import Shards, align_gradient, local, shards_of

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class Adapprox(torch.optim.Optimizer):
    """AdamW's update, clipped, with its second moment in (m + n) k numbers a matrix instead of m n.

        V = beta2 max(Q U^T, 0) + (1 - beta2) G^2        M^ = G / (sqrt(V) + eps),   M^ /= max(1, RMS(M^) / d)
        M = beta1 M + (1 - beta1) M^                     W -= lr (M + weight_decay W)
        Q, U = the best factors of V that a subspace iteration finds, of a rank that grows until they are near enough

    Matrices [m, n] and stacks of them [E, m, n] (experts, each with a rank of its own) are factored wherever factors
    of the largest rank are smaller: (m + n) max_rank < m n. All else keeps its second moment whole. More than three
    dims count as [first, all others].

    Parameters may be plain tensors or DTensors sharded by rows, columns or experts (FSDP2, tensor and expert
    parallel). Randomness is a function of (seed, place of the parameter, step): replicas stay equal without
    communication, and state holds tensors only.
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
        momentum: Momentum = "fp32",
        start: Literal["warm", "gaussian"] = "warm",
        rounds: int = 5,
        max_rank: float | int = 0.25,
        rank_threshold: float = 0.01,
        rank_every: int = 10,
        clamp: Literal["exact", "none"] = "exact",
        guidance: bool = False,
        sharding: Literal["exact", "local"] = "exact",
        nonfinite: Literal["raise", "skip"] = "raise",
        expert_group: dist.ProcessGroup | None = None,
        seed: int = 0,
        tile: int = 2**22,
    ) -> None:
        """All but the last four may be set by parameter group.

        Args:
            params: parameters, groups of them, or (name, parameter) pairs: errors and reports then have names.
            lr: learning rate.
            betas: decay of both moments; there is no bias correction, the clip stands in for it.
            eps: added to the square root.
            weight_decay: decoupled.
            clip_threshold: d, the largest root mean square of one matrix's update.
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
            nonfinite: what a NaN or infinite gradient does: FloatingPointError before anything changed, or no step.
            expert_group: ranks that hold other experts of stacks [e, m, n]: their factors get room for the largest
                rank of all, as a checkpoint of [E, m, k] wants.
            seed: of the random columns.
            tile: elements of the second moment that exist at once; one row at least.

        Raises:
            ValueError: options or dtypes that cannot be.
        """
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "clip_threshold": clip_threshold,
            "momentum": momentum,
            "start": start,
            "rounds": rounds,
            "max_rank": max_rank,
            "rank_threshold": rank_threshold,
            "rank_every": rank_every,
            "clamp": clamp,
            "guidance": guidance,
            "sharding": sharding,
            "seed": seed,
        }
        if nonfinite not in ("raise", "skip"):
            raise ValueError(f"nonfinite: {nonfinite!r} is unknown; use raise or skip")
        if tile < 1:
            raise ValueError(f"tile: {tile} holds no element; use for example 262144")
        self.nonfinite, self.expert_group, self.tile = nonfinite, expert_group, tile
        self.skipped_steps = 0
        self._seconds: dict[Tensor, float] = {}
        self._warned: set[Tensor] = set()
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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; state keeps its own dtypes. Raises ValueError for state of other shapes, and changes nothing."""
        _check_state(self.param_groups, state_dict)
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
        largest = self._largest_gradients()
        if largest is None:
            self.skipped_steps += 1
            return loss
        place = 0
        for group in self.param_groups:
            places = {parameter: place + i for i, parameter in enumerate(group["params"])}
            place += len(places)
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
                FactoredStep(matrices, group, [largest[p] for p in matrices.parameters], self.tile).run()
                for parameter in matrices.parameters:
                    self._took(parameter, start, len(matrices.parameters))
                self._warn(matrices, group)
        return loss

    def report(self) -> list[ParameterReport]:
        """Rank, error, bytes and seconds of each parameter that has state, in their order."""
        return [
            report_of(self._name(parameter), parameter, self.state[parameter], self._seconds.get(parameter, 0.0))
            for group in self.param_groups
            for parameter in group["params"]
            if parameter in self.state
        ]

    def _create(self, group: dict[str, Any], parameter: Tensor) -> None:
        state = self.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32)
        size = matrix_size(parameter)
        if size is not None and is_factored(*size, group["max_rank"]):
            state.update(new_factors(parameter, shards_of(parameter, group["sharding"] == "exact")))
        else:
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=wide(parameter.dtype))
        state.update(new_momentum(parameter, group["momentum"]))

    def _matrices(self, group: dict[str, Any], present: list[Tensor], places: dict[Tensor, int]) -> list[Matrices]:
        """What is stepped together: small matrices of one shape as a stack, all else by itself."""
        exact = group["sharding"] == "exact"
        alone: list[Matrices] = []
        together: dict[Any, list[Tensor]] = {}
        for parameter in present:
            shards = shards_of(parameter, exact)
            if parameter.dim() == 3 and self.expert_group is not None and not shards.matrices:
                shards = Shards(matrices=(self.expert_group,))
            if parameter.dim() != 2 or shards != Shards() or 2 * parameter.numel() > self.tile:
                alone.append(Matrices([parameter], [self.state[parameter]], [places[parameter]], shards))
                continue
            step = self.state[parameter]["step"].item()
            together.setdefault((parameter.shape, parameter.dtype, parameter.device, step), []).append(parameter)
        for same in together.values():
            count = self.tile // same[0].numel()
            for i in range(0, len(same), count):
                some = same[i : i + count]
                alone.append(Matrices(some, [self.state[p] for p in some], [places[p] for p in some], Shards()))
        return alone

    def _largest_gradients(self) -> dict[Tensor, float] | None:
        """The largest magnitude of each gradient, over all its shards; None where the step is to be skipped."""
        present: list[tuple[Tensor, Tensor, Shards]] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                align_gradient(parameter)
                grad = parameter.grad
                if grad is None:
                    continue
                if grad.is_sparse or grad.layout != torch.strided:
                    raise RuntimeError(f"{self._name(parameter)} has a sparse gradient; make it dense first")
                present.append((parameter, grad, shards_of(parameter, True)))
        if not present and self.expert_group is None:
            return {}
        norms = [
            # Twenty times as fast as the norm.
            torch.stack(torch.aminmax(part)).abs_().amax().to(wide(part.dtype))
            if (part := local(grad)).numel()
            else part.new_zeros((), dtype=wide(part.dtype))
            for _, grad, _ in present
        ]
        for norm, (_, _, shards) in zip(norms, present, strict=True):
            norm.nan_to_num_(nan=math.inf, posinf=math.inf)
            shards.largest(norm)
        device = local(self.param_groups[0]["params"][0]).device
        # One more than there are: a rank may have none and still be asked.
        zero = torch.zeros((), dtype=torch.float64, device=device)
        values = torch.stack([zero, *(norm.double().to(device) for norm in norms)])
        bad = values.isinf().any().float()
        if self.expert_group is not None:
            dist.all_reduce(bad, op=dist.ReduceOp.MAX, group=self.expert_group)
        found = values[1:].tolist()
        if not bad.item():
            return {parameter: value for (parameter, _, _), value in zip(present, found, strict=True)}
        if self.nonfinite == "skip":
            return None
        names = [self._name(present[i][0]) for i, value in enumerate(found) if math.isinf(value)]
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise FloatingPointError(
            f"NaN or infinite gradient of {shown or 'a parameter on another rank'}; nothing was stepped. Lower the "
            f"learning rate, or leave such steps out by nonfinite='skip'"
        )

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
                    stacklevel=4,
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


def _check_state(groups: list[dict[str, Any]], state_dict: dict[str, Any]) -> None:
    """Raises ValueError where saved state is not that of parameters of these shapes."""
    counts = [len(group["params"]) for group in groups]
    saved_counts = [len(group["params"]) for group in state_dict["param_groups"]]
    if counts != saved_counts:
        raise ValueError(f"the state is of groups of {saved_counts} parameters, these are {counts}")
    for place, (parameter, saved) in enumerate(_saved_state(groups, state_dict)):
        part = as_matrices(parameter) if "Q" in saved and parameter.dim() >= 2 else None
        shapes = {key: tuple(local(value).shape) for key, value in saved.items()}
        fits = True
        if part is not None:
            lead = tuple(part.shape[:1]) if parameter.dim() == 3 else ()
            fits = shapes["Q"][:-1] == (*lead, part.size(1)) and shapes["U"][:-1] == (*lead, part.size(2))
        elif "exp_avg_sq" in saved:
            fits = shapes["exp_avg_sq"] == tuple(local(parameter).shape)
        else:
            fits = False
        if "exp_avg" in saved:
            fits = fits and shapes["exp_avg"] == tuple(local(parameter).shape)
        if not fits:
            raise ValueError(
                f"state {shapes} does not belong to parameter {place}, {list(parameter.shape)}; load the state of the "
                f"same model"
            )
