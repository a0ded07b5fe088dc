"""Slurm's compressed host lists: `n[1-3,7],login` stands for n1, n2, n3, n7 and login."""

from __future__ import annotations

import itertools
import re

from .errors import UserError

_PIECE = re.compile(r"\[([^\[\]]*)\]")
_ITEM = re.compile(r"(?:[^,\[\]]|\[[^\[\]]*\])+")


def expand_hosts(hosts: str) -> list[str]:
    """All hosts of a Slurm list, in its order. Several brackets and leading zeros (`r[0-1]n[08-10]`) are fine.

    Raises UserError where the text is not such a list.
    """
    items = _ITEM.findall(hosts)
    if not items or ",".join(items) != hosts:
        raise UserError(f"SLURM_STEP_NODELIST: {hosts!r} is not a Slurm host list such as n[1-3,7]")
    return [host for item in items for host in _expand(item, hosts)]


def _expand(item: str, hosts: str) -> list[str]:
    # re.split with one group alternates literal text and bracket contents.
    parts = _PIECE.split(item)
    choices = [[part] if index % 2 == 0 else _numbers(part, hosts) for index, part in enumerate(parts)]
    return ["".join(pieces) for pieces in itertools.product(*choices)]


def _numbers(ranges: str, hosts: str) -> list[str]:
    numbers = []
    for part in ranges.split(","):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not (first.isdigit() and last.isdigit()) or int(first) > int(last):
            raise UserError(f"SLURM_STEP_NODELIST: [{ranges}] in {hosts!r} is not a list of numbers and ranges")
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return numbers


def expand_counts(counts: str) -> list[int]:
    """Slurm's tasks per node: `2(x3),1` is [2, 2, 2, 1]. Raises UserError on other text."""
    result = []
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE: {counts!r} is not a list of counts such as 2(x3),1")
        result += [int(match[1])] * int(match[2] or 1)
    return result
