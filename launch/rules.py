"""Rules that span owners: each a small function from a TrainConfig to what it violates. Torch-free.

A rule checks only what no single owner can check alone, and names the nearest legal value. Three groups: of
the configuration alone (`CROSS_RULES`; what they say of ranks is in layout_rules.py), of this machine's files and
packages (`FILE_RULES`), and of the tokenizer, known only later (`vocabulary_rule`).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from ..moe.config import EmulateConfig, nearest_divisor
from .config import TrainConfig
from .engine_rules import ENGINE_FILE_RULES, ENGINE_RULES
from .errors import Violation
from .expert_counts import divides_all, fewest_of
from .layout_rules import LAYOUT_RULES, multiples
from .optimizer_config import what_is_missing
from .recovery_rules import RECOVERY_FILE_RULES, RECOVERY_RULES

CORPORA = ("shakespeare", "sotu")
SMALLEST_BPE = 257
"""256 bytes and the end token: nothing merged yet."""

Rule = Callable[[TrainConfig], list[Violation]]


def some_layer_has_experts(config: TrainConfig) -> list[Violation]:
    model, moe = config.model, config.model.moe
    # Layer by layer it may be that none is left: that was asked for in so many words.
    if moe is None or moe.per_layer or model.expert_counts:
        return []
    name, value = ("every", moe.every) if moe.every > model.layers else ("first_dense", moe.first_dense)
    last = model.layers // moe.every * moe.every
    fix = f"every: {model.layers}" if name == "every" else f"first_dense: {last - 1}"
    paths = (f"model.moe.{name}", "model.layers", "model.moe.every", "model.moe.first_dense")
    return [Violation(paths, f"{value} leaves none of the {model.layers} layers with experts; use {fix}, or moe: null")]


def top_k_fits(config: TrainConfig) -> list[Violation]:
    """In every layer: what fits the emptiest fits all."""
    router, fewest = config.router, fewest_of(config)
    if fewest is None or router.num_choices <= fewest.experts:
        return []
    if router.top_k > fewest.experts:
        message = f"{router.top_k} exceeds {fewest.shown}; use at most {fewest.experts}"
        return [Violation(("router.top_k", fewest.path), message)]
    left = fewest.experts - router.top_k
    fix = f"use at most {left}" if left else "use rectify.fill: false"
    asked = f"{router.rectify.fill_ranks} beyond router.top_k: {router.top_k}"
    message = f"{asked} exceed {fewest.shown}; {fix}"
    return [Violation(("router.rectify.fill_ranks", "router.top_k", fewest.path), message)]


def groups_fit(config: TrainConfig) -> list[Violation]:
    router, fewest = config.router, fewest_of(config)
    if fewest is None or router.groups == 1:
        return []
    if uneven := divides_all(config, router.groups, "router.groups"):
        return uneven
    within_reach = router.top_groups * fewest.experts // router.groups
    if within_reach < router.num_choices <= fewest.experts:
        enough = -(-router.num_choices * router.groups // fewest.experts)
        wanted = f"top_k: {router.top_k}" + (" and its fill_ranks" if router.rectify.fill else "")
        message = (
            f"{router.top_groups} of {router.groups} groups hold {within_reach} experts, fewer than "
            f"{wanted}; use {enough} or more"
        )
        return [Violation(("router.top_groups", "router.groups", "router.top_k", fewest.path), message)]
    return []


def padded_needs_capacity(config: TrainConfig) -> list[Violation]:
    moe, router = config.model.moe, config.router
    if moe is None or moe.dispatch != "padded" or router.capacity_factor is not None:
        return []
    message = "padded needs router.capacity_factor for its number of slots; use 1.25 there, or ragged here"
    return [Violation(("model.moe.dispatch", "router.capacity_factor"), message)]


def benchmark_routers_learn_nothing(config: TrainConfig) -> list[Violation]:
    router = config.router
    if config.model.moe is None:
        return []
    if router.kind == "learned":
        ignored = []
    else:
        ignored = [(name, 0.0) for name in ("balance_loss", "z_loss", "bias_update", "jitter")]
    if router.kind not in ("skewed", "bursty"):
        ignored.append(("skew", 1.0))
    found = []
    for name, off in ignored:
        value = getattr(router, name)
        if value != off:
            message = f"{value} has no effect with kind: {router.kind}; use {off}"
            found.append(Violation((f"router.{name}", "router.kind"), message))
    return found


def widths_align(config: TrainConfig) -> list[Violation]:
    """torch's grouped matrix products want rows of whole 16-byte units; other kernels do without."""
    moe, precision = config.model.moe, config.train.precision
    step = {"fp32": 4, "bf16": 8}.get(precision, 1)
    if moe is None or config.kernels in ("reference", "triton"):
        return []
    found = []
    for path, value in (("model.d_model", config.model.d_model), ("model.moe.d_expert", moe.d_expert)):
        if value % step:
            fix = multiples(value, step)
            message = f"{value} is not a multiple of {step}, as {precision} experts need; use {fix}"
            found.append(Violation((path, "train.precision", "kernels"), message))
    return found


