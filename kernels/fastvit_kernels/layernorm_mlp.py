"""x + path_scale * layer_scale * fc2(GELU(fc1(LayerNorm(x)))): two GEMMs with fused epilogues.

x: (B, N, C); fc1_weight: (F, C); fc2_weight: (C, F); layer_scale: (C,); path_scale: (B,).
Saved for backward: x, mean and rstd (float32, one pair a row), the pre-activation u (B*N, F) and
both weights in the compute dtype. Bytes a token: C elements of x, F elements of u and 8; with
save="recompute", where backward recomputes u by fc1's product, C elements of x and 8.
The norm is applied as in `layernorm_linear`; bias and GELU in fc1's epilogue; bias, LayerScale,
drop path and residual in fc2's. In backward the epilogue of dU, which reads u anyway, also writes
GELU(u) for dW2: computed as dW2 loads its tiles, it would be recomputed for each column of tiles,
in more issue slots than the products take.
Launches: 3 forward (norm and casts, fc1, fc2); 6 backward (dU, dW2, dh, norm, dW1, the reduction of
all partial sums), with LayerScale one more (`linear_residual.dx_operands`). Short rows on sm_90
(`tuned.mlp_narrow`, mlp_narrow.py): 1 forward, one more for each weight that must be cast; 4
backward.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvit_kernels import (
    branch,
    gemm,
    gemm_dw,
    layernorm,
    library,
    mlp_narrow,
    parameter_grads,
    row_statistics,
    tuned,
)
from fastvit_kernels.linear_residual import branch_dtype, dx_operands
from fastvit_kernels.norm_gemm import norm_gemm, norm_is_folded, plan_cast, returnable
from fastvit_kernels.operands import as_rows, contiguous


def _fwd(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_param: Tensor,
    fc1_bias: Tensor | None,
    fc2_param: Tensor,
    fc2_bias: Tensor | None,
    layer_scale: Tensor | None,
    path_scale: Tensor | None,
    parts: Tensor | None,
    copy: Tensor | None,
    eps: float,
    rms: bool,
    activation: str,
    dtype: torch.dtype,
    save_u: bool,
    backward: bool,
    out_dtype: torch.dtype,
    keeps: bool,
) -> list[Tensor]:
    """out; with `backward`, also u (empty unless save_u), mean, rstd, both weights cast to `dtype`
    (empty if they are of that dtype); with `keeps`, unless `mlp_narrow` runs, out's statistics and
    16-bit copy (`row_statistics`).

    parts, copy: those of x.
    """
    rows, out = as_rows(x), row_statistics.empty(x.shape, out_dtype, x.device, keeps)
    u = x.new_empty((len(rows), len(fc1_param)), dtype=dtype) if save_u else None
    narrow = tuned.mlp_narrow("fwd", *rows.shape, dtype, x.device.index) is not None
    needed = backward or narrow or not norm_is_folded(rows, fc1_param, dtype)
    fc1_weight, casts1 = plan_cast(fc1_param, dtype, needed)
    fc2_weight, casts2 = plan_cast(fc2_param, dtype)
    casts = [*casts1, *casts2]
    kept = [x.new_empty((0, 0), dtype=dtype) if u is None else u] if backward else []
    pairs = ((fc1_weight, fc1_param), (fc2_weight, fc2_param)) if backward else ()
    weights = [returnable(*pair) for pair in pairs]
    config = None
    if narrow and fc1_weight is not None:
        config = mlp_narrow.config("fwd", rows, fc1_weight, fc2_weight)
    if config is not None:
        for source, target in casts:
            target.copy_(source)
        norm, fc = (norm_weight, norm_bias), (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        options = (layer_scale, path_scale, eps, rms, activation)
        stats = mlp_narrow.mlp_fwd(config, rows, *norm, *fc, *options, as_rows(out), u)
        return [out, *kept, *stats, *weights] if backward else [out]
    hidden = x.new_empty((len(rows), len(fc1_param)), dtype=dtype)
    mean, rstd = norm_gemm(
        rows,
        norm_weight,
        norm_bias,
        fc1_weight,
        hidden,
        eps,
        rms,
        fc1_param,
        (parts, copy),
        casts=casts,
        epilogue="gelu",
        bias=fc1_bias,
        u=u,
        activation=activation,
    )
    out_rows = as_rows(out)
    out_parts, out_copy = (
        row_statistics.allocate(hidden, fc2_weight, out_rows) if keeps else (None, None)
    )
    gemm.gemm(
        hidden,
        fc2_weight.t(),
        out_rows,
        epilogue="residual",
        bias=fc2_bias,
        residual=rows,
        copy=out_copy,
        parts=out_parts,
        layer_scale=layer_scale,
        path_scale=path_scale,
    )
    statistics = [t for t in (out_parts, out_copy) if t is not None]
    return [out, *kept, mean, rstd, *weights, *statistics] if backward else [out, *statistics]


def _fwd_fake(
    x,
    norm_weight,
    norm_bias,
    fc1_param,
    fc1_bias,
    fc2_param,
    fc2_bias,
    layer_scale,
    path_scale,
    parts,
    copy,
    eps,
    rms,
    activation,
    dtype,
    save_u,
    backward,
    out_dtype,
    keeps,
):
    out, rows = x.new_empty(x.shape, dtype=out_dtype), x.shape[0] * x.shape[1]
    if not backward:
        return [out]
    u = x.new_empty((rows, len(fc1_param)) if save_u else (0, 0), dtype=dtype)
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    params = (fc1_param, fc2_param)
    return [out, u, mean, rstd, *(returnable(plan_cast(p, dtype)[0], p) for p in params)]


def _bwd(
    dout: Tensor,
    g: Tensor,
    x: Tensor,
    u: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_param: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_param: Tensor,
    fc2_bias: Tensor | None,
    layer_scale: Tensor | None,
    eps: float,
    rms: bool,
    activation: str,
    needs: Sequence[bool],
    copies: bool,
    path_scale: Tensor | None,
) -> list[Tensor]:
    """dx; with `copies`, path_scale * dx in the compute dtype; then the gradients of the parameters
    that `needs` marks, in the order of the arguments. dout, g: the gradients of the residual and of
    the branch. g, copies, path_scale: see `gradient_copy`.
    """
    params = (norm_weight, norm_bias, fc1_param, fc1_bias, fc2_param, fc2_bias, layer_scale)
    w_dtype = fc1_weight.dtype
    if x.numel() == 0:
        return library.zeros(x, library.marked(params, needs), w_dtype if copies else None)
    needs_norm, needs_fc = any(needs[:2]), any(needs[2:])
    shape, x, residual = x.shape, as_rows(x), as_rows(dout)
    dout, g = residual, residual if g is dout else as_rows(g)
    if u.numel() == 0:
        u = fc1_weight.new_empty((len(x), len(fc1_weight)))
        fc = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        config = mlp_narrow.config("fwd", x, fc1_weight, fc2_weight)
        if config is not None:
            options = (None, None, eps, rms, activation, None, u)
            mlp_narrow.mlp_fwd(config, x, norm_weight, norm_bias, *fc, *options)
        else:
            norm, options = (norm_weight, norm_bias), (eps, rms, fc1_param)
            known = (mean, rstd)
            norm_gemm(x, *norm, fc1_weight, u, *options, known=known, bias=fc1_bias)
    norm = (mean, rstd, norm_weight, norm_bias)
    config = mlp_narrow.config("bwd", x, fc1_weight, fc2_weight)
    if config is not None:
        fc, options = (fc1_weight, fc2_weight), (rms, activation, needs_norm, needs_fc, copies)
        dx, copy, y, norm_rows, du, h = mlp_narrow.mlp_bwd(
            config, dout, g, x, u, *norm, *fc, layer_scale, *options, path_scale
        )
        fc2_slabs = None if h is None else gemm_dw.gemm_dw(g, h)
    else:
        du, h = torch.empty_like(u), torch.empty_like(u) if needs_fc else None
        product = dx_operands(g, fc2_weight, fc2_param, layer_scale)
        gemm.gemm(*product, du, epilogue="dgelu", u=u, h=h, activation=activation)
        fc2_slabs = None if h is None else gemm_dw.gemm_dw(g, h)
        del h, g, product
        dh = gemm.gemm(du, fc1_weight, fc1_weight.new_empty(x.shape))
        dtypes = (w_dtype if written else None for written in (needs_fc, copies))
        dx, copy, y, norm_rows = layernorm.layernorm_bwd(
            dh, x, *norm, rms, dout, *dtypes, path_scale, needs_norm
        )
    dxs = [dx.view(shape)] if copy is None else [dx.view(shape), copy.view(shape)]
    sums = None if norm_rows is None else (norm_rows, norm_weight, norm_bias)
    fc2 = None if fc2_slabs is None else (fc2_slabs, fc2_param, fc2_bias, layer_scale)
    fc1 = None if y is None or du is None else (gemm_dw.gemm_dw(du, y), fc1_param, fc1_bias)
    grads = parameter_grads.reduce_branch(fc2, fc1, sums)
    dnorm, dfc1 = (grads.norm_weight, grads.norm_bias), (grads.weight2, grads.bias2)
    found = (*dnorm, *dfc1, grads.weight, grads.bias, grads.layer_scale)
    return [*dxs, *library.marked(found, needs)]


def _bwd_fake(
    dout,
    g,
    x,
    u,
    mean,
    rstd,
    norm_weight,
    norm_bias,
    fc1_weight,
    fc1_param,
    fc1_bias,
    fc2_weight,
    fc2_param,
    fc2_bias,
    layer_scale,
    eps,
    rms,
    activation,
    needs,
    copies,
    path_scale,
):
    params = (norm_weight, norm_bias, fc1_param, fc1_bias, fc2_param, fc2_bias, layer_scale)
    dxs = [x.new_empty(x.shape), *([fc1_weight.new_empty(x.shape)] if copies else [])]
    return [*dxs, *(p.new_empty(p.shape) for p in library.marked(params, needs))]


layernorm_mlp_fwd = library.register("layernorm_mlp_fwd", _fwd_fake)(_fwd)
layernorm_mlp_bwd = library.register("layernorm_mlp_bwd", _bwd_fake)(_bwd)


class LayerNormMlpFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        fc1_weight: Tensor,
        fc1_bias: Tensor | None,
        fc2_weight: Tensor,
        fc2_bias: Tensor | None,
        layer_scale: Tensor | None,
        path_scale: Tensor | None,
        parts: Tensor | None,
        copy: Tensor | None,
        eps: float,
        rms: bool,
        activation: str,
        save_u: bool,
        dtype: torch.dtype,
        backward: bool,
    ) -> Tensor:
        x3 = x.contiguous()
        out_dtype = branch_dtype(x, layer_scale, dtype)
        norm, scales = (norm_weight, norm_bias), (layer_scale, path_scale)
        fc1, fc2 = (fc1_weight, fc1_bias), (fc2_weight, fc2_bias)
        options, keeps = (eps, rms, activation), row_statistics.enabled(x3, fc2_weight, dtype)
        saves = (dtype, save_u, backward, out_dtype, keeps)
        out, *made = layernorm_mlp_fwd(
            x3, *norm, *fc1, *fc2, *scales, parts, copy, *options, *saves
        )
        if backward:
            *saved, w1, w2 = made[:5]
            w1 = fc1_weight if fc1_weight.dtype == dtype else w1
            w2 = fc2_weight if fc2_weight.dtype == dtype else w2
            ctx.save_for_backward(x3, *saved, *norm, w1, *fc1, w2, *fc2, *scales)
            ctx.options = options
            branch.connect(ctx, x, out, dtype, path_scale)
        if statistics := made[5 if backward else 0 :]:
            row_statistics.keep(out, *statistics)
        return out

    @staticmethod
    @library.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        return branch.backward(ctx, dout, layernorm_mlp_bwd)


def layernorm_mlp(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    layer_scale: Tensor | None,
    path_scale: Tensor | None,
    eps: float,
    rms: bool,
    activation: str,
    recompute: bool,
    dtype: torch.dtype,
) -> Tensor:
    """x + path_scale * layer_scale * fc2(activation(fc1(LayerNorm(x)))), multiplied in `dtype`.

    x: (B, N, C); activation: 'gelu', 'gelu_tanh' or 'quick_gelu' -> (B, N, C) in eager's dtype.
    """
    norm_weight, norm_bias, layer_scale, path_scale = contiguous(
        norm_weight, norm_bias, layer_scale, path_scale
    )
    fc1_bias, fc2_bias = contiguous(fc1_bias, fc2_bias)
    # Without a backward u would be written for nothing.
    tensors = (x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale)
    backward = library.wants_gradient(*tensors)
    return library.apply(
        LayerNormMlpFunction,
        x,
        norm_weight,
        norm_bias,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        layer_scale,
        path_scale,
        *row_statistics.take(x, dtype),
        eps,
        rms,
        activation,
        backward and not recompute,
        dtype,
        backward,
    )
