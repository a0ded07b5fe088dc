"""One recompute segment: a function of tensors whose own tensors are dropped after forward, and computed again.

Where a segment is dropped, autograd keeps a place in place of each tensor that it would save. A place is filled when
the segment is computed again: ahead, because someone said so (`recomputation.py`), or when backward asks for what is
not there. Segments form chains: an input that another dropped segment gave is a place too. Places are let go as
autograd lets go of what it saved, and with them the tensors: there is no count to get wrong.

torch.utils.checkpoint computes again only when asked, and only from inputs that it kept.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .ranges import named
from .stopwatch import Stopwatch, StreamWait

_MADE_BY = "_wastenot_made_by"
"""Attribute of a tensor that a dropped segment gave, or of what that is a view of: the segment, which output, and the
tensor's version then."""


class Watcher(Protocol):
    """Whom a segment tells what it does."""

    debug: bool
    """Whether to compare what is computed again with what was."""

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether `tensor` is a parameter of the model, or a view of one."""
        ...

    def computed(self, name: str, took: float | StreamWait, hidden: bool) -> None:
        """Segment `name` was computed again."""
        ...

    def asked(self) -> None:
        """Backward has reached a segment."""
        ...


class Cell:
    """A place for one tensor, empty until it is computed again."""

    __slots__ = ("__weakref__", "value")

    def __init__(self) -> None:
        self.value: Tensor | None = None


@dataclass(frozen=True)
class Given:
    """Output number `number` of a dropped segment, or a view of it."""

    maker: Segment
    number: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    cell: Cell | None = None
    """Keeps the output between its recomputation and its use; None: it is computed when it is used."""

    def fetch(self, hidden: bool) -> Tensor:
        """The tensor, computed again if it is not there."""
        cell = self.cell or self.maker.place(self.number)
        if cell.value is None:
            self.maker.compute(hidden)
        assert cell.value is not None
        return cell.value.as_strided(self.size, self.stride, self.offset)

    def seen_as(self, tensor: Tensor) -> Given:
        """The same output as `tensor` sees it, which shares its memory; with a place to be kept in."""
        return replace(_seen_as(tensor, self.maker, self.number), cell=self.maker.place(self.number))


def _seen_as(tensor: Tensor, maker: Segment, number: int) -> Given:
    size, stride = tuple(tensor.size()), tuple(tensor.stride())
    return Given(maker, number, size, stride, int(tensor.storage_offset()))


def given(value: Any) -> Given | None:
    """Where `value` comes from, if it is a tensor that a dropped segment gave."""
    if not isinstance(value, Tensor):
        return None
    base = value if value._base is None else value._base
    maker, number, version = base.__dict__.get(_MADE_BY, (None, 0, 0))
    # What was changed in place since, nobody computes again.
    return None if maker is None or base._version != version else _seen_as(value, maker, number)


class _Kept:
    """A tensor that is kept, as it was: with hooks, autograd does not look whether it has been changed."""

    __slots__ = ("segment", "tensor", "version")

    def __init__(self, tensor: Tensor, segment: str) -> None:
        # The tensor itself could hold the graph that holds it.
        self.tensor, self.version, self.segment = tensor.detach(), tensor._version, segment

    def fetch(self, hidden: bool) -> Tensor:
        """The tensor. Raises RuntimeError where it was changed in place."""
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"segment {self.segment}: {_words(self.tensor)} that it reads has been changed in place since its "
                "forward, and its backward needs it as it was; change a clone"
            )
        return self.tensor


@dataclass(frozen=True)
class _Own:
    """What autograd keeps in place of a tensor that only its segment can compute again."""

    segment: Segment
    cell: Cell

    def fetch(self, hidden: bool) -> Tensor:
        if self.cell.value is None:
            self.segment.compute(hidden)
        assert self.cell.value is not None
        return self.cell.value


@dataclass(frozen=True)
class _Expected:
    """Of a tensor that autograd saved in forward."""

    cell: weakref.ref[Cell] | None
    """None: it is not the segment's own."""
    shape: torch.Size
    dtype: torch.dtype
    digest: bytes


class _EnoughError(Exception):
    """All that is wanted is there: what is left of the segment is not computed."""


