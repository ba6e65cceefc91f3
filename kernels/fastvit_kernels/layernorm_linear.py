"""LayerNorm(x) W^T + b, the norm applied to the tiles of x as the product loads them.

x: (..., C); weight: (O, C) -> (..., O) in the compute dtype.
Saved for backward: x, mean and rstd (float32, one pair a row), weight in the compute dtype.
Launches: 2 forward (row statistics, product); 6 backward (dh product, dW, its slab sum, LayerNorm
backward with two column sums).
Bytes: x twice, y once; backward dy twice, x twice, dh twice, dx once, and the dW slabs.
"""

from typing import Any

import torch
from torch import Tensor

from fastvit_kernels import gemm, layernorm, library


def _fwd(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = layernorm.row_stats(x, eps)
    out = weight.new_empty((len(x), len(weight)))
    norm = (norm_weight, norm_bias, mean, rstd)
    gemm.gemm(x, weight.t(), out, prologue="layernorm", bias=bias, norm=norm)
    return out, mean, rstd


def _fwd_fake(x, norm_weight, norm_bias, weight, bias, eps):
    stats = x.new_empty(len(x), dtype=torch.float32)
    return weight.new_empty((len(x), len(weight))), stats, torch.empty_like(stats)


def _bwd(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    param: Tensor,
    bias: Tensor | None,
) -> list[Tensor]:
    dh = weight.new_empty(x.shape)
    gemm.gemm(dy, weight, dh)
    norm = (norm_weight, norm_bias, mean, rstd)
    dw, db, _ = gemm.gemm_dw(dy, x, param, bias, weight.dtype, prologue="layernorm", norm=norm)
    dx, dnorm_weight, dnorm_bias = layernorm.layernorm_bwd(
        dh, x, mean, rstd, norm_weight, norm_bias
    )
    return [g for g in (dx, dnorm_weight, dnorm_bias, dw, db) if g is not None]


def _bwd_fake(dy, x, mean, rstd, norm_weight, norm_bias, weight, param, bias):
    dx = x.new_empty(x.shape)
    params = (norm_weight, norm_bias, param, bias)
    return [dx, *(p.new_empty(p.shape) for p in params if p is not None)]


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
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        x2, w = gemm.rows(x), weight.to(dtype)
        out, mean, rstd = layernorm_linear_fwd(x2, norm_weight, norm_bias, w, bias, eps)
        ctx.save_for_backward(x2, mean, rstd, norm_weight, norm_bias, w, weight, bias)
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    @library.first_order
    def backward(ctx: Any, dy: Tensor) -> Any:
        saved = ctx.saved_tensors
        grads = layernorm_linear_bwd(gemm.rows(dy), *saved)
        dx, *params = grads
        _, _, _, norm_weight, norm_bias, _, weight, bias = saved
        left = iter(params)
        dparams = [
            None if p is None else next(left) for p in (norm_weight, norm_bias, weight, bias)
        ]
        return dx.view(*dy.shape[:-1], dx.shape[1]), *dparams, None, None


def layernorm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """LayerNorm(x) weight^T + bias in `dtype`. x: (..., C); weight: (O, C) -> (..., O)."""
    return LayerNormLinearFunction.apply(x, norm_weight, norm_bias, weight, bias, eps, dtype)
