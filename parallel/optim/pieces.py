"""Adapprox of parameters that lie in pieces over ranks, cut anywhere: each is put together and stepped by one rank.

DeepSpeed's ZeRO and Megatron's distributed optimizer flatten parameters and give every rank a range of the result. The
factors of a matrix need its rows and columns, so for a step its pieces travel to the rank that owns it, and its weights
back: 12 bytes a weight, none of them where the pieces lie on their owner already. State is the owner's alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .adapprox import Adapprox, check_state
from .finite import are_too_large, few, not_finite
from .report import ParameterReport

__all__ = ["AdapproxOfPieces", "Block", "Parameter", "Piece"]

_LIMIT = 2**25
"""Weights that one rank puts together at once; one parameter at least."""

Loads = dict[tuple[int, ...], list[int]]
"""Numbers that each rank of a group owns, by the ranks that it has."""

_NOT_OPTIONS = ("params", "param_names", "places")


@dataclass(frozen=True)
class Parameter:
    """What lies in pieces."""

    name: str
    shape: tuple[int, ...]
    place: int
    """Among all parameters of the model: what its random columns are drawn by."""


@dataclass(frozen=True)
class Piece:
    """Entries [start, stop) of a flattened parameter: those of `flat` [n], fp32, from `offset` on."""

    parameter: int
    """Its number in the block."""
    start: int
    stop: int
    flat: Tensor
    """Its `grad` is the gradient, when a step is made."""
    offset: int = 0

    @property
    def weight(self) -> Tensor:
        return self.flat.detach()[self.offset : self.offset + self.stop - self.start]

    @property
    def gradient(self) -> Tensor:
        grad = self.flat.grad
        assert grad is not None
        return grad[self.offset : self.offset + self.stop - self.start]


@dataclass(frozen=True)
class Block:
    """Parameters that are stepped at once and lie in pieces over the same ranks."""

    options: dict[str, Any]
    """The parameter group that they are of."""
    parameters: Sequence[Parameter]
    """The same on all ranks of the group."""
    pieces: Sequence[Piece]
    """This rank's."""
    ranks: dist.ProcessGroup
    device: torch.device
    stepped_with: Tensor | None = None
    """What is among the parameters of a group when this block is to be stepped; without it, it always is."""
    expert_group: dist.ProcessGroup | None = None
    """Ranks that hold other experts of its stacks, and as many; they own the same numbers of their groups."""