class Segment:
    """One call of a function in one forward. It lives as long as anything may want it computed again."""

    def __init__(self, name: str, function: Callable[..., Any], watcher: Watcher, dropped: bool, draws: bool) -> None:
        self.name, self.function, self.watcher = name, function, watcher
        self.dropped, self._draws = dropped, draws
        self._outputs: dict[int, weakref.ref[Cell]] = {}
        self._saved: list[_Expected] = []
        self._readers: list[weakref.ref[Segment]] = []
        """Dropped segments that read what this one gives."""
        self.dropped_bytes = 0
        """Of storages that would have been kept: what it saved of its own, and what it gave."""
        self._counted: dict[int, torch.UntypedStorage] = {}
        """Held until the forward ends, so that none is taken for another one in its place."""
        self._args: list[Any] = []
        self._needs_grad: list[bool] = []

    def forward(self, args: tuple[Any, ...], origins: tuple[Given | None, ...]) -> Any:
        """function(*args); `origins` says of each argument whether a dropped segment gave it."""
        if self.dropped:
            device = next((arg.device for arg in args if isinstance(arg, Tensor)), torch.device("cpu"))
            self._surroundings = _Surroundings(device, self._draws)
            for arg, origin in zip(args, origins, strict=True):
                kept = _Kept(arg, self.name) if isinstance(arg, Tensor) else arg
                self._args.append(kept if origin is None else origin)
                self._needs_grad.append(isinstance(arg, Tensor) and arg.requires_grad)
                if origin is not None:
                    origin.maker._readers.append(weakref.ref(self))
        sources = {_storage(arg): origin for arg, origin in zip(args, origins, strict=True) if isinstance(arg, Tensor)}
        with saved_tensors_hooks(lambda tensor: self._pack(tensor, sources), self._unpack):
            returned = self.function(*args)
        if self.dropped:
            for number, output in enumerate(_tensors(returned)):
                if _storage(output) not in sources and not self.watcher.is_weight(output):
                    self._count(output)
                    base = output if output._base is None else output._base
                    setattr(base, _MADE_BY, (self, number, base._version))
            self._counted.clear()
        return returned

    @property
    def is_wanted(self) -> bool:
        """Whether anything waits for a tensor of this segment that is not there."""
        return any(cell.value is None for cell in self._cells()) or any(self._waiting_readers())

    def place(self, number: int) -> Cell:
        """Of output `number`; as long as it is held, the output is kept once it is computed again."""
        weak = self._outputs.get(number)
        cell = weak() if weak is not None else None
        if cell is None:
            cell = Cell()
            self._outputs[number] = weakref.ref(cell)
        return cell

    def compute(self, hidden: bool) -> None:
        """Fills all places that are empty. Raises RuntimeError where the function does not do what it did."""
        inputs = []
        for arg, needs_grad in zip(self._args, self._needs_grad, strict=True):
            value = arg.fetch(hidden) if isinstance(arg, Given | _Kept) else arg
            inputs.append(value.detach().requires_grad_(needs_grad) if isinstance(value, Tensor) else value)
        for reader in list(self._waiting_readers()):
            reader._hold(self)
        watch = Stopwatch(self._surroundings.device)
        outputs = {number: cell for number, weak in self._outputs.items() if (cell := weak()) is not None}
        collect = _Collect(self, [cell for cell in outputs.values() if cell.value is None])
        with named(f"recompute {self.name}"), self._surroundings.again(), saved_tensors_hooks(collect, _never):
            try:
                returned = _tensors(self.function(*inputs))
                collect.check_all()
                for number, cell in outputs.items():
                    cell.value = returned[number].detach()
            except _EnoughError:
                pass
        # Inputs that were computed again are let go: whoever else reads them holds a place of its own.
        self._args = [replace(arg, cell=None) if isinstance(arg, Given) else arg for arg in self._args]
        self.watcher.computed(self.name, watch.stop(), hidden)

    def _waiting_readers(self) -> Iterator[Segment]:
        for weak in self._readers:
            reader = weak()
            if reader is not None and reader._lacks(self) and reader.is_wanted:
                yield reader

    def _lacks(self, maker: Segment) -> bool:
        """Whether what `maker` gives this segment is not there."""
        given = (arg for arg in self._args if isinstance(arg, Given) and arg.maker is maker)
        return any(arg.cell is None or arg.cell.value is None for arg in given)

    def _hold(self, maker: Segment) -> None:
        """Asks for places for what `maker` gives, until this segment is computed."""
        for i, arg in enumerate(self._args):
            if isinstance(arg, Given) and arg.maker is maker and arg.cell is None:
                self._args[i] = replace(arg, cell=maker.place(arg.number))

    def _pack(self, tensor: Tensor, sources: dict[int, Given | None]) -> Any:
        storage = _storage(tensor)
        origin, cell = sources.get(storage), None
        if origin is not None:
            packed = origin.seen_as(tensor)
        elif storage not in sources and self.dropped and not self.watcher.is_weight(tensor):
            cell = Cell()
            packed = _Own(self, cell)
            self._count(tensor)
        else:
            packed = _Kept(tensor, self.name)
        if self.dropped:
            digest = _digest(tensor) if self.watcher.debug and cell is not None else b""
            weak = None if cell is None else weakref.ref(cell)
            self._saved.append(_Expected(weak, tensor.shape, tensor.dtype, digest))
        return packed

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._counted:
            self._counted[storage._cdata] = storage
            self.dropped_bytes += storage.nbytes()

    def _unpack(self, packed: Any) -> Tensor:
        self.watcher.asked()
        return packed.fetch(hidden=False)

    def _cells(self) -> Iterator[Cell]:
        places = (*self._outputs.values(), *(each.cell for each in self._saved if each.cell is not None))
        return (cell for weak in places if (cell := weak()) is not None)


