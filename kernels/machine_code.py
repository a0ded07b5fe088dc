"""Machine code of every kernel for GPUs that are not here: which registers it takes, what it spills.

`python -m wastenot.kernels.machine_code [ARCH …]` compiles all that the operations start, over dtypes and over shapes
that reach every entry of the tables of tiles, and prints a line of JSON for each. It must not run under Triton's
interpreter, which replaces what would be compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from .combine import kernel as combine
from .dispatch import kernel as dispatch
from .gate import kernel as gate
from .grouped_mm import kernel as grouped_mm
from .launching import Launch, recorded
from .lowrank import Step
from .lowrank import kernel as lowrank
from .route import kernel as route
from .weigh import kernel as weigh

ARCHITECTURES = (80, 90, 100)
"""Compute capabilities: A100, H100 and H200, B200."""

_POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class MachineCode:
    """One kernel, compiled."""

    kernel: str
    types: str
    options: dict[str, Any]
    arch: int
    registers: int
    """Of a thread."""
    spilled_bytes: int
    """Stored to memory for want of registers, of a thread."""
    shared_bytes: int
    """Of a block."""


def compile_launch(launch: Launch, arch: int) -> MachineCode:
    """Compiles what `launch` would start on a device of compute capability `arch`, to the last step."""
    names = launch.kernel.arg_names
    options = dict(launch.options)
    built = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
    signature: dict[str, str] = dict.fromkeys(options, "constexpr")
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
            continue
        elif value == 1:
            # As at run time: a one is built in.
            signature[name], options[name] = "constexpr", 1
            continue
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            aligned[place,] = [["tt.divisibility", 16]]
    ordered = {name: signature[name] for name in names}
    source = ASTSource(fn=launch.kernel, signature=ordered, constexprs=options, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=built)
    assert compiled.asm["cubin"], launch
    registers, spilled = _usage(compiled.asm["ptx"], arch)
    types = ", ".join(signature[name] for name in names if signature[name].startswith("*"))
    shown = {k: v if isinstance(v, (bool, int, str, tuple)) else str(v) for k, v in launch.options.items()}
    return MachineCode(launch.kernel.__name__, types, shown, arch, registers, spilled, compiled.metadata.shared)


def _usage(ptx: str, arch: int) -> tuple[int, int]:
    """Registers and spilled bytes of a thread, as the assembler says."""
    target = re.search(r"\.target\s+(sm_\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={target[1]}", str(source), "-o", f"{folder}/kernel.cubin"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    assert registers is not None and spilled is not None, said
    return int(registers[1]), int(spilled[1])


def launches() -> list[Launch]:
    """Everything that the operations start, once for each kind of code it needs."""
    with recorded() as heard, torch.device("meta"):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for width in (64, 200, 2048):
                _rows(dtype, width)
            for rows in (64, 65536):
                _experts(dtype, rows)
        scattered = torch.empty(4096, 2048, dtype=torch.uint8)
        dispatch.scatter(
            scattered, torch.empty(32768, dtype=torch.int64), torch.empty(4096, 8, dtype=torch.int64), True
        )
        _routes()
        _moments()
    return list({_kind(launch): launch for launch in heard}.values())


def _rows(dtype: torch.dtype, width: int) -> None:
    x_TD, source_R = torch.empty(4096, width, dtype=dtype), torch.empty(40000, dtype=torch.int64)
    rows_RD = torch.empty(40000, width, dtype=dtype)
    for k in (1, 2, 8, 9):
        position_TK, weights_TK = torch.empty(4096, k, dtype=torch.int64), torch.empty(4096, k)
        dispatch.scatter(x_TD, source_R, position_TK, True)
        combine.sum_rows(rows_RD, None, position_TK)
        combine.sum_rows(rows_RD, weights_TK, position_TK)
        combine.differentiate(x_TD, rows_RD, weights_TK, position_TK, source_R, True)


def _experts(dtype: torch.dtype, rows: int) -> None:
    E, D, F = 128, 2048, 768
    x_RD, offsets_e = torch.empty(rows, D, dtype=dtype), torch.empty(E, dtype=torch.int32)
    gate_up, down = torch.empty(E, 2 * F, D, dtype=dtype), torch.empty(E, D, F, dtype=dtype)
    gate_up_R2F, hidden_RF = grouped_mm.gate_up_product(x_RD, gate_up, offsets_e)
    grouped_mm.product(hidden_RF, down, offsets_e)
    grouped_mm.differentiate(x_RD, x_RD, gate_up_R2F, gate_up, down, offsets_e)


def _routes() -> None:
    for experts, k, groups, top_groups in ((8, 2, 1, 1), (128, 8, 1, 1), (256, 8, 8, 4)):
        logits_TE = torch.empty(4096, experts)
        gate.differentiate(
            logits_TE, torch.empty(4096, 2048, dtype=torch.bfloat16), torch.empty(experts, 2048), gate.split
        )
        for score in ("softmax", "sigmoid", "given"):
            for bias_E in (None, torch.empty(experts)):
                _, chosen_TK = route.choose_fwd(logits_TE, bias_E, k, score, groups, top_groups)
        for score in ("softmax", "sigmoid"):
            for normalize, detach in ((True, True), (True, False), (False, True)):
                for choices in (k, 1):
                    experts_TK = torch.empty(4096, choices, dtype=torch.int64)
                    for times_TK in (None, experts_TK):
                        weights_TK = weigh.forward(logits_TE, experts_TK, times_TK, score, normalize, 0)
                        weigh.differentiate(weights_TK, logits_TE, experts_TK, times_TK, score, normalize, detach, 0)
        for capacity in (None, 400):
            route.assign_fwd(chosen_TK, torch.empty(4096, dtype=torch.int32), experts, 1, capacity)


def _moments() -> None:
    b, m, n = 32, 7168, 2048
    step = Step(torch.empty(b), 0.1, 1.0, 1e-3)
    for rank in (16, 32, 64):
        q_bmk, u_bnk = torch.empty(b, m, rank), torch.empty(b, n, rank)
        for dtype in (torch.float32, torch.bfloat16):
            grad = torch.empty(b, m, n, dtype=dtype)
            for kind in (torch.float32, torch.bfloat16, torch.int8, None):
                momentum = {} if kind is None else {"exp_avg": torch.empty(b, m, n, dtype=kind)}
                if kind == torch.int8:
                    momentum["exp_avg_scale"] = torch.empty(b, m, n // 128)
                moment = lowrank.FusedMoment.of(q_bmk, u_bnk, [grad], [grad], [momentum], 0.95, 1e-8)
                assert moment is not None
                moment.times(u_bnk, True, True)
                moment.times(u_bnk, True)
                moment.times(u_bnk)
                moment.transposed_times(q_bmk, step)
                moment.transposed_times(q_bmk)


def _kind(launch: Launch) -> tuple[Any, ...]:
    """What decides which code is compiled, near enough."""
    arguments = (
        a.dtype if isinstance(a, torch.Tensor) else isinstance(a, float) or (a == 1, a % 16 == 0, abs(a) >= 2**31)
        for a in launch.arguments
    )
    return launch.kernel.__name__, *arguments, *map(str, launch.options.items())


def compile_all(architectures: Sequence[int] = ARCHITECTURES) -> Iterator[MachineCode]:
    """Machine code of `launches` for each architecture."""
    for launch in launches():
        for arch in architectures:
            yield compile_launch(launch, arch)


def main(argv: Sequence[str]) -> None:
    """Prints a line of JSON for each kernel, configuration and architecture."""
    for code in compile_all([int(arch) for arch in argv] or ARCHITECTURES):
        print(json.dumps(asdict(code)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
