"""Ends a run that hangs, and says which rank the others wait for and where it is.

A hang is a rank that stays inside one collective for longer than `parallel.timeout_seconds`. Hearing of a
collective costs a few assignments; once a second a daemon thread tells the store where this rank is.
"""

# pyright: reportPrivateImportUsage=false
# torch.distributed does not declare its stores as exported.

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import NoReturn

import torch.distributed as dist

from ..parallel.stopwatch import StreamWait
from .env import Rank
from .heartbeat import Board, Place, stack_of_main_thread


class Watchdog:
    """A Recorder of collectives that watches its own rank from a daemon thread.

    On CUDA a collective is left as soon as it is launched (`waited_s` of 0), so the last one launched counts as
    still going on until the rank enters another or changes its phase.
    """

    store_seconds = 15.0
    """How long the store may take to answer, beyond what is waited for, before it counts as gone."""

    def __init__(
        self, rank: Rank, store: dist.Store | None, timeout_seconds: float, *, beat_seconds: float = 1.0
    ) -> None:
        """Watches from now on; `store` is what `env.start` returned, None (one rank) watches nothing."""
        self._rank = rank
        self.stage = range(rank.world)
        """Ranks that enter the same collectives in the same order: those of this one's pipeline stage."""
        self._timeout_s = timeout_seconds
        self._beat_s = beat_seconds
        self._step, self._phase = 0, "starting"
        self._entered, self._last = 0, ""
        self._open: dict[int, str] = {}
        self._launched: tuple[int, str] | None = None
        self._moved = time.monotonic()
        self._beats = 0
        self._ended = ""
        self._verdict = ""
        self._done = threading.Event()
        self._store = store
        self._threads: list[threading.Thread] = []
        if store is not None:
            # A connection of its own: on the process group's, a call that waits would hold up the heartbeat.
            connection = store.clone()  # pyright: ignore[reportAttributeAccessIssue]: not in torch's stubs yet
            self._board = Board(connection, rank.world)
            self._board.put(self._place())
            for work, name in (self._beat, "heartbeat"), (self._watch, "watchdog"):
                self._threads.append(threading.Thread(target=work, name=name, daemon=True))
                self._threads[-1].start()

    # What the main thread reports. Plain assignments: the other threads only read.

    def at(self, step: int, phase: str) -> None:
        """This rank begins `phase` (a word or two for the report) of `step`."""
        self._step, self._phase = step, phase
        self._launched = None
        self._moved = time.monotonic()

    def collective_entered(self, name: str, num_bytes: int) -> None:
        """See parallel.events.Recorder."""
        self._entered += 1
        self._last = name
        self._open[self._entered] = name
        self._launched = None
        self._moved = time.monotonic()

    def collective_left(self, name: str, waited: float | StreamWait, hidden: float = 0.0) -> None:
        """See parallel.events.Recorder."""
        number = next((number for number, other in self._open.items() if other == name), None)
        if number is not None:
            del self._open[number]
            self._launched = None if isinstance(waited, float) else (number, name)
        self._moved = time.monotonic()

    def close(self) -> None:
        """Stops watching; the others are told that this rank has ended."""
        self._done.set()
        if self._store is None:
            return
        self._ended = self._ended or "finished"
        with contextlib.suppress(RuntimeError):
            self._board.put(self._place())
        for thread in self._threads:
            thread.join(1.0)

    def explain(self, error: BaseException) -> str:
        """One line: where this rank was, and the ranks whose processes are gone or the one that failed first.

        Takes some seconds. Empty where this rank was the first itself: its own traceback says it all. Every rank that
        fails calls it before it exits, so that the others learn of `error`.
        """
        if self._store is None:
            return ""
        self._ended = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"

        def ask() -> str:
            self._board.put(self._place())
            if not self._board.claim("failed"):
                return self._board.await_message("verdict", 3 * self._beat_s + self.store_seconds)
            places, silent = self._board.survey(self._beat_s)
            verdict = f"rank {self._rank.rank} failed first: {self._ended}"
            if silent and _is_of_torch(error):
                verdict = "; ".join(_gone(rank, places) for rank in sorted(silent))
            self._board.say("verdict", verdict)
            return verdict

        verdict = self._verdict or self._within(6 * self._beat_s + 2 * self.store_seconds, ask) or self._store_gone()
        self._let_others_read()
        return "" if verdict.startswith(f"rank {self._rank.rank} failed first") else f"{self._whereabouts()}: {verdict}"

    # What the threads do.

    def _beat(self) -> None:
        while not self._done.wait(self._beat_s):
            try:
                self._board.put(self._place())
                self._verdict = self._board.hear("verdict")
            except RuntimeError:
                # The store went with its process; who needs it from here on finds that out.
                return

    def _watch(self) -> None:
        while not self._done.wait(min(self._beat_s, self._timeout_s / 4)):
            waiting = self._waiting()
            stuck_s = time.monotonic() - self._moved
            if waiting and stuck_s > self._timeout_s:
                self._report_and_exit(waiting[0], stuck_s)

    def _report_and_exit(self, waiting: tuple[int, str], stuck_s: float) -> NoReturn:
        number, name = waiting
        head = (
            f'watchdog: rank {self._rank.rank} has waited {stuck_s:.0f} s in collective "{name}" #{number} (step '
            f"{self._step}, {self._phase}); parallel.timeout_seconds is {self._timeout_s:g}"
        )

        def ask() -> str:
            if not self._board.claim("hang"):
                return self._board.await_message("report", 3 * self._beat_s + self.store_seconds)
            text = "\n".join([head, *_findings(number, name, *self._board.survey(self._beat_s), self.stage)])
            print(text, file=sys.stderr, flush=True)
            # A rank whose collective breaks when this one exits, before its own patience ends, hears of it.
            self._board.say("verdict", "the watchdog of another rank has reported a hang")
            self._board.say("report", text)
            time.sleep(2 * self._beat_s)
            return text

        if not self._within(6 * self._beat_s + 2 * self.store_seconds, ask):
            print(f"{head}\n  {self._store_gone()}", file=sys.stderr, flush=True)
        self._let_others_read()
        # The main thread sits in a call that never returns: nothing gentler ends this process.
        os._exit(1)

    def _waiting(self) -> tuple[tuple[int, str], ...]:
        return tuple(self._open.copy().items()) or ((self._launched,) if self._launched else ())

    def _whereabouts(self) -> str:
        for number, name in self._waiting():
            return f'rank {self._rank.rank} waited in collective "{name}" #{number} (step {self._step}, {self._phase})'
        return f"rank {self._rank.rank} was at {self._place().describe()}"

    def _place(self) -> Place:
        self._beats += 1
        return Place(
            rank=self._rank.rank,
            beat=self._beats,
            step=self._step,
            phase=self._phase,
            entered=self._entered,
            waiting=self._waiting(),
            last=self._last,
            still_s=time.monotonic() - self._moved,
            stack=stack_of_main_thread(),
            ended=self._ended,
        )

    def _within(self, seconds: float, ask: Callable[[], str]) -> str:
        """What `ask` returns, or an empty text where the store is gone or does not answer in time."""
        answer: list[str] = []

        def work() -> None:
            with contextlib.suppress(RuntimeError):
                answer.append(ask())

        thread = threading.Thread(target=work, name="watchdog-question", daemon=True)
        thread.start()
        thread.join(seconds)
        return answer[0] if answer else ""

    def _store_gone(self) -> str:
        if self._rank.agent_store:
            return "the store in torchrun's agent does not answer: that agent, or its host, is gone"
        return "the store in rank 0's process does not answer: rank 0, or its host, is dead or stopped"

    def _let_others_read(self) -> None:
        """Keeps the store alive a little, where it goes with this process."""
        if self._rank.rank == 0 and not self._rank.agent_store:
            time.sleep(2 * self._beat_s)


