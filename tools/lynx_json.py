"""An answer of the planner as one JSON object. docs/lynx.md documents its keys, and they stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from ..parallel.lynx.plain import to_plain
from ..parallel.lynx.question import Question
from .lynx_compare import Policy, ratio
from .lynx_figures import Figures


def as_json(question: Question, figures: Figures, policies: Sequence[Policy], origin: str) -> dict[str, Any]:
    """Plain values; what does not exist (a gap that nobody proved) is null."""
    return {
        "question": _question(question, origin),
        "step_seconds": figures.step_seconds,
        "tokens_per_second_per_device": figures.tokens_per_second_per_device,
        "mfu": figures.mfu,
        "waste": _keys(figures.waste),
        "exposed_communication_seconds": figures.exposed_communication_seconds,
        "exposed_recompute_seconds": figures.exposed_recompute_seconds,
        "hidden_recompute_seconds": figures.hidden_recompute_seconds,
        "memory": {
            "budget_bytes": question.bytes,
            "peak_bytes": figures.peak,
            "fullest_rank": figures.fullest,
            "ranks": [
                {"rank": rank, "peak_bytes": peak, "components": _keys(components)}
                for rank, (peak, components) in enumerate(zip(figures.peaks, figures.components, strict=True))
            ],
        },
        "routing": to_plain(figures.routing),
        "stages": to_plain(figures.stages),
        "policies": {policy.name: _policy(policy, policies) for policy in policies},
        "search_seconds": figures.search_seconds,
        "version": version("wastenot"),
    }


def _question(question: Question, origin: str) -> dict[str, Any]:
    layout = question.layout
    return {
        "model": question.shape.name,
        "devices": layout.devices,
        "cluster": question.cluster.name,
        "device_memory_bytes": int(question.cluster.device.memory),
        "budget_bytes": question.bytes,
        "layout": to_plain(layout),
        "layout_from": origin,
        "global_batch": layout.global_batch,
        "schedule": question.schedule,
        "solver": question.solver,
        "optimizer": to_plain(question.optimizer),
        "skew": question.skew.name,
        "replay": question.replay,
        "calibrated": question.calibration is not None,
    }


def _policy(policy: Policy, policies: Sequence[Policy]) -> dict[str, Any]:
    figures = policy.figures
    return {
        "fits": figures is not None,
        "needs_bytes": policy.needs_bytes,
        "step_seconds": figures and figures.step_seconds,
        "ratio_to_full": ratio(policy, policies),
        "peak_bytes": figures and figures.peak,
        "exposed_recompute_seconds": figures and figures.exposed_recompute_seconds,
        "hidden_recompute_seconds": figures and figures.hidden_recompute_seconds,
        "search_seconds": figures and figures.search_seconds,
    }


def _keys(named: Mapping[str, Any]) -> dict[str, Any]:
    """With names as JSON has them: `pipeline warm-up` is `pipeline_warm_up`."""
    return {name.replace(" ", "_").replace("-", "_"): value for name, value in named.items()}
