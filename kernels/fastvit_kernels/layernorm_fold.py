"""LayerNorm folded into the product that follows it.

norm(x) W^T + b = scale (z W'^T - shift s) + b'
W' = norm_weight W,  s = W' 1,  b' = b + W norm_bias
z = x, shift = mean and scale = rstd (0 for a constant row far from zero); or, for "far" rows (see
below), z = (x - mean) rstd, shift = 0 and scale = 1

The product loads z through TMA and its epilogue does the rest, two instructions per output element:
no tile passes through registers on its way to the tensor cores, and a 16-bit x is z, so that no
normalized copy of it is written and read. s is summed from W' as rounded, so a row's mean cancels
up to float32 accumulation error, however far it lies from zero; rounding W' instead of the
normalized x causes an error of the same size (in float16 W' is divided by the largest norm weight,
so that it is not subnormal). RMSNorm has mean = 0.
A float32 x, as under autocast, is rounded to a 16-bit z. Rows whose mean is over half a standard
deviation from zero would lose digits, and rows whose deviation is under 2^-10 or over 2^9 would
leave float16's range: for these, the far rows, z is the normalized row.
Usually the op that produced x has already computed its statistics (`row_statistics`): then x is
read only for far rows. One launch does all this, computes W', s and b', and casts the weights that
the op needs unfolded.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels import tuned
from fastvit_kernels.common import multiple_of_8
from fastvit_kernels.launch import cdiv, launch, only_multiples_of_8
from fastvit_kernels.layernorm import Casts, cast, cast_args, statistics

ROWS = 64  # rows per program, where it merges the statistics of their pieces


class Folded(NamedTuple):
    """Operands of the product and of its epilogue; mean and rstd of x."""

    weight: Tensor
    z: Tensor
    sums: Tensor
    bias: Tensor
    shift: Tensor
    scale: Tensor
    mean: Tensor
    rstd: Tensor


@triton.jit
def _unit(norm_weight_ptr, C, BLOCK_C: tl.constexpr, HALF: tl.constexpr):
    """The largest norm weight rounded down to a power of two: with HALF, W' is divided and `scale`
    multiplied by it. Otherwise 1.
    """
    unit = 1.0
    if HALF:
        offs_c = tl.arange(0, BLOCK_C)
        w = tl.load(norm_weight_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)
        exponent = tl.max(tl.abs(w), axis=0).to(tl.int32, bitcast=True) & 0x7F800000
        unit = exponent.to(tl.float32, bitcast=True)
        unit = tl.where((unit > 0.0) & (unit < float("inf")), unit, 1.0)
    return unit


@triton.jit
def _fold_weight(
    offs_n,
    weight_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    folded_ptr,
    sums_ptr,
    folded_bias_ptr,
    N,
    C,
    stride_wn,
    unit,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_c = tl.arange(0, BLOCK_C)
    mask_c, mask_n = offs_c < C, offs_n < N
    mask = mask_n[:, None] & mask_c[None, :]
    rows = offs_n.to(tl.int64)[:, None]
    w = tl.load(weight_ptr + rows * stride_wn + offs_c[None, :], mask=mask, other=0.0)
    w = w.to(tl.float32)
    bias = tl.zeros([BLOCK_M], tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    if norm_bias_ptr is not None:
        norm_bias = tl.load(norm_bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        bias += tl.sum(w * norm_bias[None, :], axis=1)
    if norm_weight_ptr is not None:
        norm_weight = tl.load(norm_weight_ptr + offs_c, mask=mask_c, other=0.0)
        w *= (norm_weight.to(tl.float32) / unit)[None, :]
    folded = w.to(folded_ptr.dtype.element_ty)
    tl.store(folded_ptr + rows * C + offs_c[None, :], folded, mask=mask)
    tl.store(sums_ptr + offs_n, tl.sum(folded.to(tl.float32), axis=1), mask=mask_n)
    tl.store(folded_bias_ptr + offs_n, bias, mask=mask_n)


@triton.jit
def _merge(
    parts_ptr, offs_m, M, C, eps, RMS: tl.constexpr, PIECES: tl.constexpr, WIDTH: tl.constexpr
):
    """Mean and rstd of rows, merged by Chan's formula from pieces of WIDTH columns each."""
    mask = offs_m < M
    total = tl.zeros([offs_m.shape[0]], tl.float32)
    for i in range(PIECES):
        part = tl.load(parts_ptr + 2 * i * M + offs_m, mask=mask, other=0.0)
        total += part * tl.minimum(C - i * WIDTH, WIDTH)
    mean = total / C
    var = tl.zeros([offs_m.shape[0]], tl.float32)
    for i in range(PIECES):
        deviation = tl.load(parts_ptr + 2 * i * M + offs_m, mask=mask, other=0.0)
        if not RMS:
            deviation -= mean
        var += tl.load(parts_ptr + (2 * i + 1) * M + offs_m, mask=mask, other=0.0)
        var += deviation * deviation * tl.minimum(C - i * WIDTH, WIDTH)
    if RMS:
        mean = mean * 0.0
    return mean, 1.0 / tl.sqrt(var / C + eps)


