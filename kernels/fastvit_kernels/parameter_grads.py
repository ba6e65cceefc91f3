"""Parameter gradients from the partial sums that backward kernels leave: the slabs of `gemm_dw` and
the rows of LayerNorm's backward, each added in order. No atomics: bitwise repeatable.

One launch serves all parameters of an op.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels import tuned
from fastvit_kernels.common import multiple_of_8
from fastvit_kernels.dw_plan import PLAN, first_part
from fastvit_kernels.gemm_dw import Slabs
from fastvit_kernels.launch import cdiv, launch, only_multiples_of_8


@triton.jit
def _reduce_weight(
    rows,
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
    columns,
    plan,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Reduce BLOCK_N rows of dW, all in one row of TILE_N x TILE_K tiles, and of db, whose partial
    sums come with the first `columns` columns of tiles.
    """
    offs_n = rows * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    pid_n, num_n = rows * BLOCK_N // TILE_N, tl.cdiv(N, TILE_N)
    tile_n = offs_n % TILE_N
    db = tl.zeros([BLOCK_N], tl.float32)
    # Several columns of tiles at once: one by one, each load would wait for the one before.
    for start in range(0, columns, 16):
        column = start + tl.arange(0, 16)
        first = first_part(column * num_n + pid_n, *plan)
        parts = first_part(column * num_n + pid_n + 1, *plan) - first
        parts = tl.where(column < columns, parts, 0)
        for i in range(tl.max(parts, axis=0)):
            ptrs = db_slabs_ptr + (first + i)[:, None] * TILE_N + tile_n[None, :]
            db += tl.sum(tl.load(ptrs, mask=(i < parts)[:, None], other=0.0), axis=0)
    layer_scale = tl.zeros([BLOCK_N], tl.float32)
    dlayer_scale = tl.zeros([BLOCK_N], tl.float32)
    if layer_scale_ptr is not None:
        layer_scale = tl.load(layer_scale_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask = mask_n[:, None] & (offs_k < K)[None, :]
        offs = offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
        tile = k // TILE_K * num_n + pid_n
        dw = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        first = first_part(tile, *plan)
        slab_ptrs = slabs_ptr + first.to(tl.int64) * (TILE_N * TILE_K)
        slab_ptrs += tile_n[:, None] * TILE_K + (offs_k % TILE_K)[None, :]
        for _ in range(first_part(tile + 1, *plan) - first):
            dw += tl.load(slab_ptrs, mask=mask, other=0.0)
            slab_ptrs += TILE_N * TILE_K
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


@triton.jit(do_not_specialize=["R"])
def _reduce_norm_kernel(
    norm_rows_ptr,
    dnorm_weight_ptr,
    dnorm_bias_ptr,
    C,
    R,
    BY_8: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """_reduce_norm alone, for a norm that is trained beside frozen weights."""
    C, tile = multiple_of_8(C, BY_8), tl.program_id(0)
    _reduce_norm(tile, norm_rows_ptr, dnorm_weight_ptr, dnorm_bias_ptr, C, R, BLOCK_R, BLOCK_C)


_PLAN2 = tuple(name + "_2" for name in PLAN)


@triton.jit(do_not_specialize=["columns", *PLAN, "columns_2", *_PLAN2, "R"])
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
    columns,
    tiles,
    steps,
    programs,
    chunks,
    share,
    chunks2,
    slabs2_ptr,
    db_slabs2_ptr,
    dw2_ptr,
    db2_ptr,
    N2,
    K2,
    columns_2,
    tiles_2,
    steps_2,
    programs_2,
    chunks_2,
    share_2,
    chunks2_2,
    norm_rows_ptr,
    dnorm_weight_ptr,
    dnorm_bias_ptr,
    C,
    R,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_N2: tl.constexpr,
    TILE_K2: tl.constexpr,
    BY_8: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Add the partial sums of all parameter gradients in order: of one weight, optionally a second
    one, and the rows that LayerNorm's backward wrote. With LayerScale, layer_scale * (x W^T + b),
    and G = g^T x: dW = layer_scale * G, db = layer_scale * sum(g),
    dlayer_scale = <W, G> + b sum(g).
    """
    pid = tl.program_id(0)
    K, K2, C = multiple_of_8(K, BY_8), multiple_of_8(K2, BY_8), multiple_of_8(C, BY_8)
    blocks, blocks2 = tl.cdiv(N, BLOCK_N), 0
    if slabs2_ptr is not None:
        blocks2 = tl.cdiv(N2, BLOCK_N)
    if pid < blocks:
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
            columns,
            (tiles, steps, programs, chunks, share, chunks2),
            TILE_N,
            TILE_K,
            BLOCK_N,
            BLOCK_K,
        )
    elif pid < blocks + blocks2:
        if slabs2_ptr is not None:
            _reduce_weight(
                pid - blocks,
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
                columns_2,
                (tiles_2, steps_2, programs_2, chunks_2, share_2, chunks2_2),
                TILE_N2,
                TILE_K2,
                BLOCK_N,
                BLOCK_K,
            )
    elif norm_rows_ptr is not None:
        tile = pid - blocks - blocks2
        _reduce_norm(tile, norm_rows_ptr, dnorm_weight_ptr, dnorm_bias_ptr, C, R, BLOCK_R, BLOCK_C)


class Grads(NamedTuple):
    """Gradients in their parameters' dtypes; None where a parameter is, or was not given."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    layer_scale: Tensor | None = None
    weight2: Tensor | None = None
    bias2: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None


# The kernel's arguments from slabs2_ptr on, and from norm_rows_ptr on, where there are none.
NO_SECOND = (None,) * 4 + (1,) * 9
NO_NORM = (None,) * 3 + (1,) * 2


def reduce_slabs(
    slabs: Slabs,
    weight: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None = None,
    second: tuple[Slabs, Tensor, Tensor | None] | None = None,
    norm: tuple[Tensor, Tensor | None, Tensor | None] | None = None,
) -> Grads:
    """The gradients of weight, bias and layer_scale; of weight2 and bias2 in `second`, (slabs,
    weight2, bias2); of norm_weight and norm_bias in `norm`, (rows (R, 2, C), norm_weight,
    norm_bias).
    """
    grads = Grads(_like(weight), _like(bias), _like(layer_scale))
    tiles = tiles2 = slabs.dw.shape[1:]
    norm_config = tuned.REDUCE_NORM
    widths, heights, norm_programs = [slabs.K], [slabs.N], 0
    second_args: tuple = NO_SECOND
    norm_args: tuple = NO_NORM
    if second is not None:
        slabs2, weight2, bias2 = second
        grads = grads._replace(weight2=_like(weight2), bias2=_like(bias2))
        tiles2 = slabs2.dw.shape[1:]
        widths.append(slabs2.K)
        heights.append(slabs2.N)
        second_args = (slabs2.dw, slabs2.db, grads.weight2, grads.bias2, *slabs2.arguments)
    if norm is not None:
        norm_rows, norm_weight, norm_bias = norm
        grads = grads._replace(norm_weight=_like(norm_weight), norm_bias=_like(norm_bias))
        R, _, C = norm_rows.shape
        widths.append(C)
        norm_programs = cdiv(C, norm_config.BLOCK_N)
        norm_args = (norm_rows, grads.norm_weight, grads.norm_bias, C, R)
    config = tuned.reduce_slabs(tiles[1], tiles2[1])
    launch(
        _reduce_slabs_kernel,
        (sum(cdiv(n, config.BLOCK_N) for n in heights) + norm_programs,),
        slabs.dw,
        slabs.db,
        None if layer_scale is None else weight.contiguous(),
        None if layer_scale is None else bias,
        layer_scale,
        *grads[:3],
        *slabs.arguments,
        *second_args,
        *norm_args,
        TILE_N=tiles[0],
        TILE_K=tiles[1],
        TILE_N2=tiles2[0],
        TILE_K2=tiles2[1],
        BY_8=only_multiples_of_8(*widths),
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        BLOCK_R=norm_config.BLOCK_M,
        BLOCK_C=norm_config.BLOCK_N,
        num_warps=config.num_warps,
        maxnreg=config.maxnreg,
    )
    return grads


def reduce_norm(norm: tuple[Tensor, Tensor | None, Tensor | None] | None) -> Grads:
    """The gradients of `norm` alone, as in `reduce_slabs`, beside frozen weights."""
    if norm is None:
        return Grads()
    norm_rows, norm_weight, norm_bias = norm
    grads = Grads(norm_weight=_like(norm_weight), norm_bias=_like(norm_bias))
    config = tuned.REDUCE_NORM
    R, _, C = norm_rows.shape
    launch(
        _reduce_norm_kernel,
        (cdiv(C, config.BLOCK_N),),
        norm_rows,
        grads.norm_weight,
        grads.norm_bias,
        C,
        R,
        BY_8=only_multiples_of_8(C),
        BLOCK_R=config.BLOCK_M,
        BLOCK_C=config.BLOCK_N,
        num_warps=config.num_warps,
    )
    return grads


def reduce_branch(
    last: tuple[Slabs, Tensor, Tensor | None, Tensor | None] | None,
    first: tuple[Slabs, Tensor, Tensor | None] | None,
    norm: tuple[Tensor, Tensor | None, Tensor | None] | None,
) -> Grads:
    """The gradients of a residual branch, each None if not trained: weight, bias and layer_scale of
    its last product, `last`; weight2 and bias2 of its first; norm as in `reduce_slabs`.
    """
    if last is not None:
        return reduce_slabs(*last, second=first, norm=norm)
    if first is None:
        return reduce_norm(norm)
    grads = reduce_slabs(*first, norm=norm)
    return grads._replace(weight=None, bias=None, weight2=grads.weight, bias2=grads.bias)


def _like(p: Tensor | None) -> Tensor | None:
    return None if p is None else torch.empty(p.shape, dtype=p.dtype, device=p.device)
