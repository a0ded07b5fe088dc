"""Which optional packages work here: each is really imported, in a process of its own.

Only an import tells: some packages are installed and raise something other than ImportError, some hang, and the
one that PyPI calls `apex` is a login toolkit, so NVIDIA's is recognised by what it can do.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

_SECONDS = 120.0
_MARK = "wastenot-probe:"


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What to try, and how to get it."""

    name: str
    extra: str
    """The extra that brings it; empty where none does."""
    purpose: str
    module: str
    """Where importing this fails, it is missing; where anything else fails, it is broken."""
    code: str
    """Statements that raise where it does not work and leave its version in `version`."""
    instead: str = ""
    """How to get it where no extra brings it."""

    @property
    def install(self) -> str:
        """The line that installs it."""
        return f"pip install 'wastenot[{self.extra}]'" if self.extra else self.instead


@dataclass(frozen=True, kw_only=True)
class Package:
    """What came of a probe."""

    name: str
    extra: str
    purpose: str
    state: Literal["works", "missing", "broken"]
    version: str = ""
    note: str = ""
    """Why it is broken."""
    install: str
    """How to get it."""


PROBES = (
    Probe(
        name="matplotlib",
        extra="viz",
        purpose="pictures of a run",
        module="matplotlib",
        code="import matplotlib\nmatplotlib.use('agg')\nimport matplotlib.pyplot\nversion = matplotlib.__version__",
    ),
    Probe(
        name="tensorboard",
        extra="viz",
        purpose="live curves",
        module="tensorboard",
        code="import tensorboard\nfrom torch.utils.tensorboard import SummaryWriter\nversion = tensorboard.__version__",
    ),
    Probe(
        name="transformers",
        extra="hf",
        purpose="Hugging Face models and checkpoints",
        module="transformers",
        code="import transformers\nfrom transformers import MixtralForCausalLM\nversion = transformers.__version__",
    ),
    Probe(
        name="mpi4py",
        extra="mpi",
        purpose="mpirun without an address",
        module="mpi4py",
        code="import mpi4py\nmpi4py.rc.initialize = False\nfrom mpi4py import MPI\n"
        "version = mpi4py.__version__ + ' on ' + MPI.Get_library_version().split(',')[0].split('\\n')[0].strip()",
    ),
    Probe(
        name="mpirun",
        extra="mpi",
        purpose="a launcher",
        module="mpirun",
        code="import os, shutil, subprocess, sys\n"
        "folders = os.path.dirname(sys.executable) + os.pathsep + os.environ.get('PATH', '')\n"
        "tool = shutil.which('mpirun', path=folders)\n"
        "if tool is None: raise ModuleNotFoundError(name='mpirun')\n"
        "version = subprocess.run([tool, '--version'], capture_output=True, text=True, check=True)\n"
        "version = version.stdout.splitlines()[0]",
    ),
    Probe(
        name="deepspeed",
        extra="deepspeed",
        purpose="engine: deepspeed",
        module="deepspeed",
        code="import deepspeed\nversion = deepspeed.__version__",
    ),
    Probe(
        name="megatron-core",
        extra="megatron",
        purpose="engine: megatron",
        module="megatron",
        code="import megatron\nimport megatron.core\nversion = megatron.core.__version__",
    ),
    Probe(
        name="triton",
        extra="triton",
        purpose="kernels on GPUs, and their interpreter on CPUs",
        module="triton",
        code="import triton\nversion = triton.__version__",
    ),
    Probe(
        name="came-pytorch",
        extra="optimizers",
        purpose="optimizer.name: came",
        module="came_pytorch",
        code="import importlib.metadata\nfrom came_pytorch.CAME import CAME\n"
        "version = importlib.metadata.version('came-pytorch')",
    ),
    Probe(
        name="torchao",
        extra="optimizers",
        purpose="optimizer.name: adamw8bit",
        module="torchao",
        code="import torchao\nfrom torchao.optim import AdamW8bit\nversion = torchao.__version__",
    ),
    Probe(
        name="compressed-tensors",
        extra="quant",
        purpose="verifying exports in few bits",
        module="compressed_tensors",
        code="import compressed_tensors\nversion = compressed_tensors.__version__",
    ),
    Probe(
        name="apollo-torch",
        extra="apollo",
        purpose="optimizer.name: apollo",
        module="apollo_torch",
        code="import importlib.metadata\nfrom apollo_torch import APOLLOAdamW\n"
        "version = importlib.metadata.version('apollo-torch')",
    ),
    Probe(
        name="NVIDIA apex",
        extra="",
        purpose="fused optimizers on GPUs",
        module="apex",
        code="import apex\nfrom apex.optimizers import FusedAdam\nimport amp_C\n"
        "version = getattr(apex, '__version__', 'from source')",
        instead="only from NVIDIA's source; the registry's package of that name is another",
    ),
    Probe(
        name="transformer_engine",
        extra="",
        purpose="FP8 layers on GPUs",
        module="transformer_engine",
        code="import transformer_engine\nimport transformer_engine.pytorch\nversion = transformer_engine.__version__",
        instead="pip install 'transformer-engine[pytorch]', on a machine with CUDA",
    ),
)


def examine(probes: Sequence[Probe] = PROBES, seconds: float = _SECONDS) -> list[Package]:
    """Tries every probe, a few at a time; each gets `seconds`."""
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda probe: _try(probe, seconds), probes))


def _try(probe: Probe, seconds: float) -> Package:
    common = {"name": probe.name, "extra": probe.extra, "purpose": probe.purpose, "install": probe.install}
    # The version is printed behind a mark: packages print at import what they like. The exception likewise.
    code = (
        "try:\n"
        + "".join(f"    {line}\n" for line in probe.code.splitlines())
        + f"    print({_MARK!r}, 'works', version)\n"
        "except ModuleNotFoundError as error:\n"
        f"    print({_MARK!r}, 'absent', error.name)\n"
        "except BaseException as error:\n"
        f"    print({_MARK!r}, 'broken', type(error).__name__ + ': ' + ' '.join(str(error).split()))\n"
    )
    try:
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, errors="replace", timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return Package(**common, state="broken", note=f"its import did not end within {seconds:g} s")
    line = next((line for line in run.stdout.splitlines() if line.startswith(_MARK)), "")
    if not line:
        return Package(**common, state="broken", note=f"its import ended the process with exit code {run.returncode}")
    what, _, text = line.removeprefix(_MARK).strip().partition(" ")
    if what == "works":
        return Package(**common, state="works", version=text)
    if what == "broken":
        return Package(**common, state="broken", note=text)
    if text == probe.module:
        return Package(**common, state="missing")
    return Package(**common, state="broken", note=f"it lacks {text}")