def kernels_take_precision(config: TrainConfig) -> list[Violation]:
    if config.model.moe is None or config.train.precision != "fp64" or config.kernels in ("reference", "auto"):
        return []
    message = f"{config.kernels} has no grouped product for train.precision: fp64; use reference or auto"
    return [Violation(("kernels", "train.precision"), message)]


def quantized_blocks_fit_experts(config: TrainConfig) -> list[Violation]:
    """Moments of experts that ranks share are saved expert by expert, so no block of codes may straddle two."""
    model, moe = config.model, config.model.moe
    if moe is None or config.optimizer.name != "adamw8bit" or config.parallel.expert == 1:
        return []
    numbers = model.d_model * moe.d_expert
    if numbers % 256 == 0:
        return []
    message = (
        f"adamw8bit has blocks of 256 numbers, which would straddle experts of {model.d_model} x {moe.d_expert}; "
        f"use adamw, parallel.expert: 1, or widths whose product is a multiple of 256"
    )
    paths = ("optimizer.name", "model.d_model", "model.moe.d_expert", "parallel.expert")
    return [Violation(paths, message)]


def emulation_splits(config: TrainConfig) -> list[Violation]:
    """Emulated ranks hold whole sequences and whole experts (METHODS R10)."""
    moe, emulate, train = config.model.moe, config.router.emulate, config.train
    if moe is None or emulate is None:
        return []
    owners = divides_all(config, emulate.owners, "router.emulate.owners")
    uneven = _sources_split(emulate, train.batch, train.accumulate)
    return [*owners, *(uneven or _sources_split_evaluation(emulate, train.eval_batch))]


def _sources_split(emulate: EmulateConfig, batch: int, accumulate: int) -> list[Violation]:
    micro = batch // accumulate
    if micro % emulate.sources == 0:
        return []
    fix = nearest_divisor(micro, emulate.sources)
    message = f"{emulate.sources} does not divide the {micro} sequences of a micro-batch; use {fix}"
    return [Violation(("router.emulate.sources", "train.batch", "train.accumulate"), message)]


def _sources_split_evaluation(emulate: EmulateConfig, eval_batch: int) -> list[Violation]:
    if eval_batch % emulate.sources == 0:
        return []
    message = f"{eval_batch} sequences do not split into router.emulate.sources: {emulate.sources}; use "
    return [Violation(("train.eval_batch", "router.emulate.sources"), message + multiples(eval_batch, emulate.sources))]


def schedule_fits(config: TrainConfig) -> list[Violation]:
    schedule, steps = config.schedule, config.train.steps
    if schedule.warmup_steps > steps:
        message = f"{schedule.warmup_steps} exceeds train.steps: {steps}; use at most {steps}"
        return [Violation(("schedule.warmup_steps", "train.steps"), message)]
    if schedule.kind == "wsd" and schedule.warmup_steps + int(schedule.decay_ratio * steps) > steps:
        room = (steps - schedule.warmup_steps) / steps
        message = (
            f"a decay over {schedule.decay_ratio} of {steps} steps overlaps schedule.warmup_steps: "
            f"{schedule.warmup_steps}; use at most {room:.4g}"
        )
        return [Violation(("schedule.decay_ratio", "schedule.warmup_steps", "train.steps"), message)]
    return []


def profile_is_within_run(config: TrainConfig) -> list[Violation]:
    profile, steps = config.log.profile, config.train.steps
    if not profile or profile[1] <= steps:
        return []
    nearest = [min(profile[0], steps), steps]
    message = f"{list(profile)} goes beyond train.steps: {steps}; use {nearest}"
    return [Violation(("log.profile", "train.steps"), message)]


def seed_is_64_bit(config: TrainConfig) -> list[Violation]:
    if config.train.seed < 2**63:
        return []
    return [Violation(("train.seed",), f"{config.train.seed} does not fit 63 bits; use at most {2**63 - 1}")]


def known_vocabulary_fits(config: TrainConfig) -> list[Violation]:
    """As `vocabulary_rule`, where the tokenizer's name already tells its size."""
    size = tokenizer_size(config.data.tokenizer)
    return [] if size is None else vocabulary_rule(config, size)


