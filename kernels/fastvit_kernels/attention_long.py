"""Attention of long rows, of padded keys and of packed images of different sizes.

Forward: online softmax over key tiles. Backward: one kernel for dQ, whose programs own query tiles
and also write delta = rowsum(o * do), then one for dK and dV, whose programs own key tiles.
Everything is summed by one program in a fixed order: no atomics.

Sequence b is rows [start, start + N) of the token axis: start = 0 in a batch, cu_seqlens[b] in a
packed one (PACKED). Its keys past lengths[b] are left out (HAS_LENGTHS). Where N is the same for
all, the tail of a row is cut to its size when the kernel is compiled; where lengths are only known
at run time (RAGGED), a tail is one whole masked tile. Tails are loops of one round: unrolled code
after the main loop would be scheduled into it, and spill.
"""

import triton
import triton.language as tl

from fastvit_kernels.attention_tiles import (
    dot_rows,
    dot_tile,
    finish_tile,
    is_tail,
    load_tile,
    num_pieces,
    piece_bounds,
    piece_size,
    piece_start,
    row_dots,
    rows_of,
    scale_tile,
    spread,
    store_tile,
    zero_tile,
)
from fastvit_kernels.common import exp2, mul_rn


@triton.jit
def _sequence(
    pid_b, cu_seqlens_ptr, lengths_ptr, N, PACKED: tl.constexpr, HAS_LENGTHS: tl.constexpr
):
    """First row, number of rows and number of keys of sequence pid_b."""
    start = pid_b * 0
    if PACKED:
        start = tl.load(cu_seqlens_ptr + pid_b).to(tl.int64)
        N = (tl.load(cu_seqlens_ptr + pid_b + 1) - start).to(tl.int32)
    keys = N
    if HAS_LENGTHS:
        keys = tl.minimum(tl.load(lengths_ptr + pid_b).to(tl.int32), N)
    return start, N, keys


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
    T: tl.constexpr,
    MASK_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The online softmax over keys n .. n + BLOCK_N; shift is the running maximum in log2 units."""
    offs_n = n + tl.arange(0, BLOCK_N)
    k = load_tile(k_rows, offs_n, keys, MASK_N, D, ALIGN)
    s = dot_rows(q, k, PRECISION, T)
    if MASK_N:
        s = tl.where(spread(offs_n < keys, not T), s, float("-inf"))
    new_shift = tl.maximum(shift, tl.max(s, axis=0 if T else 1) * scale_log2)
    # A row whose scores are all -inf so far must not meet -inf - -inf.
    finite = tl.where(new_shift == float("-inf"), 0.0, new_shift)
    p = exp2(s * scale_log2 - spread(finite, T))
    alpha = exp2(shift - finite)
    row_sum = row_sum * alpha + tl.sum(p, axis=0 if T else 1)
    v = load_tile(v_rows, offs_n, keys, MASK_N, D, ALIGN)
    acc = dot_tile(scale_tile(acc, spread(alpha, T)), p, v, PRECISION, T)
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
    T: tl.constexpr = is_tail(BLOCK_M)
    offs_m = m + tl.arange(0, BLOCK_M)
    q = load_tile(q_rows, offs_m, N, MASK_M, D, ALIGN)
    acc = zero_tile(BLOCK_M, D, T)
    shift = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    args = (q, k_rows, v_rows, keys, scale_log2)
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
    inverse = 1.0 / row_sum
    if RAGGED:
        inverse = tl.where(keys > 0, inverse, 0.0)
    acc = finish_tile(acc, spread(inverse, T), T)
    store_tile(o_rows, acc, offs_m, N, MASK_M, D, ALIGN)
    tl.store(lse_ptr + offs_m, shift + tl.log2(row_sum), mask=offs_m < N)


@triton.jit(do_not_specialize=["H", "N"])
def _attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    cu_seqlens_ptr,
    lengths_ptr,
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
    start, N, keys = _sequence(pid_b, cu_seqlens_ptr, lengths_ptr, N, PACKED, HAS_LENGTHS)
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


@triton.jit
def _dq_keys(
    n,
    dq,
    q,
    do,
    lse,
    delta,
    k_rows,
    v_rows,
    keys,
    scale_log2,
    T: tl.constexpr,
    MASK_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq with the part of keys n .. n + BLOCK_N added."""
    offs_n = n + tl.arange(0, BLOCK_N)
    k = load_tile(k_rows, offs_n, keys, MASK_N, D, ALIGN)
    v = load_tile(v_rows, offs_n, keys, MASK_N, D, ALIGN)
    p = exp2(mul_rn(dot_rows(q, k, PRECISION, T), scale_log2) - spread(lse, T))
    if MASK_N:
        p = tl.where(spread(offs_n < keys, not T), p, 0.0)
    ds = p * (dot_rows(do, v, PRECISION, T) - spread(delta, T))
    return dot_tile(dq, ds, k, PRECISION, T)


