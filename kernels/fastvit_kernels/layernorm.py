"""LayerNorm's two row kernels: statistics forward, and the whole of its backward.

forward   mean, rstd of each row; the normalised row itself exists only inside a GEMM's prologue
backward  dx = rstd * (dy w - mean(dy w) - xhat mean(dy w xhat)) + dresidual
          dw = sum over rows of dy xhat, db = sum over rows of dy, in a fixed order
Bytes: x read; then dy, x, dresidual read and dx written, once each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels import tuned


@triton.jit(do_not_specialize=["M"])
def _row_stats_kernel(
    x_ptr,
    mean_ptr,
    rstd_ptr,
    M,
    C,
    stride_xm,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    mask_m, mask_c = offs_m < M, offs_c < C
    mask = mask_m[:, None] & mask_c[None, :]
    x = tl.load(
        x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm + offs_c[None, :], mask=mask, other=0.0
    ).to(tl.float32)
    mean = tl.sum(x, axis=1) / C
    # Deviations from the mean, not mean(x^2) - mean^2, and the mean corrected by what they sum to:
    # rows far from zero keep their digits.
    deviation = tl.where(mask_c[None, :], x - mean[:, None], 0.0)
    correction = tl.sum(deviation, axis=1) / C
    mean += correction
    var = tl.sum(deviation * deviation, axis=1) / C - correction * correction
    tl.store(mean_ptr + offs_m, mean, mask=mask_m)
    tl.store(rstd_ptr + offs_m, 1.0 / tl.sqrt(var + eps), mask=mask_m)


@triton.jit(do_not_specialize=["M", "rows_per_program"])
def _layernorm_bwd_kernel(
    dy_ptr,
    x_ptr,
    residual_ptr,
    mean_ptr,
    rstd_ptr,
    norm_weight_ptr,
    dx_ptr,
    dw_ptr,
    db_ptr,
    M,
    C,
    rows_per_program,
    stride_xm,
    HAS_RESIDUAL: tl.constexpr,
    HAS_PARAMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    w = tl.zeros([BLOCK_C], tl.float32) + 1.0
    if norm_weight_ptr is not None:
        w = tl.load(norm_weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK_C], tl.float32)
    db = tl.zeros([BLOCK_C], tl.float32)
    first = pid * rows_per_program
    for m in range(first, tl.minimum(first + rows_per_program, M), BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_c[None, :]
        offs_m = offs_m.to(tl.int64)
        offs = offs_m[:, None] * C + offs_c[None, :]
        mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_c[None, :], mask=mask, other=0.0)
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        xhat = tl.where(mask, (x.to(tl.float32) - mean[:, None]) * rstd[:, None], 0.0)
        dw += tl.sum(dy * xhat, axis=0)
        db += tl.sum(dy, axis=0)
        dxhat = dy * w[None, :]
        c1 = tl.sum(dxhat, axis=1) / C
        c2 = tl.sum(dxhat * xhat, axis=1) / C
        dx = (dxhat - c1[:, None] - xhat * c2[:, None]) * rstd[:, None]
        if HAS_RESIDUAL:
            dx += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if HAS_PARAMS:
        tl.store(dw_ptr + pid * C + offs_c, dw, mask=mask_c)
        tl.store(db_ptr + pid * C + offs_c, db, mask=mask_c)


@triton.jit(do_not_specialize=["M"])
def _sum_rows_kernel(
    x_ptr,
    out_ptr,
    M,
    C,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Column sums of a float32 (M, C), rows taken in order."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    total = tl.zeros([BLOCK_C], tl.float32)
    for m in range(0, M, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask = (offs_m < M)[:, None] & mask_c[None, :]
        offs = offs_m.to(tl.int64)[:, None] * C + offs_c[None, :]
        total += tl.sum(tl.load(x_ptr + offs, mask=mask, other=0.0), axis=0)
    tl.store(out_ptr + offs_c, total.to(out_ptr.dtype.element_ty), mask=mask_c)


def row_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """mean and 1 / sqrt(var + eps) of each row, float32. x: (M, C) -> (M,), (M,)."""
    M, C = x.shape
    mean = torch.empty(M, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if M:
        config = tuned.row_stats(C)
        _row_stats_kernel[(triton.cdiv(M, config.BLOCK_M),)](
            x,
            mean,
            rstd,
            M,
            C,
            x.stride(0),
            eps,
            BLOCK_M=config.BLOCK_M,
            BLOCK_C=config.BLOCK_N,
            num_warps=config.num_warps,
        )
    return mean, rstd


def layernorm_bwd(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx (+ residual, the gradient that bypasses the norm), dnorm_weight, dnorm_bias.

    dy: (M, C) contiguous; x: (M, C) rows; residual: (M, C) contiguous. dx has x's dtype.
    """
    M, C = x.shape
    dx = torch.empty((M, C), dtype=x.dtype, device=x.device)
    has_params = norm_weight is not None or norm_bias is not None
    if M == 0:
        dw = None if norm_weight is None else torch.zeros_like(norm_weight)
        return dx, dw, None if norm_bias is None else torch.zeros_like(norm_bias)
    config, programs = tuned.layernorm_bwd(M, C, x.device.index)
    rows_per_program = triton.cdiv(triton.cdiv(M, programs), config.BLOCK_M) * config.BLOCK_M
    programs = triton.cdiv(M, rows_per_program)
    partial = x.new_empty((2, programs if has_params else 0, C), dtype=torch.float32)
    _layernorm_bwd_kernel[(programs,)](
        dy,
        x,
        residual,
        mean,
        rstd,
        norm_weight,
        dx,
        partial[0],
        partial[1],
        M,
        C,
        rows_per_program,
        x.stride(0),
        HAS_RESIDUAL=residual is not None,
        HAS_PARAMS=has_params,
        BLOCK_M=config.BLOCK_M,
        BLOCK_C=config.BLOCK_N,
        num_warps=config.num_warps,
    )
    sums = (
        None if p is None else _sum_rows(s, p)
        for s, p in zip(partial, (norm_weight, norm_bias), strict=True)
    )
    return dx, *sums


def _sum_rows(x: Tensor, like: Tensor) -> Tensor:
    out = torch.empty_like(like)
    M, C = x.shape
    config = tuned.SUM_ROWS
    _sum_rows_kernel[(triton.cdiv(C, config.BLOCK_N),)](
        x, out, M, C, BLOCK_M=config.BLOCK_M, BLOCK_C=config.BLOCK_N, num_warps=config.num_warps
    )
    return out
