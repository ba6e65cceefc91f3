"""Attention forward for long, key-padded and packed sequences, and for dropout.

Online softmax over key tiles. One program sums everything for its query rows in a fixed order: no
atomics.

Sequence b is rows [start, start + N) of the token axis: start = 0 in a batch, cu_seqlens[b] in a
packed one (PACKED). Its keys from lengths[b] on are masked out (HAS_LENGTHS). Where N is the same
for all sequences, the tail is cut to its size at compile time; where lengths are only known at run
time (RAGGED), the tail is one whole masked tile. Tails are loops of at most one iteration:
straight-line code after the main loop would be scheduled into it, and spill.
"""

import triton
import triton.language as tl

from fastvit_kernels.attention_tiles import (
    broadcast_rows,
    dot_rows,
    dot_tile,
    dropout_of,
    finish_tile,
    is_float32,
    is_narrow,
    keep_mask,
    load_tile,
    num_pieces,
    piece_bounds,
    piece_size,
    piece_start,
    rows_of,
    scale_tile,
    sequence_of,
    store_tile,
    zero_tile,
)
from fastvit_kernels.common import exp2, log2, reciprocal


@triton.jit
def _fwd_keys(
    n,
    acc,
    shift,
    row_sum,
    q,
    k_rows,
    v_rows,
    keys,
    scale_log2,
    offs_m,
    drop,
    T: tl.constexpr,
    MASK_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One online softmax step, over keys n .. n + BLOCK_N; shift is the running maximum."""
    offs_n = n + tl.arange(0, BLOCK_N)
    k = load_tile(k_rows, offs_n, keys, MASK_N, D, ALIGN)
    s = dot_rows(q, k, PRECISION, T)
    if MASK_N:
        s = tl.where(broadcast_rows(offs_n < keys, not T), s, float("-inf"))
    new_shift = tl.maximum(shift, tl.max(s, axis=0 if T else 1))
    # Avoid -inf - -inf in rows whose scores are all -inf so far.
    finite = tl.where(new_shift == float("-inf"), 0.0, new_shift)
    p = exp2((s - broadcast_rows(finite, T)) * scale_log2)
    alpha = exp2((shift - finite) * scale_log2)
    row_sum = row_sum * alpha + tl.sum(p, axis=0 if T else 1)
    if len(drop):
        p = tl.where(keep_mask(drop, offs_m, n, BLOCK_N, T), p, 0.0)
    v = load_tile(v_rows, offs_n, keys, MASK_N, D, ALIGN)
    acc = dot_tile(scale_tile(acc, broadcast_rows(alpha, T)), p, v, PRECISION, T)
    return acc, new_shift, row_sum


@triton.jit
def _fwd_rows(
    m,
    q_rows,
    k_rows,
    v_rows,
    o_rows,
    lse_ptr,
    N,
    keys,
    scale_log2,
    drop,
    MASK_M: tl.constexpr,
    RAGGED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o and lse of query rows m .. m + BLOCK_M."""
    T: tl.constexpr = is_narrow(BLOCK_M)
    offs_m = m + tl.arange(0, BLOCK_M)
    q = load_tile(q_rows, offs_m, N, MASK_M, D, ALIGN)
    acc = zero_tile(BLOCK_M, D, T)
    shift = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    args = (q, k_rows, v_rows, keys, scale_log2, offs_m, drop)
    full = keys // BLOCK_N * BLOCK_N
    for n in range(0, full, BLOCK_N):
        acc, shift, row_sum = _fwd_keys(
            n, acc, shift, row_sum, *args, T, False, BLOCK_N, D, ALIGN, PRECISION
        )
    for i in tl.static_range(num_pieces(TAIL_N, BLOCK_N)):
        first, end = piece_bounds(full, keys, TAIL_N, BLOCK_N, i)
        for n in tl.range(first, end, piece_size(TAIL_N, BLOCK_N, i), num_stages=1):
            acc, shift, row_sum = _fwd_keys(
                n,
                acc,
                shift,
                row_sum,
                *args,
                T,
                True,
                piece_size(TAIL_N, BLOCK_N, i),
                D,
                ALIGN,
                PRECISION,
            )
    inverse = reciprocal(row_sum)
    if RAGGED:
        inverse = tl.where(keys > 0, inverse, 0.0)
    if len(drop):
        inverse *= drop[2]
    acc = finish_tile(acc, broadcast_rows(inverse, T), T)
    store_tile(o_rows, acc, offs_m, N, MASK_M, D, ALIGN)
    lse = shift + log2(row_sum, is_float32(o_rows)) * (1.0 / scale_log2)
    tl.store(lse_ptr + offs_m, lse, mask=offs_m < N)


@triton.jit(do_not_specialize=["H", "N", "stride_lseb", "stride_lseh"])
def _attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    cu_seqlens_ptr,
    lengths_ptr,
    seed_ptr,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_kd,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_vd,
    stride_ob,
    stride_lseb,
    stride_lseh,
    H,
    N,
    scale_log2,
    threshold,
    inv_keep,
    PACKED: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAIL_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid_m, pid_h, pid_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    RAGGED: tl.constexpr = PACKED or HAS_LENGTHS
    start, N, keys = sequence_of(pid_b, cu_seqlens_ptr, lengths_ptr, N, PACKED, HAS_LENGTHS)
    q_offset = pid_b * stride_qb + start * stride_qn + pid_h * stride_qh
    k_offset = pid_b * stride_kb + start * stride_kn + pid_h * stride_kh
    v_offset = pid_b * stride_vb + start * stride_vn + pid_h * stride_vh
    o_offset = pid_b * stride_ob + (start * H + pid_h) * D
    args = (
        rows_of(q_ptr, q_offset, stride_qn, stride_qd, ALIGN),
        rows_of(k_ptr, k_offset, stride_kn, stride_kd, ALIGN),
        rows_of(v_ptr, v_offset, stride_vn, stride_vd, ALIGN),
        rows_of(o_ptr, o_offset, H * D, 1, ALIGN),
        lse_ptr + pid_b * stride_lseb + pid_h * stride_lseh + start,
        N,
        keys,
        scale_log2,
        dropout_of(seed_ptr, threshold, inv_keep, pid_b.to(tl.int32) * H + pid_h),
    )
    tiles = tl.cdiv(N, BLOCK_M) if RAGGED else N // BLOCK_M
    if pid_m < tiles:
        _fwd_rows(
            pid_m * BLOCK_M,
            *args,
            RAGGED,
            RAGGED,
            BLOCK_M,
            BLOCK_N,
            TAIL_N,
            D,
            ALIGN,
            PRECISION,
        )
    for i in tl.static_range(0 if RAGGED else num_pieces(TAIL_M, BLOCK_M)):
        if pid_m == tiles + i:
            _fwd_rows(
                tiles * BLOCK_M + piece_start(TAIL_M, BLOCK_M, i),
                *args,
                True,
                RAGGED,
                piece_size(TAIL_M, BLOCK_M, i),
                BLOCK_N,
                TAIL_N,
                D,
                ALIGN,
                PRECISION,
            )
