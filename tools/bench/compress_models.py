"""The models of `bench compress`: the one that it shrinks, trained by a committed recipe, and what is made of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from ...launch.compressed_run import apply_plan
from ...launch.errors import UserError
from ...launch.local import run_ranks
from ...launch.run_folder import RunFolder
from ...moe.compress.change import weight_change
from ...moe.compress.fingerprint import checkpoint_fingerprint
from ...moe.compress.plan import DropPlan, Quantize
from ...moe.compress.profile import Profile
from ...moe.compress.streamed import StreamedModel

RECIPE = "compression"
"""The configuration that trains the model."""
QUICK = ("model.layers=8", "train.steps=240", "schedule.warmup_steps=40", "train.eval_every=0")

FOLDER = Path("runs/bench-compress")
"""Where what is made of it stays, below the current folder."""


def trained(quick: bool, say: Callable[[str], None]) -> Path:
    """The run of the recipe, trained now where it is not there. Raises UserError where training fails."""
    run = Path("runs") / (f"{RECIPE}-quick" if quick else RECIPE)
    settings = [*(QUICK if quick else ()), f"log.dir={run}"]
    if not RunFolder(run).summary.is_file():
        say(f"training {run} by configs/{RECIPE}.yaml")
        if run_ranks([RECIPE, *(f"--set={each}" for each in settings)], 1):
            raise UserError(f"{run}: training failed; what it said stands above")
    loss = json.loads(RunFolder(run).summary.read_text(encoding="utf-8"))["val_loss"]
    say(f"{run}: held-out loss {loss:.4f}")
    return run


def made(source: Path, name: str, plan: DropPlan, profile: Profile | None) -> Path:
    """What `plan` makes of the run `source`, under `name`; made anew where it is of another plan."""
    target = FOLDER / name
    mark = target.with_name(f"{name}.plan")
    if not (mark.is_file() and mark.read_text() == plan.hash and target.is_dir()):
        shutil.rmtree(target, ignore_errors=True)
        own = profile if profile is not None and plan.profile == profile.fingerprint else None
        apply_plan(source, target, plan, transform=weight_change(plan, own))
        mark.write_text(plan.hash)
    return target


def recovered(source: Path, teacher: Path, name: str, steps: int, settings: Sequence[str]) -> Path:
    """The run `source` after `steps` of distillation from `teacher`, as `name`; made anew where `source` is another."""
    target = FOLDER / name
    mark, base = target.with_name(f"{name}.source"), f"{checkpoint_fingerprint(source)} {steps} {list(settings)}"
    if not (mark.is_file() and mark.read_text() == base and RunFolder(target).summary.is_file()):
        shutil.rmtree(target, ignore_errors=True)
        mark.unlink(missing_ok=True)
        words = ["compress", "recover", str(source), str(target), "--teacher", str(teacher), "--steps", str(steps)]
        words += [f"--set={each}" for each in settings]
        if run_ranks(words, 1, module="wastenot.tools.cli"):
            raise UserError(f"{target}: recovery failed; what it said stands above")
        mark.write_text(base)
    return target


def few_bits(source: Path, name: str, model: StreamedModel, how: Quantize) -> Path:
    """The weights of the run `source`, which `model` reads, in few bits."""
    return made(source, name, DropPlan(base=model.fingerprint, shape=model.shape, quantize=how), None)
