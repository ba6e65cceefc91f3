"""One GEMM family for every projection of the model, forward and backward.

`gemm`: C[M, N] = epilogue(prologue(A)[M, K] B[K, N])

Prologues act on the A tile between its load and the product:
    "none"       a
    "layernorm"  (a - mean) * rstd * norm_weight + norm_bias, with precomputed mean and rstd
Epilogues act on the float32 accumulator:
    "none"       acc + bias; with `fold`, in every epilogue, scale * (acc - shift * s) + bias: the
                 part of a LayerNorm that `layernorm_fold` leaves to the epilogue
    "gelu"       GELU(u), u = acc + bias; also stores u for a backward
    "dgelu"      acc * GELU'(u); also stores GELU(u) for the product that reads it next
    "residual"   residual + path_scale[sample] * layer_scale * (acc + bias); also stores, for the
                 LayerNorm that reads it next, the mean and squared deviations of each row's pieces
                 of columns, and a 16-bit copy of float32 rows (`row_statistics`)

Two kernels share the epilogues (`gemm_epilogue`). `_gemm_tma_kernel` is persistent and loads 16-bit
operands, which have no prologue, through TMA descriptors. The tensor cores idle while a program
runs its epilogue, so long epilogues get smaller tiles and two CTAs per SM, one of which multiplies
meanwhile.
`_gemm_kernel` loads through pointers: prologues, float32, few rows, operands that TMA cannot
address (base or row stride not a multiple of 16 bytes), and everything on sm_80 and sm_120.
Operands are multiplied in the compute dtype with float32 accumulation.
Bytes: A once per column of tiles (from L2 after the first), B and C once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels import tuned
from fastvit_kernels.common import dot, multiple_of_8, stagger_programs, tile_order
from fastvit_kernels.gemm_epilogue import finish
from fastvit_kernels.launch import cdiv, launch, only_multiples_of_8
from fastvit_kernels.operands import descriptor, precision, tma_compatible, tokens_per_sample


@triton.jit(do_not_specialize=["M", "tokens"])
def _gemm_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    u_ptr,
    h_ptr,
    residual_ptr,
    copy_ptr,
    parts_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    mean_ptr,
    rstd_ptr,
    sums_ptr,
    layer_scale_ptr,
    path_scale_ptr,
    M,
    N,
    K,
    tokens,
    stride_am,
    stride_bk,
    stride_bn,
    PROLOGUE: tl.constexpr,
    EPILOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    EVEN_K: tl.constexpr,
    BY_8: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
):
    N, K, stride_am = multiple_of_8(N, BY_8), multiple_of_8(K, BY_8), multiple_of_8(stride_am, BY_8)
    if B_TRANSPOSED:
        stride_bn = multiple_of_8(stride_bn, BY_8)
    else:
        stride_bk = multiple_of_8(stride_bk, BY_8)
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid_m, pid_n = tile_order(tl.program_id(0), num_m, num_n, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # Rows and columns past the end wrap to real ones: loads stay unmasked, stores are masked.
    rows = (offs_m % M).to(tl.int64)
    cols = tl.max_contiguous(tl.multiple_of(offs_n % N, 8), 8)
    a_ptrs = a_ptr + rows[:, None] * stride_am + offs_k[None, :]
    b_ptrs = b_ptr + offs_k.to(tl.int64)[:, None] * stride_bk + cols[None, :] * stride_bn

    mean = tl.zeros([BLOCK_M], tl.float32)
    rstd = mean
    path_scale = mean
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + rows)
        rstd = tl.load(rstd_ptr + rows)
    if path_scale_ptr is not None:
        path_scale = tl.load(path_scale_ptr + rows // tokens).to(tl.float32)

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = k + offs_k < K
        if EVEN_K:
            a = tl.load(a_ptrs)
            b = tl.load(b_ptrs)
        else:
            a = tl.load(a_ptrs, mask=mask_k[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=mask_k[:, None], other=0.0)
        if PROLOGUE == "layernorm":
            a = (a.to(tl.float32) - mean[:, None]) * rstd[:, None]
            if norm_weight_ptr is not None:
                w = tl.load(norm_weight_ptr + k + offs_k, mask=mask_k, other=0.0)
                a *= w.to(tl.float32)[None, :]
            if norm_bias_ptr is not None:
                w = tl.load(norm_bias_ptr + k + offs_k, mask=mask_k, other=0.0)
                a += w.to(tl.float32)[None, :]
        acc = dot(a.to(b.dtype), b, acc, PRECISION)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * stride_bk

    matrices = (c_ptr, u_ptr, h_ptr, residual_ptr, copy_ptr, parts_ptr)
    EXACT: tl.constexpr = b_ptr.dtype.element_ty == tl.float32
    out = (matrices, (bias_ptr, layer_scale_ptr, path_scale_ptr, sums_ptr))
    finish(
        acc,
        out,
        offs_m,
        pid_n * BLOCK_N,
        (path_scale, mean, rstd),
        M,
        N,
        EPILOGUE,
        ACTIVATION,
        EXACT,
        BLOCK_M,
        BLOCK_N,
        SUBTILES,
    )


@triton.jit(do_not_specialize=["M", "tokens"])
def _gemm_tma_kernel(
    a_desc,
    b_desc,
    c_ptr,
    u_ptr,
    h_ptr,
    residual_ptr,
    copy_ptr,
    parts_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    sums_ptr,
    layer_scale_ptr,
    path_scale_ptr,
    M,
    N,
    K,
    tokens,
    EPILOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    BY_8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
    STAGGER: tl.constexpr,
):
    """B_TRANSPOSED: b is stored as (N, K), as a weight is in forward. TMA loads zeros past the
    edges.
    """
    N, K = multiple_of_8(N, BY_8), multiple_of_8(K, BY_8)
    tl.assume(K > 0)  # else the flattened loop is compiled twice, once for K == 0
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    if STAGGER:
        stagger_programs(STAGGER)
    matrices = (c_ptr, u_ptr, h_ptr, residual_ptr, copy_ptr, parts_ptr)
    out = (matrices, (bias_ptr, layer_scale_ptr, path_scale_ptr, sums_ptr))
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=True):
        pid_m, pid_n = tile_order(tile, num_m, num_n, GROUP_M)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            a = a_desc.load([pid_m * BLOCK_M, k])
            if B_TRANSPOSED:
                b = tl.trans(b_desc.load([pid_n * BLOCK_N, k]))
            else:
                b = b_desc.load([k, pid_n * BLOCK_N])
            acc = dot(a, b, acc, "ieee")
        offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        path_scale = tl.zeros([BLOCK_M], tl.float32)
        mean = path_scale
        rstd = path_scale
        if path_scale_ptr is not None:
            sample = tl.minimum(offs_m, M - 1) // tokens
            path_scale = tl.load(path_scale_ptr + sample).to(tl.float32)
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + offs_m, mask=offs_m < M, other=0.0)
            rstd = tl.load(rstd_ptr + offs_m, mask=offs_m < M, other=0.0)
        finish(
            acc,
            out,
            offs_m,
            pid_n * BLOCK_N,
            (path_scale, mean, rstd),
            M,
            N,
            EPILOGUE,
            ACTIVATION,
            False,
            BLOCK_M,
            BLOCK_N,
            SUBTILES,
        )


def _config(a: Tensor, b: Tensor, no_prologue: bool, epilogue: str) -> tuple[tuned.Config, Tensor]:
    """The configuration, and b or its transpose, whichever has unit column stride."""
    b_rows = b.t() if b.stride(0) == 1 else b
    tma = no_prologue and tma_compatible(a, b_rows)
    return tuned.gemm(len(a), b.shape[1], b.dtype, a.device.index, tma, epilogue), b_rows


def new_row_statistics(a: Tensor, b: Tensor) -> Tensor:
    """Allocate the row statistics that epilogue "residual" of gemm(a, b) writes: the mean and the
    sum of squared deviations of P pieces of each row, (P, 2, M) float32. The width of a piece is
    N / P rounded up to a power of two.
    """
    config, _ = _config(a, b, True, "residual")
    pieces = cdiv(b.shape[1], config.BLOCK_N // config.SUBTILES)
    return torch.empty((pieces, 2, len(a)), dtype=torch.float32, device=a.device)


def gemm(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    epilogue: str = "none",
    bias: Tensor | None = None,
    norm: tuple[Tensor | None, Tensor | None, Tensor, Tensor] | None = None,
    fold: tuple[Tensor, Tensor, Tensor] | None = None,
    u: Tensor | None = None,
    h: Tensor | None = None,
    residual: Tensor | None = None,
    copy: Tensor | None = None,
    parts: Tensor | None = None,
    layer_scale: Tensor | None = None,
    path_scale: Tensor | None = None,
    activation: str = "gelu",
) -> Tensor:
    """Write epilogue(prologue(a) b) to out and return it. a: (M, K), unit column stride; b: (K, N),
    any strides, in the compute dtype; out: (M, N).

    norm: (norm_weight, norm_bias, mean, rstd) makes the prologue "layernorm"; fold: (shift, scale,
    s) of `layernorm_fold`, float32, with W'^T as b and b' as bias. u: (M, N), read by epilogue
    "dgelu", and written by "gelu" if given; h: (M, N), GELU(u), written by "dgelu" if given; copy:
    (M, N), and parts, from `new_row_statistics`, written by "residual" if given. path_scale: (B,).
    """
    (M, K), N = a.shape, b.shape[1]
    if M == 0:
        return out
    if residual is not None:
        residual = residual.contiguous()
    work = "fold" if fold is not None and epilogue == "none" else epilogue
    config, b_rows = _config(a, b, norm is None, work)
    tiles = cdiv(M, config.BLOCK_M) * cdiv(N, config.BLOCK_N)
    programs = min(tiles, config.CTAS * tuned.num_sms(a.device.index))  # of the persistent kernel
    outputs = (out, u, h, residual, copy, parts, bias)
    scales = (layer_scale, path_scale)
    norm_params, statistics = (None, None), fold or (None, None, None)
    if norm is not None:
        norm_params, statistics = norm[:2], (*norm[2:], None)
    blocks: dict[str, Any] = {
        "BY_8": only_multiples_of_8(N, K, a.stride(0), *(s for s in b.stride() if s != 1)),
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_K": config.BLOCK_K,
        "GROUP_M": config.GROUP_M,
        "SUBTILES": config.SUBTILES,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "maxnreg": config.maxnreg,
    }
    if config.tma:
        b_block = [config.BLOCK_K, config.BLOCK_N]
        launch(
            _gemm_tma_kernel,
            (programs,),
            descriptor(a, [config.BLOCK_M, config.BLOCK_K]),
            descriptor(b_rows, b_block if b_rows is b else b_block[::-1]),
            *outputs,
            *statistics,
            *scales,
            M,
            N,
            K,
            tokens_per_sample(M, path_scale),
            EPILOGUE=epilogue,
            ACTIVATION=activation,
            B_TRANSPOSED=b_rows is not b,
            STAGGER=config.STAGGER if tiles > programs else 0,
            **blocks,
        )
        return out
    launch(
        _gemm_kernel,
        (tiles,),
        a,
        b,
        *outputs,
        *norm_params,
        *statistics,
        *scales,
        M,
        N,
        K,
        tokens_per_sample(M, path_scale),
        a.stride(0),
        b.stride(0),
        b.stride(1),
        PROLOGUE="none" if norm is None else "layernorm",
        EPILOGUE=epilogue,
        ACTIVATION=activation,
        B_TRANSPOSED=b.stride(0) == 1,
        EVEN_K=K % config.BLOCK_K == 0,
        PRECISION=precision(b.dtype),
        **blocks,
    )
    return out
