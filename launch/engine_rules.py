"""Rules of runs that another engine than wastenot's own trains. Torch-free."""

from __future__ import annotations

from pathlib import Path

from .config import TrainConfig
from .engine_config import what_is_missing
from .engines.deepspeed_json import contradictions, generated, read
from .errors import UserError, Violation
from .layout_rules import STEPS_PARTS

_OWN_ONLY = {
    "parallel.tensor": (1, "cut by our tensor ranks"),
    "parallel.shard": (1, "sharded by FSDP2"),
    "train.only": ("all", "trained in part"),
    "train.keep_zeros": (False, "kept sparse"),
    "train.distill": (None, "taught by another run"),
    "model.moe.per_layer": ((), "made of unlike layers"),
}
"""What only the native engine can do, by path: the value that asks for nothing, and what is done otherwise."""


def others_do_what_they_can(config: TrainConfig) -> list[Violation]:
    if config.engine == "native":
        return []
    found = []
    for path, (nothing, done) in _OWN_ONLY.items():
        value = _at(config, path)
        if value not in (nothing, None):
            message = f"under {config.engine} no model is {done}; use {_shown(nothing)}, or engine: native"
            found.append(Violation((path, "engine"), message))
    return found


def others_recompute_little(config: TrainConfig) -> list[Violation]:
    """DeepSpeed runs our blocks, but knows of no windows; Megatron-Core runs its own."""
    mode = config.recompute.mode
    legal = {"native": ("none", "selective", "full", "lynx"), "deepspeed": ("none", "selective", "full")}
    if mode in legal.get(config.engine, ("none",)):
        return []
    nearest = "full" if config.engine == "deepspeed" else "none"
    message = f"{mode} is not there under {config.engine}; use {nearest}, or engine: native"
    return [Violation(("recompute.mode", "engine"), message)]


def deepspeed_has_no_stages(config: TrainConfig) -> list[Violation]:
    degree = config.parallel.pipeline
    if config.engine != "deepspeed" or degree == 1:
        return []
    message = f"{degree} stages need an engine with a pipeline for our model; use 1, or engine: native or megatron"
    return [Violation(("parallel.pipeline", "engine"), message)]


def megatron_has_words(config: TrainConfig) -> list[Violation]:
    """What Megatron-Core's model, pipeline and dispatcher cannot be told."""
    if config.engine != "megatron":
        return []
    moe, parallel = config.model.moe, config.parallel
    cannot: list[tuple[str, object, str]] = [
        ("model.qk_norm", "full", "norms go over one head there; use head or none"),
        ("train.precision", "fp64", "its norms and rotary embeddings are fp32; use fp32"),
    ]
    if moe is not None:
        if config.megatron.layer == "megatron":
            why = "its dispatcher sends the rows that there are; use ragged, megatron.layer: wastenot"
            cannot.append(("model.moe.dispatch", "padded", why))
            if parallel.piece_bytes not in ("auto", 0):
                why = "its dispatcher sends each exchange whole; use auto or 0, megatron.layer: wastenot"
                cannot.append(("parallel.piece_bytes", parallel.piece_bytes, why))
        if config.router.kind != "learned":
            cannot.append(("router.kind", config.router.kind, "it is for benchmarks of our own layers; use learned"))
    if parallel.pipeline > 1 and parallel.schedule != "1f1b":
        cannot.append(("parallel.schedule", parallel.schedule, "stages run one forward, one backward there; use 1f1b"))
    return [
        Violation((path, "engine"), f"{value} has no counterpart in Megatron-Core: {why}, or engine: native")
        for path, value, why in cannot
        if _at(config, path) == value
    ]


def deepspeed_shares_out_what_it_can(config: TrainConfig) -> list[Violation]:
    stage, found = config.deepspeed.zero, []
    if config.engine != "deepspeed":
        return []
    if stage == 3 and config.parallel.expert > 1:
        message = "3 is not there for experts over ranks (DeepSpeed refuses it); use 2, or parallel.expert: 1"
        found.append(Violation(("deepspeed.zero", "parallel.expert"), message))
    if stage and config.optimizer.name not in STEPS_PARTS:
        message = (
            f"{stage} gives {config.optimizer.name} parts of weights, which it cannot step; use 0, or optimizer.name: "
        )
        found.append(Violation(("deepspeed.zero", "optimizer.name"), message + " or ".join(STEPS_PARTS)))
    if config.train.precision == "fp64":
        found.append(Violation(("train.precision", "engine"), "DeepSpeed keeps no fp64; use fp32, or engine: native"))
    return found


def engine_is_installed(config: TrainConfig) -> list[Violation]:
    missing = what_is_missing(config.engine)
    return [Violation(("engine",), missing)] if missing else []


def devices_for_engine(config: TrainConfig) -> list[Violation]:
    """Asked where a run starts: a configuration is written, and a job sent, on machines that have none."""
    if config.engine != "megatron":
        return []
    import torch  # Which nothing else here needs.

    if torch.cuda.device_count():
        return []
    return [Violation(("engine",), "Megatron-Core computes on CUDA devices, and this machine has none; use native")]


def deepspeed_json_exists(config: TrainConfig) -> list[Violation]:
    path = config.deepspeed.json
    if config.engine != "deepspeed" or path is None or Path(path).is_file():
        return []
    return [Violation(("deepspeed.json",), f"{path!r} is no file; give a DeepSpeed JSON, or null")]


def deepspeed_json_agrees(config: TrainConfig) -> list[Violation]:
    path = config.deepspeed.json
    if config.engine != "deepspeed" or path is None or not Path(path).is_file():
        return []
    try:
        wrong = contradictions(read(path), generated(config, 1))
    except UserError as error:
        return [Violation(("deepspeed.json",), str(error).removeprefix("deepspeed.json: "))]
    return [Violation(("deepspeed.json",), f"{path}: {each}") for each in wrong]


ENGINE_RULES = (
    others_do_what_they_can,
    others_recompute_little,
    deepspeed_has_no_stages,
    deepspeed_shares_out_what_it_can,
    megatron_has_words,
)
ENGINE_FILE_RULES = (engine_is_installed, deepspeed_json_exists, deepspeed_json_agrees)


def _at(config: object, path: str) -> object:
    for name in path.split("."):
        config = getattr(config, name) if config is not None else None
    return config


def _shown(value: object) -> str:
    return {None: "null", False: "false", (): "[]"}.get(value, str(value))  # type: ignore[call-overload]
