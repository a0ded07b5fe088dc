"""The benchmark harness itself: registry, report, taking turns, and the command line around them."""

import argparse
import io
import json

import pytest
import torch
from rich.console import Console

from wastenot.tools.bench import command, registry
from wastenot.tools.bench.interleave import FEWEST_ROUNDS, Timings, interleave
from wastenot.tools.bench.outside import is_inside, outside_share
from wastenot.tools.bench.report import Report, at_least, at_most, environment

pytestmark = pytest.mark.usefixtures("one_thread")


class Clock:
    """Contenders whose work takes a known time, on a machine whose speed is `noise` of the call's number."""

    def __init__(self, noise=lambda call: 1.0):
        self.noise = noise
        self.calls = []

    def contender(self, name, seconds):
        def run():
            self.calls.append(name)
            return seconds * self.noise(len(self.calls) - 1)

        return run


def report(**changes):
    fields = {
        "name": "train",
        "command": "wastenot bench train --json",
        "env": environment(["numpy", "not-a-package"]),
        "rows": [{"case": "tiny", "contender": "wastenot", "seconds": 0.5, "why_not": None}],
        "goals": [at_least("speed", 1.2, 1.0), at_most("share", None, 0.25)],
        "notes": ["quick: left out nothing"],
        "headings": {"contender": "who", "seconds": "s", "why_not": "why not"},
    }
    return Report(**{**fields, **changes})


@pytest.mark.parametrize("name", list(registry.BENCHMARKS))
def test_every_registered_benchmark_runs_by_the_same_call(name):
    assert callable(registry.load(name).run)


def test_lower_bound_of_a_median_ratio():
    """Of n rounds, so many of the lowest are left out as lie below the median in 5 % of all runs at most."""
    for rounds, left_out in ((5, 0), (7, 0), (8, 1), (31, 10)):
        seconds = {"base": [1.0 + number for number in range(rounds)], "ours": [1.0] * rounds}
        assert Timings(seconds).ratio_lower("ours", "base") == 1.0 + left_out
    assert Timings({"base": [1.0] * 4, "ours": [1.0] * 4}).ratio_lower("ours", "base") is None


def test_unknown_benchmark_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'trane'.*train, train-ranks, parity"):
        registry.load("trane")


def test_report_is_the_json_object_of_the_contract():
    parsed = json.loads(report().to_json())
    assert list(parsed) == ["name", "command", "env", "rows", "goals", "notes"]
    assert parsed["rows"] == [{"case": "tiny", "contender": "wastenot", "seconds": 0.5, "why_not": None}]
    assert parsed["goals"] == [
        {"metric": "speed", "value": 1.2, "goal": ">= 1", "met": True},
        {"metric": "share", "value": None, "goal": "<= 0.25", "met": False},
    ]
    assert {"versions", "device", "cores", "threads"} <= parsed["env"].keys()
    assert parsed["env"]["versions"]["torch"] == torch.__version__
    assert parsed["env"]["versions"]["not-a-package"] == "not installed"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_what_is_not_a_number_meets_no_upper_goal_and_stays_valid_json(value):
    goal = at_most("difference", value, 1e-9)
    assert not goal.met
    parsed = json.loads(report(goals=[goal], rows=[{"difference": value, "pair": (1.0, value)}]).to_json())
    assert parsed["rows"] == [{"difference": None, "pair": [1.0, None]}]


def test_nan_meets_no_lower_goal():
    assert not at_least("speed", float("nan"), 1.0).met


def test_report_is_written_with_its_folder(tmp_path):
    path = tmp_path / "results" / "train.json"
    report().write(path)
    assert json.loads(path.read_text())["name"] == "train"


def test_tables_show_rows_goals_and_notes():
    page = io.StringIO()
    report().show(Console(width=160, file=page))
    text = page.getvalue()
    assert "wastenot" in text and "speed" in text and "who" in text and "quick: left out nothing" in text
    assert "why not" not in text, "a column in which nothing stands is not shown"
    report(rows=[{"contender": "apollo", "why_not": "pip install 'wastenot[apollo]'"}]).show(
        Console(width=160, file=page)
    )
    assert "wastenot[apollo]" in page.getvalue(), "brackets are no markup"


