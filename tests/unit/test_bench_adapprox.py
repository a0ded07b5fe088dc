"""Benchmarks of Adapprox: bytes are counted, cells train and are kept, figures are what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from wastenot.launch.config import DataConfig
from wastenot.launch.corpus import prepare_files
from wastenot.launch.optimizer_config import what_is_missing
from wastenot.launch.optimizer_state import state_bytes
from wastenot.parallel.optim import Adapprox
from wastenot.tools.bench import adapprox_cells, adapprox_check, adapprox_memory, adapprox_quality
from wastenot.tools.bench.adapprox_cells import CONTENDERS, MODELS, Cell, finished, recipe, run_cell
from wastenot.tools.bench.adapprox_memory import bytes_of, measure, storage_bytes
from wastenot.tools.bench.adapprox_picture import STYLES, draw_quality
from wastenot.tools.bench.adapprox_quality import LEARNING_RATES, best_rate, goals, summarise
from wastenot.tools.bench.adapprox_shapes import MODELS as SHAPES
from wastenot.tools.bench.adapprox_shapes import expected_bytes, gpt2
from wastenot.tools.bench.rectify_methods import DisagreementError

pytestmark = pytest.mark.usefixtures("one_thread")


def test_shapes_are_those_of_gpt2() -> None:
    transformers = pytest.importorskip("transformers", reason="pip install 'wastenot[hf]'")
    for width, layers, heads in ((768, 12, 12), (1024, 24, 16)):
        config = transformers.GPT2Config(n_embd=width, n_layer=layers, n_head=heads)
        with torch.device("meta"):
            model = transformers.GPT2LMHeadModel(config)
        model.tie_weights()
        theirs = {name.removeprefix("transformer."): tuple(p.shape) for name, p in model.named_parameters()}
        theirs.pop("lm_head.weight", None)
        assert gpt2(width, layers) == theirs
    assert sum(torch.Size(shape).numel() * count for shape, count in SHAPES["GPT-2 117M"].items()) == 124_439_808


def test_storages_are_counted_once_and_whole() -> None:
    whole = torch.zeros(100)
    assert storage_bytes([whole, whole[:3], torch.zeros(()), 7]) == 404


def test_memory_rows_by_hand() -> None:
    shapes = {(64, 32): 3, (32,): 2}
    rows = {(r["rank"], r["momentum"]): r for r in measure("tiny", shapes, lambda text: None) if r["rank"]}
    adamw = next(row for row in measure("tiny", shapes, lambda text: None, every_momentum=False) if not row["rank"])
    assert adamw["state_bytes"] == 3 * (8 * 64 * 32 + 4) + 2 * (8 * 32 + 4)
    assert len(rows) == 8
    for (rank, momentum), row in rows.items():
        assert row["unequal"] == 0, (rank, momentum)
        assert row["state_bytes"] == sum(expected_bytes(s, rank, momentum) * n for s, n in shapes.items())
        assert row["transient_bytes"] > 0
    # 8 columns of 96 entries, an fp32 average, a step, a rank and an error; twice a vector's two moments and a step.
    assert rows["k_max", "fp32"]["state_bytes"] == 3 * (4 * 8 * 96 + 4 * 2048 + 16) + 2 * (8 * 32 + 4)
    assert rows["k = 1", "none"]["state_bytes"] == 3 * (4 * 96 + 16) + 2 * (4 * 32 + 4)
    assert rows["k_max", "fp32"]["saved_percent"] == pytest.approx(100 * (1 - rows["k_max", "fp32"]["of_adamw"]))
    assert [goal.metric for goal in adapprox_memory.goals(list(rows.values()))] == [
        "parameters whose state is not the formula's",
        "tiny, k_max: state / AdamW's",
    ]


def test_published_percentages_are_met_to_the_printed_digit_only() -> None:
    row = {"model": "GPT-2 117M", "optimizer": "Adapprox", "rank": "k_max", "momentum": "fp32"}
    row |= {"published_percent": 34.5, "unequal": 0, "of_adamw": 0.655}
    for saved, met in ((34.5499, True), (34.4501, True), (34.5501, False), (34.44, False)):
        goal, _, bound = adapprox_memory.goals([{**row, "saved_percent": saved}])
        assert goal.met == met, saved
        assert bound.met


def test_stacked_experts_have_factors_each() -> None:
    parameter = nn.Parameter(torch.zeros(3, 64, 32))
    parameter.grad = torch.rand(3, 64, 32)
    assert bytes_of(parameter, ("k_max", "none")).state == 3 * 4 * 8 * 96 + 4 + 3 * 12


def test_the_check_stops_a_benchmark_of_a_wrong_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    adapprox_check.check()

    class Wrong(Adapprox):
        def __init__(self, params, **options) -> None:
            super().__init__(params, **{**options, "betas": (0.9, 0.9)})

    monkeypatch.setattr(adapprox_check, "Adapprox", Wrong)
    with pytest.raises(DisagreementError, match="rank 1"):
        adapprox_check.check()


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tiny models and a small text for them."""
    small = {"d_model": 32, "layers": 2, "heads": 2, "d_ff": 64}
    models = {
        name: replace(model, **small, moe=model.moe and replace(model.moe, experts=4, d_expert=32))
        for name, model in MODELS.items()
    }
    monkeypatch.setattr(adapprox_cells, "MODELS", models)
    monkeypatch.setattr(adapprox_cells, "EVALUATE_EVERY", 5)
    (tmp_path / "text.txt").write_text("".join(f"{i} green bottles hanging on the wall.\n" for i in range(4000)))
    data = DataConfig(dir=str(tmp_path / "data"), tokenizer="bytes", val_fraction=0.15)
    return prepare_files([tmp_path / "text.txt"], data, progress=False)


