"""The end of a run: summary.json, a picture, and the table that is printed."""

from __future__ import annotations

import json
import resource
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from ..moe.accounts import RATIOS, slot_ratios, sum_up
from ..parallel.collectives import all_reduce
from ..parallel.mesh import Mesh
from .evaluate import Evaluation
from .metrics import read_metrics
from .picture import draw
from .run_folder import RunFolder, write_atomically

OPTIMIZER = ("optimizer_bytes", "optimizer_bytes_per_parameter", "optimizer_part_of_adamw", "optimizer_mean_rank")
"""What a line of metrics says of the optimizer's state."""


@dataclass(frozen=True)
class Summary:
    """What a finished run came to; the keys of summary.json."""

    steps: int
    val_loss: float
    val_bits_per_byte: float
    start_val_loss: float | None
    """`val_loss` before the first step, of a run that began with another's weights, ..."""
    teacher_val_loss: float | None
    """... and that of its teacher; None where there is none."""
    order1_bits_per_byte: float
    order3_bits_per_byte: float
    order5_bits_per_byte: float
    tokens_per_second: float
    """Median over the logged intervals."""
    training_seconds: float
    peak_memory_bytes: int
    """Of the rank that used most."""
    skipped_steps: int
    sent_bytes: int
    """That ranks handed to collectives, over all ranks and steps."""
    waited_ratio: float | None
    """Part of the training time that a rank stood still for collectives, mean over ranks."""
    communication_hidden_ratio: float | None
    """Part of the time that collectives travelled in which a rank did other things; known on CPUs."""
    recompute_seconds: float
    """That backward computed again, over all ranks and steps, ..."""
    recompute_hidden_ratio: float | None
    """... and the part of it that ran under communication; None where nothing was computed again."""
    expert_load_max_over_mean: float | None
    """Of the last steps; as all that follows up to `unserved_ratio`, None for a model without experts."""
    kept_ratio: float | None
    """Part of the run's choices, as `filled`, `rectified` and `dropped`."""
    filled_ratio: float | None
    rectified_ratio: float | None
    dropped_ratio: float | None
    padding_ratio: float | None
    """Part of the run's slots."""
    unserved_ratio: float | None
    """Part of the run's tokens, layer by layer."""
    optimizer_bytes_per_parameter: float | None
    """Of the optimizer's state at the end."""
    optimizer_part_of_adamw: float | None
    """These bytes over AdamW's 8."""
    world: int
    parameters: int
    picture: str | None
    sample: str