def test_every_round_runs_each_contender_once_and_warm_up_is_dropped():
    clock = Clock()
    timings = interleave({"a": clock.contender("a", 1.0), "b": clock.contender("b", 2.0)}, rounds=5, warmup=2)
    assert len(timings.seconds["a"]) == len(timings.seconds["b"]) == 5
    rounds = [clock.calls[i : i + 2] for i in range(0, 14, 2)]
    assert all(sorted(pair) == ["a", "b"] for pair in rounds)
    assert ["a", "b"] in rounds and ["b", "a"] in rounds, "the order within a round changes"
    assert timings.median("b") == 2.0
    assert timings.ratio("a", "b") == 2.0


def test_ratio_survives_a_machine_that_slows_down_between_rounds():
    # Twice as slow in every later round of two calls: medians mislead, ratios within a round do not.
    clock = Clock(noise=lambda call: 2.0 ** (call // 2))
    timings = interleave({"a": clock.contender("a", 1.0), "b": clock.contender("b", 3.0)}, rounds=6, warmup=0)
    assert timings.ratios("a", "b") == [3.0] * 6
    assert timings.ratio("b", "a") == pytest.approx(1 / 3)


def test_quartiles_are_of_the_ratios_within_rounds():
    timings = Timings({"a": [1.0, 2.0, 4.0], "b": [1.0, 4.0, 12.0]})
    assert timings.ratio_quartiles("a", "b") == [1.5, 2.5]
    assert Timings({"a": [1.0], "b": [3.0]}).ratio_quartiles("a", "b") is None


def test_slow_machine_stops_early_but_not_before_the_fewest_rounds():
    slow = {"a": Clock().contender("a", 10.0)}
    assert len(interleave(slow, rounds=50, warmup=1, budget_s=1.0).seconds["a"]) == FEWEST_ROUNDS
    assert len(interleave(slow, rounds=50, warmup=1, budget_s=115.0).seconds["a"]) == 11
    assert len(interleave(slow, rounds=2, warmup=1, budget_s=1.0).seconds["a"]) == 2


@pytest.mark.parametrize(("rounds", "warmup"), [(0, 1), (1, -1)])
def test_rounds_that_measure_nothing_are_refused(rounds, warmup):
    with pytest.raises(ValueError, match="measure nothing"):
        interleave({}, rounds=rounds, warmup=warmup)


@pytest.mark.parametrize(
    ("operator", "inside"),
    [
        ("aten::mm", True),
        ("aten::addmm", True),
        ("aten::_grouped_mm", True),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", True),
        ("aten::add", False),
        ("aten::mul", False),
        ("aten::copy_", False),
        ("aten::_fused_adamw_", False),
        ("aten::index_select", False),
        ("MmBackward0", False),
        ("bench_step", False),
    ],
)
def test_matrix_products_and_attention_are_told_from_the_rest(operator, inside):
    assert is_inside(operator) == inside


def test_outside_share_is_small_for_a_product_and_whole_for_a_sum():
    x = torch.randn(700, 700)
    assert outside_share(lambda: x @ x) < 0.5
    assert outside_share(lambda: x + x) == 1.0


def test_outside_share_sees_grouped_products_and_attention():
    x, w = torch.randn(2048, 256), torch.randn(4, 256, 256)
    offsets = torch.tensor([512, 1024, 1536, 2048], dtype=torch.int32)
    assert outside_share(lambda: torch.nn.functional.grouped_mm(x, w, offs=offsets)) < 0.5
    q = torch.randn(2, 4, 512, 64)
    assert outside_share(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)) < 0.5


def test_command_prints_one_json_object_and_nothing_else(tmp_path, monkeypatch, capfd):
    class Chatty:
        def run(self, *, quick, command, say):
            print("a library prints")
            say("half way")
            return report(command=command)

    monkeypatch.setattr(registry, "load", lambda name: Chatty())
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    path = tmp_path / "out.json"
    args = parser.parse_args(["train", "--quick", "--json", "--output", str(path)])
    assert command.run(args) == 0
    out, err = capfd.readouterr()
    parsed = json.loads(out)
    assert parsed["command"] == f"wastenot bench train --quick --json --output {path}"
    assert "a library prints" in err and "half way" in err
    assert json.loads(path.read_text()) == parsed
