"""`wastenot compress report`: the page about a compression, whole and with parts missing.

The model is a tiny random Qwen2-MoE whose layer 0 is dense, so that rows of charts and numbers of layers differ.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from page_reader import BROWSER, Page, pixels_of, references_hold, stands_alone
from stock_models import save_stock

from wastenot.launch.errors import UserError
from wastenot.moe.compress.calibration import packed
from wastenot.moe.compress.criteria import coverage, layer_scores
from wastenot.moe.compress.open import open_model
from wastenot.moe.compress.plan import DropPlan, Quantize, Slim, read_plan, write_plan
from wastenot.moe.compress.profile import ProfileConfig, profile, read_profile
from wastenot.tools.cli import main
from wastenot.tools.compress.page.experts import CRITERIA, STARVED
from wastenot.tools.compress.page.fate import in_words
from wastenot.tools.compress.page.folder import read_compression
from wastenot.tools.compress.page.page import SECTIONS, make_page, write_page
from wastenot.tools.compress.page.quality import Point, front
from wastenot.tools.compress.page.unmeasured import sentences
from wastenot.tools.report.palette import LIGHT_AND_DARK

pytest.importorskip("matplotlib", reason="needs the extra `viz`")
pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS, EXPERTS = 6, 6
BLOCKS, CUT, GONE = (4, 5), (2,), {1: (0, 5), 3: (2,)}
"""What goes: blocks, feed-forward networks, experts by layer."""
QUALITY: dict[str, Any] = {
    "checkpoint": "runs/deep",
    "text": "bottles (held out)",
    "unigram_accuracy": 0.2,
    "rows": [
        {
            "name": name,
            "parameters": parameters,
            "bytes": 4 * parameters,
            "loss": loss,
            "accuracy": accuracy,
            "kl": kl,
            "prefill_tokens_per_second": prefill,
            "decode_tokens_per_second": decode,
            "seconds": seconds,
            "peak_bytes": peak,
        }
        for name, parameters, loss, accuracy, kl, prefill, decode, seconds, peak in (
            ("whole", 8 << 20, 1.5, 0.6, None, 1000.0, 50.0, 2.0, None),
            ("applied", 4 << 20, 1.9, 0.4, 0.31, 1500.0, 60.0, 1.0, 3 << 20),
            ("recovered", 4 << 20, 1.6, 0.5, 0.07, 1510.0, 61.0, 90.0, 5 << 20),
        )
    ],
    "balance": [{"layer": 1, "before": 1.7, "after": 1.1}, {"layer": 3, "before": 1.4, "after": 1.2}],
    "ranks": 2,
    "stability": [{"tokens": 256, "jaccard": 0.5}, {"tokens": 512, "jaccard": 0.9}],
    "not_measured": ["Speed on a GPU: there was none."],
}
STEPS: dict[str, Any] = {
    "target": "params",
    "steps": [
        {"hash": f"{i}" * 16, "cost": 8e6 - 2e6 * i, "tried": 3 * i, "loss": 1.5 + i, "accuracy": 0.5, "kl": 0.1 * i}
        for i in range(3)
    ],
}
VERIFY = {
    "passed": True,
    "max_difference": 2.5e-6,
    "folder": "small/exported",
    "transformers": "5.23.0",
    "allowed": 5e-6,
    "problems": [],
}
BENCH: list[dict[str, Any]] = [
    {
        "case": "half",
        "method": method,
        "parameters": 10,
        "bytes": 40 << 20,
        "loss": 1.0,
        "accuracy": 0.5,
        "kept": kept,
        "prefill_ratio": 1.5,
        "decode_ratio": 1.25,
    }
    for method, kept in (("layer drop", 0.9), ("random 0", 0.3), ("random 1", 0.5))
]
BENCH.append({"case": "whole", "method": "", "bytes": 80 << 20, "loss": 0.9, "accuracy": 0.6, "kept": 1.0})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every part of a compression."""
    home = tmp_path_factory.mktemp("compression")
    source = save_stock("qwen2_moe", home / "model", num_hidden_layers=LAYERS, num_experts=EXPERTS, layer_types=None)
    tokens = torch.randint(0, 64, (8 * 32,), generator=torch.Generator().manual_seed(0))
    text = packed(tokens, 32, 8, "bottles (training)")
    folder = home / "small"
    scored = profile(open_model(source), text, folder / "profile", ProfileConfig(window=3))
    plan = DropPlan(
        base=scored.base,
        shape=scored.shape,
        blocks=BLOCKS,
        layers=CUT,
        experts=GONE,
        profile=scored.fingerprint,
        criteria={"blocks": "cosine, consecutive", "experts": "reap, by layer"},
    )
    write_plan(plan, folder / "plan.yaml")
    for name, value in (("quality", QUALITY), ("steps", STEPS), ("verify", VERIFY)):
        (folder / f"{name}.json").write_text(json.dumps(value))
    (home / "bench.json").write_text(json.dumps({"name": "compress", "rows": BENCH}))
    return folder


