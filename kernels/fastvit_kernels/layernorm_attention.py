"""x + path_scale * layer_scale * (attention(LayerNorm(x) W_qkv^T + b_qkv) W_proj^T + b_proj).

The attention branch of a block, from the kernels of `layernorm_linear`, `attention` and
`linear_residual`. As one op it costs the CPU less than those three, both weights are cast in one
launch, and the partial sums of all parameters' gradients are added in another. In backward qkv, o
and g live until its end.

x: (B, N, C); qkv_weight: (3 H D, C); proj_weight: (C, H D); layer_scale: (C,); path_scale: (B,).
Saved for backward: x, qkv, o, lse, mean and rstd (float32), both weights in the compute dtype.
Launches: 4 forward (norm and casts, QKV, attention, projection); 8 backward (dO and dW of the
projection, attention, dh, norm, dW of QKV, the reduction of all partial sums) if attention takes
two; one more each with LayerScale (`linear_residual.dx_operands`), and if g is not attached to dout
(`gradient_copy`).
Bytes: those of the three ops.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvit_kernels import (
    attention,
    branch,
    gemm,
    gemm_dw,
    layernorm,
    library,
    parameter_grads,
    row_statistics,
)
from fastvit_kernels.linear_residual import branch_dtype, dx_operands
from fastvit_kernels.norm_gemm import norm_gemm, norm_is_folded, plan_cast, returnable
from fastvit_kernels.operands import as_rows, contiguous


def _fwd(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    qkv_param: Tensor,
    qkv_bias: Tensor | None,
    proj_param: Tensor,
    proj_bias: Tensor | None,
    layer_scale: Tensor | None,
    path_scale: Tensor | None,
    parts: Tensor | None,
    copy: Tensor | None,
    heads: int,
    scale: float,
    eps: float,
    rms: bool,
    dtype: torch.dtype,
    backward: bool,
    out_dtype: torch.dtype,
    keeps: bool,
) -> list[Tensor]:
    """out; with `backward`, also qkv, o, lse, mean, rstd and both weights cast to `dtype` (empty if
    they are of that dtype); with `keeps`, out's statistics and 16-bit copy (`row_statistics`).

    parts, copy: those of x.
    """
    (B, N, _), rows, D = x.shape, as_rows(x), len(qkv_param) // (3 * heads)
    needed = backward or not norm_is_folded(rows, qkv_param, dtype)
    qkv_weight, qkv_casts = plan_cast(qkv_param, dtype, needed)
    proj_weight, proj_casts = plan_cast(proj_param, dtype)
    assert proj_weight is not None
    qkv = x.new_empty((B, N, len(qkv_param)), dtype=dtype)
    mean, rstd = norm_gemm(
        rows,
        norm_weight,
        norm_bias,
        qkv_weight,
        as_rows(qkv),
        eps,
        rms,
        qkv_param,
        (parts, copy),
        casts=[*qkv_casts, *proj_casts],
        bias=qkv_bias,
    )
    o, lse = attention._fwd(*qkv.view(B, N, 3, heads, D).unbind(2), scale)
    out = row_statistics.empty(x.shape, out_dtype, x.device, keeps)
    o_rows, out_rows = o.view(len(rows), heads * D), as_rows(out)
    kept = row_statistics.allocate(o_rows, proj_weight, out_rows) if keeps else (None, None)
    gemm.gemm(
        o_rows,
        proj_weight.t(),
        out_rows,
        epilogue="residual",
        bias=proj_bias,
        residual=rows,
        copy=kept[1],
        parts=kept[0],
        layer_scale=layer_scale,
        path_scale=path_scale,
    )
    statistics = [t for t in kept if t is not None]
    if not backward:
        return [out, *statistics]
    weights = ((qkv_weight, qkv_param), (proj_weight, proj_param))
    return [out, qkv, o, lse, mean, rstd, *(returnable(*w) for w in weights), *statistics]


def _fwd_fake(
    x,
    norm_weight,
    norm_bias,
    qkv_param,
    qkv_bias,
    proj_param,
    proj_bias,
    layer_scale,
    path_scale,
    parts,
    copy,
    heads,
    scale,
    eps,
    rms,
    dtype,
    backward,
    out_dtype,
    keeps,
):
    out = x.new_empty(x.shape, dtype=out_dtype)
    if not backward:
        return [out]
    (B, N, _), inner = x.shape, len(qkv_param) // 3
    lse, mean, rstd = (
        x.new_empty(shape, dtype=torch.float32) for shape in ((B, heads, N), B * N, B * N)
    )
    qkv = x.new_empty((B, N, 3 * inner), dtype=dtype)
    o = qkv.new_empty((B, N, heads, inner // heads))
    params = (qkv_param, proj_param)
    return [
        *(out, qkv, o, lse, mean, rstd),
        *(returnable(plan_cast(p, dtype)[0], p) for p in params),
    ]


def _bwd(
    dout: Tensor,
    g: Tensor,
    x: Tensor,
    qkv: Tensor,
    o: Tensor,
    lse: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_param: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_param: Tensor,
    proj_bias: Tensor | None,
    layer_scale: Tensor | None,
    scale: float,
    rms: bool,
    needs: Sequence[bool],
    copies: bool,
    path_scale: Tensor | None,
) -> list[Tensor]:
    """dx; with `copies`, path_scale * dx in the compute dtype; then the gradients of the parameters
    that `needs` marks, in the order of the arguments. dout, g: the gradients of the residual and of
    the branch. g, copies, path_scale: see `gradient_copy`.
    """
    params = (norm_weight, norm_bias, qkv_param, qkv_bias, proj_param, proj_bias, layer_scale)
    dtype = qkv_weight.dtype
    if x.numel() == 0:
        return library.zeros(x, library.marked(params, needs), dtype if copies else None)
    needs_norm, needs_qkv, needs_proj = any(needs[:2]), any(needs[2:4]), any(needs[4:])
    rows, o_rows, residual = as_rows(x), o.view(-1, proj_weight.shape[1]), as_rows(dout)
    g = residual if g is dout else as_rows(g)
    do = gemm.gemm(*dx_operands(g, proj_weight, proj_param, layer_scale), torch.empty_like(o_rows))
    proj = (gemm_dw.gemm_dw(g, o_rows), proj_param, proj_bias, layer_scale) if needs_proj else None
    packed = qkv.view(*o.shape[:2], 3, *o.shape[2:])
    dqkv = as_rows(attention._bwd_qkv(do.view(o.shape), packed, o, lse, scale).flatten(2))
    del do, g
    dh = gemm.gemm(dqkv, qkv_weight, qkv_weight.new_empty(rows.shape))
    dtypes = (dtype if written else None for written in (needs_qkv, copies))
    norm = (mean, rstd, norm_weight, norm_bias)
    dx, dx_copy, y, norm_rows = layernorm.layernorm_bwd(
        dh, rows, *norm, rms, residual, *dtypes, path_scale, needs_norm
    )
    first = None if y is None else (gemm_dw.gemm_dw(dqkv, y), qkv_param, qkv_bias)
    sums = None if norm_rows is None else (norm_rows, norm_weight, norm_bias)
    grads = parameter_grads.reduce_branch(proj, first, sums)
    dnorm, dqkv_params = (grads.norm_weight, grads.norm_bias), (grads.weight2, grads.bias2)
    found = (*dnorm, *dqkv_params, grads.weight, grads.bias, grads.layer_scale)
    dxs = [dx] if dx_copy is None else [dx, dx_copy]
    return [*(t.view(x.shape) for t in dxs), *library.marked(found, needs)]


def _bwd_fake(
    dout,
    g,
    x,
    qkv,
    o,
    lse,
    mean,
    rstd,
    norm_weight,
    norm_bias,
    qkv_weight,
    qkv_param,
    qkv_bias,
    proj_weight,
    proj_param,
    proj_bias,
    layer_scale,
    scale,
    rms,
    needs,
    copies,
    path_scale,
):
    params = (norm_weight, norm_bias, qkv_param, qkv_bias, proj_param, proj_bias, layer_scale)
    dxs = [x.new_empty(x.shape), *([qkv_weight.new_empty(x.shape)] if copies else [])]
    return [*dxs, *(p.new_empty(p.shape) for p in library.marked(params, needs))]


layernorm_attention_fwd = library.register("layernorm_attention_fwd", _fwd_fake)(_fwd)
layernorm_attention_bwd = library.register("layernorm_attention_bwd", _bwd_fake)(_bwd)


class LayerNormAttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        qkv_weight: Tensor,
        qkv_bias: Tensor | None,
        proj_weight: Tensor,
        proj_bias: Tensor | None,
        layer_scale: Tensor | None,
        path_scale: Tensor | None,
        parts: Tensor | None,
        copy: Tensor | None,
        heads: int,
        scale: float,
        eps: float,
        rms: bool,
        dtype: torch.dtype,
        backward: bool,
    ) -> Tensor:
        x3 = x.contiguous()
        keeps = row_statistics.enabled(x3, proj_weight, dtype)
        norm, scales = (norm_weight, norm_bias), (layer_scale, path_scale)
        qkv, proj = (qkv_weight, qkv_bias), (proj_weight, proj_bias)
        options = (heads, scale, eps, rms, dtype, backward)
        out_dtype = branch_dtype(x, layer_scale, dtype)
        out, *made = layernorm_attention_fwd(
            x3, *norm, *qkv, *proj, *scales, parts, copy, *options, out_dtype, keeps
        )
        if backward:
            *saved, w_qkv, w_proj = made[:7]
            w_qkv = qkv_weight if qkv_weight.dtype == dtype else w_qkv
            w_proj = proj_weight if proj_weight.dtype == dtype else w_proj
            ctx.save_for_backward(x3, *saved, *norm, w_qkv, *qkv, w_proj, *proj, *scales)
            ctx.options = (scale, rms)
            branch.connect(ctx, x, out, dtype, path_scale)
        if statistics := made[7 if backward else 0 :]:
            row_statistics.keep(out, *statistics)
        return out

    @staticmethod
    @library.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        return branch.backward(ctx, dout, layernorm_attention_bwd)


def layernorm_attention(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    layer_scale: Tensor | None,
    path_scale: Tensor | None,
    heads: int,
    scale: float | None,
    eps: float,
    rms: bool,
    dtype: torch.dtype,
) -> Tensor:
    """x + path_scale * layer_scale * proj(attention(qkv(LayerNorm(x)))), multiplied in `dtype`.

    x: (B, N, C); qkv_weight: (3 * heads * D, C); proj_weight: (C, heads * D); scale: D**-0.5 if
    None -> (B, N, C) in eager's dtype.
    """
    norm_weight, norm_bias, layer_scale, path_scale = contiguous(
        norm_weight, norm_bias, layer_scale, path_scale
    )
    qkv_bias, proj_bias = contiguous(qkv_bias, proj_bias)
    if scale is None:
        scale = (len(qkv_weight) // (3 * heads)) ** -0.5
    tensors = (x, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, layer_scale)
    return library.apply(
        LayerNormAttentionFunction,
        *tensors,
        path_scale,
        *row_statistics.take(x, dtype),
        heads,
        float(scale),
        eps,
        rms,
        dtype,
        library.wants_gradient(*tensors),
    )
