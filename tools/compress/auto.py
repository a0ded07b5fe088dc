"""`wastenot compress auto`: all stages in a row, from a checkpoint to a smaller one with a report of what it cost.

Everything goes to one folder, and what is there already is not done again:

    profile/ plan.yaml steps.json applied/ recovered/ quantized/ exported/ verify.json quality.json report.html
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ...launch.compressed_run import apply_plan
from ...launch.console import RunConsole
from ...launch.errors import UserError
from ...launch.run_folder import RunFolder, write_atomically
from ...launch.streamed import open_streamed
from ...moe.compress.change import weight_change
from ...moe.compress.evaluate import Evaluator
from ...moe.compress.fingerprint import checkpoint_fingerprint, is_run
from ...moe.compress.plan import DropPlan, read_plan, write_plan
from ...moe.compress.profile import Profile, ProfileConfig, measure, profile
from . import recover
from .export import exported
from .page.folder import read_compression
from .page.page import FILE_NAME, write_page
from .plan import add_choice_arguments, check_counts, choose
from .quality import Row, balance, judged, kept, kept_units, row, speeds, unigram_accuracy
from .text_arguments import add_text_arguments, text_of
from .verify import examined

HELP = "profile, plan, apply, recover, export, verify and report, one after the other"
EXAMPLE = """
wastenot compress auto runs/deep --drop-layers 4
wastenot compress auto runs/deep --drop-blocks 3 --recover 200 --bits 4
wastenot compress auto models/Mixtral-8x7B-v0.1 --data c4.jsonl --keep-experts 6 --criterion reap
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `wastenot compress auto`."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a run, or a Hugging Face folder")
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="default: CHECKPOINT-smaller")
    add_choice_arguments(parser)
    add_text_arguments(parser, windows=64)
    parser.add_argument(
        "--recover", type=int, default=0, metavar="STEPS", help="of distillation, of a run (%(default)s)"
    )
    parser.add_argument(
        "--stability", action="store_true", help="also choose by a quarter and by half of the text, and compare"
    )
    parser.add_argument("--allow-zeroed", action="store_true", help="export what a family cannot leave out as zeros")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Does what is not done yet."""
    out = args.output or args.checkpoint.with_name(f"{args.checkpoint.name}-smaller")
    if args.recover and not is_run(args.checkpoint):
        raise UserError(
            f"--recover: only runs of ours are trained here; `wastenot convert from-hf {args.checkpoint} RUN` makes one"
        )
    work = _Work(args, out, RunConsole(speaks=True))
    _claim(out, args)
    work.decide()
    stages = work.make()
    work.judge(stages)
    write_page(read_compression(out, None), out / FILE_NAME)
    summary = work.summary()
    print(json.dumps(summary, indent=2) if args.json else _told(summary))
    if work.problems:
        raise UserError(f"{out / 'exported'}: is not to be served: {'; '.join(work.problems)}")
    return 0


class _Work:
    """The stages of one compression, and what they share."""

    def __init__(self, args: argparse.Namespace, out: Path, console: RunConsole) -> None:
        self.args, self.out, self.console = args, out, console
        self.notes: list[str] = []
        self.seconds: dict[str, float] = {}
        """Of the stages that were carried out now, by what they made."""
        self.problems: tuple[str, ...] = ()
        """Why the export must not be used."""
        self.model = open_streamed(args.checkpoint)
        check_counts(args, self.model.shape)
        self.calibration = text_of(args.checkpoint, args, "train")
        held_out = argparse.Namespace(**{**vars(args), "documents": False})
        if args.data == "self":
            # What a model wrote itself is no judge of it.
            held_out.data = None
        self.text = text_of(args.checkpoint, held_out, "val")
        # A search that saw what it is judged by would look better than it is.
        other = argparse.Namespace(**{**vars(args), "documents": False, "seed": args.seed + 1})
        self.scored = text_of(args.checkpoint, other, "train")

    def decide(self) -> None:
        """Profiles and plans."""
        config = ProfileConfig(window=max(1, self.args.drop_blocks) if self.args.consecutive else 4)
        config = replace(
            config, hessians=self.args.slim == "sparsegpt", window=min(config.window, self.model.shape.layers)
        )
        with self.console.following("profile", self.model.shape.layers) as line:
            self.profile: Profile = profile(
                self.model, self.calibration, self.out / "profile", config, progress=line.portion
            )
        path = self.out / "plan.yaml"
        if not path.is_file():
            plan, steps = choose(self.args, self.profile, self.model, self.scored, self.console)
            told = [
                {"hash": step.plan.hash, "cost": step.cost, "tried": step.tried, **asdict(step.quality)}
                for step in steps
            ]
            target = (self.args.target or "").partition("=")[0]
            write_atomically(self.out / "steps.json", json.dumps({"target": target, "steps": told}, indent=2) + "\n")
            write_plan(plan, path)
        self.plan: DropPlan = read_plan(path)

    def stability(self) -> list[dict[str, Any]]:
        """How much of what is kept would be, chosen by less text: Jaccard index, by the tokens of it."""
        if not self.args.stability or self.args.target is not None:
            return []
        found = []
        for part in (4, 2):
            windows = max(1, len(self.calibration.tokens_NS) // part)
            text = self.calibration.first(windows)
            with self.console.following(f"profile 1/{part}", 1):
                seen = measure(self.model, text, self.profile.config)
            plan, _ = choose(self.args, seen, self.model, self.scored, self.console)
            mine, other = kept_units(self.plan), kept_units(plan)
            found.append({"tokens": text.num_tokens, "jaccard": len(mine & other) / len(mine | other)})
        return found

    def make(self) -> dict[str, Path]:
        """Applies, recovers, quantizes, exports and verifies; the checkpoints made, by name."""
        stages = {"whole": self.args.checkpoint}
        # Few bits come last: a model learns in many, and a run is exported in many.
        last = self.plan.quantize if is_run(self.args.checkpoint) else None
        structure = replace(self.plan, quantize=None) if last else self.plan
        nothing = DropPlan(base=self.plan.base, shape=self.plan.shape)
        if replace(structure, profile="", criteria={}, semantics="reroute") != nothing:
            stages["applied"] = self._applied("applied", self.args.checkpoint, structure)
        if self.args.recover:
            stages["recovered"] = self._recovered(list(stages.values())[-1])
        if len(stages) > 1:
            self._exported(list(stages.values())[-1])
        if last:
            newest = list(stages.values())[-1]
            few = DropPlan(base=checkpoint_fingerprint(newest), shape=open_streamed(newest).shape, quantize=last)
            stages["quantized"] = self._applied("quantized", newest, few)
            self.notes.append("Export: what is in exported/ has all its bits; runs in few bits are not exported.")
        return stages

    def judge(self, stages: dict[str, Path]) -> None:
        """Writes quality.json."""
        with self.console.following("judge", len(stages) + 2) as line:
            judge = Evaluator(self.model, self.text)
            line.advance(1)
            fast = speeds(stages) if is_run(self.args.checkpoint) else {}
            if not fast:
                self.notes.append("Speed: a Hugging Face model is as fast as what serves it; nothing served it here.")
            rows: list[Row] = []
            for done, (name, path) in enumerate(stages.items()):
                quality = judge.whole if name == "whole" else judged(path, judge)
                rows.append(row(name, path, quality, fast.get(name)) | {"seconds": self.seconds.get(name)})
                line.advance(done + 2)
            ranks = max(2, self.args.ranks)
            after = measure(self.model, self.calibration, self.profile.config, plan=self.plan)
            line.advance(len(stages) + 2)
        self.quality: dict[str, Any] = {
            "checkpoint": str(self.args.checkpoint),
            "text": self.text.name,
            "unigram_accuracy": unigram_accuracy(self.calibration.tokens_NS[self.calibration.mask_NS], self.text),
            "rows": rows,
            "ranks": ranks,
            "balance": balance(self.plan, self.profile, after, ranks),
            "stability": self.stability(),
            "not_measured": self.notes,
        }
        write_atomically(self.out / "quality.json", json.dumps(self.quality, indent=2) + "\n")

    def summary(self) -> dict[str, Any]:
        """For people and machines: what was made, and how good it is."""
        whole, *others = self.quality["rows"]
        unigram = self.quality["unigram_accuracy"]
        return {
            "folder": str(self.out),
            "plan": self.plan.hash,
            "stages": [
                {**each, "kept": kept(each["accuracy"], whole["accuracy"], unigram)} for each in (whole, *others)
            ],
            "notes": self.notes,
            "report": str(self.out / FILE_NAME),
        }

    def _applied(self, name: str, source: Path, plan: DropPlan) -> Path:
        target, start = self.out / name, time.perf_counter()
        if not target.exists():
            with self.console.following("apply", 1) as line:
                change = weight_change(plan, self.profile if plan.profile == self.profile.fingerprint else None)
                apply_plan(source, target, plan, transform=change, progress=line.portion)
            self.seconds[name] = time.perf_counter() - start
        return target

    def _recovered(self, source: Path) -> Path:
        target, start = self.out / "recovered", time.perf_counter()
        if not (RunFolder(target).summary).is_file():
            words = [
                str(source),
                str(target),
                "--teacher",
                str(self.args.checkpoint),
                "--steps",
                str(self.args.recover),
            ]
            parser = argparse.ArgumentParser()
            recover.add_arguments(parser)
            if code := recover.run(parser.parse_args(words)):
                raise SystemExit(code)
            self.seconds["recovered"] = time.perf_counter() - start
        return target

    def _exported(self, source: Path) -> None:
        target = self.out / "exported"
        try:
            if not target.exists():
                exported(source, target, allow_zeroed=self.args.allow_zeroed)
            found = examined(target, source)
        except ValueError as error:
            self.notes.append(f"Export: {error}")
            self.console.say(f"export: {error}")
            return
        self.problems = found.problems
        told = {"passed": not found.problems, "max_difference": found.difference, **asdict(found)}
        write_atomically(self.out / "verify.json", json.dumps(told, indent=2) + "\n")


def _claim(out: Path, args: argparse.Namespace) -> None:
    """Makes `out` the folder of what `args` ask for. Raises UserError where it holds anything else."""
    ignored = ("json", "run_dir", "words", "stage", "output")
    asked = {name: str(value) for name, value in sorted(vars(args).items()) if name not in ignored}
    path = out / "auto.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        differs = [name for name in asked if found.get(name) != asked[name]]
        if not (out / "plan.yaml").is_file():
            # Nothing rests on it yet but a profile, which knows what it is of.
            write_atomically(path, json.dumps(asked, indent=2) + "\n")
        elif differs:
            was, now = (_option(differs[0], each.get(differs[0])) for each in (found, asked))
            raise UserError(f"{out}: holds a compression {was}, and this is one {now}; name another folder with -o")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is no compression; name another folder with -o")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(asked, indent=2) + "\n")


def _option(name: str, value: str | None) -> str:
    option = f"--{name.replace('_', '-')}"
    return f"without {option}" if value in (None, "None", "False") else f"with {option} {value}"


def _told(summary: dict[str, Any]) -> str:
    whole = summary["stages"][0]
    lines = [f"{summary['folder']}: plan {summary['plan']}"]
    for each in summary["stages"]:
        speed = each["decode_tokens_per_second"]
        ratio = f", decodes {speed / whole['decode_tokens_per_second']:.2f} times as fast" if speed else ""
        quality = f", {each['kept']:.1%} of the quality" if each["kept"] is not None else ""
        lines.append(
            f"  {each['name']:<10} {each['parameters']:>14,} parameters {each['bytes']:>16,} bytes, loss "
            f"{each['loss']:.4f}{quality}{ratio}"
        )
    return "\n".join([*lines, *(f"  {note}" for note in summary["notes"]), f"  {summary['report']}"])