@pytest.mark.parametrize("contender", CONTENDERS)
def test_cells_train_and_are_kept(contender: str, tmp_path: Path, corpus: Path) -> None:
    if why := what_is_missing(CONTENDERS[contender].name):
        pytest.skip(why)
    cell = Cell("moe", contender, 5e-2 if contender == "adafactor" else 4e-3, 10, 0)
    assert finished(cell, tmp_path) is None
    run_cell(cell, tmp_path, corpus)
    result = finished(cell, tmp_path)
    assert result is not None
    assert [point["step"] for point in result["curve"]] == [0, 5, 10]
    assert result["loss"] < result["curve"][0]["loss"] - 0.2
    assert 0 < result["state_bytes_per_parameter"] <= 8.1
    assert (result["mean_rank"] is not None) == contender.startswith("adapprox")
    if contender == "adapprox":
        assert result["mean_rank"] >= 1
        assert 4 < result["mean_state_bytes_per_parameter"] < 8
    assert finished(replace(cell, lr=1.0), tmp_path) is None


def test_a_run_that_diverges_is_a_result(tmp_path: Path, corpus: Path) -> None:
    cell = Cell("dense", "adamw", 1e30, 10, 0)
    run_cell(cell, tmp_path, corpus)
    result = finished(cell, tmp_path)
    assert result is not None
    assert result["loss"] is None


def test_state_of_quantized_optimizers_is_counted_inside() -> None:
    torchao = pytest.importorskip("torchao.optim", reason="pip install 'wastenot[optimizers]'")
    parameter = nn.Parameter(torch.ones(128, 64))
    parameter.grad = torch.ones(128, 64)
    optimizer = torchao.AdamW8bit([parameter])
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    codes, scales, tables = 2 * 128 * 64, 2 * 4 * 128 * 64 // 256, 2 * 4 * 256
    assert codes + scales <= state_bytes(optimizer) <= codes + scales + tables + 8


def outcome(cell: Cell, loss: float | None, state: float = 8.0) -> dict:
    curve = [{"step": 0, "loss": 7.0}, {"step": cell.steps, "loss": loss}]
    numbers = {"state_bytes_per_parameter": state, "mean_state_bytes_per_parameter": state, "rank": None}
    return {"loss": loss, "curve": curve, "mean_rank": None, "seconds": 9.0, "cpu_seconds": 4.0, **numbers}


def cells_of(contender: str, losses: tuple[float | None, ...], state: float = 8.0) -> dict[Cell, dict]:
    cells = [Cell("dense", contender, 2e-3, 400, seed) for seed in range(len(losses))]
    return {cell: outcome(cell, loss, state) for cell, loss in zip(cells, losses, strict=True)}


