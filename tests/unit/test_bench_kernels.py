"""The `kernels` benchmark: every contender computes the same layer, and the report's goals are what they say."""

import pytest
import torch

from wastenot.launch.peak_memory import peak_bytes
from wastenot.tools.bench import kernels
from wastenot.tools.bench.interleave import Timings
from wastenot.tools.bench.layer_cases import (
    FEW,
    USUAL,
    LayerCase,
    layer_cases,
    make_choices,
    make_layer_weights,
    make_tokens,
)
from wastenot.tools.bench.layer_floor import Floor
from wastenot.tools.bench.layer_reference import Outcome, differences, reference
from wastenot.tools.bench.memory import saved_for_backward
from wastenot.tools.bench.peers import roster, torchtitan
from wastenot.tools.bench.peers.layers import LAYERS, start_layer
from wastenot.tools.bench.peers.roster import OURS, LeftOut

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(**changes):
    return LayerCase(
        **{"shape": "tiny", "experts": 8, "top_k": 2, "d_model": 32, "d_expert": 16, "tokens": 12} | changes
    )


def entry(name):
    return next(entry for entry in LAYERS if entry.name == name)


def started(name, case):
    """The contender, where this machine has its package and it computes in this dtype."""
    try:
        return start_layer(entry(name), case, reference(case))
    except LeftOut as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("case", [tiny(), tiny(top_k=3, tokens=4, dtype="bf16")], ids=str)
@pytest.mark.parametrize("name", [entry.name for entry in LAYERS])
# Megatron-Core, DeepSpeed and torchtitan warn about CUDA that a CPU does not have.
@pytest.mark.filterwarnings("ignore")
def test_layer_agrees_with_the_reference_and_is_timed(name, case):
    contender = started(name, case)
    try:
        probed = contender.probe()
        assert set(probed.differences) == {"output", "input", "gate", "gate_up", "down"}
        assert max(probed.differences.values()) < kernels.TOLERANCE[case.dtype]
        # The gradients of all weights are there at the end.
        gradients = sum(weight.nbytes for weight in make_layer_weights(case))
        assert probed.peak_bytes > gradients
        assert probed.saved_bytes > case.tokens * case.top_k * case.d_model * case.torch_dtype.itemsize
        assert contender.run("forward") > 0 and contender.run("both") > 0
    finally:
        contender.close()


def test_reference_of_one_token_is_the_equation_by_hand():
    case = tiny(tokens=1, top_k=1)
    (x_D,), (grad_D,) = (tensor.double() for tensor in make_tokens(case))
    expert = int(make_choices(case))
    _, gate_up_2FD, down_DF = (weight[expert].double() for weight in make_layer_weights(case))
    gate_F, up_F = (gate_up_2FD @ x_D).chunk(2)
    hidden_F = gate_F * gate_F.sigmoid() * up_F
    found = reference(case)
    torch.testing.assert_close(found.output_TD[0], down_DF @ hidden_F)
    torch.testing.assert_close(found.down_EDF[expert], torch.outer(grad_D, hidden_F))
    assert found.down_EDF.count_nonzero() == case.d_model * case.d_expert, "nobody else was used"
    assert found.gate_ED.abs().max() < 1e-12, "the weight of a single choice is a constant 1"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_tokens_choose_what_was_drawn_also_where_the_gate_is_rounded(dtype):
    case = tiny(tokens=200, dtype=dtype)
    x_TD, _ = make_tokens(case)
    logits_TE = x_TD @ make_layer_weights(case).gate_ED.t()
    best_TE = logits_TE.sort(descending=True).values
    assert torch.equal(logits_TE.topk(2).indices.sort().values, make_choices(case).sort().values)
    assert (best_TE[:, 1] - best_TE[:, 2]).min() > 0.8


def test_case_is_pure_and_its_dtypes_differ_by_rounding_alone():
    assert all(map(torch.equal, make_layer_weights(tiny()), make_layer_weights(tiny())))
    assert all(map(torch.equal, make_tokens(tiny()), make_tokens(tiny())))
    rounded = [weight.bfloat16() for weight in make_layer_weights(tiny())]
    assert all(map(torch.equal, make_layer_weights(tiny(dtype="bf16")), rounded))


def test_cases_are_both_shapes_dtypes_and_numbers_of_tokens():
    cases = layer_cases()
    assert len(set(cases)) == len(set(map(str, cases))) == 8
    assert {(case.experts, case.top_k) for case in cases} == {(8, 2), (128, 8)}
    assert {case.tokens for case in cases} == {FEW, USUAL}


def test_difference_is_relative_and_keeps_nan():
    expected = Outcome(*(torch.full((4,), 2.0, dtype=torch.float64) for _ in Outcome._fields))
    found = expected._replace(output_TD=torch.tensor([2.0, 2.0, 2.0, 6.0]), down_EDF=torch.full((4,), torch.nan))
    by_name = differences(found, expected)
    assert by_name["output"] == 1.0 and by_name["gate_up"] == 0.0
    assert by_name["down"] != by_name["down"]


def test_peak_counts_what_lives_at_once():
    def work():
        first = torch.empty(1000, dtype=torch.uint8)
        second = torch.empty(500, dtype=torch.uint8)
        del first
        return second, torch.empty(700, dtype=torch.uint8)

    assert peak_bytes(work) == 1500
    assert peak_bytes(lambda: None) == 0