def finish(
    mesh: Mesh,
    folder: RunFolder,
    corpus_meta: Mapping[str, Any],
    progress: Mapping[str, Any],
    evaluation: Evaluation,
    sample: str,
    parameters: int,
    tokens_per_step: int,
    optimizer_state: list[dict[str, Any]],
) -> Summary:
    """Gathers the summary on all ranks; rank 0 writes it and the ledger, and draws the picture.

    optimizer_state: of each parameter of this rank, where the optimizer reports it.
    """
    peak = all_reduce(
        torch.tensor([peak_memory_bytes(mesh.device)], device=mesh.device),
        mesh.world,
        "summary",
        mesh.recorder,
        op=dist.ReduceOp.MAX,
    )
    lines = list(read_metrics(folder.path)) if mesh.world.rank == 0 else []
    steps = [line for line in lines if "loss" in line]
    speeds = sorted(line["tokens_per_second"] for line in steps)
    ngram = corpus_meta["ngram_bits_per_byte"]
    picture = draw(folder.picture, lines, ngram) if mesh.world.rank == 0 else None
    account = sum_up(steps)
    ratios: dict[str, float | None] = dict.fromkeys(RATIOS)
    waited_ratio = communication_hidden_ratio = recompute_hidden_ratio = None
    recompute_s = 0.0
    if account is not None:
        tokens = tokens_per_step * account["steps"]
        if "slots" in account:
            ratios |= slot_ratios(account["slots"], tokens)
        rank_seconds = sum(line["step_seconds"] * line["ledger_steps"] for line in steps) * mesh.world.size
        waited_ratio = account["waited_seconds"] / rank_seconds if rank_seconds else None
        travelled = account["hidden_seconds"] + account["waited_seconds"]
        communication_hidden_ratio = account["hidden_seconds"] / travelled if account["hidden_seconds"] else None
        recompute_s = account["recompute_hidden_seconds"] + account["recompute_exposed_seconds"]
        recompute_hidden_ratio = account["recompute_hidden_seconds"] / recompute_s if recompute_s else None
        told = {"tokens": tokens, "world": mesh.world.size, "training_seconds": progress["seconds"]}
        optimizer = {name: steps[-1][name] for name in OPTIMIZER if name in steps[-1]}
        if optimizer_state:
            optimizer["parameters_of_rank_0"] = optimizer_state
        write_atomically(folder.ledger, json.dumps(told | account | {"optimizer": optimizer}, indent=1) + "\n")
    summary = Summary(
        steps=progress["step"],
        val_loss=evaluation.loss,
        val_bits_per_byte=evaluation.bits_per_byte,
        start_val_loss=progress["start_val_loss"],
        teacher_val_loss=progress["teacher_val_loss"],
        order1_bits_per_byte=ngram["1"],
        order3_bits_per_byte=ngram["3"],
        order5_bits_per_byte=ngram["5"],
        tokens_per_second=speeds[len(speeds) // 2] if speeds else 0.0,
        training_seconds=progress["seconds"],
        peak_memory_bytes=int(peak.item()),
        skipped_steps=progress["skipped"],
        sent_bytes=0 if account is None else account["sent_bytes"],
        waited_ratio=waited_ratio,
        communication_hidden_ratio=communication_hidden_ratio,
        recompute_seconds=recompute_s,
        recompute_hidden_ratio=recompute_hidden_ratio,
        expert_load_max_over_mean=steps[-1].get("expert_load_max_over_mean") if steps else None,
        **ratios,
        optimizer_bytes_per_parameter=steps[-1].get("optimizer_bytes_per_parameter") if steps else None,
        optimizer_part_of_adamw=steps[-1].get("optimizer_part_of_adamw") if steps else None,
        world=mesh.world.size,
        parameters=parameters,
        picture=None if picture is None else str(picture),
        sample=sample,
    )
    if mesh.world.rank == 0:
        write_atomically(folder.summary, json.dumps(asdict(summary), indent=2) + "\n")
    return summary


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held: of the GPU where it computes on one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def print_table(summary: Summary, folder: RunFolder, console: Console) -> None:
    """Prints what a person wants to know first."""
    if summary.sample:
        console.rule("a sample")
        console.print(summary.sample, markup=False, highlight=False)
    table = Table(title="held-out text, bits per byte (lower is better)", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    rows = [
        ("one preceding byte (Witten-Bell)", summary.order1_bits_per_byte),
        ("three preceding bytes", summary.order3_bits_per_byte),
        ("five preceding bytes", summary.order5_bits_per_byte),
        ("this model", summary.val_bits_per_byte),
    ]
    for name, value in rows:
        table.add_row(name, f"{value:.3f}")
    console.print(table)
    facts = Table(show_header=False, box=None)
    facts.add_column(style="bold")
    facts.add_column()
    minutes, seconds = divmod(int(summary.training_seconds), 60)
    facts.add_row("trained", f"{summary.steps} steps in {minutes}:{seconds:02d} on {summary.world} ranks")
    others = (("before the first step", summary.start_val_loss), ("of the teacher", summary.teacher_val_loss))
    if compared := [f"{loss:.4f} {whose}" for whose, loss in others if loss is not None]:
        facts.add_row("held-out loss", ", ".join([f"{summary.val_loss:.4f} nats per token", *compared]))
    facts.add_row("parameters", f"{summary.parameters:,}")
    facts.add_row("throughput", f"{summary.tokens_per_second:,.0f} tokens/s")
    if summary.expert_load_max_over_mean is not None and summary.dropped_ratio is not None:
        facts.add_row("expert load", f"busiest expert {summary.expert_load_max_over_mean:.2f}x the mean")
        facts.add_row("choices", _shares(summary, "kept", "rectified", "dropped"))
        facts.add_row(
            "slots", _shares(summary, "padding", "filled") + f"; {summary.unserved_ratio:.1%} of tokens unserved"
        )
    if summary.world > 1 and summary.waited_ratio is not None:
        per_step = summary.sent_bytes / summary.world / max(1, summary.steps) / 1e6
        waited = f"{summary.waited_ratio:.1%} of the time waited for others"
        facts.add_row("exchange", f"{per_step:,.2f} MB sent per rank and step; {waited}")
    if summary.recompute_hidden_ratio is not None:
        per_step = summary.recompute_seconds / summary.world / max(1, summary.steps)
        hidden = f"{summary.recompute_hidden_ratio:.0%} of it while communicating"
        facts.add_row("recomputation", f"{1e3 * per_step:,.1f} ms per rank and step, {hidden}")
    if summary.optimizer_bytes_per_parameter is not None:
        beside = f"{summary.optimizer_part_of_adamw:.0%} of AdamW's"
        facts.add_row("optimizer state", f"{summary.optimizer_bytes_per_parameter:.2f} bytes per parameter, {beside}")
    facts.add_row("memory", f"{summary.peak_memory_bytes / 2**20:,.0f} MiB at most on a rank")
    if summary.skipped_steps:
        facts.add_row("skipped steps", f"{summary.skipped_steps} (loss or gradient not finite)")
    facts.add_row("files", f"{folder.path}/: " + ", ".join(sorted(path.name for path in folder.path.glob("[!.]*"))))
    if summary.picture:
        facts.add_row("picture", summary.picture)
    else:
        facts.add_row("picture", "none: pip install 'wastenot[viz]'")
    console.print(facts)


def _shares(summary: Summary, *names: str) -> str:
    """`1.2% padding, 3.4% filled`."""
    return ", ".join(f"{getattr(summary, f'{name}_ratio'):.1%} {name}" for name in names)
