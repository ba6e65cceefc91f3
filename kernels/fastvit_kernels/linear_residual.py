"""residual + path_scale * layer_scale * (x W^T + b): one GEMM, all else in its epilogue.

x: (B, N, K); weight: (C, K); residual: (B, N, C); layer_scale: (C,); path_scale: (B,).
Saved for backward: x and weight in the compute dtype. LayerScale's gradient needs nothing more:
with G = g^T x, which dW needs anyway, it is <W[c], G[c]> + b[c] sum(g[:, c]).
Launches: 1 forward; 3 backward (dX product, dW, its slab reduction), with LayerScale one more; one
more each if a weight must be cast, or g is not attached to dout. The residual's gradient is dout,
the branch's is g = path_scale * dout in the compute dtype, which is usually attached to dout
(`gradient_copy`).
Bytes: x, residual and out once, and what `row_statistics` keeps of out; backward g twice, x and dx
once, and the dW slabs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvit_kernels import gemm, gemm_dw, gradient_copy, library, parameter_grads, row_statistics
from fastvit_kernels.operands import as_rows, contiguous


def _fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None,
    path_scale: Tensor | None,
    out_dtype: torch.dtype,
    keeps: bool,
) -> list[Tensor]:
    """out; with `keeps`, also its statistics and 16-bit copy (`row_statistics`)."""
    out = row_statistics.empty((len(x), len(weight)), out_dtype, x.device, keeps)
    parts, copy = row_statistics.allocate(x, weight, out) if keeps else (None, None)
    gemm.gemm(
        x,
        weight.t(),
        out,
        epilogue="residual",
        bias=bias,
        residual=residual,
        copy=copy,
        parts=parts,
        layer_scale=layer_scale,
        path_scale=path_scale,
    )
    return [t for t in (out, parts, copy) if t is not None]


def _fwd_fake(x, weight, bias, residual, layer_scale, path_scale, out_dtype, keeps):
    return [x.new_empty((x.shape[0], len(weight)), dtype=out_dtype)]


def dx_operands(
    g: Tensor, weight: Tensor, param: Tensor, layer_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The operands of dX = (layer_scale * g) W. LayerScale is multiplied into W, which is smaller
    than g, except in float16, whose range may not hold layer_scale * W.
    """
    if layer_scale is None:
        return g, weight
    if weight.dtype == torch.float16:
        return torch.mul(g, layer_scale, out=torch.empty_like(g)), weight
    return g, torch.mul(param, layer_scale[:, None], out=torch.empty_like(weight))


def _bwd(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    param: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """dx, then the gradients of weight, bias and layer_scale that `needs` marks."""
    if len(x) == 0:
        return library.zeros(x, library.marked((param, bias, layer_scale), needs))
    dx = weight.new_empty((len(g), weight.shape[1]))
    gemm.gemm(*dx_operands(g, weight, param, layer_scale), dx)
    if not any(needs):
        return [dx]
    grads = parameter_grads.reduce_slabs(gemm_dw.gemm_dw(g, x), param, bias, layer_scale)
    return [dx, *library.marked((grads.weight, grads.bias, grads.layer_scale), needs)]


def _bwd_fake(g, x, weight, param, bias, layer_scale, needs):
    params = library.marked((param, bias, layer_scale), needs)
    dx = weight.new_empty((g.shape[0], weight.shape[1]))
    return [dx, *(p.new_empty(p.shape) for p in params)]


linear_residual_fwd = library.register("linear_residual_fwd", _fwd_fake)(_fwd)
linear_residual_bwd = library.register("linear_residual_bwd", _bwd_fake)(_bwd)


def branch_dtype(residual: Tensor, layer_scale: Tensor | None, dtype: torch.dtype) -> torch.dtype:
    """The dtype of residual + layer_scale * branch in eager PyTorch."""
    if layer_scale is not None:
        dtype = torch.promote_types(dtype, layer_scale.dtype)
    return torch.promote_types(dtype, residual.dtype)


class LinearResidualFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        layer_scale: Tensor | None,
        path_scale: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        x2, w = as_rows(x.to(dtype)), weight.to(dtype)
        out_dtype = branch_dtype(residual, layer_scale, dtype)
        residual2 = as_rows(residual).contiguous()
        keeps = row_statistics.enabled(x2, weight, dtype)
        branch = (layer_scale, path_scale)
        out, *statistics = linear_residual_fwd(x2, w, bias, residual2, *branch, out_dtype, keeps)
        ctx.save_for_backward(x2, w, weight, bias, layer_scale, path_scale)
        ctx.x_dtype, ctx.residual_dtype = x.dtype, residual.dtype
        ctx.copy_request = gradient_copy.make_request(out, dtype, path_scale)
        out = library.reshaped(out, *residual.shape)
        if statistics:
            row_statistics.keep(out, *statistics)
        return out

    @staticmethod
    @library.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        *saved, path_scale = ctx.saved_tensors  # checkpointing lets them be read once
        needs = [ctx.needs_input_grad[i] for i in (1, 2, 4)]
        g = gradient_copy.branch_gradient(dout, ctx.copy_request, saved[1].dtype, path_scale)
        dx, *grads = linear_residual_bwd(as_rows(g), *saved, needs)
        dweight, dbias, dscale = library.spread(grads, needs)
        dx = dx.view(*dout.shape[:-1], dx.shape[1]).to(ctx.x_dtype)
        return dx, dweight, dbias, dout.to(ctx.residual_dtype), dscale, None, None


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None,
    path_scale: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """residual + path_scale * layer_scale * (x weight^T + bias), multiplied in `dtype`.

    x: (B, N, K); weight: (C, K); residual: (B, N, C) -> (B, N, C) in eager's dtype.
    """
    bias, *branch = contiguous(bias, layer_scale, path_scale)
    return library.apply(LinearResidualFunction, x, weight, bias, residual, *branch, dtype)