@pytest.fixture(scope="module")
def page(whole: Path) -> Page:
    """The page about all of it, with the benchmark."""
    return page_of(whole, whole.parent / "page.html", whole.parent / "bench.json")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to take parts from."""
    return Path(shutil.copytree(whole, tmp_path / "small"))


def page_of(folder: Path, output: Path, bench: Path | None = None) -> Page:
    write_page(read_compression(folder, bench), output)
    return Page(output)


def write(folder: Path, name: str, value: Mapping[str, Any]) -> None:
    (folder / name).write_text(json.dumps(value))


def anchors(page: Page) -> set[str]:
    return {attributes["id"] for attributes in page.all("section")}


def drawing(page: Page, name: str) -> ElementTree.Element:
    found = re.search(rf'<svg[^>]*aria-labelledby="{name}-title".*?</svg>', page.source, re.DOTALL)
    assert found is not None, name
    return ElementTree.fromstring(found[0])


def title(page: Page, name: str) -> str:
    return drawing(page, name)[0].text or ""


class HeatMap:
    """Where the marks of a heat map stand, in rows and columns of its picture."""

    def __init__(self, svg: ElementTree.Element) -> None:
        image = next(node for node in svg.iter("image") if "matrix" in node.get("transform", ""))
        numbers = re.findall(r"[-\d.]+", image.get("transform", ""))
        self.wide, self.high, self.left, self.top = (float(numbers[i]) for i in (0, 3, 4, 5))
        self.rows, self.columns = int(image.get("height", "")), int(image.get("width", ""))
        self.paths = [(node.get("d", ""), node.get("style", "")) for node in svg.iter("path")]

    def _points(self, path: str) -> list[tuple[float, float]]:
        pairs = re.findall(r"([-\d.]+) ([-\d.]+)", path)
        return [((float(y) - self.top) / self.high, (float(x) - self.left) / self.wide) for x, y in pairs]

    def crossed(self) -> list[tuple[int, int]]:
        """Cells in which two lines of a cross lie whole, in order."""
        cells: list[tuple[int, int]] = []
        for path, style in self.paths:
            if "stroke: #101010" in style and "fill: none" in style:
                points = self._points(path)
                for i in range(0, len(points), 4):
                    [cell] = {(int(row // 1), int(column // 1)) for row, column in points[i : i + 4]}
                    cells.append(cell)
        return cells

    def hatched(self) -> dict[str, list[int]]:
        """Rows by the name of their hatch; each from the first column to the last."""
        found: dict[str, list[int]] = {}
        for path, style in self.paths:
            if hatch := re.search(r"fill: url\(#([^)]*)\)", style):
                rows, columns = zip(*self._points(path), strict=True)
                assert max(rows) - min(rows) == pytest.approx(1, abs=0.01)
                assert (min(columns), max(columns)) == pytest.approx((0, self.columns), abs=0.01)
                found.setdefault(hatch[1], []).append(round(min(rows)))
        return found


# The page as a file.


def test_page_stands_alone_with_every_section(page: Page) -> None:
    assert anchors(page) == set(SECTIONS)
    assert stands_alone(page) >= len(CRITERIA) + 1, "heat maps and the matrix"
    assert set(SECTIONS) <= references_hold(page)


def test_every_chart_says_what_it_shows(page: Page, whole: Path) -> None:
    charts = page.all("svg")
    assert len(charts) == 3 + 3 + 2 + len(CRITERIA) + 4, "stages, benchmark, similarity, experts, the others"
    assert all(chart["role"] == "img" for chart in charts)
    titles = re.findall(r"<svg[^>]*><title[^>]*>([^<]+)</title>", page.source)
    assert len(titles) == len(set(titles)) == len(charts)
    scores = layer_scores(read_profile(whole / "profile"))
    least = min(scores, key=lambda layer: scores[layer])
    told = title(page, "similarity")
    assert f"from {scores[least]:.3f} in layer {least}" in told
    assert "Gone: 2." in told
    assert "Gone: 4 and 5." in told
    assert "From 8 M and 0.0000 to 4 M and 0.2000." in title(page, "search")
    assert "Worst before: 1.70 in layer 1; worst after: 1.20 in layer 3." in title(page, "balance")
    assert "256 tokens: 0.50; 512 tokens: 0.90." in title(page, "stability")


def test_same_files_give_the_same_bytes(whole: Path) -> None:
    assert make_page(read_compression(whole)) == make_page(read_compression(whole))


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH")
@pytest.mark.parametrize(("dark", "width"), [(False, 1200), (True, 420)], ids=["light, wide", "dark, narrow"])
def test_a_browser_shows_the_charts(page: Page, dark: bool, width: int, tmp_path: Path) -> None:
    pixels = pixels_of(page.path, tmp_path, width=width, dark=dark, height=6000)

    def seen(colour: str) -> int:
        return int((pixels == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(1).sum())

    assert seen(LIGHT_AND_DARK["paper"][dark]) > len(pixels) / 4
    assert seen(LIGHT_AND_DARK["run-0"][dark]) > 100, "curves"
    assert seen("#101010") > 100, "crosses and hatches"


# Marks.


@pytest.mark.parametrize("criterion", CRITERIA)
def test_heat_map_marks_exactly_what_goes(page: Page, criterion: str) -> None:
    heat_map = HeatMap(drawing(page, f"experts-{criterion}"))
    # Layer 0 is dense: row 0 is layer 1.
    assert (heat_map.rows, heat_map.columns) == (LAYERS - 1, EXPERTS)
    assert heat_map.crossed() == [(layer - 1, expert) for layer, gone in GONE.items() for expert in gone]
    assert sorted(heat_map.hatched().values()) == [[layer - 1 for layer in CUT], [layer - 1 for layer in BLOCKS]]
    told = title(page, f"experts-{criterion}")
    assert "Crossed out: layer 1: 0 and 5; layer 3: 2." in told
    assert "Feed-forward networks hatched as gone: 2. Blocks hatched as gone: 4 and 5." in told


def test_heat_map_of_a_plan_that_takes_nothing_has_no_marks(folder: Path, tmp_path: Path) -> None:
    plan = read_plan(folder / "plan.yaml")
    write_plan(replace(plan, blocks=(), layers=(), experts={}), folder / "plan.yaml")
    page = page_of(folder, tmp_path / "page.html")
    heat_map = HeatMap(drawing(page, "experts-reap"))
    assert heat_map.crossed() == []
    assert heat_map.hatched() == {}
    assert "Nothing is marked as gone." in title(page, "experts-reap")


def test_matrix_crosses_runs_of_which_every_block_goes(page: Page) -> None:
    matrix = HeatMap(drawing(page, "similarity-runs"))
    assert (matrix.rows, matrix.columns) == (3, LAYERS)
    # One block from layer 4 and from 5 on, and two from 4 on.
    assert matrix.crossed() == [(0, 4), (0, 5), (1, 4)]


def test_random_drops_are_grey_dots(page: Page) -> None:
    for chart in ("bytes", "prefill", "decode"):
        styles = [use.get("style", "") for use in drawing(page, f"bench-{chart}").iter("use")]
        # Ticks are uses of a form too, thinner ones.
        markers = [style for style in styles if "stroke-width: 0.6" not in style]
        assert sum("fill: var(--faint)" in style for style in markers) == 2, chart
        assert sum("fill: var(--run-0)" in style for style in markers) == 1, chart
    [legend] = re.findall(r"<li>(?:(?!</li>).)*<span>random</span></li>", page.source)
    assert "color:var(--faint)" in legend
    assert "●" in legend


# What the page says.


def test_headline_is_that_of_the_last_stage(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "page.html"
    assert main(["compress", "report", str(whole), "-o", str(output), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"] == str(output)
    assert found["plan"] == read_plan(whole / "plan.yaml").hash
    assert (found["blocks_dropped"], found["layers_dropped"], found["experts_dropped"]) == (2, 1, 3)
    assert (found["model"], found["bytes"], found["bytes_of_whole"]) == ("recovered", 16 << 20, 32 << 20)
    # (0.5 - 0.2) / (0.6 - 0.2)
    assert found["quality_kept"] == pytest.approx(0.75)
    assert found["prefill_ratio"] == pytest.approx(1.51)
    assert found["verified"] is True
    page = Page(output)
    assert [row[5] for row in page.tables["Quality, size and speed"][1:]] == ["100.0\xa0%", "50.0\xa0%", "75.0\xa0%"]
    assert "2 of 6 blocks go, attention and feed-forward network alike: 4 and 5." in page.text
    assert "3 of 30 experts go, from 2 layers" in page.text


def test_words_say_what_is_done_to_what_stays(whole: Path) -> None:
    plan = read_plan(whole / "plan.yaml")
    said = " ".join(in_words(replace(plan, semantics="skip", slim=Slim(sparsity=0.25), quantize=Quantize(bits=4))))
    assert "tokens that choose them lose that part" in said
    assert "25% of the weights of the experts that stay are set to zero (unstructured, chosen by Wanda)." in said
    assert "stored in 4 bits, 32 of them to a scale" in said
    assert in_words(DropPlan(base="b", shape=plan.shape)) == ["Nothing goes."]


def test_starved_experts_are_named_with_their_tokens(page: Page, whole: Path) -> None:
    got = coverage(read_profile(whole / "profile"))
    starved = {layer: [e for e, n in enumerate(counts) if n < STARVED] for layer, counts in got.items()}
    number = sum(map(len, starved.values()))
    assert 0 < number < 30, "the text is long enough for some experts only"
    assert f"{number} of 30 experts got fewer than {STARVED} tokens" in page.text
    rows = dict(page.tables["Experts with too few tokens"][1:])
    assert set(rows) == {f"layer {layer}" for layer, names in starved.items() if names}
    for layer, names in starved.items():
        goes = [layer in (*BLOCKS, *CUT) or e in GONE.get(layer, ()) for e in names]
        told = [f"{e} ({got[layer][e]}{', goes' if g else ''})" for e, g in zip(names, goes, strict=True)]
        assert rows.get(f"layer {layer}", "") == ", ".join(told)


def test_costs_stand_beside_what_was_predicted(page: Page, whole: Path) -> None:
    costs = json.loads((whole / "profile" / "costs.json").read_text())
    rows = {row[0]: row[1:] for row in page.tables["Time and memory of the stages"]}
    assert rows["profile"][3] == f"{costs['predicted_bytes'] / costs['peak_bytes']:.2f}"
    assert rows["recovered"][:2] == ["1\xa0min\xa030\xa0s", "5.0\xa0MiB"]
    assert set(rows) == {"stage", "profile", "measuring the whole model", "applied", "recovered"}


def test_hashes_and_versions_are_named(page: Page, whole: Path) -> None:
    scored, plan = read_profile(whole / "profile"), read_plan(whole / "plan.yaml")
    names = {row[0]: row[1] for row in page.tables["Names"]}
    assert names["plan"] == plan.hash
    assert names["checkpoint"] == plan.base == scored.base
    assert names["profile"] == scored.fingerprint
    assert names["calibration text"] == scored.calibration["fingerprint"]
    assert names["transformers"] == "5.23.0"
    assert (whole / "plan.yaml").read_text() in page.text
    assert "is not what the plan was decided by" not in page.text


def test_a_plan_for_another_checkpoint_is_said_so(folder: Path, tmp_path: Path) -> None:
    write_plan(replace(read_plan(folder / "plan.yaml"), base="another"), folder / "plan.yaml")
    assert "is not what the plan was decided by" in page_of(folder, tmp_path / "page.html").text


def test_a_model_that_failed_verification_is_warned_of(folder: Path, tmp_path: Path) -> None:
    write(
        folder,
        "verify.json",
        {**VERIFY, "passed": False, "max_difference": 3.5, "problems": ["it writes other tokens"]},
    )
    page = page_of(folder, tmp_path / "page.html")
    assert "Verification failed" in page.text
    assert "failed: the largest difference is 3.5; of the largest output at most 5e-06 may differ" in page.text
    assert "it writes other tokens" in page.text


# What is missing.

MISSING: dict[str, tuple[tuple[str, ...], set[str], str]] = {
    "profile": (("profile",), {"similarity", "experts", "tokens"}, "there is no profile."),
    "costs": (("profile/costs.json",), set(), "What the profile cost: costs.json is missing."),
    "plan": (("plan.yaml",), set(), "What goes: there is no plan."),
    "steps": (("steps.json",), {"search"}, "it was not searched for within a budget."),
    "quality": (("quality.json",), {"quality", "balance", "stability"}, "there is no quality.json."),
    "verify": (("verify.json",), {"verification"}, "was not exported and verified."),
    "all but the plan": (
        ("profile", "steps.json", "quality.json", "verify.json"),
        set(SECTIONS) - {"plan", "unmeasured"},
        "there is no profile.",
    ),
    "all but quality": (
        ("profile", "steps.json", "plan.yaml", "verify.json"),
        set(SECTIONS) - {"quality", "balance", "stability", "stages", "unmeasured"},
        "What goes: there is no plan.",
    ),
}


@pytest.mark.parametrize(("parts", "sections", "said"), MISSING.values(), ids=MISSING)
def test_what_is_missing_is_left_out_and_said(
    parts: tuple[str, ...], sections: set[str], said: str, folder: Path, tmp_path: Path
) -> None:
    for part in parts:
        path = folder / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = page_of(folder, tmp_path / "page.html")
    assert anchors(page) == set(SECTIONS) - sections
    assert said in page.text
    references_hold(page)


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "speed": (lambda q: [row.pop("decode_tokens_per_second") for row in q["rows"][1:]], "as applied, recovered."),
    "unigram": (lambda q: q.pop("unigram_accuracy"), "Quality kept: the accuracy of the commonest token"),
    "whole": (lambda q: q["rows"].pop(0), "The whole model: nothing is known of it"),
    "only the whole": (lambda q: q.update(rows=q["rows"][:1]), "only the whole one was measured."),
    "not finite": (lambda q: q["rows"][1].update(loss=float("nan")), "Loss of the model as applied."),
    "balance": (lambda q: q.update(balance=[]), "Balance of expert-parallel ranks"),
    "stability": (lambda q: q.update(stability=[]), "Whether less text would have chosen the same"),
}


@pytest.mark.parametrize(("change", "said"), CHANGES.values(), ids=CHANGES)
def test_figures_that_are_missing_are_said(
    change: Callable[[dict[str, Any]], object], said: str, folder: Path, tmp_path: Path
) -> None:
    assert said not in " ".join(sentences(read_compression(folder)))
    quality = json.loads(json.dumps(QUALITY))
    change(quality)
    write(folder, "quality.json", quality)
    assert said in page_of(folder, tmp_path / "page.html").text


def test_limits_of_every_compression_are_said(whole: Path, folder: Path) -> None:
    said = " ".join(sentences(read_compression(whole)))
    assert "Speed on a GPU: there was none." in said
    assert "scored on 256 tokens of bottles (training) alone" in said
    assert "predicting the next token of bottles (held out)" in said
    assert "buy no speed in stock serving" in said
    assert "no benchmark was given with --bench" in said
    assert "no benchmark" not in " ".join(sentences(read_compression(whole, whole.parent / "bench.json")))
    write_plan(replace(read_plan(folder / "plan.yaml"), slim=Slim()), folder / "plan.yaml")
    assert "the weights that this plan sets to zero buy no speed" in " ".join(sentences(read_compression(folder)))


def test_a_dense_model_has_no_experts_to_show(tmp_path: Path) -> None:
    source = save_stock("qwen2_moe", tmp_path / "model", num_hidden_layers=2, mlp_only_layers=[0, 1], layer_types=None)
    text = packed(torch.arange(64), 32, 2, "numbers")
    profile(open_model(source), text, tmp_path / "dense" / "profile", ProfileConfig())
    page = page_of(tmp_path / "dense", tmp_path / "page.html")
    assert anchors(page) == {"similarity", "stages", "plan", "unmeasured"}
    assert "Worth of experts: the model has none." in page.text
    assert "profile with a longer --window" in page.text


# Bad input.


def test_what_stands_in_files_is_inert(folder: Path, tmp_path: Path) -> None:
    evil = "</title><script>alert(1)</script><img src=x onerror=alert(2)>\"'$\\frac{"
    quality = json.loads(json.dumps(QUALITY))
    quality |= {"checkpoint": evil, "text": evil, "not_measured": [evil]}
    quality["rows"][1]["name"] = evil
    write(folder, "quality.json", quality)
    write(folder, "verify.json", {**VERIFY, "transformers": evil, evil: evil, "problems": [evil]})
    write(folder, "steps.json", {**STEPS, "target": evil})
    head = json.loads((folder / "profile" / "profile.json").read_text())
    head["calibration"]["name"] = evil
    write(folder / "profile", "profile.json", head)
    write_plan(replace(read_plan(folder / "plan.yaml"), criteria={"experts": evil}), folder / "plan.yaml")
    write(tmp_path, "bench.json", {"rows": [{**BENCH[0], "case": evil, "method": evil}]})
    page = page_of(folder, tmp_path / "page.html", tmp_path / "bench.json")
    assert not page.all("script")
    assert not page.all("img")
    assert not any("onerror" in attributes for _, attributes in page.tags)
    stands_alone(page)
    assert page.text.count(evil) > 10


DAMAGE: dict[str, tuple[str, str, str]] = {
    "json": ("quality.json", "{", "quality.json: not JSON"),
    "list": ("steps.json", "[]", "steps.json: not a JSON object"),
    "row": ("quality.json", '{"rows": [{"bytes": 1}]}', "quality.json: is not what `wastenot compress` writes"),
    "step": ("steps.json", '{"steps": [{"hash": "a"}]}', "steps.json: is not what"),
    "plan": ("plan.yaml", "blocks: [1]", "plan.yaml: is no drop plan"),
    "profile": ("profile/profile.json", "{}", "profile: is damaged"),
}


@pytest.mark.parametrize(("name", "text", "said"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_parts_are_refused_in_one_line(
    name: str, text: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / name).write_text(text)
    assert main(["compress", "report", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert said in err
    assert not (folder / "report.html").exists()


def test_what_is_no_compression_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no compression: it has none of"):
        read_compression(tmp_path)
    with pytest.raises(UserError, match="holds no rows of a benchmark"):
        read_compression(folder, tmp_path / "nowhere.json")
    (tmp_path / "mine.html").write_text("<p>my notes</p>")
    with pytest.raises(UserError, match="is not a report of a compression"):
        write_page(read_compression(folder), tmp_path / "mine.html")
    assert (tmp_path / "mine.html").read_text() == "<p>my notes</p>"


# The front.


def test_front_by_hand() -> None:
    small, poor, best, large = Point("a", 1, 0.5), Point("b", 2, 0.4), Point("c", 2, 0.9), Point("d", 3, 0.9)
    assert front([large, best, poor, small], rising=False) == [small, best]
    assert front([large, best, poor, small], rising=True) == [large]


@given(st.lists(st.builds(Point, st.just("m"), st.integers(0, 5), st.integers(0, 5)), max_size=12), st.booleans())
def test_nothing_beats_the_front(points: list[Point], rising: bool) -> None:
    def beats(a: Point, b: Point) -> bool:
        nearer = a.x >= b.x if rising else a.x <= b.x
        return nearer and a.kept >= b.kept and (a.x, a.kept) != (b.x, b.kept)

    expected = {(p.x, p.kept) for p in points if not any(beats(other, p) for other in points)}
    assert {(p.x, p.kept) for p in front(points, rising)} == expected
