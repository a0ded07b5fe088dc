"""A training run on one rank, from its configuration to its summary."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from ..kernels.backend import implementation
from ..moe.accounts import merge
from ..moe.ledger import SLOTS, Ledger
from ..moe.load import Loads
from ..parallel.collectives import gather_to_root, tune_pieces
from ..parallel.mesh import Mesh
from .config import TrainConfig
from .console import RunConsole
from .engines.engine import Ground, make_engine
from .errors import Violation, all_together
from .evaluate import Evaluation
from .layout_rules import world_rules
from .metrics import MetricsWriter
from .optimizer_state import by_parameter, in_all, measure
from .rules import vocabulary_rule
from .run_folder import RunFolder
from .settings import as_mapping
from .shards import TokenShards, read_meta
from .signals import StopRequest
from .step import StepResult
from .straggler import straggler
from .summary import Summary, finish
from .tokenizer import load_tokenizer
from .watchdog import Watchdog

T = TypeVar("T")


class TrainingFailedError(RuntimeError):
    """The run cannot go on, and not because of its input."""


@dataclass
class Progress:
    """Where a run is; all of it goes into every checkpoint."""

    step: int = 0
    """Completed steps."""
    samples: int = 0
    """Sequences consumed over all ranks: the position in the data."""
    skipped: int = 0
    """Steps that were skipped for a non-finite loss or gradient."""
    seconds: float = 0.0
    """Time spent training, over all sessions of this run."""
    start_val_loss: float | None = None
    """Held-out loss before the first step, where the run began with the weights of another."""
    teacher_val_loss: float | None = None
    """Held-out loss of the teacher, where there is one."""


class Trainer:
    """Owns the parts of a run and moves them through it."""

    def __init__(
        self, config: TrainConfig, mesh: Mesh, data: Path, *, console: RunConsole, ledger: Ledger, watchdog: Watchdog
    ) -> None:
        """Builds everything on this rank; `data` is the prepared corpus. All ranks call it together."""
        self.shards, self.held_out = TokenShards.open(data, "train"), TokenShards.open(data, "val")
        self.config = config = complete(config, mesh, self.shards.vocab_size)
        self.mesh, self.console, self.ledger, self.watchdog = mesh, console, ledger, watchdog
        self.folder = RunFolder(config.log.dir)
        self.corpus_meta = read_meta(data)
        first = mesh.pipeline.rank * mesh.stage.size
        self.watchdog.stage = range(first, first + mesh.stage.size)
        self.tokenizer = load_tokenizer(data)
        if config.train.deterministic:
            # The switch of `use_deterministic_algorithms`, without its import of the compiler (1.5 s a rank).
            torch.set_deterministic_debug_mode("warn" if mesh.device.type == "cuda" else "error")
            # Poisoning fresh memory is for tests; it would cost a pass over every new tensor.
            torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
        pieces = config.parallel.piece_bytes
        self.piece_bytes = tune_pieces(mesh) if pieces == "auto" else pieces
        self.engine = make_engine(
            Ground(
                config=config,
                mesh=mesh,
                folder=self.folder,
                train=self.shards,
                held_out=self.held_out,
                tokenizer=self.tokenizer,
                ledger=ledger,
                watchdog=watchdog,
                piece_bytes=self.piece_bytes,
                say=console.say,
            )
        )
        self.progress = Progress()
        self.saved_at: int | None = None
        self.evaluated: dict[int, Evaluation] = {}
        self.slow_ranks: set[int] = set()
        self._resume()

    def run(self) -> Summary | None:
        """Trains to the last step; None where SIGTERM ended the run early (a checkpoint is saved)."""
        config, progress = self.config, self.progress
        # Not before: until here there is nothing to save, and what waits in torch for a dead rank would never hear it.
        stop = StopRequest()
        speaks = self.mesh.world.rank == 0
        if speaks:
            self.folder.prepare(config, self.tokenizer_files())
            if progress.step < config.train.steps:
                # It says that the run has ended: one that goes on and is stopped has to be known as stopped.
                self.folder.summary.unlink(missing_ok=True)
        metrics = MetricsWriter(self.folder.path, config.log.tensorboard) if speaks else None
        if metrics is not None:
            if metrics.note:
                self.console.say(metrics.note)
            metrics.write(event="start", step=progress.step, world=self.mesh.world.size, piece_bytes=self.piece_bytes)
        self._evaluate_sources(metrics)
        in_a_row = 0
        mark, mark_step = time.perf_counter(), progress.step
        self.ledger.clear()
        experts = [*config.model.expert_counts.values()]
        loads = Loads(experts)
        with self.console.following("train", config.train.steps, progress.step) as line, self._profiling() as tick:
            while progress.step < config.train.steps:
                self.watchdog.at(progress.step, "training")
                result = self.engine.step(progress.step, progress.samples, stop.requested)
                progress.step += 1
                progress.samples += config.train.batch
                in_a_row = 0 if result.applied else in_a_row + 1
                progress.skipped += not result.applied
                self.ledger.add(result.local_counts)
                loads.add(result.counts[:, : -len(SLOTS)])
                tick()
                if self._is_logged(result):
                    now = time.perf_counter()
                    step_s = (now - mark) / (progress.step - mark_step)
                    progress.seconds += now - mark
                    mark, mark_step = now, progress.step
                    numbers = self._measure(result, step_s, loads)
                    self.engine.look()
                    loads = Loads(experts)
                    if metrics is not None:
                        metrics.write(**numbers)
                        seconds_left = step_s * (config.train.steps - progress.step)
                        line.show(progress.step, console_numbers(numbers), seconds_left)
                else:
                    line.advance(progress.step)
                if in_a_row >= config.train.nonfinite_limit:
                    raise TrainingFailedError(self._why_stopped(in_a_row))
                if result.stop_requested:
                    self.save()
                    self.engine.wait()
                    self.console.say(f"stopped by request at step {progress.step}; the same command goes on from here")
                    self._close(metrics)
                    return None
                paused = time.perf_counter()
                if config.train.eval_every and progress.step % config.train.eval_every == 0:
                    self._evaluate(metrics)
                if config.checkpoint.every and progress.step % config.checkpoint.every == 0:
                    self.save()
                mark += time.perf_counter() - paused  # speed is the speed of training
        return self._end(metrics)

    def _end(self, metrics: MetricsWriter | None) -> Summary:
        evaluation = self.evaluated.get(self.progress.step) or self._evaluate(metrics)
        if self.saved_at != self.progress.step:
            self.save()
        self.watchdog.at(self.progress.step, "saving")
        self.engine.wait()
        sample = self._sample()
        self._close(metrics)
        return finish(
            self.mesh,
            self.folder,
            self.corpus_meta,
            asdict(self.progress),
            evaluation,
            sample,
            self.engine.num_parameters(),
            self.config.train.batch * self.config.data.seq_len,
            by_parameter(self.engine.optimizer),
        )

    def save(self) -> None:
        """Saves a checkpoint of everything that decides how the run goes on."""
        self.watchdog.at(self.progress.step, "saving")
        meta = {"progress": asdict(self.progress), "config": as_mapping(self.config)}
        # Saving is not training: the ledger of a run that was cut elsewhere is the same.
        with self.ledger.paused():
            self.engine.save(self.progress.step, meta)
        self.saved_at = self.progress.step

    def tokenizer_files(self) -> list[Path]:
        """Files that `load_tokenizer` needs."""
        return sorted(self.shards.folder.glob("tokenizer*.json"))

    def _resume(self) -> None:
        restored = self.engine.restore()
        if restored is None:
            return
        if restored.meta is None:
            self.console.say(f"starting from the weights of {restored.path}")
            return
        self.progress = Progress(**restored.meta["progress"])
        self.saved_at = self.progress.step if restored.is_own else None
        self.console.say(f"resumed from {restored.path} at step {self.progress.step}")

    def _evaluate_sources(self, metrics: MetricsWriter | None) -> None:
        """Before the first step: what the run starts from, and its teacher, make of the held-out text."""
        progress = self.progress
        if self.config.train.start is not None and progress.start_val_loss is None:
            progress.start_val_loss = self._evaluate(metrics).loss
        if self.config.train.distill is not None and progress.teacher_val_loss is None:
            teacher = self._judged(self.engine.evaluate_teacher)
            assert teacher is not None
            progress.teacher_val_loss = teacher.loss
            self.console.say(f"the teacher: {teacher.bits_per_byte:.4f} bits per byte on held-out text")

    def _evaluate(self, metrics: MetricsWriter | None) -> Evaluation:
        result = self._judged(self.engine.evaluate)
        self.evaluated = {self.progress.step: result}
        if metrics is not None:
            metrics.write(
                step=self.progress.step,
                val_loss=result.loss,
                val_bits_per_byte=result.bits_per_byte,
                order5_bits_per_byte=self.corpus_meta["ngram_bits_per_byte"]["5"],
            )
        self.console.say(
            f"evaluated at step {self.progress.step}: {result.bits_per_byte:.4f} bits per byte on held-out text"
        )
        return result

    def _judged(self, evaluate: Callable[[Callable[[int, int], None]], T]) -> T:
        """What `evaluate` makes of the held-out text; all ranks take part."""
        self.watchdog.at(self.progress.step, "evaluating")
        following = self.console.following("evaluate", 1) if not self.console.busy else self.console.nothing()
        with following as line, self.ledger.paused():
            return evaluate(line.portion)

    def _sample(self) -> str:
        """A text from the model; all ranks take part."""
        count = self.config.train.sample_tokens
        if count == 0:
            return ""
        self.watchdog.at(self.progress.step, "sampling")
        tokens = self.engine.generate([self.tokenizer.end_token], count)
        return self.tokenizer.decode(tokens)

    def _is_logged(self, result: StepResult) -> bool:
        """Whether a line of metrics ends here: also where a checkpoint is saved, so that no line spans two sessions."""
        config, step = self.config, self.progress.step
        saved = config.checkpoint.every and step % config.checkpoint.every == 0
        last = step == config.train.steps or result.stop_requested
        return bool(step % config.log.every == 0 or saved or last or not result.applied)

    def _measure(self, result: StepResult, step_s: float, loads: Loads) -> dict[str, object]:
        """One line of metrics.jsonl; `loads` are those of all steps since the last line."""
        config, mesh = self.config, self.mesh
        told = self.ledger.page(), measure(self.engine.optimizer), self.engine.recomputed_seconds()
        planned = self.engine.planned()
        gathered = gather_to_root(told, mesh.world, "ledger", mesh.recorder)
        # Only now: the account of the steps does not hold its own gathering.
        self.ledger.clear()
        tokens = config.train.batch * config.data.seq_len
        numbers: dict[str, object] = {
            "step": self.progress.step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            **result.auxiliary,
            "tokens_per_second": tokens / step_s,
            "step_seconds": step_s,
            "skipped": self.progress.skipped,
        }
        if gathered is None:
            return numbers
        pages = [page for page, *_ in gathered]
        numbers |= merge(pages, loads.read(), tokens * pages[0].steps)
        numbers |= in_all([state for _, state, _ in gathered]).numbers()
        hidden, exposed = (sum(each) for each in zip(*(spent for *_, spent in gathered), strict=True))
        numbers |= {"recompute_hidden_seconds": hidden, "recompute_exposed_seconds": exposed, **planned}
        slow = straggler([page.waited_s for page in pages], pages[0].steps * step_s, pages[0].steps)
        if slow is not None:
            numbers["slow_rank"] = slow.rank
            if slow.rank not in self.slow_ranks:
                self.slow_ranks.add(slow.rank)
                self.console.say(slow.describe())
        return numbers

    def _why_stopped(self, in_a_row: int) -> str:
        last = f"the last checkpoint is of step {self.saved_at}" if self.saved_at else "there is no checkpoint yet"
        return (
            f"{in_a_row} steps in a row had a loss or gradient that is not finite (step {self.progress.step}); {last}; "
            "try a lower optimizer.lr, a longer schedule.warmup_steps, or train.precision: fp32"
        )

    def _close(self, metrics: MetricsWriter | None) -> None:
        self.engine.close()
        if metrics is not None:
            metrics.close()

    @contextmanager
    def _profiling(self) -> Iterator:
        """Traces the steps that log.profile names; yields what to call after every step."""
        span = self.config.log.profile
        if not span:
            yield lambda: None
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.mesh.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        first, last = (max(0, step - 1 - self.progress.step) for step in span)
        schedule = torch.profiler.schedule(wait=first, warmup=0, active=last - first + 1, repeat=1)
        self.folder.profile.mkdir(parents=True, exist_ok=True)
        trace = self.folder.profile / f"rank{self.mesh.world.rank}.json"
        with torch.profiler.profile(
            activities=activities, schedule=schedule, on_trace_ready=lambda p: p.export_chrome_trace(str(trace))
        ) as profiler:
            yield profiler.step


def complete(config: TrainConfig, mesh: Mesh, vocab_size: int) -> TrainConfig:
    """`config` with what only the data and the world tell; UserError where they contradict it."""
    violations = [*world_rules(config, mesh.world.size), *vocabulary_rule(config, vocab_size)]
    try:
        implementation(config.kernels, mesh.device)
    except ValueError as error:
        violations.append(Violation(("kernels",), str(error).removeprefix("kernels: ")))
    if violations:
        raise all_together("config", violations)
    if config.model.vocab_size:
        return config
    return replace(config, model=replace(config.model, vocab_size=vocab_size))


def console_numbers(numbers: dict[str, object]) -> dict[str, str]:
    """What the live line shows of a line of metrics."""

    def get(name: str) -> float:
        value = numbers[name]
        assert isinstance(value, int | float)
        return float(value)

    shown = {"loss": f"{get('loss'):.3f}", "tokens/s": f"{get('tokens_per_second'):,.0f}"}
    if "expert_load_max_over_mean" in numbers:
        shown["busiest expert"] = f"{get('expert_load_max_over_mean'):.2f}x mean"
    if numbers["skipped"]:
        shown["skipped"] = str(numbers["skipped"])
    return shown
