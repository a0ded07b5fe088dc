"""One step of matrices whose second moment is a product of factors (METHODS A2-A4, A6, A9).

Two passes over gradients and weights, whatever their size: the first multiplies V by the start and measures the update,
which must be clipped as a whole; the second multiplies V^T by the result and applies the update. Further passes only
where the iteration takes more rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.backend import Backend
from ...kernels.lowrank import SecondMoment, Step, Tile, fused_moment
from .bias import bias
from .factors import as_matrices, matrix_size, read_factors, store_factors, wide
from .guidance import guidance
from .momentum import read, write
from .noise import gaussian
from .rank import K_INIT, max_rank, search
from .shards import Shards, local
from .srsi import srsi
from .true_moment import average_squares, measure_true_error


class Factors(NamedTuple):
    """What one iteration gives."""

    q_bmc: Tensor
    u_bnc: Tensor


@dataclass(frozen=True)
class Matrices:
    """Parameters of one shape that are stepped together, as b matrices [m, n] on this rank."""

    parameters: list[Tensor]
    states: list[dict[str, Tensor]]
    places: list[int]
    """Of each parameter among all of the optimizer: what its random columns are drawn by."""
    shards: Shards

    @property
    def steps(self) -> int:
        """Including this one."""
        return int(self.states[0]["step"].item())


class FactoredStep:
    """What one step holds between its two passes: V as an operator that measures first and then applies."""

    def __init__(self, matrices: Matrices, group: dict[str, Any], tile: int, backend: Backend = "auto") -> None:
        self.matrices, self.group, self.shards = matrices, group, matrices.shards
        self.tile = tile
        parameter = matrices.parameters[0]
        self.dtype = wide(parameter.dtype)
        size = matrix_size(parameter)
        if size is None:
            raise RuntimeError(f"a parameter {list(parameter.shape)} had factors and is no longer contiguous")
        self.rows, self.columns = size if self.shards.exact else as_matrices(parameter).shape[1:]
        self.weights = [as_matrices(p) for p in matrices.parameters]
        grads = [as_matrices(p.grad) for p in matrices.parameters if p.grad is not None]
        self.momenta = [
            {key: as_matrices(state[key]) for key in ("exp_avg", "exp_avg_scale") if key in state}
            for state in matrices.states
        ]
        self.sizes = [weight.size(0) for weight in self.weights]
        self.guided = group["guidance"] and bool(self.momenta[0])
        self.q_bmk, self.u_bnk = _stacked(matrices.states)
        self.moment = SecondMoment(
            self.q_bmk,
            self.u_bnk,
            grads,
            group["betas"][1],
            clamp=group["clamp"] == "exact",
            tile=tile,
        )
        self.lacks1, self.lacks2 = bias(group, matrices.steps)
        self.fused = None
        if group["clamp"] == "exact" and not self.guided:
            beta2, eps = group["betas"][1], group["eps"] * self.lacks2**0.5
            self.fused = fused_moment(self.q_bmk, self.u_bnk, grads, self.weights, self.momenta, beta2, eps, backend)
        b, device = self.moment.shape[0], self.q_bmk.device
        # Sums over each matrix: V^2, M^^2, M^ M and M^2.
        self.sums_4b = torch.zeros(4, b, dtype=torch.float64, device=device)
        self.measured = self.applied = False
        self.updates: list[Tensor] = []
        self.searching = (matrices.steps - 1) % group["rank_every"] == 0

    def run(self) -> None:
        """Steps the parameters and replaces their factors."""
        self._factorise()
        for parameter, state in zip(self.matrices.parameters, self.matrices.states, strict=True):
            if "exp_avg_sq" in state:
                average_squares(parameter, state, self.group["betas"][1])
                if self.searching:
                    measure_true_error(state, self.shards, self.tile)

    def _factorise(self) -> None:
        """Steps by the passes that the iteration makes over V, and stores the factors that it ends with."""
        group, steps = self.group, self.matrices.steps
        warm = steps > 1 and group["start"] == "warm"
        most = max_rank(self.rows, self.columns, group["max_rank"])
        rank_b = torch.cat([local(state["rank"]).reshape(-1) for state in self.matrices.states])
        columns = min(most, max(K_INIT, self.u_bnk.size(2)))
        factors = self._iterate(columns, warm, 1 if warm else group["rounds"])
        if not self.searching:
            self._store(factors, rank_b, torch.cat([local(state["xi"]).reshape(-1) for state in self.matrices.states]))
            return
        # A matrix that asks for more than the columns it came with takes all rounds, and none of its neighbours: what
        # becomes of it does not depend on what it is stepped with.
        known = rank_b.tolist() if warm else [columns] * len(rank_b)
        threshold = group["rank_threshold"]
        errors = [xi_c[:k] for xi_c, k in zip(self._errors(factors.u_bnc).tolist(), known, strict=True)]
        found = [search(xi_c, threshold, most) for xi_c in errors]
        while wanted := [rank for rank, done in found if not done]:
            done_b = torch.tensor([done for _, done in found], device=rank_b.device)
            again = self._iterate(max(wanted), warm, group["rounds"])
            for i, xi_c in enumerate(self._errors(again.u_bnc).tolist()):
                if not found[i][1]:
                    errors[i], found[i] = xi_c, search(xi_c, threshold, most)
            factors = _chosen(done_b, factors, again)
        rank_b = torch.tensor([rank for rank, _ in found], dtype=torch.int64, device=rank_b.device)
        xi = [xi_c[rank - 1] for xi_c, (rank, _) in zip(errors, found, strict=True)]
        self._store(factors, rank_b, torch.tensor(xi, dtype=self.dtype, device=rank_b.device))

    def _iterate(self, columns: int, warm: bool, rounds: int) -> Factors:
        b, m, n = self.moment.shape
        if not self.shards.exact and m * n == 0:
            return Factors(self.q_bmk.new_zeros(b, m, columns), self.q_bmk.new_zeros(b, n, columns))
        q_bmc, u_bnc = srsi(
            self,
            self._start(columns, warm),
            rounds,
            over_rows=self.shards.over_rows,
            over_columns=self.shards.over_columns,
            first_row=self.shards.first_row,
            first_column=self.shards.first_column,
        )
        return Factors(q_bmc, u_bnc)

    def _as_one_step(self) -> Step:
        """What the kernels need beside V."""
        group = self.group
        weigh_new = 1 - group["betas"][0] if self.momenta[0] else 1.0
        decay = 1 - group["lr"] * group["weight_decay"]
        return Step(self.clip_b11.flatten(), weigh_new, decay, group["lr"] / self.lacks1)

    # V as `srsi` needs it.

    def times(self, x_bnc: Tensor) -> Tensor:
        """V X. The first call measures the update."""
        first, self.measured = not self.measured, True
        if self.fused is not None and x_bnc.size(2) <= self.fused.most_columns:
            y_bmc, updates_b, squares_b = self.fused.times(x_bnc, first, first and self.searching)
            if first:
                self.sums_4b[0], self.sums_4b[1] = squares_b, updates_b
            return y_bmc
        return self.moment.times(x_bnc, self._measure if first else None)

    def transposed_times(self, y_bmc: Tensor) -> Tensor:
        """V^T Y. The first call applies the update."""
        first, self.applied = not self.applied, True
        if first:
            self._weigh()
        if self.fused is not None and y_bmc.size(2) <= self.fused.most_columns:
            return self.fused.transposed_times(y_bmc, self._as_one_step() if first else None)
        return self.moment.transposed_times(y_bmc, self._apply if first else None)

    def _update(self, tile: Tile) -> Tensor:
        """M^ over sqrt(c2), not clipped."""
        root_brn = tile.moment_brn.sqrt().add_(self.group["eps"] * self.lacks2**0.5)
        return torch.div(tile.grad_brn, root_brn, out=root_brn)

    def _measure(self, tile: Tile) -> None:
        update_brn, where = self._update(tile), tile.matrices
        if self.moment.is_kept:
            self.updates.append(update_brn)
        if self.searching:
            # Squares of squares would leave fp32.
            wide_brn = tile.moment_brn.double()
            self.sums_4b[0, where] += _products(wide_brn, wide_brn)
        self.sums_4b[1, where] += _products(update_brn, update_brn)
        if self.guided:
            averages = [read(self._momentum(i, own), tile.rows, self.dtype) for i, _, own in tile.shares]
            average_brn = torch.cat(averages)
            self.sums_4b[2, where] += _products(update_brn, average_brn)
            self.sums_4b[3, where] += _products(average_brn, average_brn)

    def _momentum(self, number: int, own: slice) -> dict[str, Tensor]:
        """The first moment of some matrices of one parameter, as it is stored; empty where there is none."""
        return {key: value[own] for key, value in self.momenta[number].items()}

    def _weigh(self) -> None:
        """What each matrix's update is multiplied by: its clip; and its step: the learning rate with guidance."""
        group = self.group
        self.shards.over_matrix(self.sums_4b)
        _, square_b, dot_b, old_b = self.sums_4b
        # Measured without the correction of V, which is one factor.
        corrected = self.lacks2**0.5
        rms_b = (square_b / (self.rows * self.columns)).sqrt() * corrected
        clip_b = corrected / (rms_b / group["clip_threshold"]).clamp(min=1)
        self.clip_b11 = clip_b.to(self.dtype).view(-1, 1, 1)
        step_b = torch.full_like(clip_b, group["lr"])
        if self.guided:
            # cos(M^, M) with the new M = beta1 M + (1 - beta1) M^, by the sums of the old one.
            beta1 = group["betas"][0]
            update2_b, cross_b = square_b * clip_b**2, dot_b * clip_b
            new2_b = beta1**2 * old_b + 2 * beta1 * (1 - beta1) * cross_b + (1 - beta1) ** 2 * update2_b
            step_b *= guidance(beta1 * cross_b + (1 - beta1) * update2_b, update2_b, new2_b, group["eps"])
        self.step_b11 = step_b.to(self.dtype).view(-1, 1, 1)

    def _apply(self, tile: Tile) -> None:
        group, rows = self.group, tile.rows
        update_brn = self.updates.pop(0) if self.updates else self._update(tile)
        update_brn.mul_(self.clip_b11[tile.matrices])
        beta1, decay = group["betas"][0], 1 - group["lr"] * group["weight_decay"]
        for i, inside, own in tile.shares:
            step_brn = update_brn[inside]
            if momentum := self._momentum(i, own):
                average_brn = read(momentum, rows, self.dtype)
                average_brn.lerp_(step_brn, 1 - beta1)
                write(momentum, rows, average_brn)
                step_brn = average_brn
            weight_brn = self.weights[i][own, rows]
            if self.guided:
                step_b11 = self.step_b11[tile.matrices][inside]
                weight_brn.mul_(1 - step_b11 * group["weight_decay"]).sub_(step_brn * (step_b11 / self.lacks1))
                continue
            if decay != 1:
                weight_brn.mul_(decay)
            weight_brn.add_(step_brn, alpha=-group["lr"] / self.lacks1)

    def _start(self, columns: int, warm: bool) -> Tensor:
        """The last factors' columns, if warm, and random ones where there are none; [b, n, columns]."""
        if not warm:
            return self._noise(columns)
        warm_bnc = _widened(self.u_bnk, columns)
        length_b1c = self.shards.over_columns(warm_bnc.double().square().sum(1, keepdim=True)).sqrt_()
        # Columns beyond a matrix's own rank are empty.
        is_empty_b1c = length_b1c == 0
        unit_bnc = warm_bnc / length_b1c.masked_fill_(is_empty_b1c, 1).to(self.dtype)
        if not bool(is_empty_b1c.any()):
            return unit_bnc
        return torch.where(is_empty_b1c, self._noise(columns) * self.columns**-0.5, unit_bnc)

    def _noise(self, columns: int) -> Tensor:
        """The same for all matrices of a parameter, so that it does not matter how they are spread over ranks."""
        n, first = self.moment.shape[2], self.shards.first_column
        drawn = (gaussian((n, columns), seed, self.q_bmk.device, self.dtype, first) for seed in self._seeds())
        return torch.cat([noise_nc.expand(size, -1, -1) for size, noise_nc in zip(self.sizes, drawn, strict=True)])

    def _seeds(self) -> list[int]:
        seed, steps = self.group["seed"], self.matrices.steps
        return [((seed * 1_000_003 + place) * 1_000_003 + steps) % 2**40 for place in self.matrices.places]

    def _errors(self, u_bnc: Tensor) -> Tensor:
        """Relative error of the first 1, 2, ... c columns; fp64 [b, c], on the host."""
        # Q is orthonormal: what its columns hold of V^2 are the squares of U.
        held_bc = self.shards.over_columns(u_bnc.double().square().sum(1)).cpu().cumsum(1)
        whole_b1 = self.sums_4b[0].unsqueeze(1).cpu()
        part_bc = held_bc / whole_b1.masked_fill(whole_b1 == 0, 1)
        return (1 - part_bc).clamp_(min=0).sqrt_().masked_fill_(whole_b1 == 0, 0)

    def _store(self, factors: Factors, rank_b: Tensor, xi_b: Tensor) -> None:
        parts = (part.split(self.sizes) for part in (*factors, rank_b, xi_b))
        of_each = zip(self.matrices.parameters, self.matrices.states, *parts, strict=True)
        for parameter, state, q_bmc, u_bnc, own_rank_b, own_xi_b in of_each:
            room = self._room(own_rank_b, state)
            beyond_b1k = torch.arange(room, device=q_bmc.device) >= own_rank_b.view(-1, 1, 1)
            q_bmk, u_bnk = (_widened(factor, room).masked_fill(beyond_b1k, 0) for factor in (q_bmc, u_bnc))
            store_factors(state, parameter, self.shards, q_bmk, u_bnk, own_rank_b, own_xi_b)

    def _room(self, rank_b: Tensor, state: dict[str, Tensor]) -> int:
        """Columns that the factors of one parameter are stored with: the largest rank of its stack."""
        if not self.searching:
            return local(state["Q"]).size(-1)
        largest = rank_b.amax() if rank_b.numel() else torch.ones((), dtype=torch.int64, device=rank_b.device)
        return int(self.shards.largest_of_stack(largest).item())