class _Collect:
    """Pack hook of a recomputation: puts what autograd would save into the places that are held."""

    def __init__(self, segment: Segment, outputs: list[Cell]) -> None:
        """`outputs`: those of the segment's outputs that are wanted."""
        self.segment = segment
        self.own = [each.cell() if each.cell is not None else None for each in segment._saved]
        self.number = 0
        last = max((i for i, cell in enumerate(self.own) if cell is not None and cell.value is None), default=-1)
        self.enough = None if outputs else last + 1

    def __call__(self, tensor: Tensor) -> None:
        number = self.number
        self.number += 1
        if number >= len(self.own):
            raise self._differs(f"saves more than {len(self.own)} tensors")
        expected, cell = self.segment._saved[number], self.own[number]
        if (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
            raise self._differs(f"saves {_words(tensor)} where it saved {list(expected.shape)} {expected.dtype}")
        if cell is not None:
            if expected.digest and expected.digest != _digest(tensor):
                raise self._differs(f"gives other values for {_words(tensor)}")
            # The tensor itself holds the graph of this recomputation, and that this hook, which holds its place.
            cell.value = tensor.detach() if cell.value is None else cell.value
        if self.number == self.enough:
            raise _EnoughError

    def check_all(self) -> None:
        """Raises RuntimeError where less was saved than in forward."""
        if self.number < len(self.own):
            raise self._differs(f"saves {self.number} tensors, not {len(self.own)}")

    def _differs(self, how: str) -> RuntimeError:
        return RuntimeError(
            f"segment {self.segment.name}: computed again it {how}; it must depend on its arguments alone, and say so "
            "(draws=True) where it draws random numbers"
        )


class _Surroundings:
    """What a function reads beside its arguments: autocast, and the state of random generators where it `draws`."""

    def __init__(self, device: torch.device, draws: bool) -> None:
        self.device = device
        self.is_autocast = torch.is_autocast_enabled(device.type)
        self.dtype = torch.get_autocast_dtype(device.type) if self.is_autocast else None
        self.states: tuple[Tensor, Tensor | None] | None = None
        if draws:
            on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
            self.states = torch.get_rng_state(), on_device

    @contextmanager
    def again(self) -> Iterator[None]:
        """As they were."""
        devices = [self.device] if self.device.type == "cuda" else []
        with (
            torch.enable_grad(),
            torch.autocast(self.device.type, dtype=self.dtype, enabled=self.is_autocast),
            torch.random.fork_rng(devices, enabled=self.states is not None),
        ):
            if self.states is not None:
                torch.set_rng_state(self.states[0])
                if self.states[1] is not None:
                    torch.cuda.set_rng_state(self.states[1], self.device)
            yield


def _tensors(returned: Any) -> list[Tensor]:
    each = returned if isinstance(returned, tuple | list) else (returned,)
    return [value for value in each if isinstance(value, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _never(packed: Any) -> Tensor:
    raise AssertionError("the graph of a recomputation has no backward")


def _digest(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().cpu().view(-1)
    return hashlib.blake2b(flat.view(torch.uint8).numpy().tobytes(), digest_size=8).digest()


def _words(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"
