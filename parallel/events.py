"""What lower floors report upwards, without knowing who listens."""

from __future__ import annotations

from typing import Protocol


class Recorder(Protocol):
    """Hears of every collective: the ledger counts them, the watchdog names the one that hangs."""

    def collective_entered(self, name: str, num_bytes: int) -> None:
        """This rank starts `name` (say `dispatch`), sending `num_bytes` to other ranks."""
        ...

    def collective_left(self, name: str, waited_s: float) -> None:
        """`name` is complete; `waited_s` is the time this rank stood still for it (0 on CUDA: no host sync)."""
        ...


class Recorders:
    """Passes every event on to several recorders, in order."""

    def __init__(self, *recorders: Recorder) -> None:
        self.recorders = list(recorders)

    def collective_entered(self, name: str, num_bytes: int) -> None:
        for recorder in self.recorders:
            recorder.collective_entered(name, num_bytes)

    def collective_left(self, name: str, waited_s: float) -> None:
        for recorder in self.recorders:
            recorder.collective_left(name, waited_s)