def _stacked(states: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Factors of all parameters [b, m, k] and [b, n, k] at the largest rank among them."""
    factors = [read_factors(state) for state in states]
    if len(factors) == 1:
        return factors[0]
    room = max(q.size(2) for q, _ in factors)
    return (
        torch.cat([_widened(q, room) for q, _ in factors]),
        torch.cat([_widened(u, room) for _, u in factors]),
    )


def _chosen(first_b: Tensor, first: Factors, second: Factors) -> Factors:
    """Of each matrix the first or the second, at the columns of the wider."""
    columns = max(first.q_bmc.size(2), second.q_bmc.size(2))
    return Factors(
        *(
            torch.where(first_b.view(-1, 1, 1), _widened(one, columns), _widened(other, columns))
            for one, other in zip(first, second, strict=True)
        )
    )


def _widened(factor_bmk: Tensor, columns: int) -> Tensor:
    """With zero columns added; or a view without those beyond `columns`."""
    missing = columns - factor_bmk.size(-1)
    return torch.nn.functional.pad(factor_bmk, (0, missing)) if missing > 0 else factor_bmk[..., :columns]


def _products(x_brn: Tensor, y_brn: Tensor) -> Tensor:
    """Sum over each matrix of the products of entries; fp64 [b]."""
    return torch.bmm(x_brn.flatten(1).unsqueeze(1), y_brn.flatten(1).unsqueeze(2)).flatten().double()
