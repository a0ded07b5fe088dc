"""Cells of the `rectify-quality` benchmark: one small model trained and evaluated, each in a process of its own.

A finished cell is a file, so a benchmark that was interrupted goes on where it was.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ...launch.config import (
    DataConfig,
    LogConfig,
    LoopConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from ...launch.data import eval_windows
from ...launch.run_folder import write_atomically
from ...launch.settings import as_mapping
from ...launch.shards import TokenShards
from ...moe.config import EmulateConfig, ModelConfig, RouterConfig
from ...moe.decoder import Decoder, build_decoder
from ...moe.ledger import SLOTS
from ...moe.upcycle import upcycle_, upcycled_config
from ...parallel.mesh import single
from .kept_cells import kept, make_stepper, use_one_thread
from .rectify_methods import METHODS, Method, check_first_step, rectify_of

RANKS = 4
"""Emulated ranks, each with a quarter of the tokens and of the experts."""
BATCH, SEQ_LEN, VOCABULARY = 16, 128, 1024
EXPERTS = 8
DENSE = ModelConfig(vocab_size=VOCABULARY, d_model=128, layers=4, heads=4, d_ff=256, moe=None)
STEPS = {"dense": 500, "upcycled": 120, "scratch": 160}
LEARNING_RATE = {"dense": 2e-3, "upcycled": 1e-3, "scratch": 2e-3}
EVALUATE_EVERY = 20
CURVE_WINDOWS = 64
"""Held-out windows of the points along the way, spread over all; the last evaluation takes all."""


@dataclass(frozen=True)
class Cell:
    """One run. `dense` is where the upcycled runs of its seed start."""

    setting: Literal["dense", "upcycled", "scratch"]
    seed: int
    top_k: int = 1
    method: Method = "dropless"
    factor: float | None = None
    """Capacity factor; None: dropless."""

    @property
    def name(self) -> str:
        if self.setting == "dense":
            return f"dense-seed{self.seed}"
        limit = "dropless" if self.factor is None else f"{self.method}-f{self.factor:g}"
        return f"{self.setting}-top{self.top_k}-{limit}-seed{self.seed}"

    @property
    def router(self) -> RouterConfig:
        return RouterConfig(
            top_k=self.top_k,
            capacity_factor=self.factor,
            rectify=rectify_of(self.method),
            emulate=EmulateConfig(sources=RANKS, owners=RANKS),
        )

    @property
    def config(self) -> TrainConfig:
        """The run as the trainer would be told. The rate is constant: every step may be the last one."""
        dense = self.setting == "dense"
        return TrainConfig(
            model=DENSE if dense else upcycled_config(DENSE, EXPERTS, every=2),
            router=self.router,
            optimizer=OptimizerConfig(lr=LEARNING_RATE[self.setting]),
            schedule=ScheduleConfig(kind="constant", warmup_steps=20),
            data=DataConfig(tokenizer=f"bpe:{VOCABULARY}", seq_len=SEQ_LEN),
            train=LoopConfig(steps=STEPS[self.setting], batch=BATCH, seed=self.seed),
            log=LogConfig(dir="unused"),
        )


def recipe(cell: Cell) -> dict[str, Any]:
    """All that decides what `cell` comes to, as JSON holds it."""
    made_of: dict[str, Any] = {
        "config": as_mapping(cell.config),
        "evaluate_every": EVALUATE_EVERY,
        "curve_windows": CURVE_WINDOWS,
        "torch": torch.__version__,
    }
    if cell.setting == "upcycled":
        made_of["from"] = recipe(Cell("dense", cell.seed))
    return json.loads(json.dumps(made_of))


def finished(cell: Cell, folder: Path) -> dict[str, Any] | None:
    """What `cell` came to, if it was run with its recipe; otherwise it is to be run again."""
    return kept(folder / f"{cell.name}.json", recipe(cell))


def run_cell(cell: Cell, folder: Path, corpus: Path) -> None:
    """Trains and evaluates `cell` on one thread and writes what came of it to `folder`, in one step."""
    use_one_thread()
    mesh, config = single(), cell.config
    model = build_decoder(config.model, config.router, mesh, seed=cell.seed)
    if cell.setting == "upcycled":
        upcycle_(model, load_file(weights_of(cell.seed, folder)), seed=cell.seed)
    result = train(model, config, corpus)
    if cell.setting == "dense":
        save_file({name: p.detach() for name, p in model.named_parameters()}, weights_of(cell.seed, folder))
    write_atomically(folder / f"{cell.name}.json", json.dumps({"cell": asdict(cell), "recipe": recipe(cell), **result}))


def weights_of(seed: int, folder: Path) -> Path:
    """Where the dense model of `seed` is kept."""
    return folder / f"dense-seed{seed}.safetensors"


def train(model: Decoder, config: TrainConfig, corpus: Path) -> dict[str, Any]:
    """Trains `model`; its curve, its last evaluation, and what its slots were used for."""
    held_out = eval_windows(TokenShards.open(corpus, "val"), SEQ_LEN)
    stride = len(held_out[0]) // CURVE_WINDOWS
    stepper = make_stepper(model, config, corpus)
    curve: list[dict[str, float]] = []
    rows, slots = 0, [0] * len(SLOTS)
    for step in range(config.train.steps + 1):
        if step % EVALUATE_EVERY == 0:
            loss, accuracy = evaluate(model, *(part[::stride][:CURVE_WINDOWS] for part in held_out))
            curve.append({"step": step, "expert_rows": rows, "loss": loss, "accuracy": accuracy})
        if step == config.train.steps:
            break
        result = stepper.step(step, step * BATCH, stop=False)
        if not result.applied:
            raise RuntimeError(f"step {step} was not finite")
        counted = dict(zip(SLOTS, result.counts[:, -len(SLOTS) :].sum(0).tolist(), strict=True))
        # What a static implementation computes: every slot, and the rows beside them.
        rows += sum(counted.get(name, 0) for name in ("kept", "filled", "padding", "local_rows"))
        slots = [total + counted[name] for total, name in zip(slots, SLOTS, strict=True)]
    loss, accuracy = evaluate(model, *held_out)
    return {
        "loss": loss,
        "accuracy": accuracy,
        "expert_rows": rows,
        "slots": dict(zip(SLOTS, slots, strict=True)),
        "curve": curve,
    }


def check(cell: Cell, corpus: Path) -> None:
    """Raises where the first step of `cell`, from scratch, is not what the reference kernels make of it.

    Its routings are held against the identities of the ledger: AssertionError; its loss and gradient norm against the
    reference's: DisagreementError.
    """
    config = replace(cell.config, log=LogConfig(dir="unused", debug=True))
    fast, plain = (
        make_stepper(build_decoder(config.model, config.router, single(), seed=cell.seed, backend=b), config, corpus)
        for b in ("auto", "reference")
    )
    found, expected = (stepper.step(0, 0, stop=False) for stepper in (fast, plain))
    check_first_step(cell.name, (found.loss, found.grad_norm), (expected.loss, expected.grad_norm))


@torch.no_grad()
def evaluate(model: Decoder, inputs: np.ndarray, targets: np.ndarray) -> tuple[float, float]:
    """Mean loss in nats and part of tokens guessed right, over whole batches of held-out windows."""
    model.eval()
    nats, right, count = 0.0, 0, 0
    for start in range(0, len(inputs) // BATCH * BATCH, BATCH):
        tokens, wanted = (torch.from_numpy(part[start : start + BATCH]) for part in (inputs, targets))
        logits = model.logits(model(tokens).hidden_BSD).flatten(0, 1)
        wanted = wanted.reshape(-1)
        nats += torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").item()
        right += int((logits.argmax(-1) == wanted).sum())
        count += int((wanted >= 0).sum())
    model.train()
    return nats / count, right / count


def grid(quick: bool, settings: tuple[Literal["upcycled", "scratch"], ...] = ("upcycled", "scratch")) -> list[Cell]:
    """All cells, the most telling first: top-1 at the lowest capacity. `quick` stops there, upcycled only."""
    seeds = range(3)
    cells = [Cell("dense", seed) for seed in seeds]
    for top_k in (1,) if quick else (1, 2):
        for factor in (0.5,) if quick else (0.5, 1.0, 1.5):
            for setting in ("upcycled",) if quick else settings:
                limited: list[tuple[Method, float | None]] = [(m, factor) for m in METHODS if m != "dropless"]
                unlimited: list[tuple[Method, float | None]] = [("dropless", None)] if factor == 0.5 else []
                cells += [Cell(setting, seed, top_k, m, f) for seed in seeds for m, f in limited + unlimited]
    return cells
