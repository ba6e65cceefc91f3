"""x + path_scale * layer_scale * fc2(GELU(fc1(LayerNorm(x)))) in one kernel, for short rows.

forward   a program keeps BLOCK_M rows of LayerNorm(x) in shared memory and fc2's accumulator for
          them in registers, and loops over the hidden width F in chunks of BLOCK_F: the hidden
          activation never leaves the SM; u is written only if a backward will read it
backward  du = (g W2) GELU'(u) by chunks, du and GELU(u) written for dW1 and dW2; du W1 is summed in
          registers, where LayerNorm's backward and the residual's gradient follow
Rows are split into pieces: of BLOCK_K columns as operands, of BLOCK_C columns as accumulators.
C = 192 is three pieces of 64, without padding.
With save="recompute" backward recomputes u by the forward kernel without fc2: bitwise the same u.

By estimates for H100, it pays where `tuned.mlp_narrow` chooses it: at C = 192 and batch 256,
inference moves 39 MB where three launches move 233 MB. It does not pay
  with few rows: each program loads both weights whole, 0.6 MB at C = 192, chunk after chunk
  at C = 384: the accumulator of 128 rows takes 192 of 255 registers, and programs of 64 rows load
    1.9 GB of weights from L2 at batch 256
  on A100, B200 and RTX: FLOPs or GELU take the time that is saved on memory
"""

# ruff: noqa: RUF005 - Triton cannot unpack into a tuple, only concatenate tuples.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastvit_kernels import tuned
from fastvit_kernels.common import dgelu, dot, gelu, wait_for_wgmma
from fastvit_kernels.launch import cdiv, launch
from fastvit_kernels.operands import TL_DTYPE, descriptor, tma_compatible, tokens_per_sample


