"""The live line of a run: a bar that moves in a terminal, plain lines where output is a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class RunConsole:
    """Prints what rank 0 says; every other rank gets a silent one."""

    def __init__(self, speaks: bool) -> None:
        self.console = Console(stderr=True, quiet=not speaks, highlight=False, soft_wrap=True)
        self._live = speaks and sys.stderr.isatty()
        self._bar: Progress | None = None

    @property
    def busy(self) -> bool:
        """Whether a progress line is on the screen already."""
        return self._bar is not None

    @contextmanager
    def nothing(self) -> Iterator[_Follower]:
        """A progress line that is not shown."""
        yield _Follower(self, None, "", 1, None)

    def say(self, text: str) -> None:
        """Prints a line above the live one."""
        (self._bar.console if self._bar is not None else self.console).print(text, markup=False)

    @contextmanager
    def following(self, what: str, total: int, done: int = 0) -> Iterator[_Follower]:
        """A progress line over `total` steps, `done` of them already."""
        if not self._live:
            yield _Follower(self, None, what, total)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
        )
        with Progress(*columns, console=self.console, refresh_per_second=4) as self._bar:
            task = self._bar.add_task(what, total=total, completed=done, numbers="")
            yield _Follower(self, self._bar, what, total, task)
        self._bar = None


class _Follower:
    def __init__(self, owner: RunConsole, bar: Progress | None, what: str, total: int, task: Any = None) -> None:
        self.owner, self.bar, self.what, self.total, self.task = owner, bar, what, total, task

    def advance(self, done: int) -> None:
        """Moves the bar to `done`."""
        if self.bar is not None:
            self.bar.update(self.task, completed=done)

    def portion(self, done: int, total: int) -> None:
        """Moves the bar to `done` of `total`."""
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total)

    def show(self, done: int, numbers: Mapping[str, str], seconds_left: float) -> None:
        """Shows `numbers`: beside the bar, or as a line of its own where there is no terminal."""
        text = "  ".join(f"{name} {value}" for name, value in numbers.items())
        if self.bar is not None:
            self.bar.update(self.task, completed=done, numbers=text)
        else:
            minutes, seconds = divmod(int(seconds_left), 60)
            self.owner.say(f"{self.what} {done}/{self.total}  {text}  left {minutes}:{seconds:02d}")