class AdapproxOfPieces(torch.optim.Optimizer):
    """Adapprox of whole parameters, for an engine that steps flat partitions of them.

    It stands in the place of the Adapprox that the engine was given, and shares its parameter groups: learning rates
    are set there. All ranks of a block step it together; a gradient that is there on one rank is there on all.
    """

    def __init__(
        self,
        adapprox: Adapprox,
        blocks: Sequence[Block],
        agree: dist.ProcessGroup | None = None,
        *,
        loads: Loads | None = None,
        limit: int = _LIMIT,
    ) -> None:
        """Collective over the ranks of all blocks.

        Args:
            adapprox: the optimizer of the whole parameters, unused so far: its options count.
            blocks: all that is ever stepped, in the same order on all ranks.
            agree: ranks that step at once and leave a step out together, they and the expert groups of what is
                stepped; all of them by default.
            loads: numbers that ranks own elsewhere, so that they get less; what they own here is added.
            limit: weights that one rank puts together at once; one parameter at least.

        Raises ValueError for pieces that leave out or repeat a part of a parameter.
        """
        super().__init__([{"params": []}], adapprox.defaults)
        self.param_groups = adapprox.param_groups
        self.given, self.agree, self.skipped_steps = adapprox, agree, 0
        loads = {} if loads is None else loads
        self.blocks = [_OwnedBlock(block, adapprox, loads, limit) for block in blocks]
        for block in self.blocks:
            block.adapprox.state = self.state
        places = [place for block in self.blocks for place in block.places]
        if len({*places}) < len(places):
            raise ValueError("two parameters have the same place in the model; give every parameter a place of its own")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of the blocks whose flat partitions are among the parameters now.

        Raises FloatingPointError on all ranks alike for a NaN or infinite gradient, unless such steps are left out.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        present = {parameter for group in self.param_groups for parameter in group["params"]}
        blocks = [owned for owned in self.blocks if owned.block.stepped_with in {None, *present}]
        if not self._gradients_are_finite(blocks):
            self.skipped_steps += 1
            return loss
        for block in blocks:
            with torch.autocast(block.block.device.type, enabled=False):
                block.step()
        # Where schedules made of the given optimizer look, before they warn that nothing was stepped.
        self.given.__dict__["_opt_called"] = True
        return loss

    def report(self) -> list[ParameterReport]:
        """Rank, error, bytes and seconds of each parameter that this rank owns and that has state."""
        return [each for block in self.blocks for each in block.adapprox.report()]

    def state_dict(self) -> dict[str, Any]:
        """State of what this rank owns, by place in the model, as in the state of one Adapprox of the whole model."""
        groups: list[dict[str, Any]] = []
        for group in self.param_groups:
            parameters = [p for owned in self.blocks if owned.block.options is group for p in owned.block.parameters]
            parameters.sort(key=lambda parameter: parameter.place)
            options = {key: value for key, value in group.items() if key not in _NOT_OPTIONS}
            named = {"params": [p.place for p in parameters], "param_names": [p.name for p in parameters]}
            groups.append(options | named)
        state = {place: self.state[p] for place, p in self._owned() if self.state.get(p)}
        return {"state": state, "param_groups": groups, "owned": [place for place, _ in self._owned()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The state that this rank saved; options come with it.

        Raises ValueError, and changes nothing, for the state of another model or one that is cut up over other ranks.
        """
        groups, saved_groups = self.state_dict()["param_groups"], state_dict["param_groups"]
        if "owned" not in state_dict:
            raise ValueError("the state is not that of an Adapprox over pieces; load what this optimizer saved")
        for group, saved in zip(groups, saved_groups, strict=False):
            if group["params"] != saved["params"]:
                raise ValueError(
                    f"the state is of parameters {few(saved['param_names'])}, these are {few(group['param_names'])}"
                )
        missing = [place for place, _ in self._owned() if place not in state_dict["owned"]]
        if missing or len(groups) != len(saved_groups):
            raise ValueError(
                f"the state is of {len(state_dict['owned'])} other parameters of the model than this rank owns; go on "
                f"with as many ranks, and partitions of the same sizes, as when it was saved"
            )
        parts = [block.part_of(state_dict["state"]) for block in self.blocks]
        for block, part in zip(self.blocks, parts, strict=True):
            check_state(block.adapprox.param_groups, part)
        self.state.clear()
        for block, part in zip(self.blocks, parts, strict=True):
            block.adapprox.load_state_dict(part)
            self.state.update(block.adapprox.state)
            block.adapprox.state = self.state
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            group.update({key: value for key, value in saved.items() if key not in _NOT_OPTIONS})

    def gradients(self) -> list[tuple[str, Tensor]]:
        """Of this rank's pieces, each with its parameter's name."""
        return _gradients(self.blocks)

    def _owned(self) -> list[tuple[int, Tensor]]:
        return [pair for block in self.blocks for pair in block.owned]

    def _gradients_are_finite(self, blocks: list[_OwnedBlock]) -> bool:
        present = _gradients(blocks)
        device = blocks[0].block.device if blocks else self.blocks[0].block.device
        bad = are_too_large([grad for _, grad in present], device)
        wrong = bad.amax()
        # Ranks that share stacks search for their ranks together, so they may not part either.
        experts = dict.fromkeys(owned.block.expert_group for owned in blocks if owned.block.expert_group is not None)
        for group in (self.agree, *experts):
            dist.all_reduce(wrong, op=dist.ReduceOp.MAX, group=group)
        if not wrong.item():
            return True
        if self.given.nonfinite == "skip":
            return False
        raise not_finite([name for (name, _), value in zip(present, bad[1:].tolist(), strict=True) if value])


@dataclass(frozen=True)
class _Exchange:
    """Parameters that are put together at once: what this rank sends to their owners, and gets as the owner."""

    owned: list[Tensor]
    sent: list[Piece]
    sent_sizes: list[int]
    """Numbers for each rank."""
    received: list[tuple[Tensor, int, int]]
    """Parameter, start and stop, in the order of their coming."""
    received_sizes: list[int]


class _OwnedBlock:
    """A block, and the Adapprox of those of its parameters that this rank owns."""

    def __init__(self, block: Block, adapprox: Adapprox, loads: Loads, limit: int) -> None:
        self.block = block
        ranks, own_rank = block.ranks, dist.get_rank(block.ranks)
        cuts = _gathered([(piece.parameter, piece.start, piece.stop) for piece in block.pieces], ranks)
        _check(block, cuts)
        held = [[0] * len(cuts) for _ in block.parameters]
        for rank, cut in enumerate(cuts):
            for parameter, start, stop in cut:
                held[parameter][rank] += stop - start
        members = tuple(dist.get_process_group_ranks(ranks))
        owners = owners_of(held, loads.setdefault(members, [0] * len(cuts)))
        if block.expert_group is not None and len({*map(tuple, _gathered(owners, block.expert_group))}) > 1:
            raise ValueError("ranks of expert_group own other experts than those they share stacks with; give it none")
        own = {i: _nothing(block, p.shape) for i, p in enumerate(block.parameters) if owners[i] == own_rank}
        self.owned = [(block.parameters[i].place, parameter) for i, parameter in own.items()]
        options = {key: value for key, value in block.options.items() if key in adapprox.defaults}
        self.adapprox = Adapprox(
            [
                {
                    "params": [(block.parameters[i].name, parameter) for i, parameter in own.items()],
                    "places": [place for place, _ in self.owned],
                    **options,
                }
            ],
            expert_group=block.expert_group,
            tile=adapprox.tile,
            backend=adapprox.backend,
        )
        sizes = [sum(held_r) for held_r in held]
        self.exchanges = [self._exchange(some, owners, own, cuts) for some in _bounded(sizes, owners, limit)]

    @property
    def places(self) -> list[int]:
        return [parameter.place for parameter in self.block.parameters]

    def step(self) -> None:
        """Puts parameters together on their owners, steps them there, and takes the pieces back."""
        (group,) = self.adapprox.param_groups
        group.update({key: value for key, value in self.block.options.items() if key in self.adapprox.defaults})
        for exchange in self.exchanges:
            weights = self._to_owners(exchange, [piece.weight for piece in exchange.sent])
            grads = self._to_owners(exchange, [piece.gradient for piece in exchange.sent])
            for parameter, weight, grad in zip(exchange.owned, weights, grads, strict=True):
                parameter.data = weight
                parameter.grad = grad
            del weights, grads
            self.adapprox.step_checked()
            self._to_pieces(exchange)
            for parameter in exchange.owned:
                parameter.grad = None
                parameter.data = _nothing(self.block, parameter.shape)

    def part_of(self, state: dict[int, Any]) -> dict[str, Any]:
        """Of the state of all that this rank owns, that of this block, as its Adapprox loads it."""
        (group,) = self.adapprox.param_groups
        known = {i: state[place] for i, (place, _) in enumerate(self.owned) if place in state}
        return {"state": known, "param_groups": [{**group, "params": [*range(len(self.owned))]}]}

    def _exchange(
        self, some: set[int], owners: Sequence[int], own: dict[int, Tensor], cuts: Sequence[Sequence[_Range]]
    ) -> _Exchange:
        pieces = [piece for piece in self.block.pieces if piece.parameter in some]
        sent = [[piece for piece in pieces if owners[piece.parameter] == rank] for rank in range(len(cuts))]
        got = [[(own[i], start, stop) for i, start, stop in cut if i in some and i in own] for cut in cuts]
        return _Exchange(
            owned=[parameter for i, parameter in own.items() if i in some],
            sent=[piece for pieces in sent for piece in pieces],
            sent_sizes=[sum(piece.stop - piece.start for piece in pieces) for pieces in sent],
            received=[each for ranges in got for each in ranges],
            received_sizes=[sum(stop - start for _, start, stop in ranges) for ranges in got],
        )

    def _to_owners(self, exchange: _Exchange, pieces: list[Tensor]) -> list[Tensor]:
        """Whole tensors of what this rank owns, out of everyone's pieces."""
        got = self._all_to_all(pieces, exchange.sent_sizes, exchange.received_sizes)
        whole = {parameter: got.new_empty(parameter.shape) for parameter in exchange.owned}
        parts = got.split([stop - start for _, start, stop in exchange.received])
        for (parameter, start, stop), part in zip(exchange.received, parts, strict=True):
            whole[parameter].view(-1)[start:stop] = part
        return [*whole.values()]

    def _to_pieces(self, exchange: _Exchange) -> None:
        wholes = [parameter.view(-1)[start:stop] for parameter, start, stop in exchange.received]
        got = self._all_to_all(wholes, exchange.received_sizes, exchange.sent_sizes)
        for piece, part in zip(exchange.sent, got.split([p.stop - p.start for p in exchange.sent]), strict=True):
            piece.weight.copy_(part)

    def _all_to_all(self, parts: list[Tensor], sent_sizes: list[int], received_sizes: list[int]) -> Tensor:
        empty = torch.empty(0, dtype=torch.float32, device=self.block.device)
        got = empty.new_empty(sum(received_sizes))
        dist.all_to_all_single(got, torch.cat([empty, *parts]), received_sizes, sent_sizes, group=self.block.ranks)
        return got


def _gradients(blocks: Sequence[_OwnedBlock]) -> list[tuple[str, Tensor]]:
    return [(o.block.parameters[p.parameter].name, p.gradient) for o in blocks for p in o.block.pieces]


_Range = tuple[int, int, int]
"""Number of a parameter in its block, start and stop."""


def owners_of(held: Sequence[Sequence[int]], loads: list[int]) -> list[int]:
    """The rank that owns each parameter.

    Who holds three quarters of a parameter or more owns it; the others, largest first, go to whoever owns the least.

    Args:
        held: numbers of each parameter on each rank.
        loads: numbers that each rank owns; what it gets is added.
    """
    owners = [0] * len(held)
    spread: list[int] = []
    for i, held_r in enumerate(held):
        most = max(held_r)
        if 4 * most >= 3 * sum(held_r):
            owners[i] = held_r.index(most)
            loads[owners[i]] += sum(held_r)
        else:
            spread.append(i)
    for i in sorted(spread, key=lambda i: -sum(held[i])):
        owners[i] = min(range(len(loads)), key=loads.__getitem__)
        loads[owners[i]] += sum(held[i])
    return owners


def _bounded(sizes: Sequence[int], owners: Sequence[int], limit: int) -> list[set[int]]:
    """Runs of parameters of which no rank owns more than `limit` numbers, or more than one."""
    runs: list[set[int]] = []
    loads: dict[int, int] = {}
    for i, (size, owner) in enumerate(zip(sizes, owners, strict=True)):
        loads[owner] = loads.get(owner, 0) + size
        if not runs or loads[owner] > limit:
            runs.append(set())
            loads = {owner: size}
        runs[-1].add(i)
    return runs


def _check(block: Block, cuts: Sequence[Sequence[_Range]]) -> None:
    ranges: list[list[tuple[int, int]]] = [[] for _ in block.parameters]
    for i, start, stop in (each for cut in cuts for each in cut):
        ranges[i].append((start, stop))
    for parameter, found in zip(block.parameters, map(sorted, ranges), strict=True):
        ends = [0, *(stop for _, stop in found)]
        size = torch.Size(parameter.shape).numel()
        if [start for start, _ in found] != ends[:-1] or ends[-1] != size:
            raise ValueError(f"the pieces of {parameter.name} are {found}, which is not once all of its {size} numbers")
    for piece in block.pieces:
        if piece.flat.dtype != torch.float32:
            raise ValueError(f"a partition of {piece.flat.dtype} cannot be stepped; keep fp32 weights")


def _nothing(block: Block, shape: Sequence[int]) -> Tensor:
    """Of this shape, and of one number: what stands for a parameter between steps."""
    return torch.zeros((), dtype=torch.float32, device=block.device).expand(tuple(shape))


def _gathered(value: Any, group: dist.ProcessGroup) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found
