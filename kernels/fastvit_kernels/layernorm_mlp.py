"""x + path_scale * layer_scale * fc2(GELU(fc1(LayerNorm(x)))): two products, nothing between.

x: (B, N, C); fc1_weight: (F, C); fc2_weight: (C, F); layer_scale: (C,); path_scale: (B,).
Saved for backward: x, mean and rstd (float32, one pair a row), the pre-activation u (B*N, F) and
both weights in the compute dtype. Bytes a token: C of x's size + F of the compute size + 8.
The norm is applied to the tiles of x as fc1 loads them; bias and GELU ride in fc1's epilogue, bias,
LayerScale, drop path and residual in fc2's; backward recomputes GELU(u) as dW2 loads it.
Launches: 3 forward (row statistics, fc1, fc2); 9 backward (dU, dW2 and dW1 with their slab sums,
dh, LayerNorm backward with two column sums).
"""

from typing import Any

import torch
from torch import Tensor

from fastvit_kernels import gemm, layernorm, library
from fastvit_kernels.linear_residual import branch_dtype


def _fwd(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    layer_scale: Tensor | None,
    path_scale: Tensor | None,
    tokens: int,
    eps: float,
    tanh: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, rstd = layernorm.row_stats(x, eps)
    u = fc1_weight.new_empty((len(x), len(fc1_weight)))
    hidden = torch.empty_like(u)
    norm = (norm_weight, norm_bias, mean, rstd)
    gemm.gemm(
        x,
        fc1_weight.t(),
        hidden,
        prologue="layernorm",
        epilogue="gelu",
        bias=fc1_bias,
        norm=norm,
        u=u,
        tanh=tanh,
    )
    out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    gemm.gemm(
        hidden,
        fc2_weight.t(),
        out,
        epilogue="residual",
        bias=fc2_bias,
        residual=x,
        layer_scale=layer_scale,
        path_scale=path_scale,
        tokens=tokens,
    )
    return out, u, mean, rstd


def _fwd_fake(
    x,
    norm_weight,
    norm_bias,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    layer_scale,
    path_scale,
    tokens,
    eps,
    tanh,
    out_dtype,
):
    stats = x.new_empty(len(x), dtype=torch.float32)
    u = fc1_weight.new_empty((len(x), len(fc1_weight)))
    return x.new_empty(x.shape, dtype=out_dtype), u, stats, torch.empty_like(stats)


def _bwd(
    dout: Tensor,
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
    tanh: bool,
) -> list[Tensor]:
    branch = {"path_scale": path_scale, "layer_scale": layer_scale, "tokens": tokens}
    du = torch.empty_like(u)
    gemm.gemm(dout, fc2_weight, du, prologue="branch", epilogue="dgelu", u=u, tanh=tanh, **branch)
    dfc2 = gemm.gemm_dw(dout, u, fc2_param, fc2_bias, u.dtype, prologue="gelu", tanh=tanh, **branch)
    norm = (norm_weight, norm_bias, mean, rstd)
    dw1, db1, _ = gemm.gemm_dw(du, x, fc1_param, fc1_bias, u.dtype, prologue="layernorm", norm=norm)
    dh = gemm.gemm(du, fc1_weight, fc1_weight.new_empty(x.shape))
    dx, dnorm_weight, dnorm_bias = layernorm.layernorm_bwd(
        dh, x, mean, rstd, norm_weight, norm_bias, residual=dout
    )
    grads = (dx, dnorm_weight, dnorm_bias, dw1, db1, *dfc2)
    return [g for g in grads if g is not None]


def _bwd_fake(
    dout,
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
    tanh,
):
    params = (norm_weight, norm_bias, fc1_param, fc1_bias, fc2_param, fc2_bias, layer_scale)
    return [x.new_empty(x.shape), *(p.new_empty(p.shape) for p in params if p is not None)]


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
        eps: float,
        tanh: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        x2, tokens = gemm.rows(x).contiguous(), x.shape[1]
        w1, w2 = fc1_weight.to(dtype), fc2_weight.to(dtype)
        out_dtype = branch_dtype(x, layer_scale, dtype)
        norm, branch = (norm_weight, norm_bias), (layer_scale, path_scale)
        out, u, mean, rstd = layernorm_mlp_fwd(
            x2, *norm, w1, fc1_bias, w2, fc2_bias, *branch, tokens, eps, tanh, out_dtype
        )
        fc1, fc2 = (w1, fc1_weight, fc1_bias), (w2, fc2_weight, fc2_bias)
        ctx.save_for_backward(x2, u, mean, rstd, *norm, *fc1, *fc2, *branch)
        ctx.tokens, ctx.tanh = tokens, tanh
        return out.view(x.shape)

    @staticmethod
    @library.first_order
    def backward(ctx: Any, dout: Tensor) -> Any:
        saved = ctx.saved_tensors
        dx, *grads = layernorm_mlp_bwd(gemm.rows(dout).contiguous(), *saved, ctx.tokens, ctx.tanh)
        norm_weight, norm_bias, _, fc1_weight, fc1_bias, _, fc2_weight, fc2_bias, scale, _ = saved[
            4:
        ]
        params = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, scale)
        left = iter(grads)
        dparams = [None if p is None else next(left) for p in params]
        return dx.view(dout.shape), *dparams, None, None, None, None


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
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """x + path_scale * layer_scale * fc2(activation(fc1(LayerNorm(x)))), multiplied in `dtype`.

    x: (B, N, C); activation: 'gelu' or 'gelu_tanh' -> (B, N, C) in eager's dtype.
    """
    return LayerNormMlpFunction.apply(
        x,
        norm_weight,
        norm_bias,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        layer_scale,
        path_scale,
        eps,
        activation == "gelu_tanh",
        dtype,
    )
