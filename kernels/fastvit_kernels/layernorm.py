"""LayerNorm's two row kernels: forward, and the whole backward.

forward   mean, rstd = 1 / sqrt(var + eps) and, unless the next product applies the norm itself,
          y = xhat w + b; beside them, weights that the op needs are cast
backward  dx = rstd * (dy w - mean(dy w) - xhat mean(dy w xhat)) + dresidual; y again, for that
          product's dW; partial sums over runs of rows of dy xhat (for w) and of dy (for b), which
          `parameter_grads` adds in order; a copy, path_scale * dx in the compute dtype, for
          the residual branch whose backward comes next (`gradient_copy`)
RMSNorm is the same with mean = 0 and var = mean(x^2), and without mean(dy w) in dx.
Bytes: x read, y written; then dy, x, dresidual read, dx, its copy and y written, once each.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels import tuned
from fastvit_kernels.common import multiple_of_8
from fastvit_kernels.launch import cdiv, launch, only_multiples_of_8
from fastvit_kernels.operands import tokens_per_sample


@triton.jit
def _affine(xhat, norm_weight_ptr, norm_bias_ptr, offs_c, C):
    if norm_weight_ptr is not None:
        w = tl.load(norm_weight_ptr + offs_c, mask=offs_c < C, other=0.0)
        xhat *= w.to(tl.float32)[None, :]
    if norm_bias_ptr is not None:
        b = tl.load(norm_bias_ptr + offs_c, mask=offs_c < C, other=0.0)
        xhat += b.to(tl.float32)[None, :]
    return xhat


@triton.jit
def statistics(x, offs_c, C, eps, RMS: tl.constexpr):
    """Mean and rstd of whole float32 rows, which must be zero past column C."""
    if RMS:
        mean = tl.sum(x, axis=1) * 0.0
        var = tl.sum(x * x, axis=1) / C
    else:
        mean = tl.sum(x, axis=1) / C
        # Deviations from the mean, not mean(x^2) - mean^2, and the mean corrected by their sum: no
        # cancellation in rows whose mean is far from zero.
        deviation = tl.where((offs_c < C)[None, :], x - mean[:, None], 0.0)
        correction = tl.sum(deviation, axis=1) / C
        mean += correction
        var = tl.sum(deviation * deviation, axis=1) / C - correction * correction
    return mean, 1.0 / tl.sqrt(var + eps)


@triton.jit
def _normalize_rows(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    first,
    M,
    C,
    stride_xm,
    eps,
    RMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_m, offs_c = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C)
    mask_m, mask_c = offs_m < M, offs_c < C
    mask = mask_m[:, None] & mask_c[None, :]
    x = tl.load(
        x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm + offs_c[None, :], mask=mask, other=0.0
    ).to(tl.float32)
    mean, rstd = statistics(x, offs_c, C, eps, RMS)
    tl.store(mean_ptr + offs_m, mean, mask=mask_m)
    tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)
    if y_ptr is not None:
        y = _affine((x - mean[:, None]) * rstd[:, None], norm_weight_ptr, norm_bias_ptr, offs_c, C)
        offs = offs_m.to(tl.int64)[:, None] * C + offs_c[None, :]
        tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def cast(block, from_ptr, to_ptr, size, BLOCK: tl.constexpr):
    """Store BLOCK elements in the dtype of to_ptr."""
    offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(from_ptr + offs, mask=offs < size, other=0.0)
    tl.store(to_ptr + offs, value.to(to_ptr.dtype.element_ty), mask=offs < size)


@triton.jit(do_not_specialize=["M"])
def _layernorm_fwd_kernel(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    from1_ptr,
    to1_ptr,
    from2_ptr,
    to2_ptr,
    M,
    C,
    size1,
    size2,
    stride_xm,
    eps,
    RMS: tl.constexpr,
    BY_8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The first programs cast, the others take rows of x."""
    C, stride_xm = multiple_of_8(C, BY_8), multiple_of_8(stride_xm, BY_8)
    pid = tl.program_id(0)
    BLOCK: tl.constexpr = BLOCK_M * BLOCK_C
    first2 = tl.cdiv(size1, BLOCK)
    first_row = first2 + tl.cdiv(size2, BLOCK)
    if pid < first2:
        if from1_ptr is not None:
            cast(pid, from1_ptr, to1_ptr, size1, BLOCK)
    elif pid < first_row:
        if from2_ptr is not None:
            cast(pid - first2, from2_ptr, to2_ptr, size2, BLOCK)
    else:
        pointers = (x_ptr, norm_weight_ptr, norm_bias_ptr, y_ptr, mean_ptr, rstd_ptr)
        rows = ((pid - first_row) * BLOCK_M, M, C, stride_xm, eps)
        _normalize_rows(*pointers, *rows, RMS, BLOCK_M, BLOCK_C)


