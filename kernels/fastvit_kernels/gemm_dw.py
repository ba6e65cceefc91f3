"""Weight gradients: dW[N, K] = G[M, N]^T X[M, K] and db[N], the column sums of G.

M, the tokens, is long and dW is small: a split-K GEMM, whose tiles `dw_plan` cuts along M so that
all programs sum equally many rows. A program writes the float32 partial sum of each of its segments
to a slab, and `parameter_grads` adds the slabs of each tile in order: no atomics, and results are
bitwise repeatable.
db is summed from the tiles of G that are loaded anyway. A step with these sums takes an eighth
longer on sm_90 (wgmma reads G a second time), and the busiest program sets the time: with many
rows, several columns of tiles share the sums.
Bytes: G once per column of tiles and X once per row of tiles (from L2 after the first), and
4 BLOCK_N BLOCK_K per slab, written and read.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels import tuned
from fastvit_kernels.common import dot, multiple_of_8
from fastvit_kernels.dw_plan import PLAN, Plan, num_segments, owned, segment
from fastvit_kernels.launch import cdiv, launch, only_multiples_of_8
from fastvit_kernels.operands import descriptor, precision, tma_compatible


@triton.jit
def add_sums(sums, gt):
    """Add the sums over a tile's rows of G to each column of sums (BLOCK_N, 16).

    gt: the tile transposed, (BLOCK_N, BLOCK_M). 16-bit tiles are summed as a product with ones: if
    a tile is both reduced in registers and an operand of wgmma, Triton's pipeliner considers its
    buffer free once it was reduced, and loads the next tile into it while wgmma still reads it.
    For the same reason a gt of TF32 products must be a separate load.
    """
    if gt.dtype == tl.float32:
        return sums + tl.sum(gt, axis=1)[:, None]
    ones = tl.full([gt.shape[1], 16], 1.0, tl.float32)  # the interpreter cannot fill bf16
    return dot(gt, ones.to(gt.dtype), sums, "ieee")


@triton.jit
def store_slab(
    slabs_ptr,
    db_slabs_ptr,
    acc,
    sums,
    slab,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Store a segment's sums. Slabs are whole tiles; columns past dW's edges are never read."""
    offs_n = tl.arange(0, BLOCK_N)
    offs = offs_n[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    tl.store(slabs_ptr + slab.to(tl.int64) * (BLOCK_N * BLOCK_K) + offs, acc)
    tl.store(db_slabs_ptr + slab * BLOCK_N + offs_n, tl.sum(sums, axis=1) / 16)


@triton.jit
def _add_steps(
    acc,
    sums,
    g,
    x,
    first,
    end,
    M,
    col_n,
    col_k,
    cols_n,
    cols_k,
    strides,
    TMA: tl.constexpr,
    SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Add steps first .. end of a tile of dW to acc, and with SUMS those of db to sums.

    g, x: TMA descriptors, or pointers to matrices with row strides `strides`.
    """
    for m in range(first * BLOCK_M, end * BLOCK_M, BLOCK_M):
        if TMA:
            # No mask: segments are whole blocks of rows, and TMA loads zeros past row M.
            gt_tile = tl.trans(g.load([m, col_n]))
            x_tile = x.load([m, col_k])
        else:
            offs_m = (m + tl.arange(0, BLOCK_M)).to(tl.int64)
            gt_ptrs = g + offs_m[None, :] * strides[0] + cols_n[:, None]
            x_ptrs = x + offs_m[:, None] * strides[1] + cols_k[None, :]
            gt_tile = tl.load(gt_ptrs, mask=(offs_m < M)[None, :], other=0.0)
            x_tile = tl.load(x_ptrs, mask=(offs_m < M)[:, None], other=0.0)
        if SUMS:
            again = gt_tile
            if PRECISION == "tf32":
                mask = (offs_m < M)[None, :]
                again = tl.load(gt_ptrs, mask=mask, other=0.0, eviction_policy="evict_first")
            sums = add_sums(sums, again)
        acc = dot(gt_tile, x_tile, acc, PRECISION)
    return acc, sums


@triton.jit(do_not_specialize=["M", "columns", *PLAN])
def _gemm_dw_kernel(
    g,
    x,
    slabs_ptr,
    db_slabs_ptr,
    M,
    N,
    K,
    columns,
    tiles,
    steps,
    programs,
    chunks,
    share,
    chunks2,
    stride_gm,
    stride_xm,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BY_8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    N, K = multiple_of_8(N, BY_8), multiple_of_8(K, BY_8)
    strides = multiple_of_8(stride_gm, BY_8), multiple_of_8(stride_xm, BY_8)
    pid, num_n = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    for i in range(num_segments(pid, tiles, steps, programs, chunks, share, chunks2)):
        tile, first, end, slab = segment(pid, i, tiles, steps, programs, chunks, share, chunks2)
        col_n, col_k = tile % num_n * BLOCK_N, tile // num_n * BLOCK_K
        lo, hi = owned(tile // num_n, columns, first, end, steps, chunks, share)
        cols_n = (col_n + tl.arange(0, BLOCK_N)) % N
        cols_k = (col_k + tl.arange(0, BLOCK_K)) % K
        cols_n = tl.max_contiguous(tl.multiple_of(cols_n, 8), 8)
        cols_k = tl.max_contiguous(tl.multiple_of(cols_k, 8), 8)
        acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        sums = tl.zeros([BLOCK_N, 16], tl.float32)
        edges = first, lo, hi, end
        for j in tl.static_range(3):
            acc, sums = _add_steps(
                acc,
                sums,
                g,
                x,
                edges[j],
                edges[j + 1],
                M,
                col_n,
                col_k,
                cols_n,
                cols_k,
                strides,
                TMA,
                j == 1,
                PRECISION,
                BLOCK_M,
            )
        store_slab(slabs_ptr, db_slabs_ptr, acc, sums, slab, BLOCK_N, BLOCK_K)


@dataclass(frozen=True)
class Slabs:
    """Float32 partial sums of dW (N, K), tiles of shape (S, BLOCK_N, BLOCK_K), and of db, (S,
    BLOCK_N), which are used for the first `columns` columns of tiles only.
    """

    dw: Tensor
    db: Tensor
    N: int
    K: int
    columns: int
    plan: Plan

    @property
    def arguments(self) -> tuple[int, ...]:
        """Sizes and plan in the kernels' order of arguments."""
        return self.N, self.K, self.columns, *self.plan.arguments


def gemm_dw(g: Tensor, x: Tensor) -> Slabs:
    """Partial sums of g^T x and of g's column sums. g: (M, N), x: (M, K), of one dtype and unit
    column stride.
    """
    (M, N), K = g.shape, x.shape[1]
    tma = tma_compatible(g, x)
    config, plan = tuned.gemm_dw(M, N, K, x.dtype, g.device.index, tma)
    columns = tuned.dw_columns(plan, cdiv(N, config.BLOCK_N), g.device.index)
    slabs = new_slabs(config, plan, N, K, columns, g.device)
    operands: tuple = (g, x)
    if config.tma:
        blocks = [config.BLOCK_M, config.BLOCK_N], [config.BLOCK_M, config.BLOCK_K]
        operands = descriptor(g, blocks[0]), descriptor(x, blocks[1])
    launch(
        _gemm_dw_kernel,
        (plan.programs,),
        *operands,
        slabs.dw,
        slabs.db,
        M,
        *slabs.arguments,
        g.stride(0),
        x.stride(0),
        TMA=config.tma,
        PRECISION=precision(x.dtype),
        BY_8=only_multiples_of_8(N, K, g.stride(0), x.stride(0)),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return slabs


def new_slabs(
    config: tuned.Config, plan: Plan, N: int, K: int, columns: int, device: torch.device
) -> Slabs:
    shape = (plan.parts, config.BLOCK_N, config.BLOCK_K)
    dw = torch.empty(shape, dtype=torch.float32, device=device)
    db = torch.empty(shape[:2], dtype=torch.float32, device=device)
    return Slabs(dw, db, N, K, columns, plan)
