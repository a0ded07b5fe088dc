"""`wastenot simulate`: what it says adds up, is written where it is asked for, and bad input gets one clear line."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wastenot.parallel.lynx.assess import assess
from wastenot.parallel.lynx.cluster import read_cluster
from wastenot.parallel.lynx.layout import Layout
from wastenot.parallel.lynx.question import Question
from wastenot.parallel.lynx.routing_skew import UNIFORM, Skew
from wastenot.parallel.lynx.schedules import SCHEDULES, USUAL_CHUNKS
from wastenot.parallel.lynx.solution import InfeasibleError
from wastenot.tools.cli import main
from wastenot.tools.lynx_compare import USUAL, compare, ratio
from wastenot.tools.lynx_input import read_model
from wastenot.tools.lynx_page import MARK, make_page
from wastenot.tools.report.palette import LIGHT_AND_DARK

QUICK = [
    "olmoe-1b-7b",
    "--devices",
    "8",
    "--pipeline",
    "2",
    "--expert",
    "4",
    "--micro-batch",
    "4",
    "--micro-batches",
    "4",
]
"""A question that is answered at once."""
TIGHT = [*QUICK, "--budget", "50GiB", "--solver", "greedy", "--policies", "none,selective"]
"""The same, where something must be recomputed."""


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["simulate", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says of bad input: one line, and nothing else."""
    assert main(["simulate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    return err.removeprefix("error: ").removesuffix("\n")


# What is said.


def test_keys_of_json_are_those_documented(capsys: pytest.CaptureFixture[str]) -> None:
    answer = said(capsys, *TIGHT)
    assert keys_of(answer) == {
        "": {
            "question", "step_seconds", "tokens_per_second_per_device", "mfu", "waste", "exposed_communication_seconds",
            "exposed_recompute_seconds", "hidden_recompute_seconds", "memory", "routing", "stages", "policies",
            "search_seconds", "version",
        },
        "question": {
            "model", "devices", "cluster", "device_memory_bytes", "budget_bytes", "layout", "layout_from",
            "global_batch", "schedule", "solver", "optimizer", "skew", "replay", "calibrated",
        },
        "waste": {
            "compute", "exposed_communication", "exposed_recompute", "pipeline_warm_up", "pipeline_waits",
            "pipeline_cool_down", "gradient_reduction", "optimizer",
        },
        "memory": {"budget_bytes", "peak_bytes", "fullest_rank", "ranks"},
        "routing": {"skew", "fullest_to_mean", "dropped"},
        "stages": {
            "rank", "chunk", "layers", "in_flight", "kept", "in_windows", "on_demand", "kept_bytes", "hidden_seconds",
            "exposed_seconds", "peak_bytes", "solver", "gap", "search_seconds", "note",
        },
        "policies": {
            "fits", "needs_bytes", "step_seconds", "ratio_to_full", "peak_bytes", "exposed_recompute_seconds",
            "hidden_recompute_seconds", "search_seconds",
        },
    }  # fmt: skip
    text = (Path(__file__).parents[2] / "docs" / "lynx.md").read_text(encoding="utf-8")
    for keys in keys_of(answer).values():
        assert [key for key in keys if f"`{key}`" not in text] == []


def keys_of(answer: dict[str, Any]) -> dict[str, set[str]]:
    """Of the object and of what is in it, but for the layout and the optimizer, whose keys are the library's."""
    return {
        "": set(answer),
        **{name: set(answer[name]) for name in ("question", "waste", "memory", "routing")},
        "stages": set().union(*answer["stages"]),
        "policies": set().union(*answer["policies"].values()),
    }


def test_figures_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    answer = said(capsys, *TIGHT)
    question, memory, step = answer["question"], answer["memory"], answer["step_seconds"]
    assert math.isclose(sum(answer["waste"].values()), 1.0)
    tokens = question["global_batch"] * question["layout"]["seq_len"]
    assert math.isclose(answer["tokens_per_second_per_device"], tokens / step / question["devices"])
    for part in ("exposed_communication", "exposed_recompute"):
        assert math.isclose(answer[f"{part}_seconds"], answer["waste"][part] * step)
    for rank in memory["ranks"]:
        assert rank["peak_bytes"] == sum(rank["components"].values()) <= memory["budget_bytes"]
    assert memory["peak_bytes"] == max(rank["peak_bytes"] for rank in memory["ranks"])
    assert memory["ranks"][memory["fullest_rank"]]["peak_bytes"] == memory["peak_bytes"]
    assert answer["stages"][0]["on_demand"] + answer["stages"][0]["in_windows"] > 0, "the budget is tight"
    own = answer["policies"]["greedy"]
    assert own["step_seconds"] == step
    assert math.isclose(own["ratio_to_full"], step / answer["policies"]["full"]["step_seconds"])


def test_policies_are_those_asked_for_beside_the_solver_and_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(said(capsys, *TIGHT)["policies"]) == ["none", "full", "selective", "greedy"]
    assert list(said(capsys, *QUICK)["policies"]) == list(USUAL)


def test_a_policy_that_does_not_fit_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    answer = said(capsys, *TIGHT)
    none = answer["policies"]["none"]
    assert not none["fits"] and none["step_seconds"] is None and none["ratio_to_full"] is None
    assert none["needs_bytes"] > answer["memory"]["budget_bytes"]
    more = said(capsys, *TIGHT[:-6], "--budget", f"{none['needs_bytes']}B", "--solver", "none", "--policies", "none")
    assert more["policies"]["none"]["fits"]


@pytest.mark.parametrize(
    ("arguments", "origin"),
    [
        (["olmoe-1b-7b"], "the run's own"),
        (["olmoe-1b-7b", "--devices", "16"], "suggested"),
        (["olmoe-1b-7b", "--expert", "4"], "as asked for"),
    ],
)
def test_it_says_where_the_layout_is_from(
    arguments: list[str], origin: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--micro-batch", "1", "--solver", "full", "--policies", "full"]
    assert said(capsys, *arguments, *settings)["question"]["layout_from"] == origin


def test_people_are_told_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    answer = said(capsys, *TIGHT)
    assert main(["simulate", *TIGHT]) == 0
    out = capsys.readouterr().out.replace("\u00a0", " ")
    assert out.startswith("olmoe-1b-7b on 8 × H100 SXM5 80GB (h100-nvlink8-ib)\n")
    assert "EP4 × PP2 × DP4 (as asked for) · 4 micro-batches of 4 × 4,096 tokens · 1f1b · adamw · budget 50" in out
    for text in (
        f"{answer['tokens_per_second_per_device']:,.0f}",
        f"{100 * answer['mfu']:.1f} %",
        f"{answer['memory']['peak_bytes'] / 2**30:.1f} GiB of 50.0 GiB",
        f"needs {answer['policies']['none']['needs_bytes'] / 2**30:.1f} GiB",
        "uniform: the fullest rank receives 1.00 times the mean",
    ):
        assert text in out
    assert max(map(len, out.splitlines())) <= 160


def test_skew_makes_the_fullest_rank_fuller_and_the_step_longer(capsys: pytest.CaptureFixture[str]) -> None:
    settings = [*QUICK, "--solver", "full", "--policies", "full"]
    even, skewed = said(capsys, *settings), said(capsys, *settings, "--skew", "zipf:1.0")
    assert even["routing"]["fullest_to_mean"] == pytest.approx(1.0)
    assert skewed["routing"]["fullest_to_mean"] > 1.5
    assert skewed["step_seconds"] > even["step_seconds"]


def test_it_needs_no_torch() -> None:
    code = (
        "import sys; from wastenot.tools.cli import main; "
        "main(['simulate', 'gpt-22b', '--devices', '8', '--solver', 'full', '--policies', 'full', '--json']); "
        "print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "False"


# What is written.


def test_files_are_written_and_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `viz`")
    names = {"--html": "page.html", "--picture": "step.svg", "--trace": "step.json"}
    arguments = [text for option, name in names.items() for text in (option, str(tmp_path / name))]
    for _ in range(2):
        assert main(["simulate", *TIGHT, *arguments]) == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names.values())
        written = [line for line in capsys.readouterr().out.splitlines() if line.startswith("written: ")]
        assert len(written) == 3
    assert "traceEvents" in json.loads((tmp_path / "step.json").read_text())
    assert "<svg" in (tmp_path / "step.svg").read_text()
    assert MARK in (tmp_path / "page.html").read_text()


def answered(solver: str = "greedy", schedule: str = "1f1b") -> Any:
    """A question about few layers, with an answer that recomputes."""
    given = read_model("olmoe-1b-7b")
    chunks = USUAL_CHUNKS.get(schedule, 1)
    layout = Layout(expert=4, pipeline=2, data=4, micro_batch=4, micro_batches=4, zero=1, chunks=chunks)
    question = Question(
        shape=replace(given.shape, layers=8),
        layout=layout,
        cluster=read_cluster("h100-nvlink8-ib"),
        schedule=schedule,
        solver=solver,
    )
    with pytest.raises(InfeasibleError) as error:
        assess(replace(question, budget=1))
    kept = assess(replace(question, solver="none", budget=2**50))
    most = max(solution.outcome.peak for rank in kept.ranks for solution in rank.solutions)
    return assess(replace(question, budget=(error.value.smallest + most) // 2))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_page_stands_alone(schedule: str) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `viz`")
    answer = answered(schedule=schedule)
    policies = compare(answer, ["none", "full", "greedy"])
    page = make_page(answer.question, policies, "as asked for")
    assert "<script" not in page
    assert not re.search(r"""(?:src|href)=["'](?!#|data:)""", page), "asks for nothing beside itself"
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for name in re.findall(r"var\(--([\w-]+)\)", page):
        assert name in LIGHT_AND_DARK, name
    assert page.count("<details") == sum(policy.answer is not None for policy in policies)
    assert "does not fit" in page


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH")
@pytest.mark.parametrize(("dark", "width"), [(False, 1280), (True, 500)], ids=["light, wide", "dark, narrow"])
def test_a_browser_shows_the_charts(dark: bool, width: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `viz`")
    from matplotlib.image import imread

    assert BROWSER is not None
    answer = answered()
    page = tmp_path / "page.html"
    page.write_text(make_page(answer.question, compare(answer, ["full", "greedy"]), "as asked for"), encoding="utf-8")
    picture = tmp_path / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},3000"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}"]
    options += ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run([BROWSER, *options, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert picture.exists(), done.stderr
    pixels = (imread(picture)[..., :3] * 255).round().astype(int).reshape(-1, 3)

    def seen(name: str) -> int:
        colour = LIGHT_AND_DARK[name][dark]
        return int((pixels == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(1).sum())

    assert seen("paper") > len(pixels) / 4
    for name in ("forward", "backward", "recomputation", "rectified", "warm-up", "optimizer"):
        assert seen(name) > 100, name


# What cannot be.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "60"], "--budget: 60 has no unit; write for example 60GiB"),
        (["--budget", "lots"], "--budget: 'lots' is no quantity; write for example 80GiB"),
        (["--budget", "2TiB"], "--budget: 2TiB is more than the 79.1GiB of H100 SXM5 80GB; use at most those, "),
        (["--expert", "3"], "layout.expert: 3 does not divide the 4 ranks of a stage (tensor 1 x data 4); use 2"),
        (["--devices", "20", "--expert", "5"], "olmoe-1b-7b: layout.expert: 5 does not divide 64 experts; use "),
        (["--devices", "9"], "devices: 9 is no multiple of tensor 1 x pipeline 2 = 2; use 8"),
        (["--cluster", "h100-nvlink8"], "cluster: no file and no cluster is called 'h100-nvlink8'; did you mean "),
        (["--solver", "heumix"], "--solver: 'heumix' is not known; did you mean heu-mix?"),
        (["--schedule", "1f1"], "--schedule: '1f1' is not known; did you mean 1f1b?"),
        (["--policies", "heu,gredy"], "--policies: 'gredy' is not known; did you mean greedy?"),
        (["--optimizer", "adamm"], "optimizer.name: 'adamm' is not known; did you mean adamw?"),
        (["--skew", "zipf"], "skew: 'zipf' is no skew and no file of a histogram; did you mean zipf:1.0?"),
        (["--zero", "2"], "layout.zero: 2 is not one of 0, 1, 3; use 1"),
        (["--time-limit", "0"], "--time-limit: 0 is no time; use seconds, for example 60"),
        (["--calibration", "none.yaml"], "calibration: none.yaml: No such file or directory"),
        (["--picture", "step.gif"], "step.gif: a picture is a .png or an .svg; name one"),
        (["--html", "nowhere/page.html"], "nowhere/page.html: there is no folder nowhere; make it, or "),
        (["--trace", "/proc/step.json"], "/proc/step.json: cannot be written (No such file or directory); "),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert complaint(capsys, *QUICK, "--policies", "full", *arguments).startswith(message)


def test_an_unknown_model_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert complaint(capsys, "mixtral-8x8b") == (
        "model: no file and no model is called 'mixtral-8x8b'; did you mean mixtral-8x7b?"
    )


def test_other_files_are_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option, name in (("--html", "page.html"), ("--picture", "step.png"), ("--trace", "step.json")):
        path = tmp_path / name
        path.write_text("precious")
        assert f"{path} exists and is not a" in complaint(capsys, *QUICK, option, str(path))
        assert path.read_text() == "precious"


@pytest.mark.parametrize(
    "arguments",
    [
        [*QUICK, "--budget", "8GiB", "--solver", "greedy"],
        [*QUICK, "--budget", "24GiB", "--solver", "none"],
        ["olmoe-1b-7b", "--devices", "16", "--budget", "5GiB", "--solver", "greedy"],
    ],
    ids=["layout asked for", "nothing recomputed", "layout suggested"],
)
def test_an_impossible_budget_names_one_that_fits(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    message = complaint(capsys, *arguments)
    assert message.startswith(f"--budget: {arguments[arguments.index('--budget') + 1]} is too small with --solver ")
    found = re.search(r"the smallest (?:that|known to) fits? is ([\d.]+GiB)", message)
    assert found is not None, message
    arguments = [*arguments, "--budget", found[1], "--policies", "full"]
    answer = said(capsys, *arguments)
    assert answer["memory"]["peak_bytes"] <= answer["memory"]["budget_bytes"]


# The plan and the simulation.


@settings(deadline=None, max_examples=20)
@given(
    model=st.sampled_from(["olmoe-1b-7b", "qwen3-30b-a3b", "deepseek-v3", "gpt-22b"]),
    schedule=st.sampled_from(list(SCHEDULES)),
    solver=st.sampled_from(["greedy", "heu", "heu-mix", "selective"]),
    pipeline=st.sampled_from([1, 2, 4]),
    expert=st.sampled_from([2, 8]),
    micro_batches=st.sampled_from([1, 2]),
    zero=st.sampled_from([0, 1, 3]),
    skew=st.sampled_from([UNIFORM, Skew(name="zipf:0.8", exponent=0.8)]),
    part=st.floats(0.0, 1.0),
)
def test_no_plan_exceeds_its_budget_in_the_simulation(
    model: str, schedule: str, solver: str, pipeline: int, expert: int, micro_batches: int, zero: Any, skew: Skew,
    part: float,
) -> None:  # fmt: skip
    shape = read_model(model).shape
    chunks = USUAL_CHUNKS.get(schedule, 1) if pipeline > 1 else 1
    shape = replace(shape, layers=2 * pipeline * chunks, dense_layers=tuple(d for d in shape.dense_layers if d < 2))
    layout = Layout(
        expert=1 if shape.experts is None else expert,
        pipeline=pipeline,
        data=8,
        chunks=chunks,
        micro_batches=2 * micro_batches * pipeline,
        zero=zero,
    )
    cluster = read_cluster("h200-nvlink8-ib")
    question = Question(
        shape=shape, layout=layout, cluster=cluster, schedule=schedule, solver=solver, skew=skew, budget=2**50
    )
    least, most = (max(assess(replace(question, solver=name)).peak_bytes) for name in ("full", "none"))
    budget = int(least + part * (most - least))
    try:
        answer = assess(replace(question, budget=budget))
    except InfeasibleError as error:
        assert error.smallest > budget
        return
    assert max(answer.peak_bytes) <= budget


def test_ratios_are_to_full() -> None:
    answer = answered()
    policies = compare(answer, ["none"])
    assert [policy.name for policy in policies] == ["none", "full", "greedy"]
    none, full, own = policies
    assert ratio(none, policies) is None and ratio(full, policies) == 1.0
    assert ratio(own, policies) == pytest.approx(answer.step_seconds / full.figures.step_seconds)
