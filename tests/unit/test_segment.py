"""What is dropped and computed again changes no bit, is let go of in time, and is computed once."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from wastenot.launch.peak_memory import peak_bytes
from wastenot.parallel.recomputation import KEEP, Recomputation, Schedule


class Memory:
    """Knows of every tensor that it saw whether its memory is still there."""

    def __init__(self) -> None:
        self._seen: list[StorageWeakRef] = []

    def see(self, tensor: Tensor) -> Tensor:
        self._seen.append(StorageWeakRef(tensor.untyped_storage()))
        return tensor

    @property
    def alive(self) -> int:
        return len({each.cdata for each in self._seen if not each.expired()})


class _Exchange(torch.autograd.Function):
    """Stands for a collective: nothing travels, and `during` is done before forward and backward "wait"."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.during = backward
        forward(not_yet)
        return x.clone()

    @staticmethod
    def backward(ctx, *grads):
        ctx.during(not_yet)
        return grads[0], None, None


def not_yet() -> bool:
    return False


def exchange(recomputation: Recomputation, x: Tensor, name: str) -> Tensor:
    """`x`, through the windows `name` and `name gradient`."""
    during = recomputation.window(name, forward=True), recomputation.window(f"{name} gradient")
    return _Exchange.apply(x, *during)  # pyright: ignore[reportReturnType]


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What dies here dies because nothing refers to it any more."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


# Any program