def test_rows_and_goals_by_hand() -> None:
    tuned = {Cell("dense", "adapprox", lr, 100, 3, False): {"loss": loss} for lr, loss in ((1e-3, 5.1), (2e-3, 5.0))}
    adamw = cells_of("adamw", (4.0, 4.2, 4.7))
    results = adamw | cells_of("adapprox", (4.01, 4.2, 4.69), 4.3) | cells_of("came", (4.0, None, 4.5), 4.1)
    rows = {row["contender"]: row for row in summarise(results, tuned)}
    assert rows["adamw"]["loss"] == pytest.approx(4.3)
    assert rows["adamw"]["above_adamw"] is None
    ours = rows["adapprox"]
    # Differences are paired by seed: the seeds' own spread does not enter.
    assert ours["above_adamw"] == pytest.approx(0.0, abs=1e-12)
    assert ours["above_adamw_se"] == pytest.approx(0.01 / 3**0.5)
    assert ours["of_adamw"] == pytest.approx(4.3 / 8)
    assert ours["lr_at_edge"] and ours["seconds_per_step"] == pytest.approx(0.01)
    assert rows["came"]["diverged"] == 1
    assert rows["came"]["above_adamw"] == pytest.approx(-0.1)
    loss, state = goals(list(rows.values()))
    assert loss.met and state.met
    worse = adamw | cells_of("adapprox", (4.02, 4.21, 4.71), 4.5)
    loss, state = goals(summarise(worse, {}))
    assert not loss.met and not state.met
    diverged = adamw | cells_of("adapprox", (3.0, None, 3.0))
    assert not goals(summarise(diverged, {}))[0].met
    json.dumps(list(rows.values()))


def test_the_best_rate_is_that_of_the_lowest_loss_and_never_of_a_run_that_diverged() -> None:
    def tuned(*losses: float | None) -> dict[Cell, dict]:
        return {
            Cell("moe", "muon", lr, 100, 3, False): {"loss": loss}
            for lr, loss in zip(LEARNING_RATES, losses, strict=False)
        }

    assert best_rate(tuned(None, 5.0, 4.9, 5.2), "moe", "muon") == LEARNING_RATES[2]
    assert best_rate(tuned(None, None), "moe", "muon") == LEARNING_RATES[0]


def test_an_unfinished_benchmark_goes_on_and_names_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Cell] = []

    def keep(cells, folder, corpus, workers, say) -> None:
        for cell in cells:
            if finished(cell, folder) is None:
                ran.append(cell)
                loss = 4.0 + 0.01 * cell.seed + 10 * abs(cell.lr - 5e-3)
                text = json.dumps({"recipe": recipe(cell), **outcome(cell, loss)})
                (folder / f"{cell.name}.json").write_text(text)

    monkeypatch.setattr(adapprox_quality, "FOLDER", tmp_path)
    monkeypatch.setattr(adapprox_quality, "run_all", keep)
    monkeypatch.setattr(adapprox_quality, "prepare", lambda data, progress: tmp_path)
    monkeypatch.setattr(adapprox_quality, "what_is_missing", lambda name: "no such package" if name == "came" else "")
    report = adapprox_quality.run(quick=False, command="", say=lambda text: None)
    names = len(CONTENDERS) - 1
    assert len(ran) == len(set(ran)) == 2 * names * (len(LEARNING_RATES) + 3)
    assert len({cell.name for cell in ran}) == len(ran)
    assert {row["lr"] for row in report.rows if "lr" in row} == {5e-3}
    left_out = [row for row in report.rows if row["contender"] == "came"]
    assert [row["why_not"] for row in left_out] == ["no such package"] * 2
    ran.clear()
    again = adapprox_quality.run(quick=False, command="", say=lambda text: None)
    assert not ran and again.rows == report.rows
    quick = adapprox_quality.run(quick=True, command="", say=lambda text: None)
    assert {row["model"] for row in quick.rows} == {"dense"}
    assert "left out are the MoE" in quick.notes[-1]


def test_the_picture_has_every_contender(tmp_path: Path) -> None:
    assert STYLES.keys() == CONTENDERS.keys()
    rows = [
        {"model": model, "contender": name, "loss": 4.0, "above_adamw_se": None, "mean_state_bytes_per_parameter": 8.0}
        for model in MODELS
        for name in CONTENDERS
    ]
    picture = draw_quality([*rows, {"model": "moe", "contender": "came", "why_not": "missing"}], tmp_path / "a.png")
    assert picture is not None
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert draw_quality([], tmp_path / "nothing.png") is None


def test_finished_cells_are_not_run_again(tmp_path: Path) -> None:
    cell = Cell("dense", "adamw", 1e-3, 400, 0)
    (tmp_path / f"{cell.name}.json").write_text(json.dumps({"recipe": recipe(cell), **outcome(cell, 4.0)}))
    said: list[str] = []
    adapprox_cells.run_all([cell], tmp_path, tmp_path, 1, said.append)
    assert said == ["1 of 1 cells are there already"]
