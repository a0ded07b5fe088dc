"""A contender in a process of its own, run one round at a time over a pipe."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import traceback
import warnings
from multiprocessing.connection import Connection

import torch

from ..cases import Case, make_batch, make_weights
from ..machine import use_the_machine
from ..step import TrainingStep


class RemoteStep:
    """TrainingStep of the peer module `module`, in another process; idle between rounds."""

    def __init__(self, module: str, case: Case) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve,
            args=(theirs, module, case, torch.get_num_threads()),
            name=f"bench-{module}",
            daemon=True,
        )
        self.process.start()
        theirs.close()
        self._answer()

    def probe(self) -> tuple[float, float]:
        """Loss and gradient norm of the first batch; leaves the weights alone."""
        return self._ask("probe")

    def run(self) -> float:
        """Does one step there and returns its seconds, measured there."""
        return self._ask("run")

    def close(self) -> None:
        """Ends the process."""
        self.pipe.close()
        self.process.join(timeout=10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def _ask(self, what: str):
        self.pipe.send(what)
        return self._answer()

    def _answer(self):
        try:
            answer, error = self.pipe.recv()
        except EOFError:
            self.process.join(timeout=10)
            raise RuntimeError(f"{self.process.name} ended with exit code {self.process.exitcode}") from None
        if error:
            self.close()
            raise RuntimeError(f"{self.process.name} failed:\n{error}")
        return answer


def _serve(pipe: Connection, module: str, case: Case, threads: int) -> None:
    # The parent's standard output belongs to the report.
    os.dup2(2, 1)
    warnings.simplefilter("ignore")  # about CUDA libraries that a CPU does not have
    use_the_machine(threads)
    try:
        peer = importlib.import_module(f".{module}", __package__)
        step = TrainingStep(peer.build(case, make_weights(case)), *make_batch(case))
        pipe.send((None, ""))
        while True:
            answer = getattr(step, pipe.recv())()
            pipe.send((answer, ""))
    except EOFError:
        pass
    except Exception:
        pipe.send((None, traceback.format_exc()))
