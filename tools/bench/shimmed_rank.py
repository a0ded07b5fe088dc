"""One rank of a run whose engine is Megatron-Core, on a machine without CUDA: `launch.train` behind the tests' shim.

The shim (`tests/megatron_cpu_shim.py`, see peers/megatron.py) patches this process for good. On CUDA it stays away.
"""

from __future__ import annotations

import sys

import torch

from ...launch.train import main
from .peers.megatron import load_shim

if __name__ == "__main__":
    if torch.cuda.is_available():
        sys.exit(main())
    shim = load_shim()
    shim.install()
    with shim.devices_on_cpu():
        sys.exit(main())
