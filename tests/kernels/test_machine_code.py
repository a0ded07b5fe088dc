"""Every kernel, in every configuration that is ever started, becomes machine code for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter

import pytest


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_compile_without_spilling(arch, record_property):
    """In a process of its own: Triton's interpreter, which tests of this folder run under, would replace the code."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "wastenot.kernels.machine_code", str(arch)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    codes = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = Counter(code["kernel"] for code in codes)
    assert kernels.keys() == {
        "scatter_fwd", "combine_fwd", "combine_bwd", "clear_padding", "gate_up_fwd", "grouped_fwd", "grouped_wgrad",
        "swiglu_bwd", "split_fwd", "select_fwd", "count_fwd", "place_fwd", "weigh_fwd", "weigh_bwd",
        "lowrank_times", "lowrank_step",
    }  # fmt: skip
    # Cut for Hopper, where it was measured: others keep more of a product's operands in registers.
    cut_for_hopper = () if arch == 90 else ("lowrank_times", "lowrank_step")
    spilled = [code for code in codes if code["spilled_bytes"] and code["kernel"] not in cut_for_hopper]
    assert not spilled
    for name in kernels:
        record_property(name, max(code["registers"] for code in codes if code["kernel"] == name))