def _is_of_torch(error: BaseException | None) -> bool:
    """Whether it may come from a peer that is gone: torch raises RuntimeErrors there, and others may pass them on."""
    while error is not None and not isinstance(error, RuntimeError):
        error = error.__cause__
    return error is not None


def _gone(rank: int, places: Mapping[int, Place]) -> str:
    if rank not in places:
        return f"rank {rank} never came"
    return f"rank {rank} is dead or stopped: no heartbeat since {places[rank].describe()}"


def _findings(number: int, name: str, places: Mapping[int, Place], silent: set[int], stage: range) -> list[str]:
    """One line for each rank that is not in collective `name`, which the others of `stage` entered as their
    `number`th."""
    lines, there = [], []
    for rank in sorted(places.keys() | silent):
        if rank in silent:
            lines.append(f"  {_gone(rank, places)}")
            continue
        place = places[rank]
        found = dict(place.waiting).get(number)
        if found == name and rank in stage:
            there.append(str(rank))
            continue
        if place.ended:
            what = f"has ended ({place.ended})"
        elif rank not in stage:
            waits = ", ".join(f'"{other}"' for _, other in place.waiting)
            what = f"of another pipeline stage {f'waits in {waits}' if waits else 'waits for nothing'}"
        elif found is not None:
            what = f'waits in "{found}" instead: the ranks do not agree on what comes next'
        elif place.entered >= number:
            what = "has been there and gone on"
        else:
            what = "has not arrived"
        lines.append(f"  rank {rank} {what}: {place.describe()}, not moved for {place.still_s:.0f} s")
        if not place.ended:
            lines += [f"    {'at' if call == 0 else 'in'} {text}" for call, text in enumerate(place.stack)]
    if not lines:
        lines.append("  every rank is there: the exchange itself does not get through (a firewall, a broken link?)")
    return [*lines, f"  waiting there: {'rank' if len(there) == 1 else 'ranks'} {', '.join(there)}"]
