"""Rules of runs that begin with another's weights, learn in part, or learn from a teacher. Torch-free."""

from __future__ import annotations

from dataclasses import replace

from ..moe.config import dropless
from .config import TrainConfig
from .errors import UserError, Violation
from .layout_rules import LAYOUT_RULES


def something_learns(config: TrainConfig) -> list[Violation]:
    model, only = config.model, config.train.only
    layers = range(model.layers)
    if only == "router" and not any(map(model.is_moe, layers)):
        return [Violation(("train.only", "model.moe"), "router learns nothing in a model without experts; use all")]
    if only == "stub" and not any(map(model.is_dense, layers)):
        message = "stub learns nothing where no layer has a dense feed-forward network; use router, or model.moe.dense"
        return [Violation(("train.only", "model.moe"), message)]
    return []


def frozen_routers_stay(config: TrainConfig) -> list[Violation]:
    """The selection bias is a part of the router, which no gradient moves."""
    only, step = config.train.only, config.router.bias_update
    if only in ("all", "router") or step == 0 or config.model.moe is None:
        return []
    message = f"{step} would move routers, which train.only: {only} leaves as they are; use 0"
    return [Violation(("router.bias_update", "train.only"), message)]


def whole_models_are_piped(config: TrainConfig) -> list[Violation]:
    """Stages pass gradients on, and one model's hidden states."""
    train, degree = config.train, config.parallel.pipeline
    found = []
    if degree > 1 and train.only != "all":
        message = f"{degree} stages pass gradients on, which train.only: {train.only} stops on the way; use 1"
        found.append(Violation(("parallel.pipeline", "train.only"), message))
    if degree > 1 and train.distill is not None:
        message = f"{degree} stages pass on one model's hidden states, and train.distill has two; use 1"
        found.append(Violation(("parallel.pipeline", "train.distill"), message))
    return found


def plans_are_of_whole_steps(config: TrainConfig) -> list[Violation]:
    train = config.train
    if config.recompute.mode != "lynx" or (train.only == "all" and train.distill is None):
        return []
    other = "train.distill" if train.distill is not None else "train.only"
    message = f"lynx plans the whole backward of one model, and with {other} a step is another; use selective, or none"
    return [Violation(("recompute.mode", other), message)]


def one_beginning(config: TrainConfig) -> list[Violation]:
    resume = config.checkpoint.resume
    if config.train.start is None or resume in ("auto", "never"):
        return []
    message = f"{resume!r} is another beginning than train.start: {config.train.start}; use auto"
    return [Violation(("checkpoint.resume", "train.start"), message)]


def start_exists(config: TrainConfig) -> list[Violation]:
    """Where a run begins; one that goes on needs it no more."""
    from .run_folder import RunFolder  # which reads configurations, and so imports these rules

    start = config.train.start
    if start is None or RunFolder(config.log.dir).has_checkpoints():
        return []
    return _unreadable("train.start", start)


def teacher_fits(config: TrainConfig) -> list[Violation]:
    """The teacher is a run, which the ranks can hold as they hold the model."""
    from .run_folder import RunFolder

    if config.train.distill is None:
        return []
    path, run = "train.distill.teacher", config.train.distill.teacher
    if found := _unreadable(path, run):
        return found
    teacher = RunFolder(run).load_config()
    model, router = dropless(teacher.model, teacher.router)
    in_its_place = replace(config, model=model, router=router)
    broken = [violation for rule in LAYOUT_RULES for violation in rule(in_its_place)]
    return [Violation((path, *violation.paths), f"{run} does not fit these ranks: {violation}") for violation in broken]


def _unreadable(path: str, run: str) -> list[Violation]:
    from .run_folder import RunFolder

    try:
        RunFolder(run).load_config()
    except UserError as error:
        return [Violation((path,), str(error))]
    return []


RECOVERY_RULES = (
    something_learns,
    frozen_routers_stay,
    whole_models_are_piped,
    plans_are_of_whole_steps,
    one_beginning,
)
RECOVERY_FILE_RULES = (start_exists, teacher_fits)
