"""Plan files: what is written is read back and assigns the same, and `explain` says what another way would come to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from wastenot.launch.exits import BAD_INPUT, OK
from wastenot.parallel.lynx.assess import Answer, assess
from wastenot.parallel.lynx.cluster import read_cluster
from wastenot.parallel.lynx.evaluate import evaluate, violations
from wastenot.parallel.lynx.explain import explain
from wastenot.parallel.lynx.layout import Layout
from wastenot.parallel.lynx.plan import assignment_of, plan_of, read_plan, stage_of, write_plan
from wastenot.parallel.lynx.question import Question
from wastenot.parallel.lynx.stages import Costs
from wastenot.tools.cli import main
from wastenot.tools.lynx_input import read_model

LAYOUT = Layout(expert=8, pipeline=4, data=16, micro_batches=16, zero=1)


@pytest.fixture(scope="module")
def question() -> Question:
    given = read_model("mixtral-8x7b")
    return Question(
        shape=replace(given.shape, layers=8, dense_layers=(3,)),
        layout=LAYOUT,
        cluster=read_cluster("h100-nvlink8-ib"),
        optimizer=given.optimizer,
        budget=14 * 2**30,
    )


@pytest.fixture(scope="module")
def answer(question: Question) -> Answer:
    return assess(question)


def test_a_plan_is_read_back_and_assigns_the_same(answer, question, tmp_path: Path):
    plan = plan_of(answer)
    path = tmp_path / "plan.yaml"
    path.write_text(write_plan(plan))
    again = read_plan(path)
    assert again == plan and again.hash == plan.hash
    costs = Costs(again.question)
    words = {word for policy in plan.policies.values() for word in policy.values()}
    assert words - {"keep", "demand", "none"}, "something is recomputed under a window"
    for number, stage in enumerate(again.stages):
        solved = answer.ranks[stage.rank]
        own = stage_of(again, number, costs)
        assert own == solved.stages[stage.chunk]
        assignment = assignment_of(again, number, own)
        assert assignment == solved.solutions[stage.chunk].assignment
        assert violations(own, assignment) == []
        assert evaluate(own, assignment).peak == stage.peak <= question.bytes


def test_a_plan_tells_the_cut_of_a_run(answer):
    plan = plan_of(answer)
    assert plan.cut == (2, 2, 2, 2)
    of_chunks = [(0, 0, 5), (0, 1, 1), (1, 0, 4), (1, 1, 2)]
    stages = [
        replace(plan.stages[0], rank=rank, chunk=chunk, layers=("one",) * layers) for rank, chunk, layers in of_chunks
    ]
    cuts = {"interleaved": (5, 4, 1, 2), "dualpipev": (5, 4, 2, 1)}
    for schedule, cut in cuts.items():
        assert replace(plan, stages=tuple(stages), question=replace(plan.question, schedule=schedule)).cut == cut


def test_what_was_changed_by_hand_is_refused(answer, tmp_path: Path):
    plain = yaml.safe_load(write_plan(plan_of(answer)))
    path = tmp_path / "plan.yaml"

    def written(**changes) -> Path:
        path.write_text(yaml.safe_dump(plain | changes))
        return path

    with pytest.raises(ValueError, match="its question was changed since it was planned"):
        read_plan(written(question=plain["question"] | {"budget": 1}))
    with pytest.raises(ValueError, match="version: 9 is not read here"):
        read_plan(written(version=9))
    with pytest.raises(ValueError, match="there is no policy"):
        read_plan(written(policies={}))
    with pytest.raises(ValueError, match=r"stages\[0\]: unknown key 'tim'"):
        read_plan(written(stages=[{"tim": 1}]))
    with pytest.raises(ValueError, match="no plan; `wastenot plan CONFIG"):
        path.write_text("a: 1")
        read_plan(path)
    with pytest.raises(ValueError, match="No such file"):
        read_plan(tmp_path / "none.yaml")


def test_the_hash_is_that_of_all_that_was_asked(answer):
    plan = plan_of(answer)
    for change in (
        {"budget": 15 * 2**30},
        {"solver": "greedy"},
        {"layout": replace(LAYOUT, micro_batches=32)},
        {"optimizer": replace(plan.question.optimizer, name="adapprox")},
    ):
        assert replace(plan, question=replace(plan.question, **change)).hash != plan.hash, change


def test_an_explanation_tries_the_other_ways(answer):
    plan = plan_of(answer)
    operator = next(
        name
        for stage in plan.stages
        for policy in stage.layers
        for name, word in plan.policies[policy].items()
        if word not in ("keep", "none")
    )
    found = explain(plan, operator)
    [planned] = [way for way in found.alternatives if way.is_planned]
    assert planned.word == found.word and planned.why_not == ""
    ways = {way.word: way for way in found.alternatives}
    kept = ways["keep"]
    assert kept.peak is not None and planned.peak is not None
    # Kept for every micro-batch in flight; what was recomputed is gone from the peak, or was not at it.
    more = found.in_flight * found.bytes * len(found.layers)
    assert more - 2 * found.bytes * len(found.layers) <= kept.peak - planned.peak <= more
    assert (kept.peak > found.budget) == kept.why_not.endswith("over the budget")
    assert "keeping it would take" in found.reason
    assert ways["none"].why_not
    with pytest.raises(ValueError, match="did you mean expert up"):
        explain(plan, "expert upp")
    with pytest.raises(ValueError, match="rank: 7 is none of the plan's; use 0 to 3"):
        explain(plan, operator, rank=7)


def test_the_command_plans_writes_and_explains(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "plan.yaml"
    asked = ["plan", "gpt-22b", "--tensor", "8", "--micro-batches", "4", "--budget", "60GiB"]
    asked += ["--devices", "32", "--pipeline", "4"]
    assert main([*asked, "-o", str(path), "--json"]) == OK
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == {"hash", "solver", "predicted", "policies", "stages"}
    assert read_plan(path).hash == printed["hash"]
    assert main(["plan", "explain", str(path), "up", "--json"]) == OK
    assert json.loads(capsys.readouterr().out)["operator"] == "up"
    assert main(["plan", "explain", str(path), "up"]) == OK
    assert "Because" in capsys.readouterr().out
    assert main(asked) == OK
    assert "predicted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpt-22b", "--budget", "60"], "--budget: 60 has no unit; write for example 60GiB"),
        (["gpt-22b", "--budget", "1GiB"], "--budget: 1GiB is too small with --solver heu-mix"),
        (["gpt-22", "--budget", "1GiB"], "did you mean gpt-22b"),
        (["gpt-22b", "--solver", "hue"], "--solver: 'hue' is not known; did you mean heu"),
        (["gpt-22b", "--schedule", "2f2b"], "--schedule: '2f2b' is not known"),
        (["gpt-22b", "--cluster", "h100"], "did you mean h100-nvlink8-ib"),
        (["mixtral-8x7b", "--devices", "8", "--expert", "3"], "3 does not divide"),
        (["gpt-22b", "--devices", "7", "--tensor", "2"], "7 is no multiple"),
        (["gpt-22b", "extra"], "'extra' is one argument too many"),
        (["explain", "only-a-file"], "give the plan's file and an operator"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", *arguments]) == BAD_INPUT
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_file_that_is_no_plan_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    assert main(["plan", "gpt-22b", "-o", str(path)]) == BAD_INPUT
    assert "exists and is not a plan" in capsys.readouterr().err
    assert path.read_text() == "mine"
