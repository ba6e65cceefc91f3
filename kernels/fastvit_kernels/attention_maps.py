"""Chosen rows of softmax(q k^T * scale), without an (N, N) matrix or any cost for the other rows.

maps[b, h, i, n] = exp(scale q[b, rows[i], h] . k[b, n, h] - lse[b, h, rows[i]])
q, k: (B, N, H, D), any strides; rows: (R,); lse: (B, H, N) float32, or None: each program then
first reduces its 16 rows over all keys -> (B, H, R, N) float32.
Bytes: k once per 16 rows (without lse once more, from L2), and the maps. No gradient. With few
heads, SPLITS programs share the keys of 16 rows; without lse each reduces over all of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels import library, tuned_attention
from fastvit_kernels.attention import _scale, strides_divisor, with_int32_offsets
from fastvit_kernels.attention_tiles import dot_rows, load_tile, rows_of
from fastvit_kernels.common import LOG2E, exp2
from fastvit_kernels.launch import cdiv, launch
from fastvit_kernels.operands import precision

_BLOCK_R, _BLOCK_N = 16, 64


@triton.jit
def _scores(
    n,
    q,
    k_rows,
    N,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores, keys n .. n + BLOCK_N x rows: 64 keys fill a wgmma, 16 rows would not."""
    k = load_tile(k_rows, n + tl.arange(0, BLOCK_N), N, True, D, ALIGN)
    return dot_rows(k, q, PRECISION)


@triton.jit(do_not_specialize=["H", "N", "R"])
def _attention_maps_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    rows_ptr,
    maps_ptr,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_kd,
    H,
    N,
    R,
    scale_log2,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid_r, pid_s, pid_bh = tl.program_id(1), tl.program_id(2), tl.program_id(0).to(tl.int64)
    pid_b, pid_h = pid_bh // H, pid_bh % H
    q_rows = rows_of(q_ptr, pid_b * stride_qb + pid_h * stride_qh, stride_qn, stride_qd, ALIGN)
    k_rows = rows_of(k_ptr, pid_b * stride_kb + pid_h * stride_kh, stride_kn, stride_kd, ALIGN)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    rows = tl.load(rows_ptr + offs_r, mask=mask_r, other=0)
    q = load_tile(q_rows, rows, N, True, D, ALIGN)
    if lse_ptr is None:
        shift = tl.full([BLOCK_R], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_R], tl.float32)
        for n in range(0, N, BLOCK_N):
            s = _scores(n, q, k_rows, N, BLOCK_N, D, ALIGN, PRECISION)
            s = tl.where((n + tl.arange(0, BLOCK_N) < N)[:, None], s, float("-inf"))
            new_shift = tl.maximum(shift, tl.max(s, axis=0))
            # Avoid -inf - -inf in rows whose scores are all -inf so far.
            finite = tl.where(new_shift == float("-inf"), 0.0, new_shift)
            total *= exp2((shift - finite) * scale_log2)
            total += tl.sum(exp2((s - finite[None, :]) * scale_log2), axis=0)
            shift = new_shift
        lse = shift + tl.log2(total) / scale_log2
    else:
        lse = tl.load(lse_ptr + pid_bh * N + rows) * LOG2E / scale_log2
    for n in range(pid_s * BLOCK_N, N, SPLITS * BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        s = _scores(n, q, k_rows, N, BLOCK_N, D, ALIGN, PRECISION)
        offs = (pid_bh * R + offs_r)[None, :] * N + offs_n[:, None]
        mask = (offs_n < N)[:, None] & mask_r[None, :]
        tl.store(maps_ptr + offs, exp2((s - lse[None, :]) * scale_log2), mask=mask)


def _maps(q: Tensor, k: Tensor, lse: Tensor | None, rows: Tensor, scale: float) -> Tensor:
    B, N, H, D = q.shape
    R = len(rows)
    maps = q.new_empty((B, H, R, N), dtype=torch.float32)
    if maps.numel() == 0:
        return maps
    q, k = with_int32_offsets(q, N), with_int32_offsets(k, N)
    blocks = cdiv(R, _BLOCK_R)
    splits = tuned_attention.maps_splits(B * H * blocks, cdiv(N, _BLOCK_N), q.device.index)
    launch(
        _attention_maps_kernel,
        (B * H, blocks, splits),
        *(q, k, None if lse is None else lse.contiguous(), rows, maps),
        *q.stride(),
        *k.stride(),
        *(H, N, R, scale * LOG2E.value),
        SPLITS=splits,
        BLOCK_R=_BLOCK_R,
        BLOCK_N=_BLOCK_N,
        D=D,
        ALIGN=strides_divisor(q, k),
        PRECISION=precision(q.dtype),
        num_warps=4,
        num_stages=2,
        maxnreg=tuned_attention.maps_max_registers(D, q.device.index),
    )
    return maps


def _maps_fake(q, k, lse, rows, scale):
    B, N, H, _ = q.shape
    return q.new_empty((B, H, len(rows), N), dtype=torch.float32)


attention_maps_fwd = library.register("attention_maps", _maps_fake)(_maps)


def attention_maps(
    q: Tensor, k: Tensor, lse: Tensor | None, rows: Tensor, scale: float | None = None
) -> Tensor:
    """Rows `rows` (R,) of the probabilities: (B, H, R, N) float32. lse: from `attention_lse`."""
    scale = _scale(q, scale)
    lse = None if lse is None else lse.detach()
    return attention_maps_fwd(q.detach(), k.detach(), lse, rows, scale)
