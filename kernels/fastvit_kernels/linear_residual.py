"""residual + path_scale * layer_scale * (x W^T + b), all but the product in its epilogue.

x: (B, N, K); weight: (C, K); residual: (B, N, C); layer_scale: (C,); path_scale: (B,).
Saved for backward: x and weight in the compute dtype. LayerScale's gradient needs nothing more:
with G = (path_scale * dout)^T x, which dW needs anyway, it is
<W[c], G[c]> + b[c] sum(path_scale * dout[:, c]).
Launches: 1 forward; 3 backward (dX product, dW, its slab sum). The residual's gradient is dout.
A float32 dout mostly comes with a copy in the compute dtype (`gradient_copy`). Without one, or with
path_scale, the dX product writes path_scale * dout in the compute dtype on the way, for dW to read.
Bytes: x, residual and out once, and what `row_statistics` keeps of out; backward dout twice, x and
dx once, and the dW slabs.
"""

from typing import Any

import torch
from torch import Tensor

from fastvit_kernels import gemm, gemm_dw, gradient_copy, library, row_statistics


def _fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None,
    path_scale: Tensor | None,
    tokens: int,
    out_dtype: torch.dtype,
    keeps: bool,
) -> list[Tensor]:
    """out; with `keeps`, what `row_statistics` keeps of it too."""
    out = row_statistics.empty((len(x), len(weight)), out_dtype, x.device, keeps)
    parts, copy = row_statistics.room(x, weight, out) if keeps else (None, None)
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
        tokens=tokens,
    )
    return [t for t in (out, parts, copy) if t is not None]


def _fwd_fake(x, weight, bias, residual, layer_scale, path_scale, tokens, out_dtype, keeps):
    return [x.new_empty((x.shape[0], len(weight)), dtype=out_dtype)]


def branch_gradient(
    dout: Tensor, dtype: torch.dtype, path_scale: Tensor | None, needs_params: bool
) -> tuple[Tensor, Tensor | None]:
    """What dW is made of, path_scale * dout in the compute dtype, and whether it is yet to be
    written (by prologue "branch") or is dout itself.
    """
    if dout.dtype == dtype and path_scale is None:
        return dout, None
    g = torch.empty(dout.shape, dtype=dtype, device=dout.device) if needs_params else None
    return dout if g is None else g, g


def _bwd(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    param: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    path_scale: Tensor | None,
    tokens: int,
    needs_params: bool,
) -> list[Tensor]:
    """dx, then the gradients of weight, bias and layer_scale, if they are needed."""
    if len(x) == 0:
        return library.zeros(x, (param, bias, layer_scale) if needs_params else ())
    branch = {"path_scale": path_scale, "layer_scale": layer_scale, "tokens": tokens}
    g, unwritten = branch_gradient(dout, weight.dtype, path_scale, needs_params)
    dx = torch.empty((len(dout), weight.shape[1]), dtype=weight.dtype, device=dout.device)
    gemm.gemm(dout, weight, dx, prologue="branch", g=unwritten, **branch)
    if not needs_params:
        return [dx]
    grads = gemm_dw.reduce_slabs(gemm_dw.gemm_dw(g, x), param, bias, layer_scale)
    return [dx, *(grad for grad in grads if grad is not None)]


def _bwd_fake(dout, x, weight, param, bias, layer_scale, path_scale, tokens, needs_params):
    params = (param, bias, layer_scale) if needs_params else ()
    dx = weight.new_empty((dout.shape[0], weight.shape[1]))
    return [dx, *(p.new_empty(p.shape) for p in params if p is not None)]


linear_residual_fwd = library.register("linear_residual_fwd", _fwd_fake)(_fwd)
linear_residual_bwd = library.register("linear_residual_bwd", _bwd_fake)(_bwd)


def branch_dtype(residual: Tensor, layer_scale: Tensor | None, dtype: torch.dtype) -> torch.dtype:
    """The dtype that eager's residual + layer_scale * branch has."""
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
        x2, w, tokens = gemm.rows(x.to(dtype)), weight.to(dtype), x.shape[1]
        out_dtype = branch_dtype(residual, layer_scale, dtype)
        residual2 = gemm.rows(residual).contiguous()
        keeps = row_statistics.are_wanted(x2, w)
        branch = (layer_scale, path_scale, tokens)
        out, *kept = linear_residual_fwd(x2, w, bias, residual2, *branch, out_dtype, keeps)
        ctx.save_for_backward(x2, w, weight, bias, layer_scale, path_scale)
        ctx.tokens, ctx.x_dtype, ctx.residual_dtype = tokens, x.dtype, residual.dtype
        ctx.reads_copy_in = dtype if layer_scale is None else None
        out = out.view(residual.shape)
        if kept:
            row_statistics.keep(out, *kept)
        return out

    @staticmethod
    @library.first_order
    def backward(ctx: Any, dout: Tensor) -> Any:
        saved = ctx.saved_tensors  # checkpointing allows one look
        needed = any(ctx.needs_input_grad[i] for i in (1, 2, 4))
        copy = gradient_copy.carried(dout, ctx.reads_copy_in)
        dbranch = gemm.rows(dout if copy is None else copy)
        dx, *grads = linear_residual_bwd(dbranch, *saved, ctx.tokens, needed)
        dweight, dbias, dscale = library.spread(grads, saved[2:5], needed)
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
    return library.apply(
        LinearResidualFunction, x, weight, bias, residual, layer_scale, path_scale, dtype
    )