def test_saved_are_storages_once_and_no_weights():
    linear = torch.nn.Linear(8, 4, bias=False)
    x = torch.randn(16, 8, requires_grad=True)
    with saved_for_backward(linear) as saved:
        linear(x) * linear(x[:1])
    assert sum(saved.values()) == x.nbytes + 16 * 4 * 4 + 1 * 4 * 4


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_floor_does_two_products_forward_and_six_in_both(dtype, monkeypatch):
    case = tiny(dtype=dtype)
    floor = Floor(case)
    done = []
    product = torch.nn.functional.grouped_mm
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lambda *a, **k: done.append(product(*a, **k)) or done[-1])
    floor.run("forward")
    R, D, F = case.tokens * case.top_k, case.d_model, case.d_expert
    assert [tuple(y.shape) for y in done] == [(R, 2 * F), (R, D)]
    floor.run("both")
    assert [tuple(y.shape) for y in done[4:]] == [(R, F), (8, D, F), (8, 2 * F, D), (R, D)]


def timings(**seconds):
    return Timings({name.replace("_", " "): [value] * 3 for name, value in seconds.items()})


def goals_of(seconds, case=None):
    entries = [entry(name) for name in (OURS, "transformers eager", "deepspeed", "megatron-core", "torchtitan")]
    timing = timings(**seconds)
    return kernels.make_goals(case or tiny(), entries, {"forward": timing, "both": timing})


def test_goals_by_hand():
    seconds = {"wastenot": 10.0, "transformers_eager": 30.0, "deepspeed": 14.0, "megatron-core": 11.0, "floor": 5.0}
    best, easier, *_, measured = goals_of(seconds)
    assert best.metric == "tiny, 12 tokens, fp32, forward: speed of wastenot relative to the best peer (megatron-core)"
    assert (best.value, best.met) == (pytest.approx(1.1), True)
    # 1.4 times as fast as the median peer, and twice the floor: neither bar is met.
    assert (easier.value, easier.met) == (pytest.approx(1.4 / 1.5), False)
    assert (measured.value, measured.goal, measured.met) == (3, ">= 3", True), "torchtitan has no fp32 rows"


@pytest.mark.parametrize(("changed", "value"), [({"deepspeed": 16.0}, 1.6 / 1.5), ({"floor": 9.0}, 1.15 * 0.9)])
def test_either_bar_will_do(changed, value):
    seconds = {"wastenot": 10.0, "transformers_eager": 30.0, "deepspeed": 14.0, "megatron-core": 11.0, "floor": 5.0}
    _, easier, *_ = goals_of(seconds | changed)
    assert (easier.value, easier.met) == (pytest.approx(value), True)


def test_peer_that_is_missing_is_a_missed_goal():
    seconds = {"wastenot": 10.0, "transformers_eager": 30.0, "floor": 5.0}
    measured = goals_of(seconds, tiny(dtype="bf16"))[-1]
    assert (measured.value, measured.goal, measured.met) == (1, ">= 4", False)


def test_nothing_is_claimed_where_wastenot_did_not_run():
    goals = goals_of({"transformers_eager": 30.0, "floor": 5.0})
    assert [goal.value for goal in goals] == [None, None, None, None, 1]
    assert not any(goal.met for goal in goals)


def test_case_is_measured_and_who_disagrees_is_not_timed(monkeypatch):
    def start_wrong(wanted, case, expected):
        if wanted.name == "transformers eager":
            return start_layer(wanted, tiny(seed=5), expected)
        return start_layer(wanted, case, expected)

    monkeypatch.setattr(kernels, "start_layer", start_wrong)
    entries = tuple(entry(name) for name in (OURS, "transformers eager", "transformers grouped_mm", "torchtitan"))
    rows, goals = kernels.run_case(tiny(), entries, rounds=2, warmup=0, say=lambda text: None)
    ours, wrong, grouped, titan, floor = rows
    assert ours["forward_ms"] > 0 and ours["both_over_floor"] > 0 and ours["peak_mb"] > 0
    assert grouped["both_wastenot_speedup"] > 0 and len(grouped["both_wastenot_speedup_quartiles"]) == 2
    assert "forward_ms" not in wrong and "not timed" in wrong["why_not"] and wrong["difference"] > 0.1
    assert titan["why_not"] == "left out: torchtitan computes in bf16 only"
    assert floor["contender"] == "floor" and floor["both_ms"] > 0
    assert (goals[-1].value, goals[-1].met) == (1, False)


def test_torchtitan_that_is_not_installed_is_left_out_with_the_line_for_pip(monkeypatch):
    monkeypatch.setattr(roster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LeftOut, match=r"torchtitan is not installed: pip install --no-deps torchtitan==0"):
        start_layer(entry("torchtitan"), tiny(dtype="bf16"), None)
    assert torchtitan.missing().startswith("torchtitan needs spmd_types, tyro, docstring_parser: pip install --no-deps")


def test_report_says_what_was_left_out(monkeypatch):
    monkeypatch.setattr(kernels, "layer_cases", list)
    monkeypatch.setattr(kernels, "use_the_machine", lambda: None)
    report = kernels.run(quick=True, command="wastenot bench kernels --quick", say=lambda text: None)
    assert report.notes[-1].startswith("quick: ")
