"""LayerNorm(x) W^T + b, and x itself for the residual that leaves from the same place.

x: (..., C); weight: (O, C) -> (..., O) in the compute dtype. RMSNorm likewise.
The norm is folded into the product's weight and epilogue where rows are many, applied as tiles of x
are loaded in float32, else by the row kernel that makes the statistics (`tuned.norm_way` says why).
Saved for backward: x, mean and rstd (float32, one pair a row), weight in the compute dtype.
Launches: 2 forward (norm, product); 4 backward (dh product, norm, dW, the sum of all parts). The
residual's gradient is added where the norm's backward writes dx, and dx's copy (`gradient_copy`).
Bytes: x twice, or once where its rows are known (`row_statistics`), and y once (by the row kernel
the norm once more, a folded float32 x in 16 bits once more); backward dy twice, x once, dh
twice, dx once, the norm twice, and the dW slabs.
"""

from typing import Any

import torch
from torch import Tensor

from fastvit_kernels import (
    gemm,
    gemm_dw,
    gradient_copy,
    layernorm,
    layernorm_fold,
    library,
    row_statistics,
    tuned,
)


def _fwd(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    param: Tensor,
    bias: Tensor | None,
    parts: Tensor | None,
    copy: Tensor | None,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """param: weight in its own dtype; parts and copy of x: `row_statistics`."""
    out = weight.new_empty((len(x), len(weight)))
    norm, rows = (norm_weight, norm_bias), (parts, copy)
    mean, rstd = norm_gemm(x, *norm, weight, out, eps, rms, param, rows, bias=bias)
    return out, mean, rstd


def norm_gemm(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    out: Tensor,
    eps: float,
    rms: bool,
    param: Tensor,
    rows: tuple[Tensor | None, Tensor | None] = (None, None),
    known: tuple[Tensor, Tensor] | None = None,
    **epilogue: Any,
) -> tuple[Tensor, Tensor]:
    """out = epilogue(norm(x) weight^T); returns mean and rstd, which are `known` when this is done
    for the second time. param: weight in its own dtype; rows: parts and copy of x.
    """
    way = tuned.norm_way(len(x), len(weight), weight.dtype)
    if way == "fold" and len(x):
        norm, bias = (norm_weight, norm_bias), epilogue.pop("bias", None)
        folded = layernorm_fold.layernorm_fold(
            x, *norm, param, bias, eps, rms, weight.dtype, *rows, known
        )
        fold = (folded.shift, folded.scale, folded.sums)
        gemm.gemm(folded.z, folded.weight.t(), out, fold=fold, bias=folded.bias, **epilogue)
        return folded.mean, folded.rstd
    y_dtype = None if way == "load" else weight.dtype
    y, mean, rstd = layernorm.layernorm_fwd(x, norm_weight, norm_bias, eps, rms, y_dtype)
    if y is None:
        norm = (norm_weight, norm_bias, mean, rstd)
        gemm.gemm(x, weight.t(), out, prologue="layernorm", norm=norm, **epilogue)
    else:
        gemm.gemm(y, weight.t(), out, **epilogue)
    return mean, rstd


def _fwd_fake(x, norm_weight, norm_bias, weight, param, bias, parts, copy, eps, rms):
    stats = x.new_empty(x.shape[0], dtype=torch.float32)
    return weight.new_empty((x.shape[0], len(weight))), stats, torch.empty_like(stats)


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
    needs_params: bool,
    copies: bool,
) -> list[Tensor]:
    """dx, its copy in the compute dtype if it is wanted, then the gradients of norm_weight,
    norm_bias, weight and bias, if they are needed.
    """
    params = (norm_weight, norm_bias, param, bias)
    if len(x) == 0:
        return library.zeros(x, params if needs_params else (), weight.dtype if copies else None)
    dh = gemm.gemm(dy, weight, weight.new_empty(x.shape))
    norm = (mean, rstd, norm_weight, norm_bias)
    y_dtype = weight.dtype if needs_params else None
    copy_dtype = weight.dtype if copies else None
    dx, copy, y, norm_rows = layernorm.layernorm_bwd(
        dh, x, *norm, rms, dx_residual, y_dtype, copy_dtype
    )
    dxs = [dx] if copy is None else [dx, copy]
    if y is None:
        return dxs
    sums = None if norm_rows is None else (norm_rows, norm_weight, norm_bias)
    dw, db, _, *dnorm = gemm_dw.reduce_slabs(gemm_dw.gemm_dw(dy, y), param, bias, norm=sums)
    return [*dxs, *(g for g in (*dnorm, dw, db) if g is not None)]


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
    needs_params,
    copies,
):
    params = (norm_weight, norm_bias, param, bias) if needs_params else ()
    dxs = [x.new_empty(x.shape), *([weight.new_empty(x.shape)] if copies else [])]
    return [*dxs, *(p.new_empty(p.shape) for p in params if p is not None)]


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
    ) -> tuple[Tensor, Tensor]:
        x2, w = gemm.rows(x), weight.to(dtype)
        norm, rows = (norm_weight, norm_bias), (parts, copy)
        out, mean, rstd = layernorm_linear_fwd(x2, *norm, w, weight, bias, *rows, eps, rms)
        ctx.save_for_backward(x2, mean, rstd, norm_weight, norm_bias, w, weight, bias)
        ctx.rms, ctx.copies = rms, gradient_copy.is_wanted(x, dtype)
        ctx.set_materialize_grads(False)
        return out.view(*x.shape[:-1], len(weight)), x

    @staticmethod
    @library.first_order
    def backward(ctx: Any, dy: Tensor | None, dx: Tensor | None) -> Any:
        if dy is None:
            return dx, *(None,) * 9
        saved = ctx.saved_tensors
        x2, norm_weight, norm_bias, weight, bias = saved[0], *saved[3:5], *saved[6:]
        params = (norm_weight, norm_bias, weight, bias)
        needed = any(ctx.needs_input_grad[1:5])
        residual = None if dx is None else gemm.rows(dx).contiguous()
        dx2, *grads = layernorm_linear_bwd(
            gemm.rows(dy), residual, *saved, ctx.rms, needed, ctx.copies
        )
        dx2 = dx2.view(*dy.shape[:-1], x2.shape[1])
        if ctx.copies:
            gradient_copy.carry(dx2, grads.pop(0))
        return dx2, *library.spread(grads, params, needed), *(None,) * 5


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
    norm, rows = (norm_weight, norm_bias), row_statistics.take(x, dtype)
    return library.apply(LayerNormLinearFunction, x, *norm, weight, bias, *rows, eps, rms, dtype)
