"""Speeds of `bench compress`: against our own whole model, and against the eager experts of transformers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from ...launch.saved_run import open_run
from ..compress.export import exported
from ..compress.speed import Contender, Speed, compare, of_decoder
from .compress_models import FOLDER

PROMPT, WRITTEN, ROUNDS = 128, 16, 9
EAGER = "transformers, eager"


def measure(runs: Mapping[str, Path], whole: str) -> dict[str, Speed]:
    """Of each of `runs`, and of the one called `whole` in transformers' eager backend, in turns in this process."""
    contenders = {name: of_decoder(open_run(path).model, PROMPT, WRITTEN) for name, path in runs.items()}
    contenders[EAGER] = of_transformers(runs[whole])
    return compare(contenders, PROMPT, ROUNDS)


def of_transformers(run: Path) -> Contender:
    """The model of `run` in stock transformers, experts in a Python loop, as the paper's baseline had them.

    The first pass caches its keys and values, and every further token reads them.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = FOLDER / f"{run.name}-stock"
    if not folder.is_dir():
        exported(run, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")
    tokens_1S = torch.arange(PROMPT).remainder(model.config.vocab_size).unsqueeze(0)

    @torch.no_grad()
    def work() -> tuple[float, float]:
        start = time.perf_counter()
        output = model(tokens_1S, use_cache=True, logits_to_keep=1)
        token = output.logits.argmax(-1)
        reading = time.perf_counter() - start
        writing = []
        for _ in range(WRITTEN):
            start = time.perf_counter()
            output = model(token, past_key_values=output.past_key_values, use_cache=True)
            token = output.logits.argmax(-1)
            writing.append(time.perf_counter() - start)
        return reading, statistics.median(writing)

    return work
