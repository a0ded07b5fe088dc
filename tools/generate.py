"""`wastenot generate RUN`: texts from a trained model."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass

from ..launch.errors import UserError
from ..launch.saved_run import SavedRun, open_run
from ..moe.generate import generate

HELP = "let a trained model continue texts"
EXAMPLE = "wastenot generate runs/quickstart --prompt 'To be, or' --prompt 'Friends, ' --tokens 80 --temperature 0.7"


@dataclass(frozen=True)
class Sample:
    """One text."""

    prompt: str
    text: str
    """The prompt and what follows it."""
    new_tokens: int
    ended: bool
    """Whether the model ended the text itself."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `wastenot generate`."""
    parser.add_argument("run", metavar="RUN", help="the log.dir of a training run")
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="how the text begins; may be repeated; default: a new document",
    )
    parser.add_argument("--tokens", type=int, default=100, help="most tokens to add (%(default)s)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="0 takes the likeliest token, 1 the model's own odds (%(default)s)",
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="draw among the likeliest tokens that make up this much (%(default)s)"
    )
    parser.add_argument("--top-k", type=int, default=0, help="draw among this many likeliest tokens (%(default)s: all)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same texts (%(default)s)")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="step of the checkpoint; default: the newest")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Loads the run and prints one text per prompt."""
    saved = open_run(args.run, args.checkpoint)
    samples = continue_texts(
        saved,
        args.prompt or [""],
        tokens=args.tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
    )
    if args.json:
        whole = {"run": args.run, "step": saved.step, "samples": [asdict(sample) for sample in samples]}
        print(json.dumps(whole, indent=2, ensure_ascii=False))
    else:
        print("\n\n".join(sample.text for sample in samples))
    return 0


def continue_texts(
    saved: SavedRun, prompts: list[str], *, tokens: int, temperature: float, top_p: float, top_k: int, seed: int
) -> list[Sample]:
    """What the model makes of `prompts`; an empty one begins a new document. Raises UserError for illegal options."""
    tokenizer, seq_len = saved.tokenizer, saved.config.data.seq_len
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    try:
        made = generate(
            saved.model,
            # Documents follow an end token in training: after one, a document begins.
            [ids or [tokenizer.end_token] for ids in encoded],
            max_new_tokens=tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            end_token=tokenizer.end_token,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    longest = max(map(len, encoded)) + tokens
    if longest > seq_len:
        print(
            f"note: up to {longest} tokens, but the model was trained on {seq_len} at a time; expect it to wander",
            file=sys.stderr,
        )
    return [
        Sample(prompt, tokenizer.decode([*ids, *new]), len(new), ended=len(new) < tokens)
        for prompt, ids, new in zip(prompts, encoded, made, strict=True)
    ]
