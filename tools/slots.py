"""`wastenot slots RUN`: a picture of what one held-out batch did with its expert slots, before and after rectification.

Left the router alone, right with intra-GPU rectification and fill-in; the same weights, tokens and capacity.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..launch.data import eval_windows
from ..launch.errors import UserError
from ..launch.precision import computing_in
from ..launch.saved_run import SavedRun, open_run, refuse_quantized
from ..launch.shards import TokenShards
from ..moe.config import EmulateConfig, RectifyConfig, RouterConfig, nearest_divisor
from ..moe.decoder import with_router
from ..moe.ledger import SLOTS, count_slots
from ..moe.routing import DROPPED, FILLED, KEPT, Routing
from .eval import held_out
from .output import check_output, replacing
from .report.palette import LIGHT

HELP = "picture what a batch does with its expert slots, without and with Rectify-Router"
EXAMPLE = "wastenot slots runs/quickstart --ranks 4 --capacity-factor 1.0 --output slots.png"

FILE_NAME = "slots.png"
MARK = b"\x89PNG"
"""How a picture begins, by which it is known as one that may be drawn anew."""

COLOURS = {name: LIGHT[name] for name in ("kept", "filled", "rectified", "dropped", "padding")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `wastenot slots`."""
    parser.add_argument("run", metavar="RUN", help="the log.dir of a training run with experts")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="step of the checkpoint; default: the newest")
    parser.add_argument("--layer", type=int, default=-1, help="MoE layer, from 0; default: the last")
    parser.add_argument("--ranks", type=int, default=4, help="(emulated) ranks that share the experts (%(default)s)")
    parser.add_argument("--capacity-factor", type=float, default=1.0, metavar="F", help="(%(default)s)")
    parser.add_argument("--output", type=Path, default=Path(FILE_NAME), metavar="FILE", help="PNG (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Routes one held-out batch both ways and draws it."""
    check_output(args.output, MARK, "a PNG picture", FILE_NAME)
    saved = open_run(args.run, args.checkpoint)
    refuse_quantized(saved.checkpoint, "be routed otherwise")
    before, after = both_routings(saved, args.ranks, args.capacity_factor)
    if not -len(before) <= args.layer < len(before):
        raise UserError(f"--layer: {args.layer} is not there; use 0 to {len(before) - 1}")
    pair = before[args.layer], after[args.layer]
    draw(*pair, args.output)
    counts = {
        name: dict(zip(SLOTS, count_slots(routing).tolist(), strict=True))
        for name, routing in zip(("vanilla", "rectified"), pair, strict=True)
    }
    if args.json:
        print(json.dumps({"picture": str(args.output), **counts}))
        return 0
    print(
        f"{args.output}: {pair[0].num_tokens} tokens, {pair[0].num_blocks} ranks, {pair[0].capacity} slots per expert"
    )
    for name, count in counts.items():
        print(f"  {name:<10}" + ", ".join(f"{value} {what.replace('_', ' ')}" for what, value in count.items()))
    return 0


@torch.no_grad()
def both_routings(saved: SavedRun, ranks: int, factor: float) -> tuple[list[Routing], list[Routing]]:
    """The routings of every MoE layer for one held-out batch, without and with rectification.

    Raises UserError where the run has no experts, or `ranks` does not divide them.
    """
    config, counts = saved.config, [*saved.config.model.expert_counts.values()]
    if not counts:
        raise UserError(f"{saved.folder.path} has no experts: no layer of model.moe has any")
    if odd := [experts for experts in counts if ranks < 1 or experts % ranks]:
        fix = nearest_divisor(math.gcd(*counts), max(1, ranks))
        raise UserError(f"--ranks: {ranks} does not divide the {odd[0]} experts; use {fix}")
    # Whole sequences on every rank, at least 16 in all.
    sequences = -(-16 // ranks) * ranks
    inputs, _ = eval_windows(TokenShards.open(held_out(saved, None), "val"), config.data.seq_len)
    tokens_BS = torch.from_numpy(inputs[:sequences]).to(saved.mesh.device)
    if len(tokens_BS) < sequences:
        raise UserError(f"the held-out text has {len(inputs)} windows, fewer than {sequences}; use fewer --ranks")
    routings = []
    for rectify in (RectifyConfig(), RectifyConfig(intra=True, fill=config.router.top_k < min(counts))):
        try:
            router = _router(config.router, ranks, factor, rectify)
        except ValueError as error:
            raise UserError(str(error)) from error
        with computing_in(config.train.precision, saved.mesh.device):
            routings.append(with_router(saved.model, router)(tokens_BS).routings)
    return routings[0], routings[1]


def _router(trained: RouterConfig, ranks: int, factor: float, rectify: RectifyConfig) -> RouterConfig:
    emulate = EmulateConfig(sources=ranks, owners=ranks)
    return replace(trained, jitter=0.0, capacity_factor=factor, rectify=rectify, emulate=emulate)


def draw(before: Routing, after: Routing, path: Path) -> None:
    """Draws both routings of the same tokens, at most 4 ranks one below the other, into the file `path`.

    Raises UserError where matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise UserError("pictures need matplotlib: pip install 'wastenot[viz]'") from None
    shown = min(4, before.num_blocks)
    height = max(_stacks(r, block)["top"].max() for r in (before, after) for block in range(shown))
    figure = Figure(figsize=(11, 1.3 + 1.75 * shown), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(shown, 2, sharex=True, sharey=True, squeeze=False)
    for column, (routing, title) in enumerate(((before, "router alone"), (after, "with IR and FR"))):
        count = dict(zip(SLOTS, count_slots(routing).tolist(), strict=True))
        told = (
            f"{count['padding']} slots padded, {count['dropped']} choices dropped, {count['unserved']} tokens unserved"
        )
        panels[0][column].set_title(f"{title}: {told}", loc="left", fontsize=9)
        for block in range(shown):
            _bars(panels[block][column], routing, block, height)
    for block in range(shown):
        panels[block][0].set_ylabel(f"rank {block}\nrows")
    for column in range(2):
        panels[-1][column].set_xlabel("expert")
    handles = [Patch(facecolor=c, edgecolor="0.5", label=name) for name, c in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=130, format="png")


def _stacks(routing: Routing, block: int) -> dict[str, Any]:
    """Per expert what one rank asked of it: slots by use, lost choices, stand-in rows; and the height of it all."""
    size, E = routing.num_tokens // routing.num_blocks, routing.num_experts
    mine = slice(block * size, (block + 1) * size)
    kinds, experts = routing.kinds_TK[mine], routing.experts_TK[mine]

    def per_expert(kind: int) -> Tensor:
        return torch.bincount(experts[kinds == kind].cpu(), minlength=E)

    kept, filled = per_expert(KEPT), per_expert(FILLED)
    padding = (routing.capacity or 0) - kept - filled
    rows = torch.zeros_like(kept) if routing.stand_ins is None else routing.stand_ins.counts_BE[block].cpu()
    dropped = per_expert(DROPPED)
    top = (routing.capacity or 0) + dropped + rows
    return {"kept": kept, "filled": filled, "padding": padding, "dropped": dropped, "rectified": rows, "top": top}


def _bars(panel: Any, routing: Routing, block: int, height: Tensor) -> None:
    stacks = _stacks(routing, block)
    base = torch.zeros_like(stacks["kept"])
    experts = range(routing.num_experts)
    for name in ("kept", "filled", "padding", "rectified", "dropped"):
        panel.bar(
            experts,
            stacks[name].tolist(),
            bottom=base.tolist(),
            width=0.85,
            color=COLOURS[name],
            edgecolor="0.5",
            linewidth=0.5,
            hatch="///" if name == "dropped" else None,
        )
        base = base + stacks[name]
    panel.axhline(routing.capacity, color="black", lw=1)
    panel.set_ylim(0, float(height) * 1.08)
    panel.set_xticks(list(experts) if routing.num_experts <= 32 else [])
    panel.spines[["top", "right"]].set_visible(False)