@triton.constexpr_function
def num_pieces(C, BLOCK_C):
    return -(-C // BLOCK_C)


@triton.jit
def _load_piece(
    ptr, first, rows, mask_m, i, C: tl.constexpr, BLOCK_C: tl.constexpr, KEEP: tl.constexpr
):
    """Piece i of rows of a contiguous (M, C) matrix; zero past the last row and column."""
    offs_c = i * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = mask_m[:, None] & (offs_c < C)[None, :]
    ptrs = ptr + first * C + (rows[:, None] * C + offs_c[None, :])
    return tl.load(ptrs, mask=mask, other=0.0, eviction_policy=KEEP)


@triton.jit
def _store_piece(ptr, block, first, rows, mask_m, i, C: tl.constexpr, BLOCK_C: tl.constexpr):
    offs_c = i * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = mask_m[:, None] & (offs_c < C)[None, :]
    ptrs = ptr + first * C + (rows[:, None] * C + offs_c[None, :])
    tl.store(ptrs, block.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _columns(ptr, i, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Piece i of a vector (C,), to broadcast over rows."""
    offs_c = i * BLOCK_C + tl.arange(0, BLOCK_C)
    return tl.load(ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _scaled(block, vector_ptr, i, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Piece i times a vector (C,), if there is one."""
    if vector_ptr is not None:
        block = block.to(tl.float32) * _columns(vector_ptr, i, C, BLOCK_C)
    return block


@triton.jit
def _affine(xhat, norm_weight_ptr, norm_bias_ptr, i, C: tl.constexpr, BLOCK_C: tl.constexpr):
    y = _scaled(xhat, norm_weight_ptr, i, C, BLOCK_C)
    if norm_bias_ptr is not None:
        y = y + _columns(norm_bias_ptr, i, C, BLOCK_C)
    return y


@triton.jit
def _deviation(block, mean, i, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Piece i minus the rows' means; zero in padded columns."""
    block = block.to(tl.float32) - mean[:, None]
    if (i + 1) * BLOCK_C > C:
        offs_c = i * BLOCK_C + tl.arange(0, BLOCK_C)
        block = tl.where((offs_c < C)[None, :], block, 0.0)
    return block


@triton.jit
def _xhat(
    x_ptr,
    first,
    rows,
    mask_m,
    mean,
    rstd,
    i,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    KEEP: tl.constexpr,
):
    x = _load_piece(x_ptr, first, rows, mask_m, i, C, BLOCK_C, KEEP)
    return _deviation(x, mean, i, C, BLOCK_C) * rstd[:, None]


@triton.jit
def _statistics(tile, eps, C: tl.constexpr, BLOCK_C: tl.constexpr, RMS: tl.constexpr):
    """Mean and rstd as in `layernorm.statistics`: deviations, the mean corrected by their sum."""
    mean = tl.zeros([tile[0].shape[0]], tl.float32)
    correction = tl.zeros([tile[0].shape[0]], tl.float32)
    var = tl.zeros([tile[0].shape[0]], tl.float32)
    if not RMS:
        for i in tl.static_range(num_pieces(C, BLOCK_C)):
            mean += tl.sum(tile[i].to(tl.float32), axis=1)
        mean = mean / C
    for i in tl.static_range(num_pieces(C, BLOCK_C)):
        deviation = _deviation(tile[i], mean, i, C, BLOCK_C)
        correction += tl.sum(deviation, axis=1)
        var += tl.sum(deviation * deviation, axis=1)
    var = var / C
    if not RMS:
        correction = correction / C
        mean += correction
        var -= correction * correction
    return mean, 1.0 / tl.sqrt(var + eps)


@triton.jit
def _zeros(C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr):
    tile = ()
    for _ in tl.static_range(num_pieces(C, BLOCK_C)):
        tile = tile + (tl.zeros([BLOCK_M, BLOCK_C], tl.float32),)
    return tile


@triton.jit
def _path_scale(path_scale_ptr, rows, M, tokens):
    return tl.load(path_scale_ptr + tl.minimum(rows, M - 1) // tokens).to(tl.float32)


@triton.jit(do_not_specialize=["M", "tokens"])
def _mlp_narrow_fwd_kernel(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    w1_desc,
    fc1_bias_ptr,
    w2_desc,
    fc2_bias_ptr,
    layer_scale_ptr,
    path_scale_ptr,
    out_ptr,
    u_ptr,
    mean_ptr,
    rstd_ptr,
    M,
    F,
    tokens,
    eps,
    C: tl.constexpr,
    RMS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """u and out: each written if given."""
    # The offset of a program's first row needs 64 bits; those from there on fit 32.
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    mask_m = rows < M - first
    tile = ()
    for i in tl.static_range(num_pieces(C, BLOCK_K)):
        tile = tile + (_load_piece(x_ptr, first, rows, mask_m, i, C, BLOCK_K, "evict_last"),)
    mean, rstd = _statistics(tile, eps, C, BLOCK_K, RMS)
    tl.store(mean_ptr + first + rows, mean, mask=mask_m)
    tl.store(rstd_ptr + first + rows, rstd, mask=mask_m)
    y = ()
    for i in tl.static_range(num_pieces(C, BLOCK_K)):
        xhat = _deviation(tile[i], mean, i, C, BLOCK_K) * rstd[:, None]
        y = y + (_affine(xhat, norm_weight_ptr, norm_bias_ptr, i, C, BLOCK_K).to(COMPUTE),)

    acc = _zeros(C, BLOCK_C, BLOCK_M)
    for f in range(0, F, BLOCK_F):
        offs_f = f + tl.arange(0, BLOCK_F)
        mask_f = offs_f < F
        u = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
        for i in tl.static_range(num_pieces(C, BLOCK_K)):
            u = dot(y[i], tl.trans(w1_desc.load([f, i * BLOCK_K])), u, "ieee")
        if fc1_bias_ptr is not None:
            b1 = tl.load(fc1_bias_ptr + offs_f, mask=mask_f, other=0.0).to(tl.float32)
            u += b1[None, :]
        if u_ptr is not None:
            u_ptrs = u_ptr + first * F + (rows[:, None] * F + offs_f[None, :])
            mask = mask_m[:, None] & mask_f[None, :]
            tl.store(u_ptrs, u.to(u_ptr.dtype.element_ty), mask=mask)
        if out_ptr is not None:
            h = gelu(u, ACTIVATION, False).to(COMPUTE)
            total = ()
            for i in tl.static_range(num_pieces(C, BLOCK_C)):
                w = tl.trans(w2_desc.load([i * BLOCK_C, f]))
                total = total + (dot(h, w, acc[i], "ieee"),)
            acc = total
            wait_for_wgmma()

    if out_ptr is None:
        return
    path_scale = tl.zeros([BLOCK_M], tl.float32)
    if path_scale_ptr is not None:
        path_scale = _path_scale(path_scale_ptr, first + rows, M, tokens)
    for i in tl.static_range(num_pieces(C, BLOCK_C)):
        block = acc[i]
        if fc2_bias_ptr is not None:
            block += _columns(fc2_bias_ptr, i, C, BLOCK_C)
        block = _scaled(block, layer_scale_ptr, i, C, BLOCK_C)
        if path_scale_ptr is not None:
            block *= path_scale[:, None]
        x = _load_piece(x_ptr, first, rows, mask_m, i, C, BLOCK_C, "evict_first")
        block += x.to(tl.float32)
        _store_piece(out_ptr, block, first, rows, mask_m, i, C, BLOCK_C)


@triton.jit(do_not_specialize=["M", "tokens"])
def _mlp_narrow_bwd_kernel(
    g_ptr,
    dout_ptr,
    x_ptr,
    u_ptr,
    mean_ptr,
    rstd_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    w1_desc,
    w2_desc,
    layer_scale_ptr,
    path_scale_ptr,
    dx_ptr,
    copy_ptr,
    y_ptr,
    du_ptr,
    h_ptr,
    norm_rows_ptr,
    M,
    F,
    tokens,
    C: tl.constexpr,
    RMS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """g, dout: gradients of the branch and of the residual. Also writes, each if given, y, du, h
    and norm_rows for the parameters' gradients, and copy = path_scale * dx in the compute dtype.
    """
    pid = tl.program_id(0)
    first = pid.to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    mask_m = rows < M - first
    a = ()
    for i in tl.static_range(num_pieces(C, BLOCK_K)):
        g = _load_piece(g_ptr, first, rows, mask_m, i, C, BLOCK_K, "")
        a = a + (_scaled(g, layer_scale_ptr, i, C, BLOCK_K).to(COMPUTE),)
    mean = tl.load(mean_ptr + first + rows, mask=mask_m, other=0.0)
    rstd = tl.load(rstd_ptr + first + rows, mask=mask_m, other=0.0)

    dy = _zeros(C, BLOCK_C, BLOCK_M)
    for f in range(0, F, BLOCK_F):
        offs_f = f + tl.arange(0, BLOCK_F)
        mask_f = offs_f < F
        mask = mask_m[:, None] & mask_f[None, :]
        offs = rows[:, None] * F + offs_f[None, :]
        u = tl.load(u_ptr + first * F + offs, mask=mask, other=0.0).to(tl.float32)
        du = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
        for i in tl.static_range(num_pieces(C, BLOCK_K)):
            du = dot(a[i], w2_desc.load([i * BLOCK_K, f]), du, "ieee")
        if h_ptr is not None:
            tl.store(h_ptr + first * F + offs, gelu(u, ACTIVATION, False).to(COMPUTE), mask=mask)
        du = (du * dgelu(u, ACTIVATION, False)).to(COMPUTE)
        if du_ptr is not None:
            tl.store(du_ptr + first * F + offs, du, mask=mask)
        total = ()
        for i in tl.static_range(num_pieces(C, BLOCK_C)):
            w = w1_desc.load([f, i * BLOCK_C])
            total = total + (dot(du, w, dy[i], "ieee"),)
        dy = total
        wait_for_wgmma()

    # Two passes, each of which loads x: registers do not hold all of xhat in addition to dy.
    slope = tl.zeros([BLOCK_M], tl.float32)
    shift = tl.zeros([BLOCK_M], tl.float32)
    for i in tl.static_range(num_pieces(C, BLOCK_C)):
        xhat = _xhat(x_ptr, first, rows, mask_m, mean, rstd, i, C, BLOCK_C, "evict_last")
        if y_ptr is not None:
            y = _affine(xhat, norm_weight_ptr, norm_bias_ptr, i, C, BLOCK_C)
            _store_piece(y_ptr, y, first, rows, mask_m, i, C, BLOCK_C)
        if norm_rows_ptr is not None:
            offs_c = i * BLOCK_C + tl.arange(0, BLOCK_C)
            sums = norm_rows_ptr + pid.to(tl.int64) * 2 * C + offs_c
            tl.store(sums, tl.sum(dy[i] * xhat, axis=0), mask=offs_c < C)
            tl.store(sums + C, tl.sum(dy[i], axis=0), mask=offs_c < C)
        dxhat = _scaled(dy[i], norm_weight_ptr, i, C, BLOCK_C)
        slope += tl.sum(dxhat * xhat, axis=1) / C
        if not RMS:
            shift += tl.sum(dxhat, axis=1) / C
    for i in tl.static_range(num_pieces(C, BLOCK_C)):
        xhat = _xhat(x_ptr, first, rows, mask_m, mean, rstd, i, C, BLOCK_C, "evict_first")
        dxhat = _scaled(dy[i], norm_weight_ptr, i, C, BLOCK_C)
        dx = (dxhat - xhat * slope[:, None] - shift[:, None]) * rstd[:, None]
        dout = _load_piece(dout_ptr, first, rows, mask_m, i, C, BLOCK_C, "")
        dx += dout.to(tl.float32)
        _store_piece(dx_ptr, dx, first, rows, mask_m, i, C, BLOCK_C)
        if copy_ptr is not None:
            if path_scale_ptr is not None:
                dx *= _path_scale(path_scale_ptr, first + rows, M, tokens)[:, None]
            _store_piece(copy_ptr, dx, first, rows, mask_m, i, C, BLOCK_C)


def config(kernel: str, x: Tensor, fc1_weight: Tensor, fc2_weight: Tensor) -> tuned.Config | None:
    """The configuration of `kernel`, "fwd" or "bwd"; None if separate GEMMs are to run instead."""
    found = tuned.mlp_narrow(kernel, *x.shape, fc1_weight.dtype, x.device.index)
    weights = (fc1_weight, fc2_weight)
    loadable = all(w.is_contiguous() for w in weights) and tma_compatible(*weights)
    return found if loadable else None


def _descriptors(
    config: tuned.Config, fc1_weight: Tensor, fc2_weight: Tensor, block1: int, block2: int
) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Of both weights; block1, block2: the size of their tiles along C."""
    w1 = descriptor(fc1_weight, [config.BLOCK_N, block1])
    return w1, descriptor(fc2_weight, [block2, config.BLOCK_N])


def _sum_block(config: tuned.Config) -> int:
    """BLOCK_C: columns of a piece of the accumulator, whose epilogue needs registers too."""
    return config.BLOCK_K // config.SUBTILES


def _constants(
    config: tuned.Config, C: int, rms: bool, activation: str, dtype: torch.dtype
) -> dict[str, Any]:
    return {
        "C": C,
        "RMS": rms,
        "ACTIVATION": activation,
        "COMPUTE": TL_DTYPE[dtype],
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_F": config.BLOCK_N,
        "BLOCK_K": config.BLOCK_K,
        "BLOCK_C": _sum_block(config),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def mlp_fwd(
    config: tuned.Config,
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
    out: Tensor | None,
    u: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Write out (M, C) and the pre-activation u (M, F), each if given; return mean and rstd."""
    M, C = x.shape
    mean = torch.empty(M, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    blocks = config.BLOCK_K, _sum_block(config)
    w1, w2 = _descriptors(config, fc1_weight, fc2_weight, *blocks)
    launch(
        _mlp_narrow_fwd_kernel,
        (cdiv(M, config.BLOCK_M),),
        x,
        norm_weight,
        norm_bias,
        w1,
        fc1_bias,
        w2,
        fc2_bias,
        layer_scale,
        path_scale,
        out,
        u,
        mean,
        rstd,
        M,
        len(fc1_weight),
        tokens_per_sample(M, path_scale),
        eps,
        **_constants(config, C, rms, activation, fc1_weight.dtype),
    )
    return mean, rstd


def mlp_bwd(
    config: tuned.Config,
    dout: Tensor,
    g: Tensor,
    x: Tensor,
    u: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    layer_scale: Tensor | None,
    rms: bool,
    activation: str,
    needs_norm: bool,
    needs_fc: bool,
    copies: bool,
    path_scale: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx (M, C); path_scale * dx in the compute dtype (with `copies`); then what
    the parameters' gradients are computed from: y, the rows (R, 2, C) that add up to dnorm_weight
    and dnorm_bias (None without needs_norm or either), du and h = GELU(u) (y, du and h None without
    needs_fc).
    """
    M, C = x.shape
    programs = cdiv(M, config.BLOCK_M)
    dx = torch.empty_like(x)
    copy = fc1_weight.new_empty(x.shape) if copies else None
    y = fc1_weight.new_empty(x.shape) if needs_fc else None
    du, h = (torch.empty_like(u) if needs_fc else None for _ in range(2))
    has_params = needs_norm and (norm_weight is not None or norm_bias is not None)
    norm_rows = x.new_empty((programs, 2, C), dtype=torch.float32) if has_params else None
    launch(
        _mlp_narrow_bwd_kernel,
        (programs,),
        g,
        dout,
        x,
        u,
        mean,
        rstd,
        norm_weight,
        norm_bias,
        *_descriptors(config, fc1_weight, fc2_weight, _sum_block(config), config.BLOCK_K),
        layer_scale,
        path_scale,
        dx,
        copy,
        y,
        du,
        h,
        norm_rows,
        M,
        len(fc1_weight),
        tokens_per_sample(M, path_scale),
        **_constants(config, C, rms, activation, fc1_weight.dtype),
    )
    return dx, copy, y, norm_rows, du, h
