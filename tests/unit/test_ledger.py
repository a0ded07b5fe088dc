"""The waste ledger counts every choice and slot once, however often a step is cut, recomputed or resumed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from wastenot.launch.config import DataConfig, LogConfig, LoopConfig, ScheduleConfig, TrainConfig
from wastenot.launch.metrics import read_metrics, scalars
from wastenot.launch.optimizer import make_optimizer
from wastenot.launch.step import Stepper, StepResult
from wastenot.moe.accounts import merge, slot_ratios, sum_up
from wastenot.moe.config import EmulateConfig, ModelConfig, MoEConfig, RectifyConfig, RouterConfig
from wastenot.moe.decoder import build_decoder
from wastenot.moe.ledger import SLOTS, Ledger, check_identities, count_layers, count_slots
from wastenot.moe.load import Loads, gini, load_of
from wastenot.moe.routing import Routing, StandIns
from wastenot.parallel.gradients import Gradients
from wastenot.parallel.mesh import single
from wastenot.parallel.stopwatch import StreamWait
from wastenot.tools.random_tokens import RandomTokens

pytestmark = pytest.mark.usefixtures("one_thread")


def by_hand() -> Routing:
    """Two ranks of three tokens, three experts of two slots, top-1 and one fill-in choice.

    Rank 0 owns expert 0: its tokens 0 and 1 got their first choice, expert 1, and token 2 found it full; as a fill-in
    choice token 0 got expert 0 and token 2 nothing: it lost all and stands with expert 0. Rank 1: everybody wants
    expert 2, token 5 finds it full, its fill-in choice is full too, and the bound of rows leaves it unserved.
    """
    experts_TK = torch.tensor([[1, 0], [1, 2], [1, 1], [2, 0], [2, 1], [2, 2]])
    slots_TK = torch.tensor([[0, 0], [1, 0], [-1, -1], [0, 0], [1, -1], [-1, -1]])
    counts_BE = torch.tensor([[1, 2, 1], [1, 0, 2]])
    logits_TE = torch.zeros(6, 3)
    stand_ins = StandIns(
        expert_T=torch.tensor([-1, -1, 0, -1, -1, -1]),
        weight_T=torch.tensor([0.0, 0, 1, 0, 0, 0]),
        slots_T=torch.tensor([-1, -1, 0, -1, -1, -1]),
        counts_BE=torch.tensor([[1, 0, 0], [0, 0, 0]]),
        bound=1,
    )
    return Routing(
        experts_TK=experts_TK,
        weights_TK=torch.where(slots_TK >= 0, 0.5, 0.0),
        slots_TK=slots_TK,
        counts_BE=counts_BE,
        capacity=2,
        logits_TE=logits_TE,
        probs_TE=logits_TE.softmax(-1),
        top_k=1,
        stand_ins=stand_ins,
    )


def counted(routing: Routing) -> dict[str, int]:
    return dict(zip(SLOTS, count_slots(routing).tolist(), strict=True))


def test_slots_by_hand():
    routing = by_hand()
    check_identities(routing)
    assert counted(routing) == {
        "kept": 4,
        "filled": 3,
        "rectified": 1,
        "dropped": 1,
        "padding": 2 * 3 * 2 - 7,
        "local_rows": 1,
        "unserved": 1,
    }
    assert routing.load_E.tolist() == [0, 3, 3], "first choices only, dropped ones too"


def test_slots_without_rectification_by_hand():
    routing = replace(by_hand(), stand_ins=None)
    check_identities(routing)
    assert counted(routing) == counted(by_hand()) | {"rectified": 0, "dropped": 2, "local_rows": 0, "unserved": 2}


def test_dropless_routing_wastes_nothing():
    experts_TK = torch.tensor([[0, 1], [1, 2]])
    routing = replace(
        by_hand(),
        experts_TK=experts_TK,
        slots_TK=torch.tensor([[0, 0], [1, 0]]),
        weights_TK=torch.full((2, 2), 0.5),
        counts_BE=torch.tensor([[1, 2, 1]]),
        capacity=None,
        logits_TE=torch.zeros(2, 3),
        probs_TE=torch.full((2, 3), 1 / 3),
        top_k=2,
        stand_ins=None,
    )
    check_identities(routing)
    assert counted(routing) == dict.fromkeys(SLOTS, 0) | {"kept": 4}


def with_cell(tensor: Tensor, place: tuple[int, ...], value: float) -> Tensor:
    changed = tensor.clone()
    changed[place] = value
    return changed


def replaced(**changes: Callable[[Tensor], Tensor]) -> Routing:
    """The routing by hand with fields changed; names of `StandIns` change its fields."""
    routing = by_hand()
    stand_ins = routing.stand_ins
    assert stand_ins is not None
    for name, change in changes.items():
        if name in ("expert_T", "weight_T", "slots_T", "rows_BE"):
            name = "counts_BE" if name == "rows_BE" else name
            stand_ins = replace(stand_ins, **{name: change(getattr(stand_ins, name))})
        else:
            routing = replace(routing, **{name: change(getattr(routing, name))})
    return replace(routing, stand_ins=stand_ins)


CORRUPTED = {
    "a choice lost its slot": (
        {"slots_TK": lambda t: with_cell(t, (3, 0), -1), "weights_TK": lambda t: with_cell(t, (3, 0), 0)},
        "filled: 4 counted, 3 choices",
    ),
    "a slot is counted that nobody has": ({"counts_BE": lambda t: t + 1}, "filled: 9 counted, 3 choices"),
    "slots are counted at the wrong expert": ({"counts_BE": lambda t: t.flip(1)}, "counts_BE disagrees"),
    "two choices share a slot": ({"slots_TK": lambda t: with_cell(t, (1, 0), 0)}, "two choices share a slot"),
    "a slot beyond the capacity": ({"slots_TK": lambda t: with_cell(t, (1, 0), 2)}, "beyond the capacity"),
    "a weight is not finite": ({"weights_TK": lambda t: with_cell(t, (0, 0), math.nan)}, "not finite"),
    "a lost choice has a weight": ({"weights_TK": lambda t: with_cell(t, (2, 0), 0.1)}, "without a slot has a weight"),
    "a row too many": ({"rows_BE": lambda t: t + 1}, "rows of stand-ins"),
    "a row of the wrong expert": ({"expert_T": lambda t: with_cell(t, (2,), 1)}, "rows of stand-ins"),
    "a stand-in without a row or a slot": (
        {"slots_T": lambda t: with_cell(t, (2,), -1), "rows_BE": torch.zeros_like},
        "stand-in neither has a row nor holds",
    ),
    "two stand-ins in one row": (
        {
            "expert_T": lambda t: with_cell(t, (1,), 0),
            "slots_T": lambda t: with_cell(t, (1,), 0),
            "rows_BE": lambda t: with_cell(t, (0, 0), 2),
        },
        "two stand-ins share a row",
    ),
    "a stand-in's weight is not finite": (
        {"weight_T": lambda t: with_cell(t, (2,), math.inf)},
        "weight is not finite",
    ),
    "a weight without a row": ({"weight_T": lambda t: with_cell(t, (0,), 0.5)}, "without a row has a weight"),
    "more rows than the bound": (
        {
            "expert_T": lambda t: with_cell(t, (1,), 0),
            "slots_T": lambda t: with_cell(t, (1,), 1),
            "rows_BE": lambda t: with_cell(t, (0, 0), 2),
        },
        "more rows of stand-ins than the bound",
    ),
}


@pytest.mark.parametrize("name", CORRUPTED)
def test_a_routing_that_contradicts_itself_is_caught(name):
    changes, message = CORRUPTED[name]
    with pytest.raises(AssertionError, match=message):
        check_identities(replaced(**changes))


def test_even_load_by_hand():
    load = load_of(torch.tensor([[5, 5, 5, 5]]))
    assert (load.max_over_mean, load.cv, load.gini, load.dead) == (1.0, 0.0, 0.0, 0)
    assert load.entropy == pytest.approx(1.0)
    assert load.per_layer == [[0.25] * 4]


def test_one_expert_for_all_by_hand():
    load = load_of(torch.tensor([[0, 8, 0, 0]]))
    assert (load.max_over_mean, load.entropy, load.dead) == (4.0, 0.0, 3)
    assert load.cv == pytest.approx(math.sqrt(3))
    assert load.gini == pytest.approx(3 / 4)


def test_figures_of_load_are_means_over_layers_and_dead_experts_are_counted_over_all():
    load = load_of(torch.tensor([[5, 5], [10, 0]]))
    assert (load.max_over_mean, load.cv, load.entropy, load.gini) == pytest.approx((1.5, 0.5, 0.5, 0.25))
    assert load.dead == 1


@given(st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=6), min_size=1, max_size=4))
def test_experts_that_a_layer_lacks_are_no_idle_ones(load):
    """Figures of every layer are those it has alone."""
    counts = [len(layer) for layer in load]
    loads = Loads(counts)
    loads.add(torch.tensor([layer + [0] * (max(counts) - len(layer)) for layer in load]))
    found = loads.read()
    assert found is not None
    alone = [load_of(torch.tensor([layer])) for layer in load]
    assert [len(layer) for layer in found.per_layer] == counts
    assert found.per_layer == [one.per_layer[0] for one in alone]
    assert found.dead == sum(one.dead for one in alone)
    for name, values in found.by_layer.items():
        assert values == pytest.approx([getattr(one, name) for one in alone], abs=1e-12), name


def test_accounts_of_layers_with_other_numbers_of_experts_add_up():
    loads = Loads([3, 2])
    loads.add(torch.tensor([[1, 0, 3], [2, 2, 0]]))
    line = merge([ledger_of_one(3)], loads.read(), tokens=8)
    assert (line["expert_load"], line["dead_experts"]) == ([[0.25, 0, 0.75], [0.5, 0.5]], 1)
    account = sum_up([line, line])
    assert account is not None
    assert account["expert_load"] == [pytest.approx([0.25, 0, 0.75]), pytest.approx([0.5, 0.5])]
    assert account["load"]["dead"] == 1


def test_a_single_expert_and_a_layer_without_choices_have_finite_figures():
    alone = load_of(torch.tensor([[7]]))
    assert (alone.max_over_mean, alone.cv, alone.entropy, alone.gini, alone.dead) == (1, 0, 1, 0, 0)
    nothing = load_of(torch.zeros(1, 3))
    assert (nothing.max_over_mean, nothing.cv, nothing.entropy, nothing.gini, nothing.dead) == (0, 0, 0, 0, 3)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=12))
def test_gini_is_half_the_relative_mean_difference(load):
    load_E = torch.tensor([load])
    mean, pairs = sum(load) / len(load), [abs(a - b) for a in load for b in load]
    expected = sum(pairs) / len(pairs) / (2 * mean) if mean else 0.0
    assert gini(load_E).item() == pytest.approx(expected)
    assert 0 <= gini(load_E).item() <= 1


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=12).filter(any), st.integers(2, 50), st.randoms())
def test_load_does_not_depend_on_scale_or_order(load, factor, shuffle):
    shuffled = shuffle.sample(load, len(load))
    one, other = load_of(torch.tensor([load])), load_of(factor * torch.tensor([shuffled]))
    for name in ("max_over_mean", "cv", "entropy", "gini", "dead"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), abs=1e-12)
    assert 1 <= one.max_over_mean <= len(load)
    assert 0 <= one.entropy <= 1 + 1e-12


def test_ratios_by_hand():
    slots = {"kept": [6, 2], "filled": [1, 1], "rectified": [1, 0], "dropped": [1, 6], "padding": [3, 7]}
    ratios = slot_ratios(slots | {"local_rows": [1, 0], "unserved": [0, 4]}, tokens=8)
    assert ratios == {
        "kept_ratio": 8 / 16,
        "filled_ratio": 2 / 16,
        "rectified_ratio": 1 / 16,
        "dropped_ratio": 7 / 16,
        "padding_ratio": 10 / 20,
        "unserved_ratio": 4 / 16,
    }
    assert set(slot_ratios({name: [0] for name in SLOTS}, 0).values()) == {0.0}


def ledger_of(steps: int, first: int, seconds: float) -> Ledger:
    """Two layers; layer l counts first + l of everything, each step sends 100 bytes in layer 1 and 7 elsewhere."""
    ledger = Ledger()
    for _ in range(steps):
        ledger.collective_entered("layer1.dispatch", 100)
        ledger.collective_left("layer1.dispatch", seconds, hidden=2 * seconds)
        ledger.collective_entered("step-statistics", 7)
        ledger.add(torch.tensor([[9, 9] + [first + layer] * 7 for layer in range(2)]))
    return ledger


def test_accounts_of_ranks_merge_into_one_by_hand():
    pages = [ledger_of(3, 1, 0.5).page(), ledger_of(3, 10, 0.25).page()]
    merged = merge(pages, load_of(torch.tensor([[4, 4], [8, 0]])), tokens=12)
    assert merged["ledger_steps"] == 3
    assert merged["slots"] == {name: [3 * 11, 3 * 13] for name in SLOTS}
    assert merged["slots_by_rank"] == [[[3] * 7, [6] * 7], [[30] * 7, [33] * 7]]
    assert merged["sent_bytes"] == 2 * 3 * 107
    assert merged["sent_bytes_by_rank"] == [321, 321]
    assert merged["sent_bytes_by_layer"] == [0, 600]
    assert merged["sent_bytes_by_rank_and_layer"] == [[0, 300], [0, 300]]
    assert merged["waited_seconds_by_layer"] == [0, 2.25]
    assert merged["waited_seconds_by_rank_and_layer"] == [[0, 1.5], [0, 0.75]]
    assert merged["waited_seconds_by_rank"] == [1.5, 0.75]
    assert merged["collectives"] == {
        "dispatch": {"calls": 6, "bytes": 600, "waited_seconds": 2.25, "hidden_seconds": 4.5},
        "step-statistics": {"calls": 6, "bytes": 42, "waited_seconds": 0.0, "hidden_seconds": 0.0},
    }
    assert merged["hidden_seconds"] == 4.5
    assert merged["expert_load"] == [[0.5, 0.5], [1.0, 0.0]]
    assert merged["dead_experts"] == 1
    assert merged["unserved_ratio"] == (33 + 39) / (12 * 2)


def test_a_paused_ledger_counts_no_collective_and_forgets_none():
    ledger = ledger_of(1, 1, 0.5)
    with ledger.paused():
        ledger.collective_entered("evaluation", 1000)
        ledger.collective_left("evaluation", 1.0)
        ledger.collective_entered("layer1.dispatch", 1000)
    assert ledger.page() == ledger_of(1, 1, 0.5).page()


def test_a_cleared_ledger_is_empty():
    ledger = ledger_of(2, 1, 0.5)
    ledger.clear()
    assert ledger.page() == Ledger().page()
    assert merge([ledger.page()], None, 0)["sent_bytes"] == 0


def lines_of(cuts: list[int], steps: int) -> list[dict]:
    """The metrics of `steps` steps, a line where each cut falls; step s counts s of everything on both ranks."""
    lines, last = [], 0
    for step in sorted({*cuts, steps}):
        ranks = [Ledger(), Ledger()]
        loads = Loads()
        for s in range(last + 1, step + 1):
            for ledger in ranks:
                ledger.collective_entered("layer0.dispatch", s)
                ledger.add(torch.tensor([[s, 2] + [s] * 7]))
            loads.add(torch.tensor([[2 * s, 4 * s]]))
        pages = [ledger.page() for ledger in ranks]
        lines.append({"step": step, "loss": 1.0} | merge(pages, loads.read(), tokens=8 * (step - last)))
        last = step
    return lines


@settings(max_examples=30)
@given(st.integers(1, 12), st.lists(st.integers(1, 11), max_size=6))
def test_the_account_of_a_run_does_not_depend_on_where_its_lines_end(steps, cuts):
    whole, cut = sum_up(lines_of([], steps)), sum_up(lines_of([c for c in cuts if c < steps], steps))
    assert whole is not None
    assert cut is not None
    assert cut["steps"] == whole["steps"] == steps
    once = steps * (steps + 1) // 2
    for account in (whole, cut):
        assert account["slots"] == {name: [2 * once] for name in SLOTS}
        assert account["slots_by_rank"] == [[[once] * 7]] * 2
        assert account["collectives"]["dispatch"] == {
            "calls": 2 * steps,
            "bytes": 2 * once,
            "waited_seconds": 0,
            "hidden_seconds": 0,
        }
        assert account["sent_bytes_by_layer"] == [account["sent_bytes"]] == [2 * once]
        assert account["sent_bytes_by_rank"] == [once, once]
        assert account["sent_bytes_by_rank_and_layer"] == [[once]] * 2
        assert account["load"]["gini"] == pytest.approx(1 / 6)
        assert account["expert_load"] == [pytest.approx([1 / 3, 2 / 3])]


def test_lines_of_other_worlds_count_in_totals_but_not_by_rank():
    two = lines_of([], 2)
    alone = merge([ledger_of_one(3)], load_of(torch.tensor([[1, 1]])), tokens=8)
    account = sum_up([*two, {"step": 3, "loss": 1.0} | alone])
    assert account is not None
    assert account["steps"] == 3
    assert account["slots"]["kept"] == [2 * (1 + 2) + 3]
    assert account["slots_by_rank"] is None
    assert account["sent_bytes_by_rank"] is None
    assert sum_up([]) is None


def test_the_account_of_a_dense_model_has_bytes_and_waits_but_no_slots():
    ledger = Ledger()
    ledger.collective_entered("gradients", 100)
    ledger.collective_left("gradients", 0.5)
    ledger.add(torch.zeros(0, len(SLOTS), dtype=torch.int64))
    account = sum_up([{"step": s, "loss": 1.0} | merge([ledger.page()] * 2, None, tokens=8) for s in (1, 2)])
    assert account is not None
    assert (account["steps"], account["sent_bytes"], account["waited_seconds_by_rank"]) == (2, 400, [1.0, 1.0])
    assert not {"slots", "load", "expert_load"} & account.keys()


def test_load_is_judged_step_by_step_and_shares_are_of_all_steps():
    """Two steps that each use one expert alone are as uneven as can be, however even both together are."""
    loads = Loads()
    for step in ([[8, 0], [3, 1]], [[0, 8], [2, 2]]):
        loads.add(torch.tensor(step))
    load = loads.read()
    assert load is not None
    assert load.per_layer == [[0.5, 0.5], [0.625, 0.375]]
    assert load.by_layer["max_over_mean"] == [2.0, 1.25]
    assert load.by_layer["gini"] == [0.5, 0.125]
    assert load.by_layer["cv"] == [1.0, 0.25]
    assert load.max_over_mean == pytest.approx((2 + 1.25) / 2)
    assert load.dead == 0, "dead is an expert that nobody chose in any step"


def test_tensorboard_gets_every_number_by_a_name_of_its_own_but_no_table():
    values = {"loss": 2.5, "slots": {"kept": [3, 4]}, "collectives": {"dispatch": {"bytes": 7}}, "text": "no"}
    values |= {"expert_load": [[0.5, 0.5]], "sent_bytes_by_rank": [1, 2]}
    assert dict(scalars(values)) == {
        "loss": 2.5,
        "slots/kept/0": 3,
        "slots/kept/1": 4,
        "collectives/dispatch/bytes": 7,
        "sent_bytes_by_rank/0": 1,
        "sent_bytes_by_rank/1": 2,
    }


def ledger_of_one(number: int):
    ledger = Ledger()
    ledger.add(torch.tensor([[1, 1] + [number] * 7]))
    return ledger.page()


def write_metrics(folder: Path, *lines: dict) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_what_a_killed_session_did_beyond_its_checkpoint_is_not_counted_twice(tmp_path: Path):
    """Stopped at 7, where it saved nothing in time; resumed at 4 with lines that end elsewhere, killed, resumed."""
    first, second = lines_of([4, 7], 9), lines_of([4, 6, 9], 12)
    start = [{"event": "start", "step": step, "world": 2} for step in (0, 4, 6)]
    evaluated = [{"step": step, "val_loss": 2.0} for step in (5, 8)]
    write_metrics(
        tmp_path, start[0], *first[:1], evaluated[0], *first[1:2], start[1], *second[1:3], evaluated[1], start[2],
        *second[2:],
    )  # fmt: skip
    lines = list(read_metrics(tmp_path))
    assert [line["step"] for line in lines if "loss" in line] == [4, 6, 9, 12]
    assert not any("val_loss" in line for line in lines), "nor is what it evaluated there"
    assert [line["step"] for line in lines if line.get("event") == "start"] == [0, 4, 6]
    account, uninterrupted = sum_up([line for line in lines if "loss" in line]), sum_up(lines_of([], 12))
    assert account is not None
    assert uninterrupted is not None
    for name in ("steps", "slots", "slots_by_rank", "collectives", "sent_bytes"):
        assert account[name] == uninterrupted[name], name


def first_step(
    router: RouterConfig, accumulate: int = 1, recomputed: bool = False, spoiled: bool = False
) -> StepResult:
    """One training step of two MoE layers, in debug mode.

    recomputed: each block's forward runs again in backward; spoiled: a gate is not finite.
    """
    config = TrainConfig(
        model=ModelConfig(
            vocab_size=31, d_model=16, layers=2, heads=2, init_std=0.3, moe=MoEConfig(experts=4, d_expert=8)
        ),
        router=router,
        schedule=ScheduleConfig(warmup_steps=1),
        data=DataConfig(seq_len=8),
        train=LoopConfig(steps=1, batch=8, accumulate=accumulate),
        log=LogConfig(debug=True),
    )
    model = build_decoder(config.model, config.router, single())
    if recomputed:
        for block in model.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if spoiled:
        torch.nn.init.constant_(model.get_parameter("blocks.0.ffn.router.weight"), torch.nan)
    gradients = Gradients(model, single(), 2**20)
    stepper = Stepper(config, single(), model, make_optimizer(model, config.optimizer), gradients, RandomTokens(31, 8))  # pyright: ignore[reportArgumentType]
    return stepper.step(0, 0, stop=False)


RECTIFIED = RouterConfig(
    capacity_factor=0.6,
    rectify=RectifyConfig(intra=True, fill=True),
    emulate=EmulateConfig(sources=8, owners=2),
)


def test_recomputation_counts_nothing_twice():
    plain, recomputed = first_step(RECTIFIED), first_step(RECTIFIED, recomputed=True)
    assert recomputed.counts.equal(plain.counts)
    assert (recomputed.loss, recomputed.grad_norm) == (plain.loss, plain.grad_norm)
    counts = dict(zip(SLOTS, plain.counts[:, -7:].sum(0).tolist(), strict=True))
    assert counts["kept"] + counts["rectified"] + counts["dropped"] == 2 * 8 * 8 * 2
    assert counts["rectified"] > 0


def test_a_step_that_is_not_finite_is_skipped_in_debug_mode_too():
    assert first_step(RECTIFIED).applied
    assert not first_step(RECTIFIED, spoiled=True).applied


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_accumulation_counts_the_same_as_one_large_batch(accumulate):
    """Eight emulated ranks at once, or in micro-batches of fewer ranks each: the same capacity, the same tokens."""
    smaller = replace(RECTIFIED, emulate=EmulateConfig(sources=8 // accumulate, owners=1))
    larger = replace(RECTIFIED, emulate=EmulateConfig(sources=8, owners=1))
    assert first_step(smaller, accumulate).counts.equal(first_step(larger).counts)


def test_layers_are_counted_in_order_with_the_load_of_their_experts():
    routings = [by_hand(), replace(by_hand(), stand_ins=None)]
    counts = count_layers(routings)
    assert counts.shape == (2, 3 + len(SLOTS))
    for row, routing in zip(counts, routings, strict=True):
        assert row.tolist() == routing.load_E.tolist() + count_slots(routing).tolist()
    assert count_layers([]).shape == (0, len(SLOTS)), "a dense model"


def test_layers_with_fewer_experts_have_zeros_for_those_they_lack():
    routing = by_hand()
    [row] = count_layers([routing], 5)
    assert row.tolist() == [*routing.load_E.tolist(), 0, 0, *count_slots(routing).tolist()]


class OnDevice(StreamWait):
    """Knows its seconds as CUDA events would."""

    def __init__(self, seconds: float) -> None:
        self.asked, self._seconds = 0, seconds

    def seconds(self) -> float:
        self.asked += 1
        return self._seconds


def test_the_device_is_asked_for_its_waits_once_and_late() -> None:
    ledger, wait = Ledger(), OnDevice(0.5)
    for waited in (0.25, wait):
        ledger.collective_entered("layer0.dispatch", 8)
        ledger.collective_left("layer0.dispatch", waited)
    assert wait.asked == 0
    assert ledger.page().waited_s == 0.75
    assert ledger.page().waited_s == 0.75
    assert wait.asked == 1
