"""What lower floors report upwards, without knowing who listens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .stopwatch import StreamWait


class Recorder(Protocol):
    """Hears of every collective: the ledger counts them, the watchdog names the one that hangs."""

    def collective_entered(self, name: str, num_bytes: int) -> None:
        """This rank starts `name` (say `dispatch`), sending `num_bytes` to other ranks."""
        ...

    def collective_left(self, name: str, waited: float | StreamWait, hidden: float = 0.0) -> None:
        """`name` is complete, or on CUDA in line; `waited` is the time in seconds that this rank stood still for it.

        hidden: seconds that it travelled before while this rank did other things, as far as that is known.
        """
        ...


class Recorders:
    """Passes every event on to several recorders, in order."""

    def __init__(self, *recorders: Recorder) -> None:
        self.recorders = list(recorders)

    def collective_entered(self, name: str, num_bytes: int) -> None:
        for recorder in self.recorders:
            recorder.collective_entered(name, num_bytes)

    def collective_left(self, name: str, waited: float | StreamWait, hidden: float = 0.0) -> None:
        for recorder in self.recorders:
            recorder.collective_left(name, waited, hidden)
