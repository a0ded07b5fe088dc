"""`recompute.mode: lynx` in whole runs: plans, budgets, the account, resuming; and no loss that depends on it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from real_runs import finish, log_dir, losses, start

from wastenot.launch.metrics import read_metrics

MIB = 2**20
RUN: dict[str, Any] = {
    "model": {"d_model": 64, "layers": 2, "heads": 2, "moe": {"experts": 4, "d_expert": 128}},
    "router": {"top_k": 2},
    "parallel": {"expert": 2, "piece_bytes": 0},
    "schedule": {"warmup_steps": 2},
    "data": {"tokenizer": "bytes", "seq_len": 128},
    "train": {"steps": 10, "batch": 16, "sample_tokens": 0, "eval_every": 0},
    "checkpoint": {"every": 0},
    "log": {"every": 1, "tensorboard": False},
}


def run(made, *arguments: str, expected: int = 0, **options: Any) -> tuple[Path, str]:
    """Its configuration, and what it printed."""
    config = made(**RUN | options)
    return config, finish(start(config, *arguments), expected)


def planned(config: Path) -> list[dict[str, Any]]:
    """Lines of metrics that a plan was in force for."""
    return [line for line in read_metrics(log_dir(config)) if "planned_step_seconds" in line]


def test_the_least_that_fits_is_told_and_runs(made):
    _, output = run(made, recompute={"mode": "lynx", "budget": MIB}, expected=2)
    told = re.search(r"recompute.budget: 1MiB is too little .* the smallest that fits is (\d+)MiB", output)
    assert told is not None and "Traceback" not in output
    least = int(told[1])
    config, output = run(made, recompute={"mode": "lynx", "budget": (least + 2) * MIB})
    assert "lynx: planned by heu-mix" in output
    lines = planned(config)
    assert lines[-1]["peak_bytes"] <= lines[-1]["budget_bytes"] == (least + 2) * MIB
    again = sum(line["recompute_hidden_seconds"] + line["recompute_exposed_seconds"] for line in lines)
    assert again > 0 and any(line["recompute_hidden_seconds"] > 0 for line in lines)
    account = json.loads((log_dir(config) / "ledger.json").read_text())
    assert account["recompute_hidden_seconds"] > 0 and account["hidden_seconds"] > 0
    summary = json.loads((log_dir(config) / "summary.json").read_text())
    assert summary["recompute_seconds"] > 0 and 0 < summary["recompute_hidden_ratio"] <= 1
    # The losses are those of a run that keeps everything, and of one whose blocks are computed again whole.
    expected = losses(config)
    for mode in ("none", "full"):
        other, _ = run(made, recompute={"mode": mode})
        assert losses(other) == expected


def test_a_run_goes_on_with_the_plan_that_it_saved(made):
    recompute = {"mode": "lynx", "budget": 512 * MIB, "drift": 1.0}
    options: dict[str, Any] = {"recompute": recompute, "checkpoint": {"every": 6}}
    config, output = run(made, **options)
    assert output.count("lynx: planned") == 1
    first = log_dir(config)
    path = first / "checkpoints" / "step-00000006"
    again = made(**RUN | options | {"checkpoint": {"every": 6, "resume": str(path)}})
    output = finish(start(again))
    assert "resumed from" in output and "lynx: planned" not in output
    assert planned(again)[0]["planned_step_seconds"] == planned(config)[-1]["planned_step_seconds"]
    whole = losses(config)
    assert losses(again) == {step: whole[step] for step in losses(again)} and max(losses(again)) == max(whole)
    # For another budget it is planned anew.
    recompute = recompute | {"budget": 511 * MIB}
    other = made(**RUN | options | {"recompute": recompute, "checkpoint": {"resume": str(first)}})
    assert "lynx: planned" in finish(start(other, "--set", "train.steps=14"))


def test_routing_that_moves_is_planned_for_again(made):
    log = {"debug": True, **RUN["log"]}
    _, output = run(made, recompute={"mode": "lynx", "drift": 1e-6, "measure_steps": 1}, log=log)
    assert "of the choices of experts have moved" in output and output.count("lynx: planned") > 1
