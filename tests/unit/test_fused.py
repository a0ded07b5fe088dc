"""Whose fused Adam, RMS norm and clipping run: NVIDIA's apex by its features, on CUDA only; torch's otherwise.

NVIDIA's runs on CUDA only and comes from source only. What stands in for it here has the same signatures, in plain
torch: it shows that we call them rightly, and nothing of NVIDIA's kernels.
"""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch
from torch import nn

from wastenot.kernels import fused
from wastenot.tools import doctor
from wastenot.tools.cli import main
from wastenot.tools.packages import PROBES, examine

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
MODULES = ("apex", "amp_C", "fused_layer_norm_cuda")

STAND_IN = {
    "apex/__init__.py": "",
    "apex/optimizers.py": """
import torch

class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0, amsgrad=False):
        assert adam_w_mode and bias_correction
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (b1, b2), t = group["betas"], group["step"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                m = state["exp_avg"].mul_(b1).add_(p.grad, alpha=1 - b1)
                v = state["exp_avg_sq"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                update = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + group["eps"]) + group["weight_decay"] * p
                p.sub_(group["lr"] * update)
""",
    "apex/normalization/__init__.py": "",
    "apex/normalization/fused_layer_norm.py": """
import torch

def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
    assert not torch.is_autocast_enabled(input.device.type)
    assert tuple(normalized_shape) == tuple(weight.shape)
    return input / (input.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight
""",
    "apex/multi_tensor_apply.py": """
def multi_tensor_applier(op, noop_flag_buffer, tensor_lists, *args):
    return op(2048 * 32, noop_flag_buffer, tensor_lists, *args)
""",
    "amp_C.py": """
import torch

# As NVIDIA's: the last chunk of the last tensor starts what is pending.
def started(tensors):
    return tensors if tensors[-1].numel() else []

def multi_tensor_l2norm(chunk_size, noop_flag, tensor_lists, per_tensor=False):
    (tensors,) = tensor_lists
    assert noop_flag.dtype == torch.int32 and len({t.dtype for t in tensors}) == 1
    norms = torch.zeros(len(tensors))
    for i, t in enumerate(started(tensors)):
        norms[i] = t.float().norm()
    return norms.norm().reshape(1), norms if per_tensor else torch.empty(0)

def multi_tensor_scale(chunk_size, noop_flag, tensor_lists, scale):
    assert isinstance(scale, float)
    for source, target in zip(*map(started, tensor_lists), strict=True):
        target.copy_(source * scale)
""",
    "fused_layer_norm_cuda.py": "",
}


@pytest.fixture(autouse=True)
def of_apex_alone(monkeypatch):
    """doctor tries no other package: that takes long."""
    apex = next(probe for probe in PROBES if probe.name == "NVIDIA apex")
    monkeypatch.setattr(doctor, "examine", lambda: examine([apex]))


@pytest.fixture
def apex(tmp_path, monkeypatch):
    """Puts modules with these texts where Python looks first, and has the choice made anew."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in MODULES]:
            del sys.modules[name]
        for choice in (fused.fused_adam, fused.fused_rms_norm, fused.fused_clip):
            choice.cache_clear()
        importlib.invalidate_caches()

    def write(texts: dict[str, str]) -> None:
        for name, text in texts.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
        forget()

    yield write
    forget()


def choices(device: torch.device) -> list[fused.Fused]:
    return [fused.fused_adam(device), fused.fused_rms_norm(device), fused.fused_clip(device)]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("__version__ = '0.9.10dev'", "an apex that lacks apex.optimizers: not NVIDIA's, or in part"),
        ("raise RuntimeError('no driver\\n here')", "an apex that does not work (RuntimeError: no driver here)"),
    ],
    ids=["a stranger's", "raises"],
)
def test_an_apex_without_the_features_is_ignored_and_named_once(apex, body, why, capsys):
    apex({"apex/__init__.py": body})
    chosen = choices(CUDA)
    assert chosen[0].why == why
    assert all(choice.why.startswith("an apex that ") for choice in chosen)
    assert [choice.source for choice in chosen] == [choice.source for choice in choices(CPU)]
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert sum("NVIDIA apex" in line for line in shown.splitlines()) == 1
    assert "torch.optim.AdamW(fused=True)" in shown


def test_the_right_features_without_cuda_are_not_used(apex, capsys):
    apex(STAND_IN)
    assert {choice.why for choice in choices(CPU)} == {"no CUDA device"}
    assert not set(MODULES) & set(sys.modules)
    assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["fused"]
    if not torch.cuda.is_available():
        assert told["adam"] == {"runs": "torch.optim.AdamW(fused=True)", "why": "no CUDA device"}
    assert set(told) == {"adam", "rms_norm", "clip"}


def test_what_apex_computes_is_what_torch_does(apex):
    apex(STAND_IN)
    adam, norm, clip = choices(CUDA)
    assert [adam.source, norm.source, clip.source] == [
        "apex.optimizers.FusedAdam",
        "apex.normalization.fused_rms_norm_affine",
        "amp_C.multi_tensor_l2norm, amp_C.multi_tensor_scale",
    ]
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 8, generator=generator), torch.randn(8, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        found = norm.run(x, weight, 1e-6)
    torch.testing.assert_close(found, choices(CPU)[1].run(x, weight, 1e-6))
    tensors = [torch.randn(shape, generator=generator) for shape in (3, 0, 100, 7, 0)]
    others = [t.clone() for t in tensors]
    assert list(clip.run.norms(tensors[1:2])) == [0]
    clip.run.scale(tensors[1:2], 0.5)
    for mixed in ([], [torch.ones(2, dtype=torch.float64)]):
        expected = [t.norm() for t in others + mixed]
        torch.testing.assert_close(list(clip.run.norms(tensors + mixed)), expected)
    clip.run.scale(tensors, torch.tensor(0.5))
    torch.testing.assert_close(tensors, [t * 0.5 for t in others])


def test_a_run_goes_on_from_the_other_adams_state(apex):
    apex(STAND_IN)
    makers = {"apex": choices(CUDA)[0].run, "torch": choices(CPU)[0].run}
    ends = []
    for first, then in (("torch", "torch"), ("apex", "apex"), ("apex", "torch"), ("torch", "apex")):
        generator = torch.Generator().manual_seed(0)
        parameters = [nn.Parameter(torch.randn(4, 3, generator=generator)), nn.Parameter(torch.ones(3))]
        assert fused.apex_takes(parameters)
        state = None
        for name in (first, then):
            groups = [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:], "weight_decay": 0.0}]
            optimizer = makers[name](groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
            if state is not None:
                optimizer.state.update(state)
            for _ in range(3):
                for p in parameters:
                    p.grad = torch.randn(p.shape, generator=generator)
                optimizer.step()
            state = dict(optimizer.state)
            assert all(set(of_one) == {"step", "exp_avg", "exp_avg_sq"} for of_one in state.values())
            assert not any("step" in group for group in optimizer.param_groups)
        ends.append([p.detach() for p in parameters])
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0])
    assert not fused.apex_takes([torch.zeros(1, dtype=torch.float64)])
    assert not fused.apex_takes([torch.ones(1), torch.ones(0)])