@triton.jit
def _variance(rstd, eps):
    """The row's own variance, without eps: rounding does not depend on eps."""
    return 1.0 / (rstd * rstd) - eps


@triton.jit
def _is_far(mean, rstd, eps):
    """Mask of rows that are to be normalized before they are rounded to 16 bits."""
    var = _variance(rstd, eps)
    return (mean * mean > 0.25 * var) | (var < 1.0 / (1 << 20)) | (var > 1 << 18)


@triton.jit
def _scale(mean, rstd, eps):
    """rstd, or 0 for a constant row far from zero, where it would only amplify rounding errors."""
    deviates = _variance(rstd, eps) > 1e-12 * mean * mean
    return tl.where(deviates | (tl.abs(mean) * rstd < 1024.0), rstd, 0.0)


@triton.jit
def _round_rows(
    x_ptr,
    z_ptr,
    shift_ptr,
    scale_ptr,
    mean_ptr,
    rstd_ptr,
    first,
    M,
    C,
    stride_xm,
    eps,
    unit,
    RMS: tl.constexpr,
    KNOWN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Store mean and rstd of rows read whole, unless KNOWN; scale; and z and shift, if given."""
    offs_m, offs_c = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C)
    mask_m = offs_m < M
    mask = mask_m[:, None] & (offs_c < C)[None, :]
    rows = offs_m.to(tl.int64)[:, None]
    x = tl.load(x_ptr + rows * stride_xm + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
    if KNOWN:
        mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)
    else:
        mean, rstd = statistics(x, offs_c, C, eps, RMS)
        tl.store(mean_ptr + offs_m, mean, mask=mask_m)
        tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)
    if z_ptr is None:
        tl.store(scale_ptr + offs_m, _scale(mean, rstd, eps) * unit, mask=mask_m)
    else:
        far = _is_far(mean, rstd, eps)
        z = tl.where(far[:, None], (x - mean[:, None]) * rstd[:, None], x)
        tl.store(z_ptr + rows * C + offs_c[None, :], z.to(z_ptr.dtype.element_ty), mask=mask)
        tl.store(shift_ptr + offs_m, tl.where(far, 0.0, mean), mask=mask_m)
        tl.store(scale_ptr + offs_m, tl.where(far, 1.0, rstd) * unit, mask=mask_m)


@triton.jit
def _merge_rows(
    x_ptr,
    z_ptr,
    shift_ptr,
    scale_ptr,
    parts_ptr,
    mean_ptr,
    rstd_ptr,
    first,
    M,
    C,
    stride_xm,
    eps,
    unit,
    RMS: tl.constexpr,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """As `_round_rows`, from statistics of pieces; of z, if given, only far rows are rewritten."""
    offs_m = first + tl.arange(0, ROWS)
    mask_m = offs_m < M
    mean, rstd = _merge(parts_ptr, offs_m, M, C, eps, RMS, PIECES, WIDTH)
    tl.store(mean_ptr + offs_m, mean, mask=mask_m)
    tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)
    if z_ptr is None:
        tl.store(scale_ptr + offs_m, _scale(mean, rstd, eps) * unit, mask=mask_m)
    else:
        far = _is_far(mean, rstd, eps) & mask_m
        tl.store(shift_ptr + offs_m, tl.where(far, 0.0, mean), mask=mask_m)
        tl.store(scale_ptr + offs_m, tl.where(far, 1.0, rstd) * unit, mask=mask_m)
        if tl.max(far.to(tl.int32), axis=0) > 0:
            rows = offs_m.to(tl.int64)[:, None]
            for c in range(0, C, 32):
                offs_c = c + tl.arange(0, 32)
                mask = far[:, None] & (offs_c < C)[None, :]
                x = tl.load(x_ptr + rows * stride_xm + offs_c[None, :], mask=mask, other=0.0)
                z = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
                z_ptrs = z_ptr + rows * C + offs_c[None, :]
                tl.store(z_ptrs, z.to(z_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _layernorm_fold_kernel(
    x_ptr,
    z_ptr,
    shift_ptr,
    scale_ptr,
    parts_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    folded_ptr,
    sums_ptr,
    folded_bias_ptr,
    from1_ptr,
    to1_ptr,
    from2_ptr,
    to2_ptr,
    M,
    C,
    N,
    size1,
    size2,
    stride_xm,
    stride_wn,
    eps,
    RMS: tl.constexpr,
    KNOWN: tl.constexpr,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BY_8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The first programs fold rows of the weight, the next ones cast, the others take rows of x."""
    C, stride_xm = multiple_of_8(C, BY_8), multiple_of_8(stride_xm, BY_8)
    stride_wn = multiple_of_8(stride_wn, BY_8)
    pid, num_n = tl.program_id(0), tl.cdiv(N, BLOCK_M)
    BLOCK: tl.constexpr = BLOCK_M * BLOCK_C
    first2 = num_n + tl.cdiv(size1, BLOCK)
    first_row = first2 + tl.cdiv(size2, BLOCK)
    HALF: tl.constexpr = norm_weight_ptr is not None and folded_ptr.dtype.element_ty == tl.float16
    unit = _unit(norm_weight_ptr, C, BLOCK_C, HALF)
    if pid < num_n:
        _fold_weight(
            pid * BLOCK_M + tl.arange(0, BLOCK_M),
            weight_ptr,
            bias_ptr,
            norm_weight_ptr,
            norm_bias_ptr,
            folded_ptr,
            sums_ptr,
            folded_bias_ptr,
            N,
            C,
            stride_wn,
            unit,
            BLOCK_M,
            BLOCK_C,
        )
    elif pid < first2:
        if from1_ptr is not None:
            cast(pid - num_n, from1_ptr, to1_ptr, size1, BLOCK)
    elif pid < first_row:
        if from2_ptr is not None:
            cast(pid - first2, from2_ptr, to2_ptr, size2, BLOCK)
    elif parts_ptr is not None:
        stats = (parts_ptr, mean_ptr, rstd_ptr)
        rows = ((pid - first_row) * ROWS, M, C, stride_xm, eps, unit)
        _merge_rows(x_ptr, z_ptr, shift_ptr, scale_ptr, *stats, *rows, RMS, PIECES, WIDTH, ROWS)
    else:
        stats = (mean_ptr, rstd_ptr)
        rows = ((pid - first_row) * BLOCK_M, M, C, stride_xm, eps, unit)
        _round_rows(x_ptr, z_ptr, shift_ptr, scale_ptr, *stats, *rows, RMS, KNOWN, BLOCK_M, BLOCK_C)


def layernorm_fold(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    dtype: torch.dtype,
    parts: Tensor | None = None,
    z: Tensor | None = None,
    known: tuple[Tensor, Tensor] | None = None,
    casts: Casts = (),
) -> Folded:
    """W' (N, C) and z (M, C) in `dtype`; s, b' (N,), shift, scale, mean and rstd (M,), float32.

    x: (M, C), unit column stride; weight: (N, C) in `dtype` or wider; parts: statistics of x's
    pieces (`row_statistics`); z: with parts, a float32 x rounded to `dtype`, whose far rows are
    overwritten; known: mean and rstd of x, if computed before.
    """
    (M, C), N = x.shape, len(weight)
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    folded = torch.empty((N, C), dtype=dtype, device=x.device)
    sums = torch.empty(N, dtype=torch.float32, device=x.device)
    folded_bias = torch.empty_like(sums)
    # Two allocations: an op's outputs must not share memory.
    mean, rstd = known or (x.new_empty(M, dtype=torch.float32) for _ in range(2))
    shift, scale = mean, torch.empty_like(mean)
    rounds = x.dtype != dtype
    if rounds:
        z = torch.empty((M, C), dtype=dtype, device=x.device) if z is None else z
        shift = torch.empty_like(mean)
    config = tuned.layernorm_fwd(C)
    programs, cast_tensors, sizes = cast_args(casts, config.BLOCK_M * config.BLOCK_N)
    pieces = 0 if parts is None else len(parts)
    rows = config.BLOCK_M if parts is None else ROWS
    launch(
        _layernorm_fold_kernel,
        (cdiv(N, config.BLOCK_M) + programs + cdiv(M, rows),),
        x,
        z,
        shift if rounds else None,
        scale,
        parts,
        mean,
        rstd,
        weight,
        bias,
        norm_weight,
        norm_bias,
        folded,
        sums,
        folded_bias,
        *cast_tensors,
        M,
        C,
        N,
        *sizes,
        x.stride(0),
        weight.stride(0),
        eps,
        RMS=rms,
        KNOWN=known is not None,
        PIECES=pieces,
        WIDTH=triton.next_power_of_2(cdiv(C, pieces)) if pieces else 0,
        ROWS=ROWS,
        BY_8=only_multiples_of_8(C, x.stride(0), weight.stride(0)),
        BLOCK_M=config.BLOCK_M,
        BLOCK_C=config.BLOCK_N,
        num_warps=config.num_warps,
    )
    return Folded(folded, x if z is None else z, sums, folded_bias, shift, scale, mean, rstd)
