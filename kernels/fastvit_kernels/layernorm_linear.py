"""LayerNorm(x) W^T + b, and x itself as the residual, whose gradient the norm's backward adds.

x: (..., C); weight: (O, C) -> (..., O) in the compute dtype. RMSNorm likewise.
The norm is folded into the product's weight and epilogue if there are many rows, applied to tiles
of x as a float32 product loads them, else written by the row kernel that computes the statistics
(`tuned.norm_placement` says why).
Saved for backward: x, mean and rstd (float32, one pair a row), weight in the compute dtype.
Launches: 2 forward (norm, with the weight's cast, and product); 4 backward (dh product, norm, dW,
the reduction of all partial sums). The norm's backward also writes dx's copy (`gradient_copy`).
Bytes: forward x twice, or once if its statistics are known (`row_statistics`), and y once; the row
kernel also writes the norm, and folding a float32 x its 16-bit copy, which the product then reads
in place of x; backward dy twice, x once, dh twice, dx once, the norm twice, and the dW slabs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvit_kernels import (
    gemm,
    gemm_dw,
    gradient_copy,
    layernorm,
    library,
    parameter_grads,
    row_statistics,
)
from fastvit_kernels.norm_gemm import norm_gemm, norm_is_folded, plan_cast, returnable
from fastvit_kernels.operands import as_rows, contiguous


def _fwd(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    param: Tensor,
    bias: Tensor | None,
    parts: Tensor | None,
    copy: Tensor | None,
    eps: float,
    rms: bool,
    dtype: torch.dtype,
    keeps_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, mean, rstd and param cast to `dtype` (empty unless keeps_weight and the dtypes differ).

    parts, copy: x's statistics and 16-bit copy (`row_statistics`).
    """
    needed = keeps_weight or not norm_is_folded(x, param, dtype)
    weight, casts = plan_cast(param, dtype, needed)
    out = param.new_empty((len(x), len(param)), dtype=dtype)
    norm, rows = (norm_weight, norm_bias), (parts, copy)
    mean, rstd = norm_gemm(x, *norm, weight, out, eps, rms, param, rows, casts=casts, bias=bias)
    return out, mean, rstd, returnable(weight if keeps_weight else None, param)


def _fwd_fake(x, norm_weight, norm_bias, param, bias, parts, copy, eps, rms, dtype, keeps_weight):
    out = param.new_empty((x.shape[0], len(param)), dtype=dtype)
    stats = x.new_empty(x.shape[0], dtype=torch.float32)
    weight, _ = plan_cast(param, dtype, keeps_weight)
    return out, stats, torch.empty_like(stats), returnable(weight, param)


def _bwd(
    dy: Tensor,
    dx_residual: Tensor | None,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    param: Tensor,
    bias: Tensor | None,
    rms: bool,
    needs: Sequence[bool],
    copies: bool,
    path_scale: Tensor | None,
) -> list[Tensor]:
    """dx; with `copies`, path_scale * dx in the compute dtype; then the gradients of norm_weight,
    norm_bias, weight and bias that `needs` marks.
    """
    params = (norm_weight, norm_bias, param, bias)
    if len(x) == 0:
        return library.zeros(x, library.marked(params, needs), weight.dtype if copies else None)
    dh = gemm.gemm(dy, weight, weight.new_empty(x.shape))
    norm = (mean, rstd, norm_weight, norm_bias)
    y_dtype = weight.dtype if any(needs[2:]) else None
    copy_dtype = weight.dtype if copies else None
    dx, copy, y, norm_rows = layernorm.layernorm_bwd(
        dh, x, *norm, rms, dx_residual, y_dtype, copy_dtype, path_scale, any(needs[:2])
    )
    dxs = [dx] if copy is None else [dx, copy]
    sums = None if norm_rows is None else (norm_rows, norm_weight, norm_bias)
    if y is None:
        grads = parameter_grads.reduce_norm(sums)
    else:
        slabs = gemm_dw.gemm_dw(dy, y)
        grads = parameter_grads.reduce_slabs(slabs, param, bias, norm=sums)
    found = (grads.norm_weight, grads.norm_bias, grads.weight, grads.bias)
    return [*dxs, *library.marked(found, needs)]


def _bwd_fake(
    dy,
    dx_residual,
    x,
    mean,
    rstd,
    norm_weight,
    norm_bias,
    weight,
    param,
    bias,
    rms,
    needs,
    copies,
    path_scale,
):
    params = library.marked((norm_weight, norm_bias, param, bias), needs)
    dxs = [x.new_empty(x.shape), *([weight.new_empty(x.shape)] if copies else [])]
    return [*dxs, *(p.new_empty(p.shape) for p in params)]


layernorm_linear_fwd = library.register("layernorm_linear_fwd", _fwd_fake)(_fwd)
layernorm_linear_bwd = library.register("layernorm_linear_bwd", _bwd_fake)(_bwd)


class LayerNormLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        parts: Tensor | None,
        copy: Tensor | None,
        eps: float,
        rms: bool,
        dtype: torch.dtype,
        keeps_weight: bool,
    ) -> tuple[Tensor, Tensor]:
        x2, norm, rows = as_rows(x), (norm_weight, norm_bias), (parts, copy)
        out, mean, rstd, w = layernorm_linear_fwd(
            x2, *norm, weight, bias, *rows, eps, rms, dtype, keeps_weight
        )
        w = weight if weight.dtype == dtype else w
        ctx.save_for_backward(x2, mean, rstd, norm_weight, norm_bias, w, weight, bias)
        ctx.rms, ctx.upstream = rms, gradient_copy.find_request(x, dtype)
        ctx.set_materialize_grads(False)
        return library.reshaped(out, *x.shape[:-1], len(weight)), x

    @staticmethod
    @library.once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dx: Tensor | None) -> Any:
        if dy is None:
            return dx, *(None,) * 10
        saved = ctx.saved_tensors
        residual = None if dx is None else as_rows(dx).contiguous()
        needs = ctx.needs_input_grad[1:5]
        request = gradient_copy.current_request(ctx.upstream)
        copy = (request is not None, None if request is None else request.path_scale)
        dx2, *grads = layernorm_linear_bwd(as_rows(dy), residual, *saved, ctx.rms, needs, *copy)
        dx2 = dx2.view(*dy.shape[:-1], saved[0].shape[1])
        if request is not None:
            gradient_copy.attach(dx2, grads.pop(0), request)
        return dx2, *library.spread(grads, needs), *(None,) * 6


def layernorm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """LayerNorm(x) weight^T + bias in `dtype`, and x. x: (..., C); weight: (O, C) -> (..., O)."""
    norm_weight, norm_bias, bias = contiguous(norm_weight, norm_bias, bias)
    args = (x, norm_weight, norm_bias, weight, bias)
    options = (*row_statistics.take(x, dtype), eps, rms, dtype, library.wants_gradient(*args))
    return library.apply(LayerNormLinearFunction, *args, *options)