class _Cube(torch.autograd.Function):
    """Saves what goes in, what comes out, and what is neither."""

    @staticmethod
    def forward(ctx, x):
        square = x * x
        y = square * x
        ctx.save_for_backward(x, y, square)
        return y

    @staticmethod
    def backward(ctx, *grads):
        x, y, square = ctx.saved_tensors
        return grads[0] * (2 * square + y / torch.where(x == 0, 1, x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.weight = nn.Parameter(torch.randn(4, 4, generator=generator))
        self.recomputation = Recomputation()


Function = Callable[..., Any]
FUNCTIONS: dict[str, Function] = {
    "wave": lambda model, x: x.sin().cos(),
    "its output alone": lambda model, x: x.tanh(),
    "its inputs alone": lambda model, x, y: x * y.sigmoid().detach(),
    "product": lambda model, x, y: x * y,
    "sum": lambda model, x, y: x + y,
    "two": lambda model, x, y: (x.sin() * y, y.cos() * x),
    "halves": lambda model, x: torch.cat([x.sin(), x.cos()], 1).chunk(2, 1),
    "turned": lambda model, x: x.t().sin().t(),
    "view of its input": lambda model, x: x.unsqueeze(0).squeeze(0),
    "view and more": lambda model, x: (x.t().t(), x.sigmoid().exp()),
    "its input": lambda model, x: x,
    "custom": lambda model, x: _Cube.apply(x.sin()),
    "custom of its input": lambda model, x: _Cube.apply(x),
    "linear": lambda model, x: F.linear(x, model.weight).tanh(),
    "weight alone": lambda model, x: F.linear(x, model.weight) / 8,
    "noise": lambda model, x: F.dropout(x.sin(), 0.5),
    "within": lambda model, x: model.recomputation.segment("0", lambda x: x.sin().exp(), x).cos(),
}
"""Of values [3, 4] to one or two such; none grows beyond a few."""
DRAWING = {"noise"}


@dataclass(frozen=True)
class Node:
    name: str
    function: str
    """Or `exchange`."""
    how: str
    """plain: not a segment; kept; dropped."""
    reads: tuple[int, int]
    """Numbers of values before it, modulo how many there are."""
    window: int
    """Where it is computed again, modulo how many windows there are and one more: on demand."""


@dataclass(frozen=True)
class Program:
    nodes: tuple[Node, ...]
    ends: tuple[int, ...]
    """Values that the loss is of."""
    order: str
    """F begins another pass, B is the backward of the oldest, N of the newest, T throws the oldest away."""
    autocast: bool
    debug: bool
    backwards: bool
    """Whether windows compute in an order against that of forward."""

    def schedule(self) -> Schedule:
        exchanges = [node.name for node in self.nodes if node.function == "exchange"]
        names = [*exchanges, *(f"{name} gradient" for name in exchanges)]
        dropped = [node for node in self.nodes if node.how == "dropped" and node.function != "exchange"]
        windows: dict[str, tuple[str, ...]] = {}
        for node in reversed(dropped) if self.backwards else dropped:
            number = node.window % (len(names) + 1)
            if number < len(names):
                windows[names[number]] = (*windows.get(names[number], ()), node.name)
        return Schedule(frozenset(node.name for node in dropped), windows)


nodes = st.builds(
    Node,
    name=st.just(""),
    function=st.sampled_from([*FUNCTIONS, "exchange", "exchange", "exchange"]),
    how=st.sampled_from(["plain", "kept", "dropped", "dropped", "dropped"]),
    reads=st.tuples(st.integers(0, 20), st.integers(0, 20)),
    window=st.integers(0, 40),
)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    listed = draw(st.lists(nodes, min_size=1, max_size=9))
    named = tuple(Node(str(i), node.function, node.how, node.reads, node.window) for i, node in enumerate(listed))
    order, waiting = "F", 1
    for _ in range(draw(st.integers(0, 3))):
        step = draw(st.sampled_from("FFBNT" if waiting else "F"))
        order, waiting = order + step, waiting + (1 if step == "F" else -1)
    order += draw(st.sampled_from("BN")) * waiting
    ends = draw(st.lists(st.integers(0, 20), min_size=1, max_size=3))
    return Program(named, tuple(ends), order, draw(st.booleans()), draw(st.booleans()), draw(st.booleans()))


def forward(program: Program, model: Model, x: Tensor, calls: Counter[str], memory: Memory) -> Tensor:
    """The loss of one pass."""
    recomputation, values = model.recomputation, [x]
    recomputation.begin(model)

    def counted(node: Node, *args: Tensor) -> Any:
        calls[node.name] += 1
        returned = FUNCTIONS[node.function](model, *args)
        for each in returned if isinstance(returned, tuple) else (returned,):
            memory.see(each)
        return returned

    for node in program.nodes:
        args = [values[number % len(values)] for number in node.reads]
        if node.function == "exchange":
            values.append(memory.see(exchange(recomputation, args[0], node.name)))
            continue
        args = args[: FUNCTIONS[node.function].__code__.co_argcount - 1]
        call = partial(counted, node)
        if node.how == "plain":
            returned = call(*args)
        else:
            returned = recomputation.segment(node.name, call, *args, draws=node.function in DRAWING)
        values += returned if isinstance(returned, tuple) else [returned]
    each = [values[-1 - number % len(values)] for number in program.ends]
    weights = torch.linspace(-1, 1, 12).view(3, 4)
    return torch.stack([(value * weights).sum() for value in each]).sum()


def run(program: Program, schedule: Schedule) -> tuple[list[Tensor], Counter[str], Memory]:
    """Losses, gradients and the next random number; calls of each function; and what became of what they gave."""
    torch.manual_seed(0)
    model, calls, memory = Model(), Counter[str](), Memory()
    model.recomputation.schedule, model.recomputation.debug = schedule, program.debug
    inputs: list[Tensor] = []
    found: list[Tensor] = []
    waiting: list[Tensor] = []
    for step in program.order:
        if step == "F":
            # A leaf of the graph that is seen to die is not one whose gradient is read.
            inputs.append(torch.randn(3, 4).requires_grad_())
            with torch.autocast("cpu", torch.bfloat16) if program.autocast else nullcontext():
                loss = forward(program, model, inputs[-1] * 1, calls, memory)
            waiting.append(loss)
            found.append(loss.detach().clone())
            del loss
        else:
            loss = waiting.pop(-1 if step == "N" else 0)
            if step != "T":
                loss.backward()
            del loss
    leaves = [*inputs, model.weight]
    found += [leaf.grad if leaf.grad is not None else torch.zeros(()) for leaf in leaves]
    return [*found, torch.rand(1)], calls, memory


@settings(max_examples=600, deadline=None)
@given(programs())
def test_no_bit_changes_whatever_is_dropped_and_wherever_it_is_computed_again(program):
    gc.disable()
    try:
        expected, once, _ = run(program, KEEP)
        found, calls, memory = run(program, program.schedule())
        assert memory.alive == 0, "freed with its graph, and in no cycle"
    finally:
        gc.enable()
    for one, other in zip(expected, found, strict=True):
        assert one.isfinite().all()
        assert one.equal(other)
    for node in program.nodes:
        most = 2 if node.how == "dropped" else 1
        assert once[node.name] <= calls[node.name] <= most * once[node.name], node


# Memory


def chain(recomputation: Recomputation, memory: Memory, x: Tensor, mark: Callable[[Tensor], Any] = id) -> Tensor:
    """Three segments with a window before the last: loss of x. Each keeps one tensor that is seen, and not its input.

    `mark` sees what goes into each, and into the window.
    """
    recomputation.begin(nn.Identity())

    def two(x: Tensor) -> Tensor:
        return memory.see(memory.see((x + 1).sin()).cos())

    def through(step: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        mark(x)
        return step(x)

    x = through(partial(recomputation.segment, "first", two), x * 1)
    x = through(partial(recomputation.segment, "second", two), x)
    x = through(lambda x: exchange(recomputation, x, "window"), x)
    return through(partial(recomputation.segment, "third", two), x).sum()


ALL = frozenset({"first", "second", "third"})


def test_what_is_dropped_dies_after_forward_and_again_after_its_use(no_collector):
    alive: list[int] = []

    def alive_in_backward(schedule: Schedule) -> list[int]:
        """Tensors after forward, before each step of backward, and after it."""
        memory = Memory()
        x = torch.randn(5, requires_grad=True)

        def mark(x: Tensor) -> None:
            x.register_hook(lambda grad: alive.append(memory.alive))

        loss = chain(Recomputation(schedule), memory, x, mark)
        alive.append(memory.alive)
        loss.backward()
        del loss
        found = [*alive, memory.alive]
        alive.clear()
        return found

    assert alive_in_backward(KEEP) == [3, 2, 2, 1, 0, 0]
    # The window computes the second one, and for it the first; on demand it is the same somewhat later.
    assert alive_in_backward(Schedule(ALL, {"window gradient": ("second",)})) == [0, 0, 2, 1, 0, 0]
    assert alive_in_backward(Schedule(ALL)) == [0, 0, 0, 1, 0, 0]
    # Nobody has to compute the first one for the second, which is kept.
    assert alive_in_backward(Schedule(ALL - {"second"}, {"window gradient": ("third", "first")})) == [1, 1, 2, 1, 0, 0]


def test_what_is_thrown_away_is_freed_whatever_was_computed_again(no_collector):
    schedule = Schedule(ALL, {"window": ("first", "second", "third")})
    for passes in (1, 2):
        memory, recomputation = Memory(), Recomputation(schedule)
        x = memory.see(torch.randn(5)).requires_grad_()
        # The second one computes what the first one dropped; nobody reads it.
        losses = [chain(recomputation, memory, x) for _ in range(passes)]
        assert len(recomputation.spent.hidden) == 3 * (passes - 1)
        del x
        assert memory.alive == 1 + 3 * (passes - 1)
        losses.clear()
        assert memory.alive == 0


def test_layers_recomputed_on_demand_take_the_memory_of_one():
    def loss(schedule: Schedule) -> Tensor:
        recomputation = Recomputation(schedule)
        recomputation.begin(nn.Identity())
        x = torch.zeros(2**18, requires_grad=True)
        for layer in range(10):
            x = x + recomputation.segment(str(layer), lambda x: x.sin().cos().sin().cos().sin(), x)
        return x.sum()

    everything = Schedule(frozenset(map(str, range(10))))
    kept, dropped = (peak_bytes(lambda s=s: loss(s).backward()) for s in (KEEP, everything))
    # Of each layer what goes in, and four tensors within.
    assert kept > 50 * 2**20
    assert dropped < 0.4 * kept


# What is computed, and when


class Calls:
    """Functions that count their calls by name."""

    def __init__(self) -> None:
        self.of = Counter[str]()
        self.order: list[str] = []

    def named(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.of[name] += 1
            self.order.append(name)
            return function(*args)

        return call


def wave(x: Tensor) -> Tensor:
    """Of its input it keeps nothing."""
    return (x + 1).sin().cos()


def begun(schedule: Schedule, module: nn.Module | None = None, debug: bool = False) -> Recomputation:
    recomputation = Recomputation(schedule, debug=debug)
    recomputation.begin(module or nn.Identity())
    return recomputation


def test_windows_in_order_compute_each_segment_once_and_hide_it():
    calls = Calls()
    recomputation = begun(Schedule(ALL, {"window gradient": ("first", "second", "third", "first")}))
    x = torch.randn(5, requires_grad=True)
    for name in ("first", "second", "third"):
        x = recomputation.segment(name, calls.named(name, wave), x)
    exchange(recomputation, x, "window").sum().backward()
    assert calls.order == ["first", "second", "third"] * 2
    assert (len(recomputation.spent.hidden), len(recomputation.spent.exposed)) == (3, 0)


def test_windows_out_of_order_compute_what_they_need_first():
    calls = Calls()
    recomputation = begun(Schedule(ALL, {"window gradient": ("third", "first")}))
    x = torch.randn(5, requires_grad=True)
    for name in ("first", "second", "third"):
        x = recomputation.segment(name, calls.named(name, wave), x)
    exchange(recomputation, x, "window").sum().backward()
    assert calls.order == ["first", "second", "third"] * 2


def test_nothing_is_computed_that_nobody_reads():
    calls, model = Calls(), nn.Linear(4, 4)
    cast = model.weight.double()
    names = ("sum", "product", "product of a cast", "rows", "constant", "unused")
    recomputation = begun(Schedule(frozenset(names), {"window gradient": names}), model)
    x = torch.randn(3, 4, requires_grad=True)

    def segment(name: str, function: Callable[..., Any], *args: Any) -> Any:
        return recomputation.segment(name, calls.named(name, function), *args)

    y = segment("sum", torch.add, x, x)
    # Reads an input and a weight, of which both are there; it needs no casting again of what came as an argument.
    y = segment("product", lambda x: F.linear(x, model.weight), y) + y
    y = segment("product of a cast", F.linear, x.double(), cast) + y
    y = segment("rows", torch.index_select, x, 0, torch.tensor([2, 1, 0])) + y
    segment("unused", wave, x)
    with torch.no_grad():
        constant = segment("constant", wave, x)
    y = exchange(recomputation, y + constant, "window")
    y.sum().backward()
    assert calls.of == Counter(dict.fromkeys(names, 1) | {"sum": 2}), "read by the weight's gradient alone"


def test_what_is_cast_within_or_closed_over_is_asked_for_by_a_call():
    calls, model = Calls(), nn.Linear(4, 4)
    recomputation = begun(Schedule(frozenset({"product", "rows"})), model)
    x, order = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.tensor([2, 1, 0])
    product = calls.named("product", lambda x: F.linear(x, model.weight.double()))
    rows = calls.named("rows", lambda x: x.index_select(0, order))
    (recomputation.segment("product", product, x) + recomputation.segment("rows", rows, x)).sum().backward()
    assert calls.of == {"product": 2, "rows": 2}


def test_a_weight_that_a_segment_gives_is_not_its_own():
    calls, model = Calls(), nn.Linear(4, 4)
    recomputation = begun(Schedule(frozenset({"weight"})), model)
    give = calls.named("weight", lambda x: (x.sin(), model.weight.t()))
    x = torch.randn(3, 4, requires_grad=True)
    recomputation.segment("weight", give, x)
    # Nor later, by what is left of it in that pass.
    recomputation.begin(model)
    (recomputation.segment("product", torch.mm, x, model.weight) + x).sum().backward()
    assert calls.of["weight"] == 1


def test_a_recomputation_ends_with_the_last_tensor_that_is_wanted():
    calls = Calls()
    recomputation = begun(Schedule(frozenset({"long", "reader"})))

    def long(x: Tensor) -> Tensor:
        # The product saves both of its factors.
        return calls.named("late", torch.neg)(x.sin() * x.cos())

    x = torch.randn(5, requires_grad=True)
    recomputation.segment("long", long, x).sum().backward()
    assert calls.of["late"] == 1
    # Its output is wanted as well where a dropped segment reads it.
    recomputation.begin(nn.Identity())
    recomputation.segment("reader", wave, recomputation.segment("long", long, x)).sum().backward()
    assert calls.of["late"] == 3


def test_a_graph_that_is_retained_computes_again_once():
    calls = Calls()
    recomputation = begun(Schedule(frozenset({"wave"})))
    x = torch.randn(5, requires_grad=True)
    loss = recomputation.segment("wave", calls.named("wave", wave), x).sum()
    once = torch.autograd.grad(loss, x, retain_graph=True)
    again = torch.autograd.grad(loss, x)
    assert once[0].equal(again[0])
    assert calls.of["wave"] == 2


def test_segments_within_a_dropped_one_are_part_of_it():
    for dropped, expected in ({"outer", "inner"}, 2), ({"outer"}, 2), ({"inner"}, 1), (set(), 1):
        calls, schedule = Calls(), Schedule(frozenset(dropped))
        recomputation = begun(schedule)
        inner = calls.named("inner", wave)
        outer = calls.named("outer", lambda x, r=recomputation, f=inner: r.segment("inner", f, x).sin())
        x = torch.randn(5, requires_grad=True)
        recomputation.segment("outer", outer, x).sum().backward()
        assert calls.of == {"outer": expected, "inner": 2 if dropped else 1}
        assert len(recomputation.spent.exposed) == (1 if dropped else 0)
        assert x.grad is not None
        assert x.grad.equal(torch.autograd.grad(wave(x).sin().sum(), x)[0])


def test_without_gradients_a_segment_is_a_call():
    recomputation = Recomputation(Schedule(ALL, {"window": tuple(ALL), "window gradient": tuple(ALL)}))
    with torch.no_grad():
        chain(recomputation, Memory(), torch.randn(5))
    assert not recomputation.current._segments
    assert recomputation.window("window") is recomputation.window("no such window")


def test_random_numbers_are_drawn_again_and_no_others():
    recomputation = begun(Schedule(frozenset({"noise"})))
    x = torch.ones(1000, requires_grad=True)
    y = recomputation.segment("noise", lambda x: F.dropout(x.exp(), 0.5), x, draws=True)
    torch.rand(3)
    state = torch.get_rng_state()
    y.sum().backward()
    assert torch.get_rng_state().equal(state)
    assert x.grad is not None
    assert x.grad.equal(y.detach())


# Passes


def passes_in_order(order: str, schedule: Schedule) -> str:
    """What is computed, by name and pass: F and B are the forward and the backward of the next pass."""
    recomputation, events = Recomputation(schedule), list[str]()
    losses: dict[int, Tensor] = {}
    forwards = backwards = 0
    for step in order:
        if step == "B":
            events.append(f"B{backwards}")
            losses.pop(backwards).backward()
            backwards += 1
            continue
        events.append(f"F{forwards}")
        recomputation.begin(nn.Identity())
        x = torch.randn(5, requires_grad=True)

        def seen(x: Tensor, number: int = forwards) -> Tensor:
            events.append(str(number))
            return wave(x)

        y = exchange(recomputation, recomputation.segment("wave", seen, x), "window")
        losses[forwards] = y.sum()
        forwards += 1
    return " ".join(events)


def test_forward_windows_serve_the_oldest_pass_that_waits():
    schedule = Schedule(frozenset({"wave"}), {"window": ("wave",)})
    assert passes_in_order("FBFB", schedule) == "F0 0 B0 0 F1 1 B1 1", "nobody waits: on demand"
    # 1F1B, two stages before the last: the first forward has nobody to serve.
    assert passes_in_order("FFBFBB", schedule) == "F0 0 F1 1 0 B0 F2 2 1 B1 B2 2"
    # GPipe: the third finds what waits longest served.
    assert passes_in_order("FFFBBB", schedule) == "F0 0 F1 1 0 F2 2 B0 B1 1 B2 2"


def test_backward_windows_serve_their_own_pass():
    schedule = Schedule(frozenset({"wave"}), {"window gradient": ("wave",)})
    assert passes_in_order("FFBFBB", schedule) == "F0 0 F1 1 B0 0 F2 2 B1 1 B2 2"


def test_a_new_schedule_is_that_of_the_passes_that_begin_from_then_on():
    calls, recomputation = Calls(), begun(Schedule(frozenset({"wave"}), {"window gradient": ("wave",)}))
    x = torch.randn(5, requires_grad=True)
    first = exchange(recomputation, recomputation.segment("wave", calls.named("first", wave), x), "window")
    recomputation.schedule = KEEP
    recomputation.begin(nn.Identity())
    second = exchange(recomputation, recomputation.segment("wave", calls.named("second", wave), x), "window")
    (first + second).sum().backward()
    assert calls.of == {"first": 2, "second": 1}


def test_a_pass_that_is_gone_is_not_served():
    calls, recomputation = Calls(), Recomputation(Schedule(frozenset({"wave"}), {"window": ("wave",)}))
    for name in ("gone", "there"):
        recomputation.begin(nn.Identity())
        x = torch.randn(5, requires_grad=True)
        loss = exchange(recomputation, recomputation.segment("wave", calls.named(name, wave), x), "window").sum()
        del loss
    assert calls.of == {"gone": 1, "there": 1}


def test_what_began_after_all_had_arrived_is_exposed():
    recomputation = begun(Schedule(ALL, {"window": ("first", "second")}))
    x = torch.randn(5, requires_grad=True)
    loss = torch.stack([recomputation.segment(name, wave, x) for name in sorted(ALL)]).sum()
    arrived = iter([False, True])
    recomputation.window("window")(lambda: next(arrived))
    spent = recomputation.spent
    assert (len(spent.hidden), len(spent.exposed)) == (1, 1)
    loss.backward()
    assert (len(spent.hidden), len(spent.exposed)) == (1, 2), "the third one on demand"
    hidden, exposed = spent.take()
    assert hidden > 0
    assert exposed > 0
    assert spent.take() == (0.0, 0.0)


# Mistakes


def differing(*shapes: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """Another function at its second call: saves products of these shapes at the first, then others."""
    left: list[tuple[int, ...]] = list(shapes)

    def function(x: Tensor) -> Tensor:
        total = x.sum()
        for size in left.pop(0):
            total = total + x[:size].sin().cos().sum()
        return total

    return function


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ((3,), (2,), r"saves \[2\] torch.float32 where it saved \[3\] torch.float32"),
        ((3, 3), (3,), "saves 2 tensors, not 4"),
        ((3,), (3, 3), "saves more than 2 tensors"),
    ],
)
def test_a_function_that_is_not_the_same_again_is_named(first, second, message):
    recomputation = begun(Schedule(frozenset({"odd", "reader"})))
    x = torch.randn(5, requires_grad=True)
    # Read by another segment, so that it is computed to its end.
    total = recomputation.segment("reader", wave, recomputation.segment("odd", differing(first, second), x))
    with pytest.raises(RuntimeError, match=f"segment odd: computed again it {message}.*draws=True"):
        total.backward()


def test_debugging_finds_other_values():
    for debug in (False, True):
        recomputation = begun(Schedule(frozenset({"noise"})), debug=debug)
        x = torch.randn(100, requires_grad=True)
        loss = recomputation.segment("noise", lambda x: (x + torch.rand(100)).sin().cos(), x).sum()
        if debug:
            with pytest.raises(RuntimeError, match=r"segment noise: .* gives other values for \[100\] torch.float32"):
                loss.backward()
        else:
            loss.backward()


def test_a_window_of_what_is_kept_is_refused():
    with pytest.raises(ValueError, match="windows: 'kept' is to be computed again and is not dropped"):
        Schedule(frozenset({"dropped"}), {"window": ("dropped", "kept")})
