"""x + path_scale * layer_scale * fc2(GELU(fc1(LayerNorm(x)))): two products, nothing between.

x: (B, N, C); fc1_weight: (F, C); fc2_weight: (C, F); layer_scale: (C,); path_scale: (B,).
Saved for backward: x, mean and rstd (float32, one pair a row), the pre-activation u (B*N, F) and
both weights in the compute dtype. Bytes a token: C of x's size + F of the compute size + 8; without
u, which save="recompute" makes again in backward by fc1's product, C of x's size + 8.
The norm is applied where `layernorm_linear` applies it; bias and GELU ride in fc1's epilogue, bias,
LayerScale, drop path and residual in fc2's. In backward the epilogue of dU, which has u at hand,
writes GELU(u) too, for dW2: applied as dW2 loads its tiles it would be computed again for each
column of tiles, at more issue slots than their products take.
Launches: 3 forward (norm, fc1, fc2); 6 backward (dU, dW2, dh, norm, dW1, the sum of all parts).
Short rows on sm_90 (`tuned.mlp_narrow`): 1 forward, 4 backward; mlp_narrow.py has both.
"""

from typing import Any

import torch
from torch import Tensor

from fastvit_kernels import (
    gemm,
    gemm_dw,
    gradient_copy,
    layernorm,
    library,
    mlp_narrow,
    row_statistics,
)
from fastvit_kernels.layernorm_linear import norm_gemm
from fastvit_kernels.linear_residual import branch_dtype, branch_gradient


