"""Windowed collectives on real ranks, and the Llama of transformers that the documentation runs under them."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from spawned import run_ranks
from torch import Tensor

from wastenot.launch.peak_memory import peak_bytes
from wastenot.parallel.recomputation import KEEP, Pass, Recomputation, Schedule
from wastenot.parallel.windowed import sum_gradients, sum_terms

EXAMPLE = Path(__file__).parents[2] / "docs" / "lynx_huggingface.py"


def own(whole: Tensor, dim: int) -> Tensor:
    """This rank's part."""
    return whole.chunk(dist.get_world_size(), dim)[dist.get_rank()]


def two_matrices(rank: int, world: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 4), (8, 4), (4, 8)
    x, first, second = (torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes)

    def whole(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x.sin(), first)), second).cos()

    def shared(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        hidden = F.gelu(F.linear(sum_gradients(x.sin()), own(first, 0)))
        return sum_terms(F.linear(hidden, own(second, 1))).cos()

    expected, y = whole(x, first, second), shared(x, first, second)
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    gradients, found = (torch.autograd.grad(y.sum(), (x, first, second)) for y in (expected, y))
    torch.testing.assert_close(found[0], gradients[0], rtol=1e-13, atol=1e-13)
    for dim, gradient, got in zip((0, 1), gradients[1:], found[1:], strict=True):
        torch.testing.assert_close(own(got, dim), own(gradient, dim), rtol=1e-13, atol=1e-13)
    # All ranks disturb the same number of x at the same time.
    assert torch.autograd.gradcheck(lambda x: shared(x, first.detach(), second.detach()), x)


def test_two_cut_matrices_are_the_whole_ones():
    run_ranks(2, two_matrices)


def plain(rank: int, world: int) -> None:
    group = dist.new_group(list(range(world)))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        # Not contiguous.
        x = torch.randn(6, 4, dtype=dtype, generator=torch.Generator().manual_seed(rank)).t().requires_grad_()
        before, total = x.detach().clone(), x.detach().contiguous()
        dist.all_reduce(total)
        for chosen in (None, group):
            assert sum_terms(x, chosen).equal(total)
            assert torch.autograd.grad(sum_terms(x, chosen), x, before)[0].equal(before)
            assert sum_gradients(x, chosen).equal(before)
            assert torch.autograd.grad(sum_gradients(x, chosen), x, before)[0].equal(total)
        assert x.equal(before), "is left alone"


def test_values_and_gradients_are_those_of_a_plain_all_reduce():
    run_ranks(3, plain)


# The example


class Watched:
    """Work that has not arrived before it is waited for, and notes when that is."""

    def __init__(self, work: Any, log: list[str]) -> None:
        self.work, self.log, self.arrived = work, log, False

    def is_completed(self) -> bool:
        return self.arrived

    def get_future(self) -> Any:
        return self.work.get_future()

    def wait(self) -> None:
        self.work.wait()
        self.arrived = True
        self.log.append("wait")


def watch(log: list[str]) -> None:
    """From here on, notes every all-reduce of this rank and every segment that is computed again."""
    all_reduce, computed = dist.all_reduce, Pass.computed

    def watched(*args: Any, **how: Any) -> Watched:
        log.append("start")
        return Watched(all_reduce(*args, **how), log)

    def noted(self: Pass, name: str, took: Any, hidden: bool) -> None:
        log.append(f"{name}, {'hidden' if hidden else 'exposed'}")
        computed(self, name, took, hidden)

    dist.all_reduce, Pass.computed = watched, noted


Gradients = dict[str, Tensor]


def llama(rank: int, world: int) -> tuple[list[str], float, float]:
    """What happens in a backward of the example, once it is right, and bytes at most with and without its schedule."""
    example = runpy.run_path(str(EXAMPLE))
    gradients: Callable[[Any, Tensor], Gradients] = example["gradients"]
    tokens_BS = torch.randint(64, (4, 128), generator=torch.Generator().manual_seed(1))
    model, recomputation = example["tiny"](), Recomputation(debug=True)
    whole = gradients(model, tokens_BS)
    example["cut_"](model)
    example["attach_"](model, recomputation)
    kept = gradients(model, tokens_BS)
    for name, gradient in kept.items():
        dim = example["CUT"].get(name.split(".")[-2])
        expected = whole[name] if dim is None else own(whole[name], dim)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)

    schedule: Schedule = example["in_windows_above"](model.config.num_hidden_layers)
    most = []
    for recomputation.schedule in (KEEP, schedule):
        most.append(peak_bytes(lambda: gradients(model, tokens_BS)))
    log: list[str] = []
    watch(log)
    again = gradients(model, tokens_BS)
    assert again.keys() == kept.keys() == dict(model.named_parameters()).keys()
    for name, gradient in kept.items():
        assert again[name].equal(gradient), name
    return log, *most


def test_every_part_of_the_example_is_computed_again_in_the_window_above():
    pytest.importorskip("transformers", reason="needs the extra `hf`")
    for log, kept, most in run_ranks(2, llama):
        layers = log.count("start") // 4
        assert layers == 6
        forward, backward = log[: 4 * layers], log[4 * layers :]
        assert forward == ["start", "wait"] * 2 * layers
        expected = []
        for above in reversed(range(layers)):
            for part in ("mlp", "attention"):
                again = [f"{above - 1}.{part} norm, hidden", f"{above - 1}.{part}, hidden"] if above else []
                expected += ["start", *again, "wait"]
        assert backward == expected
        assert most < 0.5 * kept


def test_the_example_runs_as_it_says():
    pytest.importorskip("transformers", reason="needs the extra `hf`")
    command = re.search(r"^ +torchrun (.*)$", EXAMPLE.read_text(encoding="utf-8"), re.M)
    assert command is not None
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *command[1].split()],
        cwd=EXAMPLE.parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    said = re.findall(r"rank \d: gradients equal: True; .* ([\d.]+) MiB, .* kept ([\d.]+); .*: \d+% of", done.stdout)
    assert len(said) == 2, done.stdout
    for most, kept in said:
        assert float(most) < 0.5 * float(kept)
