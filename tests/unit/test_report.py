"""`wastenot report`: real runs, whole and damaged, become one page that opens anywhere and says what they did."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from page_reader import BROWSER, Page, pixels_of, references_hold, stands_alone

from wastenot.launch.config import DataConfig
from wastenot.launch.corpus import prepare_files
from wastenot.launch.errors import UserError
from wastenot.launch.metrics import read_metrics
from wastenot.moe.ledger import SLOTS
from wastenot.moe.load import FIGURES
from wastenot.tools.cli import main
from wastenot.tools.report.accounts import checks
from wastenot.tools.report.formats import percent
from wastenot.tools.report.headline import read_entries
from wastenot.tools.report.history import MOST_BINS, history_of
from wastenot.tools.report.ledger import ledger
from wastenot.tools.report.overview import overview
from wastenot.tools.report.page import MARK, SECTIONS, write_report
from wastenot.tools.report.palette import LIGHT_AND_DARK
from wastenot.tools.report.runs import read_runs
from wastenot.tools.report.settings import differences
from wastenot.tools.report.usage import CHOICES
from wastenot.tools.report.usage import SLOTS as SLOTS_VIEW

pytest.importorskip("matplotlib", reason="needs the extra `viz`")

TEXT = "".join(f"{i} green bottles, hanging on the wall.\n" for i in range(200))
DATA = {"corpus": "bottles.txt", "tokenizer": "bytes", "seq_len": 32, "val_fraction": 0.1}
RECTIFIED: dict[str, Any] = {
    "model": {"d_model": 32, "layers": 3, "heads": 2, "moe": {"experts": 4, "d_expert": 16, "first_dense": 1}},
    "router": {"top_k": 2, "capacity_factor": 0.75, "rectify": {"intra": True, "fill": True}},
    "parallel": {"expert": 2, "piece_bytes": 0},
    "schedule": {"warmup_steps": 2},
    "train": {"steps": 10, "batch": 4, "accumulate": 2, "eval_every": 5, "sample_tokens": 8},
    "log": {"dir": "rectified", "every": 3, "tensorboard": False},
}
DENSE: dict[str, Any] = {
    **RECTIFIED,
    "model": {"d_model": 32, "layers": 2, "heads": 2, "moe": None},
    "router": {},
    "parallel": {"expert": 1},
    "log": {"dir": "dense", "every": 3, "tensorboard": False},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `rectified` (two ranks, layers 1 and 2 have experts) and `dense`."""
    home = tmp_path_factory.mktemp("home")
    (home / "bottles.txt").write_text(TEXT)
    prepare_files([home / "bottles.txt"], DataConfig(**{**DATA, "dir": str(home / "data")}), progress=False)
    started = []
    for config in (RECTIFIED, DENSE):
        path = home / f"{config['log']['dir']}.yaml"
        path.write_text(yaml.safe_dump({**config, "data": DATA}))
        command = [sys.executable, "-m", "wastenot.tools.cli", "train", str(path)]
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        started.append(
            subprocess.Popen(
                command, cwd=home, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    for process in started:
        output, _ = process.communicate()
        assert process.returncode == 0, output
    return home


@pytest.fixture
def run(home: Path, tmp_path: Path) -> Path:
    """A copy of the rectified run to damage."""
    return Path(shutil.copytree(home / "rectified", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")))


def page_of(*runs: Path, output: Path) -> Page:
    return Page(write_report(runs, output))


def metrics(run: Path) -> list[dict[str, Any]]:
    return [dict(line) for line in read_metrics(run)]


def write_metrics(run: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What the command says of bad input."""
    assert main(["report", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def number(text: str) -> int:
    return int(text.replace(",", ""))


# The page as a file.


def test_page_asks_for_nothing_beside_itself(home: Path, tmp_path: Path) -> None:
    page = page_of(home / "rectified", home / "dense", output=tmp_path / "both.html")
    assert stands_alone(page) >= 2, "heat-maps"


def test_ids_are_unique_and_every_reference_has_its_target(home: Path, tmp_path: Path) -> None:
    page = page_of(home / "rectified", home / "dense", output=tmp_path / "both.html")
    assert set(SECTIONS) <= references_hold(page)


def test_every_chart_says_what_it_shows(home: Path, tmp_path: Path) -> None:
    page = page_of(home / "rectified", output=tmp_path / "page.html")
    charts = page.all("svg")
    assert len(charts) == 3 + 2 + 2 * 2 + 2, "losses and speed; all layers; two layers in two views; load"
    assert all(chart["role"] == "img" for chart in charts)
    titles = re.findall(r"<svg[^>]*><title[^>]*>([^<]+)</title>", page.source)
    assert len(titles) == len(charts)
    assert any(title.startswith("Held-out text, bits per byte, over steps. rectified: from ") for title in titles)


def test_same_runs_give_the_same_bytes_and_nothing_else(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    first = write_report([home / "rectified", home / "dense"], path).read_bytes()
    assert write_report([home / "rectified", home / "dense"], path).read_bytes() == first
    assert list(tmp_path.iterdir()) == [path]


def test_what_stands_in_files_of_a_run_is_inert(run: Path, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'$\\frac{"
    name = evil.replace("/", "∕")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["corpus"] = evil
    config["router"][evil] = evil
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "sample": f"</pre></body>{evil}"}))
    lines = metrics(run)
    for line in lines:
        if "collectives" in line:
            line["collectives"][evil] = {"calls": 1, "bytes": 2, "waited_seconds": 0.5}
    write_metrics(run, lines)
    other = shutil.copytree(run, tmp_path / name)
    (other / "config.yaml").write_text(yaml.safe_dump({**config, "kernels": f"--><!-- {evil}"}))
    page = page_of(run, other, output=tmp_path / "page.html")
    assert not page.all("script")
    assert not page.all("img")
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert f"</pre></body>{evil}" in page.text
    assert f"--><!-- {evil}" in page.text
    assert name in page.text


# What the page says.


def test_headline_figures_are_those_of_the_run(home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    arguments = ["report", str(home / "rectified"), str(home / "dense"), "--output", str(output), "--json"]
    assert main(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["report"] == str(output)
    rectified, dense = told["runs"]
    assert (rectified["name"], dense["name"]) == ("rectified", "dense")
    for figures in told["runs"]:
        summary = json.loads((home / figures["name"] / "summary.json").read_text())
        for key in summary.keys() & figures.keys():
            assert figures[key] == summary[key], key
        assert figures["planned_steps"] == figures["steps"] == 10
    assert rectified["rectified_ratio"] > 0.01
    assert dense["kept_ratio"] is None
    assert rectified["active_parameters"] < rectified["parameters"]
    [row] = [row for row in Page(output).tables["Headline figures"] if row[0] == "rectified"]
    names = ("dropped_ratio", "padding_ratio", "rectified_ratio", "filled_ratio", "unserved_ratio")
    assert row[1] == f"{rectified['val_bits_per_byte']:.3f}"
    assert row[3:-1] == [percent(rectified[name]) for name in names]
    assert row[-1] == "8.00"
    # AdamW's, and a count of its steps for each parameter.
    assert rectified["optimizer_part_of_adamw"] == pytest.approx(1, rel=1e-3)


def test_ledger_is_the_sum_of_the_lines(home: Path, tmp_path: Path) -> None:
    tables = page_of(home / "rectified", output=tmp_path / "page.html").tables
    lines = [line for line in metrics(home / "rectified") if "slots" in line]
    assert [line["ledger_steps"] for line in lines] == [3, 3, 3, 1]
    by_layer = {row[0]: row[1:] for row in tables["Ledger of rectified by layer"]}
    assert list(by_layer) == ["", "layer 1", "layer 2", "all"], "layer 0 is dense"
    for layer in (0, 1):
        sums = [sum(line["slots"][name][layer] for line in lines) for name in SLOTS]
        assert [number(cell) for cell in by_layer[f"layer {layer + 1}"][:7]] == sums
    by_rank = {row[0]: row[1:] for row in tables["Ledger of rectified by rank"]}
    rank_1 = [sum(line["slots_by_rank"][1][layer][i] for line in lines for layer in (0, 1)) for i in range(7)]
    assert [number(cell) for cell in by_rank["rank 1"][:7]] == rank_1
    assert ["rank 1", "layer 2"] in [row[:2] for row in tables["Ledger by rank and layer"]]
    kinds = {row[0]: row for row in tables["Collectives of rectified"]}
    assert number(kinds["dispatch"][1]) == sum(line["collectives"]["dispatch"]["calls"] for line in lines)


def test_balance_is_that_of_the_last_lines(home: Path, tmp_path: Path) -> None:
    tables = page_of(home / "rectified", output=tmp_path / "page.html").tables
    last = [line for line in metrics(home / "rectified") if "expert_load" in line][-1]
    [row] = [row for row in tables["Balance of the layers of rectified"] if row[0] == "layer 2"]
    figures = [last[f"expert_load_{name}_by_layer"][1] for name in FIGURES]
    assert row[1:] == [*(f"{figure:.3f}" for figure in figures), str(last["expert_load"][1].count(0))]


def test_identities_hold_in_a_real_run(home: Path, tmp_path: Path) -> None:
    [entry] = read_entries([home / "rectified"])
    assert entry.account is not None
    found = {check.identity: check.detail for check in checks(entry.run, entry.account) if check.holds}
    assert found == {
        "kept + rectified + dropped = tokens × top-k": f"{10 * 4 * 32 * 2:,} in each of 2 layers",
        # ceil(2 * 0.75 * 32 / 4) = 12 slots for each of 4 experts, 2 ranks and 2 micro-batches
        "kept + filled + padding = experts × capacity": f"{10 * 2 * 2 * 4 * 12:,} in each of 2 layers",
        "ranks have equal parts that add up to their layers": "2 ranks",
        "bytes sent by all ranks = bytes of all collectives": found[
            "bytes sent by all ranks = bytes of all collectives"
        ],
        "the lines of metrics.jsonl add up to ledger.json": "10 steps",
    }
    assert "broken" not in page_of(home / "rectified", output=tmp_path / "page.html").text


@pytest.mark.parametrize(
    ("key", "place", "identity"),
    [
        ("slots", ("dropped", 1), "kept + rectified + dropped = tokens × top-k"),
        ("slots", ("padding", 0), "kept + filled + padding = experts × capacity"),
        ("slots_by_rank", (1, 0, 3), "ranks have equal parts that add up to their layers"),
        ("slots", ("local_rows", 0), "the lines of metrics.jsonl add up to ledger.json"),
        ("sent_bytes_by_rank", (0,), "bytes sent by all ranks = bytes of all collectives"),
    ],
)
def test_a_ledger_that_does_not_add_up_is_said_so(key: str, place: tuple[Any, ...], identity: str, run: Path) -> None:
    lines = metrics(run)
    *outer, last = place
    inside = next(line for line in lines if key in line)[key]
    for step in outer:
        inside = inside[step]
    inside[last] += 1
    write_metrics(run, lines)
    [entry] = read_entries([run])
    assert f'<span class="bad">broken</span> <b>{identity}</b>' in ledger([entry])


def test_only_what_differs_is_listed(home: Path, run: Path, tmp_path: Path) -> None:
    runs = read_runs([home / "rectified", run])
    assert differences(runs) == {}
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["router"]["rectify"] = {"intra": False}
    config["train"]["seed"] = 7
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert differences(read_runs([home / "rectified", run])) == {
        "router.rectify.intra": ["true", "false"],
        "router.rectify.fill": ["true", "–"],
        "router.rectify.fill_ranks": ["1", "–"],
        "router.rectify.select": ["any", "–"],
        "router.rectify.capacity": ["null", "–"],
        "train.seed": ["0", "7"],
    }
    page = page_of(home / "rectified", run, output=tmp_path / "page.html")
    assert len(page.tables["Differences of configuration"]) == 7
    assert (run / "config.yaml").read_text() in page.text


def test_a_router_for_benchmarks_is_labelled(run: Path) -> None:
    text = (run / "config.yaml").read_text()
    assert "For benchmarks only" not in overview(read_entries([run]))
    (run / "config.yaml").write_text(text.replace("kind: learned", "kind: skewed"))
    assert "The router is skewed: it ignores the tokens. For benchmarks only." in overview(read_entries([run]))


# Runs that lack something.


def keep_lines(run: Path, keep: Callable[[dict[str, Any]], Any]) -> None:
    write_metrics(run, [line for line in metrics(run) if keep(line)])


def change_lines(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    lines = metrics(run)
    for line in lines:
        if "loss" in line:
            change(line)
    write_metrics(run, lines)


def still_running(run: Path) -> None:
    (run / "summary.json").unlink()
    (run / "ledger.json").unlink()
    keep_lines(run, lambda line: line["step"] < 6)


def first_line_only(run: Path) -> None:
    still_running(run)
    keep_lines(run, lambda line: line["step"] <= 3)


def nothing_logged(run: Path) -> None:
    still_running(run)
    (run / "metrics.jsonl").unlink()


def no_finite_loss(run: Path) -> None:
    change_lines(run, lambda line: line.update(loss=None, grad_norm=None))


def a_nan_as_text(run: Path) -> None:
    path = run / "metrics.jsonl"
    path.write_text(re.sub(r'"(loss|tokens_per_second)": [\d.]+', r'"\1": NaN', path.read_text()))


def of_an_earlier_version(run: Path) -> None:
    kept = ("step", "loss", "tokens_per_second", "expert_load", "sent_bytes", "skipped")
    lines = [{key: value for key, value in line.items() if key in kept or "loss" not in line} for line in metrics(run)]
    write_metrics(run, [{**line, "dropped_ratio": 0.25} if "loss" in line else line for line in lines])
    (run / "ledger.json").unlink()


def of_a_later_version(run: Path) -> None:
    with (run / "config.yaml").open("a") as file:
        file.write("accelerator: quantum\n")


def of_too_many_ranks(run: Path) -> None:
    change_lines(run, lambda line: line.pop("slots_by_rank"))


def with_one_expert_layer(run: Path) -> None:
    (run / "ledger.json").unlink()

    def cut(line: dict[str, Any]) -> None:
        line["slots"] = {name: counts[:1] for name, counts in line["slots"].items()}
        line["slots_by_rank"] = [rank[:1] for rank in line["slots_by_rank"]]
        for name in ("sent_bytes_by_layer", "waited_seconds_by_layer"):
            line[name] = line[name][:1]
        line["expert_load"] = line["expert_load"][:1]

    change_lines(run, cut)


def with_dead_experts(run: Path) -> None:
    change_lines(run, lambda line: line.update(expert_load=[[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]))


LACKING = [
    still_running,
    first_line_only,
    nothing_logged,
    no_finite_loss,
    a_nan_as_text,
    of_an_earlier_version,
    of_a_later_version,
    of_too_many_ranks,
    with_one_expert_layer,
    with_dead_experts,
]


@pytest.mark.parametrize("damage", LACKING, ids=lambda damage: damage.__name__)
def test_a_run_that_lacks_something_has_a_page(damage: Callable[[Path], None], run: Path) -> None:
    damage(run)
    alone = page_of(run, output=run / "report.html")
    assert set(SECTIONS) <= {attributes.get("id") for _, attributes in alone.tags}
    assert "broken" not in alone.text
    assert "nan" not in re.findall(r"[a-z]+", alone.text)


def test_runs_that_lack_something_stand_beside_others(home: Path, tmp_path: Path) -> None:
    runs = [home / "rectified", home / "dense"]
    for damage in LACKING:
        runs.append(Path(shutil.copytree(home / "rectified", tmp_path / damage.__name__)))
        damage(runs[-1])
    page = page_of(*runs, output=tmp_path / "page.html")
    assert [row[0] for row in page.tables["Headline figures"][1:]] == [run.name for run in runs]


def test_what_a_run_lacks_is_said(run: Path, home: Path, tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    assert "The model is dense: there is nothing to choose." in page_of(home / "dense", output=output).text
    still_running(run)
    assert "5 of 10 steps, not ended" in page_of(run, output=output).text
    (run / "metrics.jsonl").unlink()
    assert page_of(run, output=output).text.count("Nothing logged yet.") == 4, "three charts and the ledger"


def test_of_lines_that_repeat_a_step_the_last_counts(run: Path, tmp_path: Path) -> None:
    before = page_of(run, output=tmp_path / "page.html").tables
    lines = metrics(run)
    stale = [{**line, "loss": 99.0, "slots": {n: [1, 1] for n in SLOTS}} if "loss" in line else line for line in lines]
    write_metrics(run, [*stale, *lines])
    assert page_of(run, output=tmp_path / "page.html").tables == before


def test_a_run_that_went_on_under_another_world_adds_up(run: Path, tmp_path: Path) -> None:
    lines = metrics(run)

    def on_one_rank(line: dict[str, Any]) -> dict[str, Any]:
        # 24 slots for each expert on one rank are as many as 12 on each of two.
        ranks = [[[sum(rank[layer][i] for rank in line["slots_by_rank"]) for i in range(7)] for layer in (0, 1)]]
        sums = {key: [sum(line[key])] for key in ("sent_bytes_by_rank", "waited_seconds_by_rank")}
        return {**line, "slots_by_rank": ranks, **sums}

    late = [on_one_rank(line) for line in lines if "loss" in line and line["step"] > 6]
    write_metrics(run, [*lines, {"event": "start", "step": 6, "world": 1}, *late])
    page = page_of(run, output=tmp_path / "page.html")
    assert "broken" not in page.text
    assert f"{10 * 2 * 2 * 4 * 12:,} in each of 2 layers" in page.text
    assert "Nothing by rank: the number of ranks changed." in page.text
    assert "2 sessions" in page.text


def test_many_layers_and_experts_stay_in_bounds(run: Path, tmp_path: Path) -> None:
    layers, experts = 14, 64
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["layers"] = layers + 1
    config["model"]["moe"]["experts"] = experts
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "ledger.json").unlink()

    def widen(line: dict[str, Any]) -> None:
        line["slots"] = {name: counts[:1] * layers for name, counts in line["slots"].items()}
        line["slots_by_rank"] = [rank[:1] * layers for rank in line["slots_by_rank"]]
        for name in ("sent_bytes_by_layer", "waited_seconds_by_layer"):
            line[name] = line[name][:1] * layers
        line["expert_load"] = [[2 * e / experts / (experts - 1) for e in range(experts)]] * layers
        for name in FIGURES:
            line[f"expert_load_{name}_by_layer"] = line[f"expert_load_{name}_by_layer"][:1] * layers

    change_lines(run, widen)
    page = page_of(run, output=tmp_path / "page.html")
    assert len(page.all("svg")) == 3 + 2 + 2 * layers + 2
    assert len(page.tables["Balance of the layers of run"]) == layers + 1
    assert len(page.source) < 1_000_000


# What is refused.


def test_what_is_no_run_is_refused(home: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a run: it has no config.yaml; give the log.dir" in complaint(capsys, home)
    assert "is not a run" in complaint(
        capsys, home / "rectified", tmp_path / "nowhere", "--output", tmp_path / "x.html"
    )
    assert "is given twice" in complaint(capsys, run, run.parent / "." / "run", "--output", tmp_path / "x.html")
    (run / "summary.json").write_text("{")
    assert "summary.json: not JSON" in complaint(capsys, run)
    assert not (run / "report.html").exists()
    assert not (tmp_path / "x.html").exists()


def test_only_a_report_is_replaced(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert main(["report", str(run)]) == 0, "an earlier report"
    capsys.readouterr()
    mine = tmp_path / "mine.html"
    mine.write_text("<p>my notes</p>")
    assert "mine.html exists and is not a report" in complaint(capsys, run, "--output", mine)
    assert mine.read_text() == "<p>my notes</p>"
    assert "is a folder; name a file" in complaint(capsys, run, "--output", tmp_path)
    assert "there is no folder" in complaint(capsys, run, "--output", tmp_path / "a" / "b.html")


def test_several_runs_are_compared_in_the_current_folder(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(home / "rectified"), str(home / "dense")]) == 0
    assert MARK in (tmp_path / "report.html").read_text()
    assert capsys.readouterr().out == "report.html\n"


def test_runs_of_one_name_are_told_apart(home: Path, tmp_path: Path) -> None:
    paths = [Path(shutil.copytree(home / "dense", tmp_path / name / "run")) for name in ("first", "second")]
    assert [run.name for run in read_runs(paths)] == ["first/run", "second/run"]


def test_without_matplotlib_it_says_what_to_install(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install 'wastenot[viz]'" in complaint(capsys, run)
    with pytest.raises(UserError):
        write_report([run], run / "report.html")


# Parts with properties.


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3 * MOST_BINS), st.randoms(use_true_random=False))
def test_history_loses_no_count(gaps: list[int], draw: Any) -> None:
    lines, step = [], 0
    for steps in gaps:
        step += steps
        slots = {name: [draw.randrange(100) for _ in range(2)] for name in SLOTS}
        lines.append({"step": step, "ledger_steps": steps, "slots": slots})
    history = history_of(lines)
    assert len(history.edges) - 1 <= MOST_BINS
    assert history.edges[0] == 0
    assert history.edges[-1] == step
    assert sorted(set(history.edges)) == history.edges
    for name in SLOTS:
        assert history.slots[name].sum(0).tolist() == [sum(line["slots"][name][i] for line in lines) for i in (0, 1)]
        first = [line["slots"][name] for line in lines if line["step"] <= history.edges[1]]
        assert history.slots[name][0].tolist() == [sum(column) for column in zip(*first, strict=True)]


@given(st.floats(0, 1))
def test_a_percentage_says_neither_none_nor_all_of_a_part(part: float) -> None:
    text = percent(part).replace("\u00a0", " ")
    assert (text == "0.0 %") == (part == 0)
    assert (text == "100.0 %") == (part == 1)
    assert math.isclose(float(text.strip("<>% ")) / 100, part, abs_tol=0.001)


def luminance(colour: str) -> float:
    """Relative luminance as WCAG defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("tone", [0, 1], ids=["light", "dark"])
def test_colours_can_be_told_apart_without_hue(tone: int) -> None:
    def contrast(a: str, b: str) -> float:
        low, high = sorted(luminance(LIGHT_AND_DARK[name][tone]) for name in (a, b))
        return (high + 0.05) / (low + 0.05)

    for text in ("ink", "faint", "good", "bad"):
        assert contrast(text, "paper") >= 4.5, text
        assert contrast(text, "panel") >= 4.5, text
    for name in LIGHT_AND_DARK:
        if name.startswith("run-"):
            assert contrast(name, "paper") >= 3, name
    for view in (CHOICES, SLOTS_VIEW):
        for below, above in zip(view.parts, view.parts[1:], strict=False):
            assert contrast(below, above) >= 1.35, (below, above)


# The page in a browser.


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH")
@pytest.mark.parametrize(("dark", "width"), [(False, 1280), (True, 500)], ids=["light, wide", "dark, narrow"])
def test_a_browser_shows_the_charts(dark: bool, width: int, home: Path, tmp_path: Path) -> None:
    page = write_report([home / "rectified"], tmp_path / "page.html")
    pixels = pixels_of(page, tmp_path, width=width, dark=dark)

    def seen(name: str) -> int:
        colour = LIGHT_AND_DARK[name][dark]
        return int((pixels == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(1).sum())

    assert seen("paper") > len(pixels) / 4
    for name in ("kept", "filled", "rectified", "dropped", "padding"):
        assert seen(name) > 200, f"the area of what was {name}"
    assert seen("run-0") > 100, "curves"