@triton.jit(do_not_specialize=["M", "rows_per_program", "tokens"])
def _layernorm_bwd_kernel(
    dy_ptr,
    x_ptr,
    residual_ptr,
    mean_ptr,
    rstd_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    dx_ptr,
    copy_ptr,
    path_scale_ptr,
    y_ptr,
    norm_rows_ptr,
    M,
    C,
    rows_per_program,
    tokens,
    stride_xm,
    RMS: tl.constexpr,
    BY_8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    C, stride_xm = multiple_of_8(C, BY_8), multiple_of_8(stride_xm, BY_8)
    pid = tl.program_id(0)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    w, b = tl.zeros([BLOCK_C], tl.float32) + 1.0, tl.zeros([BLOCK_C], tl.float32)
    if norm_weight_ptr is not None:
        w = tl.load(norm_weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    if norm_bias_ptr is not None:
        b = tl.load(norm_bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK_C], tl.float32)
    db = tl.zeros([BLOCK_C], tl.float32)
    first = pid * rows_per_program
    end = tl.minimum(first + rows_per_program, M)
    # Pipelined: the next rows load while these are summed.
    for m in tl.range(first, end, BLOCK_M, num_stages=NUM_STAGES):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_c[None, :]
        offs_m = offs_m.to(tl.int64)
        offs = offs_m[:, None] * C + offs_c[None, :]
        mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_c[None, :], mask=mask, other=0.0)
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        residual = 0.0
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        xhat = tl.where(mask, (x.to(tl.float32) - mean[:, None]) * rstd[:, None], 0.0)
        if norm_rows_ptr is not None:
            dw += tl.sum(dy * xhat, axis=0)
            db += tl.sum(dy, axis=0)
        if y_ptr is not None:
            y = xhat * w[None, :] + b[None, :]
            tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)
        dxhat = dy * w[None, :]
        dx = dxhat - xhat * (tl.sum(dxhat * xhat, axis=1) / C)[:, None]
        if not RMS:
            dx -= (tl.sum(dxhat, axis=1) / C)[:, None]
        dx = dx * rstd[:, None] + residual
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if copy_ptr is not None:
            if path_scale_ptr is not None:
                sample = tl.minimum(offs_m, M - 1) // tokens
                dx *= tl.load(path_scale_ptr + sample).to(tl.float32)[:, None]
            tl.store(copy_ptr + offs, dx.to(copy_ptr.dtype.element_ty), mask=mask)
    if norm_rows_ptr is not None:
        tl.store(norm_rows_ptr + pid * 2 * C + offs_c, dw, mask=mask_c)
        tl.store(norm_rows_ptr + (pid * 2 + 1) * C + offs_c, db, mask=mask_c)


Casts = Sequence[tuple[Tensor, Tensor]]  # at most two (source, contiguous target)


def cast_args(casts: Casts, block: int) -> tuple[int, list[Tensor | None], list[int]]:
    """The programs that cast, of `block` elements each; the kernel's pointers and sizes."""
    tensors = [t for source, target in casts for t in (source.contiguous(), target)]
    sizes = [*(target.numel() for _, target in casts), 0, 0][:2]
    return sum(cdiv(n, block) for n in sizes), [*tensors, *[None] * 4][:4], sizes


def layernorm_fwd(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    rms: bool,
    y_dtype: torch.dtype | None = None,
    casts: Casts = (),
) -> tuple[Tensor | None, Tensor, Tensor]:
    """y = norm(x) in y_dtype (None: not written), mean and rstd.

    x: (M, C), unit column stride -> y (M, C); mean and rstd (M,), float32.
    """
    M, C = x.shape
    mean = torch.empty(M, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    y = None if y_dtype is None else torch.empty((M, C), dtype=y_dtype, device=x.device)
    if M:
        config = tuned.layernorm_fwd(C)
        programs, cast_tensors, sizes = cast_args(casts, config.BLOCK_M * config.BLOCK_N)
        launch(
            _layernorm_fwd_kernel,
            (programs + cdiv(M, config.BLOCK_M),),
            x,
            norm_weight,
            norm_bias,
            y,
            mean,
            rstd,
            *cast_tensors,
            M,
            C,
            *sizes,
            x.stride(0),
            eps,
            RMS=rms,
            BY_8=only_multiples_of_8(C, x.stride(0)),
            BLOCK_M=config.BLOCK_M,
            BLOCK_C=config.BLOCK_N,
            num_warps=config.num_warps,
        )
    return y, mean, rstd


def layernorm_bwd(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    rms: bool,
    residual: Tensor | None = None,
    y_dtype: torch.dtype | None = None,
    copy_dtype: torch.dtype | None = None,
    path_scale: Tensor | None = None,
    needs_norm: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """dx (+ residual, the gradient that bypasses the norm), path_scale * dx in copy_dtype, y in
    y_dtype (dtype None: not written), and the rows (R, 2, C) that add up to dnorm_weight and
    dnorm_bias (None if there is neither, or not needs_norm).

    dy, residual: (M, C) contiguous; x: (M, C), unit column stride. dx has x's dtype.
    """
    M, C = x.shape
    dx = torch.empty((M, C), dtype=x.dtype, device=x.device)
    y = None if y_dtype is None else torch.empty((M, C), dtype=y_dtype, device=x.device)
    copy = None if copy_dtype is None else torch.empty_like(dx, dtype=copy_dtype)
    config, programs = tuned.layernorm_bwd(M, C, x.dtype, x.device.index)
    rows_per_program = cdiv(cdiv(M, programs), config.BLOCK_M) * config.BLOCK_M
    programs = cdiv(M, rows_per_program)
    has_params = needs_norm and (norm_weight is not None or norm_bias is not None)
    norm_rows = x.new_empty((programs, 2, C), dtype=torch.float32) if has_params else None
    launch(
        _layernorm_bwd_kernel,
        (programs,),
        dy,
        x,
        residual,
        mean,
        rstd,
        norm_weight,
        norm_bias,
        dx,
        copy,
        path_scale,
        y,
        norm_rows,
        M,
        C,
        rows_per_program,
        tokens_per_sample(M, path_scale),
        x.stride(0),
        RMS=rms,
        BY_8=only_multiples_of_8(C, x.stride(0)),
        BLOCK_M=config.BLOCK_M,
        BLOCK_C=config.BLOCK_N,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
        maxnreg=config.maxnreg,
    )
    return dx, copy, y, norm_rows
