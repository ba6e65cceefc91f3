"""[prefix; patches(images) W^T + b + pos]: a convolution as a GEMM that reads the image in place.

images: (B, C, H, W) at any strides; weight: (dim, C, p_h, p_w); pos: (m, dim); prefix: (P, dim).
Row t of sample b is the patch at (t // grid_w, t % grid_w), column k its pixel (c, y, x); both are
address arithmetic on the image, without an unfolded or permuted copy. The kernel also adds bias and
positions, and writes the prefix rows into the same token buffer (B, P + m, dim).
Saved for backward: images and weight. For 16-bit products, float32 images that need no gradient and
dW's float32 upstream gradient are cast first: loading twice the bytes through pointers takes longer
than the copy.
Backward: dW and db as partial sums over fixed slabs of rows, added in order; dpos and dprefix by
one sum of dout over the batch; dimages stored straight to its pixels. No atomics, and only the
gradients that are needed.
FLOPs: 2 B m K dim forward, K = C p_h p_w; the same for dW, and for dimages.
Bytes: images and tokens once forward; images once and dout twice backward (three with dimages).
"""

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels import gemm_dw, library, parameter_grads, tuned
from fastvit_kernels.common import dot, multiple_of, multiple_of_8, tile_order
from fastvit_kernels.gemm_dw import add_sums, store_slab
from fastvit_kernels.launch import cdiv, launch, only_multiples_of_8
from fastvit_kernels.operands import TL_DTYPE, precision


@triton.jit
def _pixel_offsets(
    k, stride_c, stride_h, stride_w, P_H: tl.constexpr, P_W: tl.constexpr, VEC: tl.constexpr
):
    """Offset of column k = (c, y, x) from its patch's first pixel; runs of VEC are contiguous."""
    c, y, x = k // (P_H * P_W), (k // P_W) % P_H, k % P_W
    offs = c.to(tl.int64) * stride_c + y * stride_h + x * stride_w
    return tl.max_contiguous(tl.multiple_of(offs, VEC), VEC)