@triton.jit
def _dq_rows(
    m,
    q_rows,
    k_rows,
    v_rows,
    o_rows,
    do_rows,
    dq_rows,
    lse_ptr,
    delta_ptr,
    N,
    keys,
    scale,
    scale_log2,
    MASK_M: tl.constexpr,
    RAGGED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq and delta of query rows m .. m + BLOCK_M."""
    T: tl.constexpr = is_tail(BLOCK_M)
    offs_m = m + tl.arange(0, BLOCK_M)
    q = load_tile(q_rows, offs_m, N, MASK_M, D, ALIGN)
    do = load_tile(do_rows, offs_m, N, MASK_M, D, ALIGN)
    delta = row_dots(load_tile(o_rows, offs_m, N, MASK_M, D, ALIGN), do)
    tl.store(delta_ptr + offs_m, delta, mask=offs_m < N)
    lse = tl.load(lse_ptr + offs_m, mask=offs_m < N, other=float("inf"))
    dq = zero_tile(BLOCK_M, D, T)
    args = (q, do, lse, delta, k_rows, v_rows, keys, scale_log2)
    full = keys // BLOCK_N * BLOCK_N
    for n in range(0, full, BLOCK_N):
        dq = _dq_keys(n, dq, *args, T, False, BLOCK_N, D, ALIGN, PRECISION)
    for i in tl.static_range(num_pieces(TAIL_N, BLOCK_N)):
        first, end = piece_bounds(full, keys, TAIL_N, BLOCK_N, i)
        for n in tl.range(first, end, piece_size(TAIL_N, BLOCK_N, i), num_stages=1):
            dq = _dq_keys(
                n, dq, *args, T, True, piece_size(TAIL_N, BLOCK_N, i), D, ALIGN, PRECISION
            )
    store_tile(dq_rows, finish_tile(dq, scale, T), offs_m, N, MASK_M, D, ALIGN)


@triton.jit(do_not_specialize=["H", "N"])
def _attention_bwd_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    cu_seqlens_ptr,
    lengths_ptr,
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
    stride_dob,
    stride_don,
    stride_doh,
    stride_dod,
    stride_dqb,
    stride_dqn,
    stride_lseb,
    stride_lseh,
    H,
    N,
    scale,
    scale_log2,
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
    start, N, keys = _sequence(pid_b, cu_seqlens_ptr, lengths_ptr, N, PACKED, HAS_LENGTHS)
    q_offset = pid_b * stride_qb + start * stride_qn + pid_h * stride_qh
    k_offset = pid_b * stride_kb + start * stride_kn + pid_h * stride_kh
    v_offset = pid_b * stride_vb + start * stride_vn + pid_h * stride_vh
    o_offset = pid_b * stride_ob + (start * H + pid_h) * D
    do_offset = pid_b * stride_dob + start * stride_don + pid_h * stride_doh
    dq_offset = pid_b * stride_dqb + start * stride_dqn + pid_h * D
    lse_offset = pid_b * stride_lseb + pid_h * stride_lseh + start
    args = (
        rows_of(q_ptr, q_offset, stride_qn, stride_qd, ALIGN),
        rows_of(k_ptr, k_offset, stride_kn, stride_kd, ALIGN),
        rows_of(v_ptr, v_offset, stride_vn, stride_vd, ALIGN),
        rows_of(o_ptr, o_offset, H * D, 1, ALIGN),
        rows_of(do_ptr, do_offset, stride_don, stride_dod, ALIGN),
        rows_of(dq_ptr, dq_offset, stride_dqn, 1, ALIGN),
        lse_ptr + lse_offset,
        delta_ptr + lse_offset,
        N,
        keys,
        scale,
        scale_log2,
    )
    tiles = tl.cdiv(N, BLOCK_M) if RAGGED else N // BLOCK_M
    if pid_m < tiles:
        _dq_rows(
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
            _dq_rows(
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


@triton.jit
def _dkv_rows(
    m,
    dk,
    dv,
    k,
    v,
    mask_n,
    q_rows,
    do_rows,
    lse_ptr,
    delta_ptr,
    N,
    scale_log2,
    T: tl.constexpr,
    MASK_M: tl.constexpr,
    MASK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv with the part of query rows m .. m + BLOCK_M added."""
    offs_m = m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < N
    q = load_tile(q_rows, offs_m, N, MASK_M, D, ALIGN)
    do = load_tile(do_rows, offs_m, N, MASK_M, D, ALIGN)
    # Rows past N take lse = +inf, hence p = 0.
    lse = tl.load(lse_ptr + offs_m, mask=mask_m, other=float("inf"))
    delta = tl.load(delta_ptr + offs_m, mask=mask_m, other=0.0)
    # Keys x queries: p and ds are then the left operands of dV and dK, still in registers.
    p = exp2(mul_rn(dot_rows(k, q, PRECISION, T), scale_log2) - spread(lse, not T))
    if MASK_N:
        p = tl.where(spread(mask_n, T), p, 0.0)
    dv = dot_tile(dv, p, do, PRECISION, T)
    ds = p * (dot_rows(v, do, PRECISION, T) - spread(delta, not T))
    dk = dot_tile(dk, ds, q, PRECISION, T)
    return dk, dv


@triton.jit
def _dkv_keys(
    n,
    q_rows,
    k_rows,
    v_rows,
    do_rows,
    dk_rows,
    dv_rows,
    lse_ptr,
    delta_ptr,
    N,
    keys,
    scale,
    scale_log2,
    MASK_N: tl.constexpr,
    RAGGED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAIL_M: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of key rows n .. n + BLOCK_N."""
    T: tl.constexpr = is_tail(BLOCK_N)
    offs_n = n + tl.arange(0, BLOCK_N)
    k = load_tile(k_rows, offs_n, keys, MASK_N, D, ALIGN)
    v = load_tile(v_rows, offs_n, keys, MASK_N, D, ALIGN)
    dk = zero_tile(BLOCK_N, D, T)
    dv = dk
    args = (k, v, offs_n < keys, q_rows, do_rows, lse_ptr, delta_ptr, N, scale_log2)
    full = N // BLOCK_M * BLOCK_M
    for m in range(0, full, BLOCK_M):
        dk, dv = _dkv_rows(m, dk, dv, *args, T, False, MASK_N, BLOCK_M, D, ALIGN, PRECISION)
    for i in tl.static_range(num_pieces(TAIL_M, BLOCK_M)):
        first, end = piece_bounds(full, N, TAIL_M, BLOCK_M, i)
        for m in tl.range(first, end, piece_size(TAIL_M, BLOCK_M, i), num_stages=1):
            dk, dv = _dkv_rows(
                m,
                dk,
                dv,
                *args,
                T,
                True,
                MASK_N,
                piece_size(TAIL_M, BLOCK_M, i),
                D,
                ALIGN,
                PRECISION,
            )
    store_tile(dk_rows, finish_tile(dk, scale, T), offs_n, N, MASK_N, D, ALIGN)
    store_tile(dv_rows, finish_tile(dv, 1.0, T), offs_n, N, MASK_N, D, ALIGN)


@triton.jit(do_not_specialize=["H", "N"])
def _attention_bwd_dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    cu_seqlens_ptr,
    lengths_ptr,
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
    stride_dob,
    stride_don,
    stride_doh,
    stride_dod,
    stride_dkb,
    stride_dkn,
    stride_lseb,
    stride_lseh,
    H,
    N,
    scale,
    scale_log2,
    PACKED: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAIL_M: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid_n, pid_h, pid_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    RAGGED: tl.constexpr = PACKED or HAS_LENGTHS
    start, N, keys = _sequence(pid_b, cu_seqlens_ptr, lengths_ptr, N, PACKED, HAS_LENGTHS)
    q_offset = pid_b * stride_qb + start * stride_qn + pid_h * stride_qh
    k_offset = pid_b * stride_kb + start * stride_kn + pid_h * stride_kh
    v_offset = pid_b * stride_vb + start * stride_vn + pid_h * stride_vh
    do_offset = pid_b * stride_dob + start * stride_don + pid_h * stride_doh
    dk_offset = pid_b * stride_dkb + start * stride_dkn + pid_h * D
    lse_offset = pid_b * stride_lseb + pid_h * stride_lseh + start
    args = (
        rows_of(q_ptr, q_offset, stride_qn, stride_qd, ALIGN),
        rows_of(k_ptr, k_offset, stride_kn, stride_kd, ALIGN),
        rows_of(v_ptr, v_offset, stride_vn, stride_vd, ALIGN),
        rows_of(do_ptr, do_offset, stride_don, stride_dod, ALIGN),
        rows_of(dk_ptr, dk_offset, stride_dkn, 1, ALIGN),
        rows_of(dv_ptr, dk_offset, stride_dkn, 1, ALIGN),
        lse_ptr + lse_offset,
        delta_ptr + lse_offset,
        N,
        keys,
        scale,
        scale_log2,
    )
    tiles = tl.cdiv(N, BLOCK_N) if RAGGED else N // BLOCK_N
    if pid_n < tiles:
        _dkv_keys(
            pid_n * BLOCK_N,
            *args,
            RAGGED,
            RAGGED,
            BLOCK_N,
            BLOCK_M,
            TAIL_M,
            D,
            ALIGN,
            PRECISION,
        )
    for i in tl.static_range(0 if RAGGED else num_pieces(TAIL_N, BLOCK_N)):
        if pid_n == tiles + i:
            _dkv_keys(
                tiles * BLOCK_N + piece_start(TAIL_N, BLOCK_N, i),
                *args,
                True,
                RAGGED,
                piece_size(TAIL_N, BLOCK_N, i),
                BLOCK_M,
                TAIL_M,
                D,
                ALIGN,
                PRECISION,
            )
