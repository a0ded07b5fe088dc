"""Triton kernels run compiled where there is a CUDA device, and under Triton's interpreter elsewhere."""

from __future__ import annotations

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    # Read when Triton is imported. Tests of this folder come before those that might import it for another reason.
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.exit("triton was imported too soon: run tests/kernels first, or set TRITON_INTERPRET=1", returncode=4)
    os.environ["TRITON_INTERPRET"] = "1"
