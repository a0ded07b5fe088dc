"""A polite end: SIGTERM asks the run to save a checkpoint and stop."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Set by SIGTERM; the loop looks at it once a step, so that all ranks stop after the same one."""

    def __init__(self) -> None:
        self.requested = False
        signal.signal(signal.SIGTERM, self._request)

    def _request(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True