def vocabulary_rule(config: TrainConfig, size: int) -> list[Violation]:
    """The model has a row for each of the tokenizer's `size` tokens."""
    vocab_size = config.model.vocab_size
    if vocab_size == 0 or vocab_size >= size:
        return []
    message = (
        f"{vocab_size} is smaller than the {size} tokens of data.tokenizer: {config.data.tokenizer}; "
        f"use {size}, or 0 to take the tokenizer's"
    )
    return [Violation(("model.vocab_size", "data.tokenizer"), message)]


def tokenizer_size(tokenizer: str) -> int | None:
    """Tokens of `bytes` or `bpe:N`, the end token included; None where the name does not tell."""
    if tokenizer == "bytes":
        return SMALLEST_BPE
    kind, separator, size = tokenizer.partition(":")
    return int(size) if kind == "bpe" and separator and size.isdecimal() else None


def tokenizer_exists(config: TrainConfig) -> list[Violation]:
    tokenizer = config.data.tokenizer
    size = tokenizer_size(tokenizer)
    if size is not None and size < SMALLEST_BPE:
        message = f"{tokenizer} cannot hold the 256 bytes and the end token; use bpe:{SMALLEST_BPE} or more"
    elif size is not None or Path(tokenizer).is_file():
        return []
    elif tokenizer.partition(":")[0] == "bpe":
        message = f"{tokenizer} has no size; use for example bpe:2048"
    else:
        message = f"{tokenizer!r} is neither bytes, bpe:N nor a file{_nearest(tokenizer, ('bytes', 'bpe:2048'))}"
    return [Violation(("data.tokenizer",), message)]


def corpus_exists(config: TrainConfig) -> list[Violation]:
    corpus = config.data.corpus
    if corpus in CORPORA or (corpus and Path(corpus).exists()):
        return []
    # Here: it needs numpy, which most configurations do not.
    from .indexed import find_indexed

    if find_indexed(corpus):
        return []
    hint = _nearest(corpus, CORPORA)
    message = f"{corpus!r} is neither {' nor '.join(CORPORA)}, nor a file or folder that exists{hint}"
    return [Violation(("data.corpus",), message)]


def folders_are_folders(config: TrainConfig) -> list[Violation]:
    found = []
    for path, value in (("data.dir", config.data.dir), ("log.dir", config.log.dir)):
        blocking = next((part for part in (Path(value), *Path(value).parents) if part.is_file()), None)
        if not value:
            found.append(Violation((path,), f"the name is empty; use for example {path.partition('.')[0]}"))
        elif blocking is not None:
            found.append(Violation((path,), f"{value!r} cannot be a folder: {blocking} is a file; use another name"))
    return found


def trace_fits(config: TrainConfig) -> list[Violation]:
    """The recorded logits are there, and of as many experts as the model has."""
    trace, counts = config.router.trace, config.model.expert_counts
    if trace is None or not counts:
        return []
    from ..moe.trace import read_trace  # numpy, which only benchmarks that replay one need here

    try:
        read_trace(trace, dict(enumerate(counts.values())))
    except ValueError as error:
        return [
            Violation(("router.trace", "model.moe.experts", "model.moe.per_layer"), str(error).removeprefix("trace: "))
        ]
    return []


def optimizer_is_installed(config: TrainConfig) -> list[Violation]:
    missing = what_is_missing(config.optimizer.name)
    return [Violation(("optimizer.name",), missing)] if missing else []


def resume_exists(config: TrainConfig) -> list[Violation]:
    resume = config.checkpoint.resume
    if resume in ("auto", "never") or (resume and Path(resume).is_dir()):
        return []
    message = f"{resume!r} is neither auto, never nor a folder that exists{_nearest(resume, ('auto', 'never'))}"
    return [Violation(("checkpoint.resume",), message)]


CROSS_RULES: tuple[Rule, ...] = (
    some_layer_has_experts,
    top_k_fits,
    groups_fit,
    *LAYOUT_RULES,
    padded_needs_capacity,
    benchmark_routers_learn_nothing,
    widths_align,
    kernels_take_precision,
    quantized_blocks_fit_experts,
    emulation_splits,
    schedule_fits,
    profile_is_within_run,
    seed_is_64_bit,
    known_vocabulary_fits,
    *RECOVERY_RULES,
    *ENGINE_RULES,
)
"""Hold for the configuration wherever it is read."""

FILE_RULES: tuple[Rule, ...] = (
    tokenizer_exists,
    corpus_exists,
    folders_are_folders,
    resume_exists,
    trace_fits,
    optimizer_is_installed,
    *RECOVERY_FILE_RULES,
    *ENGINE_FILE_RULES,
)
"""Hold on the machine that runs the configuration."""


def _nearest(text: str, choices: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(text, choices, n=1, cutoff=0.4)
    return f"; nearest: {close[0]}" if close else f"; use for example {choices[0]}"