def _fwd(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_param: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    layer_scale: Tensor | None,
    path_scale: Tensor | None,
    parts: Tensor | None,
    copy: Tensor | None,
    tokens: int,
    eps: float,
    rms: bool,
    activation: str,
    save_u: bool,
    out_dtype: torch.dtype,
    keeps: bool,
) -> list[Tensor]:
    """out, u (empty unless save_u), mean, rstd; with `keeps`, what `row_statistics` keeps of out.

    fc1_param: fc1_weight in its own dtype; parts and copy of x: `row_statistics`.
    """
    out = row_statistics.empty(x.shape, out_dtype, x.device, keeps)
    u = fc1_weight.new_empty((len(x), len(fc1_weight)) if save_u else (0, 0))
    config = mlp_narrow.config("fwd", x, fc1_weight, fc2_weight)
    if config is not None:
        norm, fc = (norm_weight, norm_bias), (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        options = (layer_scale, path_scale, tokens, eps, rms, activation)
        stats = mlp_narrow.mlp_fwd(config, x, *norm, *fc, *options, out, u if save_u else None)
        return [out, u, *stats]
    hidden = fc1_weight.new_empty((len(x), len(fc1_weight)))
    mean, rstd = norm_gemm(
        x,
        norm_weight,
        norm_bias,
        fc1_weight,
        hidden,
        eps,
        rms,
        fc1_param,
        (parts, copy),
        epilogue="gelu",
        bias=fc1_bias,
        u=u if save_u else None,
        activation=activation,
    )
    out_parts, out_copy = row_statistics.room(hidden, fc2_weight, out) if keeps else (None, None)
    gemm.gemm(
        hidden,
        fc2_weight.t(),
        out,
        epilogue="residual",
        bias=fc2_bias,
        residual=x,
        copy=out_copy,
        parts=out_parts,
        layer_scale=layer_scale,
        path_scale=path_scale,
        tokens=tokens,
    )
    return [t for t in (out, u, mean, rstd, out_parts, out_copy) if t is not None]


def _fwd_fake(
    x,
    norm_weight,
    norm_bias,
    fc1_weight,
    fc1_param,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    layer_scale,
    path_scale,
    parts,
    copy,
    tokens,
    eps,
    rms,
    activation,
    save_u,
    out_dtype,
    keeps,
):
    stats = x.new_empty(x.shape[0], dtype=torch.float32)
    u = fc1_weight.new_empty((x.shape[0], len(fc1_weight)) if save_u else (0, 0))
    return [x.new_empty(x.shape, dtype=out_dtype), u, stats, torch.empty_like(stats)]


def _bwd(
    dout: Tensor,
    dout_copy: Tensor | None,
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
    path_scale: Tensor | None,
    tokens: int,
    eps: float,
    rms: bool,
    activation: str,
    needs_params: bool,
    copies: bool,
) -> list[Tensor]:
    """dx, its copy in the compute dtype if it is wanted, then the gradients of the parameters there
    are, in the order of the arguments. dout_copy: dout in the compute dtype, if there is one.
    """
    params = (norm_weight, norm_bias, fc1_param, fc1_bias, fc2_param, fc2_bias, layer_scale)
    w_dtype = fc1_weight.dtype
    if len(x) == 0:
        return library.zeros(x, params if needs_params else (), w_dtype if copies else None)
    branch = {"layer_scale": layer_scale, "path_scale": path_scale, "tokens": tokens}
    dbranch = dout if dout_copy is None else dout_copy
    g, unwritten = branch_gradient(dbranch, w_dtype, path_scale, needs_params)
    if u.numel() == 0:
        u = fc1_weight.new_empty((len(x), len(fc1_weight)))
        fc = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        config = mlp_narrow.config("fwd", x, fc1_weight, fc2_weight)
        if config is not None:
            options = (None, None, tokens, eps, rms, activation, None, u)
            mlp_narrow.mlp_fwd(config, x, norm_weight, norm_bias, *fc, *options)
        else:
            norm, options = (norm_weight, norm_bias), (eps, rms, fc1_param)
            known = (mean, rstd)
            norm_gemm(x, *norm, fc1_weight, u, *options, known=known, bias=fc1_bias)
    norm = (mean, rstd, norm_weight, norm_bias)
    config = mlp_narrow.config("bwd", x, fc1_weight, fc2_weight)
    if config is not None:
        fc, options = (fc1_weight, fc2_weight), (rms, activation, unwritten, needs_params, copies)
        dx, copy, y, norm_rows, du, h = mlp_narrow.mlp_bwd(
            config, dout, dbranch, x, u, *norm, *fc, *branch.values(), *options
        )
        parts2 = None if h is None else gemm_dw.gemm_dw(g, h)
    else:
        du, h = torch.empty_like(u), torch.empty_like(u) if needs_params else None
        gemm.gemm(
            dbranch,
            fc2_weight,
            du,
            prologue="branch",
            epilogue="dgelu",
            g=unwritten,
            u=u,
            h=h,
            activation=activation,
            **branch,
        )
        parts2 = None if h is None else gemm_dw.gemm_dw(g, h)
        del h, g, unwritten, dbranch, dout_copy
        dh = gemm.gemm(du, fc1_weight, fc1_weight.new_empty(x.shape))
        dtypes = (w_dtype if wanted else None for wanted in (needs_params, copies))
        dx, copy, y, norm_rows = layernorm.layernorm_bwd(dh, x, *norm, rms, dout, *dtypes)
    dxs = [dx] if copy is None else [dx, copy]
    if y is None or du is None or parts2 is None:
        return dxs
    sums = None if norm_rows is None else (norm_rows, norm_weight, norm_bias)
    first = (gemm_dw.gemm_dw(du, y), fc1_param, fc1_bias)
    dfc2_dls = gemm_dw.reduce_slabs(parts2, fc2_param, fc2_bias, layer_scale, first, sums)
    dfc2, (dw1, db1, *dnorm) = dfc2_dls[:3], dfc2_dls[3:]
    return [*dxs, *(grad for grad in (*dnorm, dw1, db1, *dfc2) if grad is not None)]


def _bwd_fake(
    dout,
    dout_copy,
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
    path_scale,
    tokens,
    eps,
    rms,
    activation,
    needs_params,
    copies,
):
    params = (norm_weight, norm_bias, fc1_param, fc1_bias, fc2_param, fc2_bias, layer_scale)
    params = params if needs_params else ()
    dxs = [x.new_empty(x.shape), *([fc1_weight.new_empty(x.shape)] if copies else [])]
    return [*dxs, *(p.new_empty(p.shape) for p in params if p is not None)]


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
    ) -> Tensor:
        x2, tokens = gemm.rows(x).contiguous(), x.shape[1]
        w1, w2 = fc1_weight.to(dtype), fc2_weight.to(dtype)
        out_dtype = branch_dtype(x, layer_scale, dtype)
        norm, branch = (norm_weight, norm_bias), (layer_scale, path_scale)
        fc1, fc2 = (w1, fc1_weight, fc1_bias), (w2, fc2_weight, fc2_bias)
        options, keeps = (tokens, eps, rms, activation), row_statistics.are_wanted(x2, w2)
        vectors = (*branch, parts, copy)
        out, u, mean, rstd, *kept = layernorm_mlp_fwd(
            x2, *norm, *fc1, w2, fc2_bias, *vectors, *options, save_u, out_dtype, keeps
        )
        ctx.save_for_backward(x2, u, mean, rstd, *norm, *fc1, *fc2, *branch)
        ctx.options, ctx.copies = options, gradient_copy.is_wanted(x, dtype)
        ctx.reads_copy_in = dtype if layer_scale is None else None
        out = out.view(x.shape)
        if kept:
            row_statistics.keep(out, *kept)
        return out

    @staticmethod
    @library.first_order
    def backward(ctx: Any, dout: Tensor) -> Any:
        saved = ctx.saved_tensors
        needed = any(ctx.needs_input_grad[1:8])
        dout2 = gemm.rows(dout).contiguous()
        copy = gradient_copy.carried(dout, ctx.reads_copy_in)
        copy = None if copy is None else gemm.rows(copy)
        dx, *grads = layernorm_mlp_bwd(dout2, copy, *saved, *ctx.options, needed, ctx.copies)
        dx = dx.view(dout.shape)
        if ctx.copies:
            gradient_copy.carry(dx, grads.pop(0))
        params = [*saved[4:6], *saved[7:9], *saved[10:13]]
        return dx, *library.spread(grads, params, needed), *(None,) * 8


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
    )
