"""Bad input from outside, one exception: the CLI prints it without a traceback and exits with 2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class UserError(ValueError):
    """Bad input: a config, a data set, a checkpoint or the environment.

    The message stands alone: what was wrong, where, and the nearest legal value.
    """


@dataclass(frozen=True)
class Violation:
    """One rule that a configuration breaks."""

    paths: tuple[str, ...]
    """YAML paths of the fields that the rule reads; the first is the one to change."""
    message: str
    """The value found, why it is wrong, the nearest legal one."""

    def __str__(self) -> str:
        return f"{self.paths[0]}: {self.message}" if self.paths[0] else self.message


def all_together(where: str, violations: Sequence[Violation]) -> UserError:
    """One error for all `violations` (at least one) found in `where`, a line each."""
    lines = list(dict.fromkeys(str(violation) for violation in violations))
    if len(lines) == 1:
        return UserError(f"{where}: {lines[0]}")
    return UserError("\n".join([f"{where}: {len(lines)} problems", *(f"  {line}" for line in lines)]))
