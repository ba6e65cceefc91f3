"""Weight gradients: dW[N, K] = G[M, N]^T X[M, K] and db[N], the column sums of G.

M, the tokens, is long and dW small: M is cut into slabs, each summed by programs of its own into
float32, and `reduce_slabs` adds the slabs in order: no atomics, bitwise repeatable. db comes from
the tiles of G that one column of programs has loaded anyway. How many slabs is `tuned.gemm_dw`'s.
Bytes: G once per column of tiles and X once per row of them (from L2 but for the first), and two
times 4 S N K for S slabs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels import gemm, tuned
from fastvit_kernels.common import dot
from fastvit_kernels.launch import cdiv, launch


@triton.jit
def _store_slab(dw_ptr, db_ptr, acc, db, pid_k, pid_s, offs_n, offs_k, N, K):
    mask_n = offs_n < N
    offs = (pid_s * N + offs_n).to(tl.int64)[:, None] * K + offs_k[None, :]
    tl.store(dw_ptr + offs, acc, mask=mask_n[:, None] & (offs_k < K)[None, :])
    if pid_k == 0:
        tl.store(db_ptr + pid_s * N + offs_n, db, mask=mask_n)


@triton.jit(do_not_specialize=["M", "slab"])
def _gemm_dw_kernel(
    g_ptr,
    x_ptr,
    dw_ptr,
    db_ptr,
    M,
    N,
    K,
    slab,
    stride_gm,
    stride_xm,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid_n, pid_k, pid_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    cols_n = tl.max_contiguous(tl.multiple_of(offs_n % N, 8), 8)
    cols_k = tl.max_contiguous(tl.multiple_of(offs_k % K, 8), 8)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    db = tl.zeros([BLOCK_N], tl.float32)
    first = pid_s * slab
    for m in range(first, tl.minimum(first + slab, M), BLOCK_M):
        offs_m = (m + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask = (offs_m < M)[:, None]
        g = tl.load(g_ptr + offs_m[:, None] * stride_gm + cols_n[None, :], mask=mask, other=0.0)
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + cols_k[None, :], mask=mask, other=0.0)
        if pid_k == 0:
            db += tl.sum(g.to(tl.float32), axis=0)
        acc = dot(tl.trans(g), x, acc, PRECISION)
    _store_slab(dw_ptr, db_ptr, acc, db, pid_k, pid_s, offs_n, offs_k, N, K)


@triton.jit(do_not_specialize=["M", "slab"])
def _gemm_dw_tma_kernel(
    g_desc,
    x_desc,
    dw_ptr,
    db_ptr,
    M,
    N,
    K,
    slab,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Slabs are whole blocks of rows, so the zeros that TMA gives past row M are all it takes."""
    pid_n, pid_k, pid_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    db = tl.zeros([BLOCK_N], tl.float32)
    first = pid_s * slab
    for m in range(first, tl.minimum(first + slab, M), BLOCK_M):
        g = g_desc.load([m, pid_n * BLOCK_N])
        x = x_desc.load([m, pid_k * BLOCK_K])
        if pid_k == 0:
            db += tl.sum(g.to(tl.float32), axis=0)
        acc = dot(tl.trans(g), x, acc, "ieee")
    _store_slab(dw_ptr, db_ptr, acc, db, pid_k, pid_s, offs_n, offs_k, N, K)


