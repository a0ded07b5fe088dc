"""Where each rank is, as it tells the others about once a second through the store."""

# pyright: reportPrivateImportUsage=false
# torch.distributed does not declare its stores as exported.

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

_FRAMES = 4


@dataclass(frozen=True, kw_only=True)
class Place:
    """One rank, as it last said."""

    rank: int
    beat: int = 0
    """Grows with every message: one that does not is from a process that is dead or stopped."""
    step: int = 0
    phase: str = "starting"
    entered: int = 0
    """Collectives this rank has entered so far: the number of the newest."""
    waiting: tuple[tuple[int, str], ...] = ()
    """Number and name of those it has entered and not left, oldest first."""
    last: str = ""
    """Name of the newest collective."""
    still_s: float = 0.0
    """Seconds since it last entered or left a collective or changed its phase."""
    stack: tuple[str, ...] = ()
    """Where its main thread is, innermost call first."""
    ended: str = ""
    """How it ended, if it has said so."""

    def describe(self) -> str:
        """In words: step, phase, and the newest collective."""
        last = f'last collective "{self.last}" #{self.entered}' if self.entered else "no collective so far"
        return f"step {self.step}, {self.phase}, {last}"


class Board:
    """The places of all ranks in the store. Calls block while the store does not answer."""

    def __init__(self, store: dist.Store, world: int) -> None:
        self.store = dist.PrefixStore("heartbeat", store)
        self.world = world

    def put(self, place: Place) -> None:
        """Replaces what that rank said before."""
        self.store.set(f"place/{place.rank}", json.dumps(asdict(place)))

    def read(self) -> dict[int, Place]:
        """What every rank said last; ranks that never did are absent."""
        places = {}
        for rank in range(self.world):
            if self.store.check([f"place/{rank}"]):
                told = json.loads(self.store.get(f"place/{rank}"))
                told |= {"waiting": tuple(map(tuple, told["waiting"])), "stack": tuple(told["stack"])}
                places[rank] = Place(**told)
        return places

    def survey(self, beat_seconds: float) -> tuple[dict[int, Place], set[int]]:
        """What every rank said last, and the ranks that say nothing any more; takes three beats."""
        before = self.read()
        time.sleep(3 * beat_seconds)
        now = self.read()
        silent = {
            rank
            for rank in range(self.world)
            if rank not in before or (now[rank].beat == before[rank].beat and not now[rank].ended)
        }
        return now, silent

    def say(self, what: str, text: str) -> None:
        """Leaves a message for all ranks."""
        self.store.set(what, text)

    def hear(self, what: str) -> str:
        """A message that some rank left; empty where none did."""
        return self.store.get(what).decode() if self.store.check([what]) else ""

    def await_message(self, what: str, seconds: float) -> str:
        """The same, once some rank leaves it; empty after `seconds`."""
        # A wait of the store's own would hold the connection, and with it the heartbeat.
        deadline = time.monotonic() + seconds
        while not (text := self.hear(what)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return text

    def claim(self, what: str) -> bool:
        """Whether this call is the first of all ranks to claim `what`."""
        return self.store.add(what, 1) == 1


def stack_of_main_thread() -> tuple[str, ...]:
    """The innermost calls of this process's main thread as `file:line function`, innermost first."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    calls = []
    while frame is not None and len(calls) < _FRAMES and not frame.f_code.co_filename.startswith("<frozen"):
        code = frame.f_code
        calls.append(f"{'/'.join(Path(code.co_filename).parts[-2:])}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return tuple(calls)
