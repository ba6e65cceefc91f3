"""What the autograd Functions of a block's two residual branches, x + branch(x), share: the copies
of gradients (`gradient_copy`) that they take from the op after them and give to the one before.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvit_kernels import gradient_copy, library


def connect(
    ctx: Any, x: Tensor, out: Tensor, dtype: torch.dtype, path_scale: Tensor | None
) -> None:
    """Note in forward what `backward` needs. dtype: that of the branch's products."""
    ctx.dtype, ctx.upstream = dtype, gradient_copy.find_request(x, dtype)
    ctx.copy_request = gradient_copy.make_request(out, dtype, path_scale)


def backward(ctx: Any, dout: Tensor, launcher: Callable[..., list[Tensor]]) -> Any:
    """dx, the gradients of the 7 parameters that follow x, and None for all other arguments.

    launcher(dout, g, *saved, *ctx.options, needs, copies, path_scale); path_scale is saved last.
    """
    *saved, path_scale = ctx.saved_tensors  # checkpointing lets them be read once
    needs = ctx.needs_input_grad[1:8]
    request = gradient_copy.current_request(ctx.upstream)
    g = gradient_copy.branch_gradient(dout, ctx.copy_request, ctx.dtype, path_scale)
    residual = dout.contiguous()
    g = residual if g is dout else g.contiguous()
    copy = (request is not None, None if request is None else request.path_scale)
    dx, *grads = launcher(residual, g, *saved, *ctx.options, needs, *copy)
    if request is not None:
        gradient_copy.attach(dx, grads.pop(0), request)
    return dx, *library.spread(grads, needs), *(None,) * (len(ctx.needs_input_grad) - 8)