@triton.jit
def _patch_offsets(
    row,
    tokens,
    grid_w,
    stride_b,
    stride_h,
    stride_w,
    P_H: tl.constexpr,
    P_W: tl.constexpr,
    VEC: tl.constexpr,
):
    """Offset of the first pixel of a patch, by its row in (B, tokens)."""
    b, t = row // tokens, row % tokens
    offs = b.to(tl.int64) * stride_b
    offs += (t // grid_w).to(tl.int64) * P_H * stride_h + (t % grid_w) * P_W * stride_w
    return tl.multiple_of(offs, VEC)


@triton.jit(do_not_specialize=["B", "m", "P", "grid_w"])
def _patch_embed_fwd_kernel(
    images_ptr,
    weight_ptr,
    bias_ptr,
    pos_ptr,
    prefix_ptr,
    out_ptr,
    B,
    m,
    P,
    N,
    K,
    grid_w,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    P_H: tl.constexpr,
    P_W: tl.constexpr,
    VEC: tl.constexpr,
    BY_8: tl.constexpr,
    K_DIVISOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    N, K = multiple_of_8(N, BY_8), multiple_of(K, K_DIVISOR)
    M = B * (P + m)
    pid_m, pid_n = tile_order(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < M, offs_n < N
    token = offs_m % (P + m)  # prefix rows come first and have no pixels
    is_patch = mask_m & (token >= P)
    row = offs_m // (P + m) * m + tl.maximum(token - P, 0)
    rows = _patch_offsets(row, m, grid_w, stride_b, stride_h, stride_w, P_H, P_W, VEC)
    cols = (offs_n % N).to(tl.int64)

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = k + offs_k < K
        pixels = _pixel_offsets(k + offs_k, stride_c, stride_h, stride_w, P_H, P_W, VEC)
        a = tl.load(
            images_ptr + rows[:, None] + pixels[None, :],
            mask=is_patch[:, None] & mask_k[None, :],
            other=0.0,
        )
        w = tl.load(
            weight_ptr + cols[None, :] * K + (k + offs_k)[:, None], mask=mask_k[:, None], other=0.0
        )
        acc = dot(a.to(w.dtype), w, acc, PRECISION)

    mask = mask_m[:, None] & mask_n[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        acc += bias[None, :]
    # Drop the bias in prefix rows, and the NaN of their zeros times a NaN or infinite weight.
    acc = tl.where(is_patch[:, None], acc, 0.0)
    # One load for both: each row adds a row either of pos or of prefix.
    if pos_ptr is not None and prefix_ptr is not None:
        added = tl.where(is_patch, pos_ptr + (token - P) * N, prefix_ptr + token * N)
        acc += tl.load(added[:, None] + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    elif pos_ptr is not None:
        offs = (token - P)[:, None] * N + offs_n[None, :]
        acc += tl.load(pos_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    elif prefix_ptr is not None:
        offs = token[:, None] * N + offs_n[None, :]
        is_prefix = (token < P)[:, None]
        acc += tl.load(prefix_ptr + offs, mask=is_prefix & mask, other=0.0).to(tl.float32)
    offs = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["B", "m", "P", "grid_w", "rows_per_slab"])
def _patch_embed_dw_kernel(
    dout_ptr,
    images_ptr,
    slabs_ptr,
    db_slabs_ptr,
    B,
    m,
    P,
    N,
    K,
    grid_w,
    rows_per_slab,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    P_H: tl.constexpr,
    P_W: tl.constexpr,
    VEC: tl.constexpr,
    BY_8: tl.constexpr,
    K_DIVISOR: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    N, K = multiple_of_8(N, BY_8), multiple_of(K, K_DIVISOR)
    pid_n, pid_k, pid_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    cols = tl.max_contiguous(tl.multiple_of(offs_n % N, 8), 8)
    pixels = _pixel_offsets(offs_k, stride_c, stride_h, stride_w, P_H, P_W, VEC)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    sums = tl.zeros([BLOCK_N, 16], tl.float32)
    first, M = pid_s * rows_per_slab, B * m
    for start in range(first, tl.minimum(first + rows_per_slab, M), BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        rows = _patch_offsets(offs_m, m, grid_w, stride_b, stride_h, stride_w, P_H, P_W, VEC)
        x = tl.load(
            images_ptr + rows[:, None] + pixels[None, :],
            mask=mask_m[:, None] & mask_k[None, :],
            other=0.0,
        )
        out_rows = (offs_m // m * (P + m) + P + offs_m % m).to(tl.int64)
        g_ptrs = dout_ptr + out_rows[:, None] * N + cols[None, :]
        g = tl.load(g_ptrs, mask=mask_m[:, None], other=0.0)
        # Only the sums of pid_k == 0 are read; but computing 16-bit ones under that condition costs
        # the pipeliner a buffer of g on sm_90, and five registers with a ragged K.
        if g.dtype != tl.float32:
            sums = add_sums(sums, tl.trans(g))
        elif pid_k == 0:
            again = g
            if PRECISION == "tf32":
                again = tl.load(
                    g_ptrs, mask=mask_m[:, None], other=0.0, eviction_policy="evict_first"
                )
            sums = add_sums(sums, tl.trans(again))
        acc = dot(tl.trans(g.to(COMPUTE)), x.to(COMPUTE), acc, PRECISION)
    slab = (pid_k * tl.num_programs(0) + pid_n) * tl.num_programs(2) + pid_s
    store_slab(slabs_ptr, db_slabs_ptr, acc, sums, slab, BLOCK_N, BLOCK_K)


@triton.jit(do_not_specialize=["B", "m", "P"])
def _patch_embed_dtokens_kernel(
    dout_ptr,
    dpos_ptr,
    dprefix_ptr,
    B,
    m,
    P,
    N,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dpos and dprefix: dout summed over the batch, one program per token and block of channels."""
    token = tl.program_id(0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    total = tl.zeros([BLOCK_N], tl.float32)
    for b in range(0, B, BLOCK_B):
        offs_b = b + tl.arange(0, BLOCK_B)
        rows = (offs_b * (P + m) + token).to(tl.int64)
        mask = (offs_b < B)[:, None] & mask_n[None, :]
        dout = tl.load(dout_ptr + rows[:, None] * N + offs_n[None, :], mask=mask, other=0.0)
        total += tl.sum(dout.to(tl.float32), axis=0)
    if token < P:
        if dprefix_ptr is not None:
            dprefix = total.to(dprefix_ptr.dtype.element_ty)
            tl.store(dprefix_ptr + token * N + offs_n, dprefix, mask=mask_n)
    else:
        if dpos_ptr is not None:
            dpos = total.to(dpos_ptr.dtype.element_ty)
            tl.store(dpos_ptr + (token - P) * N + offs_n, dpos, mask=mask_n)


@triton.jit(do_not_specialize=["B", "m", "P", "grid_w"])
def _patch_embed_dimages_kernel(
    dout_ptr,
    weight_ptr,
    dimages_ptr,
    B,
    m,
    P,
    N,
    K,
    grid_w,
    stride_b,
    stride_c,
    stride_h,
    P_H: tl.constexpr,
    P_W: tl.constexpr,
    VEC: tl.constexpr,
    BY_8: tl.constexpr,
    K_DIVISOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """dimages = dout W, as (B m, K), BLOCK_N of its columns a program; the reduction is over N."""
    N, K = multiple_of_8(N, BY_8), multiple_of(K, K_DIVISOR)
    M = B * m
    pid_m, pid_k = tile_order(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = pid_k * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_k = offs_m < M, offs_k < K
    out_rows = (offs_m // m * (P + m) + P + offs_m % m).to(tl.int64)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for n in range(0, N, BLOCK_K):
        offs_n = n + tl.arange(0, BLOCK_K)
        mask_n = offs_n < N
        g = tl.load(
            dout_ptr + out_rows[:, None] * N + offs_n[None, :],
            mask=mask_m[:, None] & mask_n[None, :],
            other=0.0,
        )
        w = tl.load(
            weight_ptr + offs_n.to(tl.int64)[:, None] * K + offs_k[None, :],
            mask=mask_n[:, None] & mask_k[None, :],
            other=0.0,
        )
        acc = dot(g.to(w.dtype), w, acc, PRECISION)
    rows = _patch_offsets(offs_m, m, grid_w, stride_b, stride_h, 1, P_H, P_W, VEC)
    pixels = _pixel_offsets(offs_k, stride_c, stride_h, 1, P_H, P_W, VEC)
    tl.store(
        dimages_ptr + rows[:, None] + pixels[None, :],
        acc.to(dimages_ptr.dtype.element_ty),
        mask=mask_m[:, None] & mask_k[None, :],
    )


def vector_width(images: Tensor, p_w: int) -> int:
    """How many pixels of a patch row one vector load can take: 1, 2, 4 or 8."""
    if images.stride(3) != 1:
        return 1
    width = 8
    steps = (p_w, *images.stride()[:3], images.data_ptr() // images.element_size())
    while width > 1 and any(step % width for step in steps):
        width //= 2
    return width


def _geometry(images: Tensor, weight: Tensor) -> dict[str, int]:
    p_h, p_w = weight.shape[2:]
    vec = vector_width(images, p_w)
    # Where 16 does not divide K, as with patches of 14, its mask would leave no vector loads.
    divisor = math.gcd(weight[0].numel(), 16) % 16 or 1
    by_8 = only_multiples_of_8(len(weight))
    return {"P_H": p_h, "P_W": p_w, "VEC": vec, "BY_8": by_8, "K_DIVISOR": divisor}


def _access(images: Tensor, geometry: dict[str, int]) -> str:
    """The kind of pixel loads, for `tuned`: "gather", a pixel or two per address, whose many
    addresses leave few registers for a tile, or "vectors".
    """
    few = geometry["VEC"] <= max(1, images.element_size() // 2)
    return "gather" if few else "vectors"


def _grid_size(images: Tensor, weight: Tensor) -> tuple[int, int]:
    return images.shape[2] // weight.shape[2], images.shape[3] // weight.shape[3]


def _sizes(
    images: Tensor, weight: Tensor, prefix: Tensor | None
) -> tuple[int, int, int, int, int, int]:
    """B, m, P, N, K and grid_w, in the kernels' order of arguments."""
    grid_h, grid_w = _grid_size(images, weight)
    P = 0 if prefix is None else len(prefix)
    return len(images), grid_h * grid_w, P, len(weight), weight[0].numel(), grid_w


def _fwd(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor | None,
    prefix: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    B, m, P, N, K, grid_w = _sizes(images, weight, prefix)
    out = torch.empty((B, P + m, N), dtype=out_dtype, device=images.device)
    if out.numel() == 0:
        return out
    M = B * (P + m)
    geometry = _geometry(images, weight)
    pixels = _access(images, geometry)
    config = tuned.patch_embed(M, N, weight.dtype, pixels, images.device.index)
    launch(
        _patch_embed_fwd_kernel,
        (cdiv(M, config.BLOCK_M) * cdiv(N, config.BLOCK_N),),
        images,
        weight,
        bias,
        pos,
        prefix,
        out,
        B,
        m,
        P,
        N,
        K,
        grid_w,
        *images.stride(),
        **geometry,
        PRECISION=precision(weight.dtype),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        GROUP_M=config.GROUP_M,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def _fwd_fake(images, weight, bias, pos, prefix, out_dtype):
    grid_h, grid_w = _grid_size(images, weight)
    tokens = grid_h * grid_w + (0 if prefix is None else len(prefix))
    return images.new_empty((images.shape[0], tokens, len(weight)), dtype=out_dtype)


def _dw(
    dout: Tensor,
    images: Tensor,
    weight: Tensor,
    param: Tensor,
    bias: Tensor | None,
    prefix: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of param and bias."""
    B, m, P, N, K, grid_w = _sizes(images, weight, prefix)
    dtype, device = weight.dtype, dout.device
    rounded = dout.to(dtype)  # as eager's convolution does under autocast
    geometry = _geometry(images, weight)
    gather = _access(images, geometry) == "gather"
    config, plan = tuned.patch_embed_dw(B * m, N, K, dtype, device.index, gather)
    slabs = gemm_dw.new_slabs(config, plan, N, K, 1, device)
    launch(
        _patch_embed_dw_kernel,
        (cdiv(N, config.BLOCK_N), cdiv(K, config.BLOCK_K), max(1, plan.chunks)),
        rounded,
        images,
        slabs.dw,
        slabs.db,
        B,
        m,
        P,
        N,
        K,
        grid_w,
        plan.share * config.BLOCK_M,
        *images.stride(),
        **geometry,
        COMPUTE=TL_DTYPE[dtype],
        PRECISION=precision(dtype),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    grads = parameter_grads.reduce_slabs(slabs, param.flatten(1), bias)
    return grads.weight.view(param.shape), grads.bias


def _dtokens(dout: Tensor, dpos: Tensor | None, dprefix: Tensor | None, P: int) -> None:
    """Write dpos and dprefix, each if given. dout: (B, P + m, N)."""
    B, tokens, N = dout.shape
    config = tuned.SUM_BATCH
    launch(
        _patch_embed_dtokens_kernel,
        (tokens, cdiv(N, config.BLOCK_N)),
        dout,
        dpos,
        dprefix,
        B,
        tokens - P,
        P,
        N,
        BLOCK_B=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        num_warps=config.num_warps,
    )


def _dimages(dout: Tensor, images: Tensor, weight: Tensor, prefix: Tensor | None) -> Tensor:
    dimages = images.new_empty(images.shape)
    B, m, P, N, K, grid_w = _sizes(images, weight, prefix)
    geometry = _geometry(dimages, weight)
    pixels = _access(dimages, geometry)
    config = tuned.patch_embed(B * m, K, weight.dtype, pixels, dout.device.index)
    launch(
        _patch_embed_dimages_kernel,
        (cdiv(B * m, config.BLOCK_M) * cdiv(K, config.BLOCK_N),),
        dout,
        weight,
        dimages,
        B,
        m,
        P,
        N,
        K,
        grid_w,
        *dimages.stride()[:3],
        **geometry,
        PRECISION=precision(weight.dtype),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        GROUP_M=config.GROUP_M,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return dimages


def _bwd(
    dout: Tensor,
    images: Tensor,
    weight: Tensor,
    param: Tensor,
    bias: Tensor | None,
    pos: Tensor | None,
    prefix: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients of images, weight, bias, pos and prefix that `needs` marks, in this order."""
    if dout.numel() == 0:
        inputs = (images, param, bias, pos, prefix)
        return [t.new_zeros(t.shape) for t in library.marked(inputs, needs)]
    needs_images, needs_weight, needs_bias, needs_pos, needs_prefix = needs
    dpos = torch.empty_like(pos) if needs_pos and pos is not None else None
    dprefix = torch.empty_like(prefix) if needs_prefix and prefix is not None else None
    dimages = dw = db = None
    if needs_weight or needs_bias:
        dw, db = _dw(dout, images, weight, param, bias, prefix)
    if dpos is not None or dprefix is not None:
        _dtokens(dout, dpos, dprefix, 0 if prefix is None else len(prefix))
    if needs_images:
        dimages = _dimages(dout, images, weight, prefix)
    return library.marked((dimages, dw, db, dpos, dprefix), needs)


def _bwd_fake(dout, images, weight, param, bias, pos, prefix, needs):
    inputs = (images, param, bias, pos, prefix)
    return [t.new_empty(t.shape) for t in library.marked(inputs, needs)]


patch_embed_fwd = library.register("patch_embed_fwd", _fwd_fake)(_fwd)
patch_embed_bwd = library.register("patch_embed_bwd", _bwd_fake)(_bwd)


class PatchEmbedFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        pos: Tensor | None,
        prefix: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        w = weight.to(dtype).contiguous()
        bias, pos, prefix = (None if t is None else t.contiguous() for t in (bias, pos, prefix))
        ctx.save_for_backward(images, w, weight, bias, pos, prefix)
        added = [t.dtype for t in (pos, prefix) if t is not None]
        out_dtype = reduce(torch.promote_types, added, dtype)
        if len(set(added)) == 2:
            pos, prefix = (t.to(reduce(torch.promote_types, added)) for t in (pos, prefix))
        return patch_embed_fwd(images, w, bias, pos, prefix, out_dtype)

    @staticmethod
    @library.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        needs = ctx.needs_input_grad[:5]
        grads = patch_embed_bwd(dout.contiguous(), *ctx.saved_tensors, needs)
        return *library.spread(grads, needs), None


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor | None,
    prefix: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """[prefix; patches(images) weight^T + bias + pos], multiplied in `dtype`: (B, P + m, dim)."""
    if images.stride(1) == 1 and images.stride(3) == images.shape[1] > 1:
        # channels_last: read it as one channel of C times the width; permute the weight to match.
        images, weight = (t.permute(0, 2, 3, 1).flatten(2)[:, None] for t in (images, weight))
    if images.dtype == torch.float32 and not images.requires_grad:
        images = images.to(dtype)
    return library.apply(PatchEmbedFunction, images, weight, bias, pos, prefix, dtype)
