"""Operations that `torch.compile` keeps whole, and that do not pay for it where nothing is compiled.

What `torch.library` registers takes longer to call than two kernels take to start, forward and again backward. Tensors
that hold values go straight to the function instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def operator(
    name: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """`forward` as the operation `wastenot::name`, to be called with positional arguments, the first one a tensor.

    Args:
        forward: typed as `torch.library.custom_op` needs it; returns none of its inputs.
        fake: the same for tensors without values.
        save: (ctx, inputs, output), keeps what `backward` reads.
        backward: (ctx, *grads) to a gradient, or None, for each input; differentiable no further. None: no gradient.
    """
    registered = torch.library.custom_op(f"wastenot::{name}", forward, mutates_args=())
    registered.register_fake(fake)
    if backward is None or save is None:
        return lambda *inputs: forward(*inputs) if _holds_values(inputs[0]) else registered(*inputs)
    registered.register_autograd(backward, setup_context=save)

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = forward(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx, *grads):
            return backward(ctx, *grads)

    return lambda *inputs: Direct.apply(*inputs) if _holds_values(inputs[0]) else registered(*inputs)


def _holds_values(tensor: Tensor) -> bool:
    """Whether this is a call, and not the tracing of one."""
    return not torch.compiler.is_compiling() and type(tensor) in (Tensor, nn.Parameter)
