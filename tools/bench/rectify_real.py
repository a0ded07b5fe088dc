"""Real weights for `rectify-quality`: SmolLM2 upcycled to 8 experts on 8 emulated ranks.

Untrained, all experts are equal: with intra-GPU rectification the model is the dense one at every capacity factor,
without it is not. Then trained for a few steps, as far as a small machine allows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...launch.config import DataConfig, LogConfig, LoopConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from ...launch.corpus import prepare
from ...launch.data import Samples, eval_windows
from ...launch.optimizer import make_optimizer
from ...launch.shards import TokenShards
from ...launch.step import Stepper
from ...launch.tokenizer import FILE_NAME
from ...moe.adapters.huggingface import config_from_huggingface, load_huggingface
from ...moe.config import EmulateConfig, RectifyConfig, RouterConfig
from ...moe.decoder import Decoder, build_decoder, with_router
from ...moe.layer import MoELayer
from ...moe.upcycle import upcycle_, upcycled_config
from ...parallel.gradients import Gradients
from ...parallel.mesh import single
from .report import Goal, Row, at_least, at_most
from .smollm2 import SmolLM2, load_smollm2

EXPERTS = RANKS = 8
BATCH, SEQ_LEN = 8, 128
HELD_OUT_BATCHES = 4
STEPS = 12
LEARNING_RATE = 1e-5
FACTORS = (0.0, 0.5, 1.0, 1.5)
TRAINED_FACTOR = 0.5

METHODS = {
    "vanilla": RectifyConfig(),
    "IR": RectifyConfig(intra=True),
    "both": RectifyConfig(intra=True, fill=True),
}


def measure(folder: Path, say: Callable[[str], None]) -> tuple[list[Row], list[Goal]]:
    """Rows and goals; the prepared text stays in `folder`. Raises UserError where the weights are not installed."""
    smollm2 = load_smollm2()
    held_out, training = _text(smollm2, folder)
    dense, upcycled = _models(smollm2)
    dense_loss = loss_of(dense, held_out)
    del dense
    rows: list[Row] = [{"setting": "SmolLM2, dense", "loss": dense_loss}]
    for factor in FACTORS:
        for method, rectify in METHODS.items():
            if factor == 0 and not rectify.intra:
                continue  # no expert would see any token
            loss = loss_of(with_router(upcycled, _router(factor, rectify)), held_out)
            say(f"SmolLM2 untrained, f {factor:g}, {method}: loss {loss:.4f} (dense {dense_loss:.4f})")
            case = {"setting": "SmolLM2, untrained", "top_k": 1, "factor": factor, "method": method}
            rows.append({**case, "loss": loss, "above_dense": loss - dense_loss})
    apart = {m: [abs(r["above_dense"]) for r in rows if r.get("method") == m] for m in METHODS}
    exact, vanilla = max(apart["IR"] + apart["both"]), min(apart["vanilla"])
    goals = [
        at_most("SmolLM2, untrained: IR and both off the dense loss, at most, any f", exact, 1e-4),
        at_least("SmolLM2, untrained: vanilla off the dense loss, at least, any f", vanilla, 1e-2),
    ]
    initial = {name: tensor.clone() for name, tensor in upcycled.state_dict().items()}
    for method, rectify in METHODS.items():
        upcycled.load_state_dict(initial)
        model = with_router(upcycled, _router(TRAINED_FACTOR, rectify))
        _train(model, training)
        loss = loss_of(model, held_out)
        say(f"SmolLM2 after {STEPS} steps, f {TRAINED_FACTOR:g}, {method}: loss {loss:.4f}")
        case = {"setting": f"SmolLM2, {STEPS} steps", "top_k": 1, "factor": TRAINED_FACTOR, "method": method}
        rows.append({**case, "loss": loss, "above_dense": loss - dense_loss})
    return rows, goals


def _text(smollm2: SmolLM2, folder: Path) -> tuple[list[tuple[Tensor, Tensor]], TokenShards]:
    """Held-out batches, spread over the text, and the training split, in the model's own tokens."""
    tokenizer = folder / "smollm2-tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    smollm2.tokenizer.save(tokenizer)
    corpus = prepare(DataConfig(tokenizer=str(tokenizer / FILE_NAME), seq_len=SEQ_LEN), progress=False)
    inputs, targets = eval_windows(TokenShards.open(corpus, "val"), SEQ_LEN)
    count = HELD_OUT_BATCHES * BATCH
    spread = np.arange(count) * (len(inputs) // count)
    pairs = zip(
        torch.from_numpy(inputs[spread]).split(BATCH), torch.from_numpy(targets[spread]).split(BATCH), strict=True
    )
    return list(pairs), TokenShards.open(corpus, "train")


def _models(smollm2: SmolLM2) -> tuple[Decoder, Decoder]:
    """The dense model, and it upcycled in every second layer."""
    config, router, family = config_from_huggingface(smollm2.config)
    dense = build_decoder(config, router, single())
    load_huggingface(dense, smollm2.weights, family)
    upcycled = build_decoder(upcycled_config(config, EXPERTS, every=2), RouterConfig(top_k=1), single())
    upcycle_(upcycled, dense)
    return dense, upcycled


def _router(factor: float, rectify: RectifyConfig) -> RouterConfig:
    emulate = EmulateConfig(sources=RANKS, owners=RANKS)
    return RouterConfig(top_k=1, capacity_factor=factor, rectify=rectify, emulate=emulate)


@torch.no_grad()
def loss_of(model: Decoder, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Mean nats per token over `batches` of inputs and targets [B, S]."""
    model.eval()
    nats = sum(model.loss_sum(model(inputs).hidden_BSD, targets).item() for inputs, targets in batches)
    return nats / sum(int((targets >= 0).sum()) for _, targets in batches)


def _train(model: Decoder, training: TokenShards) -> None:
    """A few steps as the trainer takes them."""
    first = next(block.ffn for block in model.blocks if isinstance(block.ffn, MoELayer))
    config = TrainConfig(
        model=model.config,
        router=first.router.config,
        optimizer=OptimizerConfig(lr=LEARNING_RATE),
        schedule=ScheduleConfig(kind="constant", warmup_steps=0),
        data=DataConfig(seq_len=SEQ_LEN),
        train=LoopConfig(steps=STEPS, batch=BATCH),
        log=LogConfig(dir="unused"),
    )
    mesh = single()
    optimizer = make_optimizer(model.train(), config.optimizer)
    stepper = Stepper(config, mesh, model, optimizer, Gradients(model, mesh, 2**25), Samples(training, SEQ_LEN, 0))
    for step in range(STEPS):
        if not stepper.step(step, step * BATCH, stop=False).applied:
            raise RuntimeError(f"step {step} was not finite")