@triton.jit
def _reduce_weight(
    tile,
    slabs_ptr,
    db_slabs_ptr,
    weight_ptr,
    bias_ptr,
    layer_scale_ptr,
    dw_ptr,
    db_ptr,
    dlayer_scale_ptr,
    N,
    K,
    S,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    db = tl.zeros([BLOCK_N], tl.float32)
    for s in range(S):
        db += tl.load(db_slabs_ptr + s * N + offs_n, mask=mask_n, other=0.0)
    layer_scale = tl.zeros([BLOCK_N], tl.float32)
    dlayer_scale = tl.zeros([BLOCK_N], tl.float32)
    if layer_scale_ptr is not None:
        layer_scale = tl.load(layer_scale_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask = mask_n[:, None] & (offs_k < K)[None, :]
        offs = offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
        dw = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        slab_ptrs = slabs_ptr + offs
        for _ in range(S):
            dw += tl.load(slab_ptrs, mask=mask, other=0.0)
            slab_ptrs += N * K
        if layer_scale_ptr is not None:
            weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            dlayer_scale += tl.sum(dw * weight, axis=1)
            dw = dw * layer_scale[:, None]
        tl.store(dw_ptr + offs, dw.to(dw_ptr.dtype.element_ty), mask=mask)
    if layer_scale_ptr is not None:
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            dlayer_scale += bias * db
        dlayer_dtype: tl.constexpr = dlayer_scale_ptr.dtype.element_ty
        tl.store(dlayer_scale_ptr + offs_n, dlayer_scale.to(dlayer_dtype), mask=mask_n)
        db = db * layer_scale
    if db_ptr is not None:
        tl.store(db_ptr + offs_n, db.to(db_ptr.dtype.element_ty), mask=mask_n)


@triton.jit
def _reduce_norm(
    tile,
    rows_ptr,
    dnorm_weight_ptr,
    dnorm_bias_ptr,
    C,
    R,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = offs < C
    dw = tl.zeros([BLOCK_C], tl.float32)
    db = tl.zeros([BLOCK_C], tl.float32)
    for r in range(0, R, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R)
        ptrs = rows_ptr + offs_r.to(tl.int64)[:, None] * (2 * C) + offs[None, :]
        mask_r = (offs_r < R)[:, None] & mask[None, :]
        dw += tl.sum(tl.load(ptrs, mask=mask_r, other=0.0), axis=0)
        db += tl.sum(tl.load(ptrs + C, mask=mask_r, other=0.0), axis=0)
    if dnorm_weight_ptr is not None:
        tl.store(dnorm_weight_ptr + offs, dw.to(dnorm_weight_ptr.dtype.element_ty), mask=mask)
    if dnorm_bias_ptr is not None:
        tl.store(dnorm_bias_ptr + offs, db.to(dnorm_bias_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["S", "S2", "R"])
def _reduce_slabs_kernel(
    slabs_ptr,
    db_slabs_ptr,
    weight_ptr,
    bias_ptr,
    layer_scale_ptr,
    dw_ptr,
    db_ptr,
    dlayer_scale_ptr,
    N,
    K,
    S,
    slabs2_ptr,
    db_slabs2_ptr,
    dw2_ptr,
    db2_ptr,
    N2,
    K2,
    S2,
    norm_rows_ptr,
    dnorm_weight_ptr,
    dnorm_bias_ptr,
    C,
    R,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Add the parts of every parameter's gradient in order: one weight, maybe a second one, and
    the rows that LayerNorm's backward left. With LayerScale, whose branch is layer_scale * y,
    y = x W^T + b and G = g^T x: dW = layer_scale * G, db = layer_scale * sum(g),
    dlayer_scale = <W, G> + b sum(g).
    """
    pid = tl.program_id(0)
    tiles, tiles2 = tl.cdiv(N, BLOCK_N), 0
    if slabs2_ptr is not None:
        tiles2 = tl.cdiv(N2, BLOCK_N)
    if pid < tiles:
        _reduce_weight(
            pid,
            slabs_ptr,
            db_slabs_ptr,
            weight_ptr,
            bias_ptr,
            layer_scale_ptr,
            dw_ptr,
            db_ptr,
            dlayer_scale_ptr,
            N,
            K,
            S,
            BLOCK_N,
            BLOCK_K,
        )
    elif pid < tiles + tiles2:
        if slabs2_ptr is not None:
            _reduce_weight(
                pid - tiles,
                slabs2_ptr,
                db_slabs2_ptr,
                None,
                None,
                None,
                dw2_ptr,
                db2_ptr,
                None,
                N2,
                K2,
                S2,
                BLOCK_N,
                BLOCK_K,
            )
    elif norm_rows_ptr is not None:
        tile = pid - tiles - tiles2
        _reduce_norm(tile, norm_rows_ptr, dnorm_weight_ptr, dnorm_bias_ptr, C, R, BLOCK_R, BLOCK_C)


Slabs = tuple[Tensor, Tensor]


def gemm_dw(g: Tensor, x: Tensor) -> Slabs:
    """The parts of g^T x, (S, N, K), and of g's column sums, (S, N), float32. g: (M, N); x: (M, K),
    rows of one dtype.
    """
    (M, N), K = g.shape, x.shape[1]
    tma = gemm.tma_takes(g, x)
    config, splits = tuned.gemm_dw(M, N, K, x.dtype, g.device.index, tma)
    slab = cdiv(cdiv(M, splits), config.BLOCK_M) * config.BLOCK_M
    slabs, db_slabs = new_slabs(cdiv(M, slab), N, K, g.device)
    grid = (cdiv(N, config.BLOCK_N), cdiv(K, config.BLOCK_K), len(slabs))
    blocks = {
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_K": config.BLOCK_K,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    if config.tma:
        launch(
            _gemm_dw_tma_kernel,
            grid,
            gemm.descriptor(g, [config.BLOCK_M, config.BLOCK_N]),
            gemm.descriptor(x, [config.BLOCK_M, config.BLOCK_K]),
            slabs,
            db_slabs,
            M,
            N,
            K,
            slab,
            **blocks,
        )
        return slabs, db_slabs
    launch(
        _gemm_dw_kernel,
        grid,
        g,
        x,
        slabs,
        db_slabs,
        M,
        N,
        K,
        slab,
        g.stride(0),
        x.stride(0),
        PRECISION=gemm.precision(x.dtype),
        **blocks,
    )
    return slabs, db_slabs


def new_slabs(splits: int, N: int, K: int, device: torch.device) -> Slabs:
    """Float32 room for the parts of dW and db: (S, N, K), (S, N)."""
    slabs = torch.empty((splits, N, K), dtype=torch.float32, device=device)
    return slabs, torch.empty((splits, N), dtype=torch.float32, device=device)


def reduce_slabs(
    parts: Slabs,
    weight: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None = None,
    second: tuple[Slabs, Tensor, Tensor | None] | None = None,
    norm: tuple[Tensor, Tensor | None, Tensor | None] | None = None,
) -> list[Tensor | None]:
    """Gradients in their parameters' dtypes: weight, bias, layer_scale; then weight and bias of
    `second`, (its parts, weight, bias); then those of `norm`, (rows (R, 2, C), weight, bias).
    """
    slabs, db_slabs = parts
    S, N, K = slabs.shape
    grads = [_like(p) for p in (weight, bias, layer_scale)]
    config, norm_config = tuned.REDUCE_SLABS, tuned.REDUCE_NORM
    programs = cdiv(N, config.BLOCK_N)
    args2: tuple = (None,) * 4 + (1, 1, 1)
    if second is not None:
        (slabs2, db_slabs2), weight2, bias2 = second
        grads += [_like(weight2), _like(bias2)]
        S2, N2, K2 = slabs2.shape
        args2 = (slabs2, db_slabs2, *grads[3:], N2, K2, S2)
        programs += cdiv(N2, config.BLOCK_N)
    args3: tuple = (None, None, None, 1, 1)
    if norm is not None:
        norm_rows, *params = norm
        grads += [_like(p) for p in params]
        R, _, C = norm_rows.shape
        args3 = (norm_rows, *grads[-2:], C, R)
        programs += cdiv(C, norm_config.BLOCK_N)
    launch(
        _reduce_slabs_kernel,
        (programs,),
        slabs,
        db_slabs,
        None if layer_scale is None else weight.contiguous(),
        None if layer_scale is None else bias,
        layer_scale,
        *grads[:3],
        N,
        K,
        S,
        *args2,
        *args3,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        BLOCK_R=norm_config.BLOCK_M,
        BLOCK_C=norm_config.BLOCK_N,
        num_warps=config.num_warps,
    )
    return grads


def _like(p: Tensor | None) -> Tensor | None:
    return None if p is None else torch.empty(p.shape, dtype=p.dtype, device=p.device)
