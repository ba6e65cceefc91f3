"""Attention of short sequences: a program holds every key of one (image, head) at once.

Forward: one softmax pass, with no running maximum and no rescaling. Backward: one program owns an
(image, head), keeps dK and dV in registers while it loops over the query tiles, and computes delta
= rowsum(o * do) itself: no atomics, no second kernel, no float32 copy of dQ.

Loops recompute their invariants (disable_licm): there are few iterations, and hoisted into
registers the invariants make the longest sequences spill.
"""

# ruff: noqa: RUF005 - a kernel cannot unpack into a tuple, only add to one.

import triton
import triton.language as tl

from fastvit_kernels.attention_tiles import (
    broadcast_rows,
    dot_rows,
    dot_tile,
    finish_tile,
    is_float32,
    is_last,
    is_narrow,
    load_rows,
    load_tile,
    num_pieces,
    piece_offsets,
    piece_size,
    row_dots,
    rows_of,
    store_tile,
    zero_tile,
)
from fastvit_kernels.common import exp2, log2, reciprocal


@triton.jit
def _load_keys(rows, N, KEYS: tl.constexpr, D: tl.constexpr, ALIGN: tl.constexpr):
    """All rows, as a tuple of tiles of 128 rows and a tail of smaller ones."""
    tiles = ()
    for i in tl.static_range(num_pieces(KEYS, 128)):
        offs_n = piece_offsets(KEYS, 128, i)
        tiles = tiles + (load_tile(rows, offs_n, N, is_last(KEYS, 128, i), D, ALIGN),)
    return tiles


@triton.jit
def _is_key(offs_n, N, MASK_FROM: tl.constexpr):
    """offs_n < N, where N is over MASK_FROM: columns before it then need no mask."""
    return (offs_n < MASK_FROM) | (offs_n < N)


@triton.jit
def _fwd_rows(
    m,
    q_rows,
    o_rows,
    lse_ptr,
    k,
    v,
    N,
    scale_log2,
    MASK_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    KEYS: tl.constexpr,
    MASK_FROM: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o and lse of query rows m .. m + BLOCK_M."""
    # Not in the tail: ptxas gives its transposed products wrong addresses on sm_90.
    T: tl.constexpr = is_narrow(BLOCK_M) and not MASK_M
    offs_m = m + tl.arange(0, BLOCK_M)
    q = load_tile(q_rows, offs_m, N, MASK_M, D, ALIGN)
    scores = ()
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for i in tl.static_range(len(k)):
        s = dot_rows(q, k[i], PRECISION, T)
        if i == len(k) - 1:
            mask_n = _is_key(piece_offsets(KEYS, 128, i), N, MASK_FROM)
            s = tl.where(broadcast_rows(mask_n, not T), s, float("-inf"))
        scores = scores + (s,)
        row_max = tl.maximum(row_max, tl.max(s, axis=0 if T else 1))
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = zero_tile(BLOCK_M, D, T)
    for i in tl.static_range(len(k)):
        p = exp2((scores[i] - broadcast_rows(row_max, T)) * scale_log2)
        row_sum += tl.sum(p, axis=0 if T else 1)
        acc = dot_tile(acc, p, v[i], PRECISION, T)
    acc = finish_tile(acc, broadcast_rows(reciprocal(row_sum), T), T)
    store_tile(o_rows, acc, offs_m, N, MASK_M, D, ALIGN)
    lse = row_max + log2(row_sum, is_float32(o_rows)) * (1.0 / scale_log2)
    tl.store(lse_ptr + offs_m, lse, mask=offs_m < N)


@triton.jit(do_not_specialize=["H", "N"])
def _attention_fwd_resident_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
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
    H,
    N,
    scale_log2,
    SPLITS: tl.constexpr,
    HAS_FULL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAIL_M: tl.constexpr,
    KEYS: tl.constexpr,
    MASK_FROM: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """SPLITS programs share the query tiles of one (image, head); the last has the tail too."""
    pid_s, pid_h, pid_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    q_rows = rows_of(q_ptr, pid_b * stride_qb + pid_h * stride_qh, stride_qn, stride_qd, ALIGN)
    k_rows = rows_of(k_ptr, pid_b * stride_kb + pid_h * stride_kh, stride_kn, stride_kd, ALIGN)
    v_rows = rows_of(v_ptr, pid_b * stride_vb + pid_h * stride_vh, stride_vn, stride_vd, ALIGN)
    o_rows = rows_of(o_ptr, (pid_b * N * H + pid_h) * D, H * D, 1, ALIGN)
    lse_ptr += (pid_b * H + pid_h) * N
    k = _load_keys(k_rows, N, KEYS, D, ALIGN)
    v = _load_keys(v_rows, N, KEYS, D, ALIGN)
    full = N // BLOCK_M * BLOCK_M
    args = (q_rows, o_rows, lse_ptr, k, v, N, scale_log2)
    if HAS_FULL:
        for m in tl.range(pid_s * BLOCK_M, full, SPLITS * BLOCK_M, disable_licm=True):
            _fwd_rows(m, *args, False, BLOCK_M, KEYS, MASK_FROM, D, ALIGN, PRECISION)
    if TAIL_M:
        # A loop of at most one iteration: unrolled, it would be scheduled into the loop above.
        end = tl.where(pid_s == SPLITS - 1, N, full)
        for m in tl.range(full, end, TAIL_M, num_stages=1, disable_licm=True):
            _fwd_rows(m, *args, True, TAIL_M, KEYS, MASK_FROM, D, ALIGN, PRECISION)


@triton.jit
def _bwd_tile(
    dk,
    dv,
    dq,
    q,
    do,
    k,
    v,
    lse,
    delta,
    mask_n,
    scale_log2,
    T: tl.constexpr,
    MASK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the contribution of one query tile and one key tile to dk, dv and dq."""
    # Keys x queries: p and ds are then the left operands of dV and dK, still in registers.
    p = exp2((dot_rows(k, q, PRECISION, T) - broadcast_rows(lse, not T)) * scale_log2)
    if MASK_N:
        p = tl.where(broadcast_rows(mask_n, T), p, 0.0)
    dv = dot_tile(dv, p, do, PRECISION, T)
    ds = p * (dot_rows(v, do, PRECISION, T) - broadcast_rows(delta, not T))
    ds = ds.to(q[0].dtype)
    dk = dot_tile(dk, ds, q, PRECISION, T)
    if T:
        ds = tl.trans(ds)
    dq = dot_tile(dq, ds, k, PRECISION, True)
    return dk, dv, dq


@triton.jit
def _bwd_rows(
    m,
    dk,
    dv,
    q_rows,
    o_rows,
    do_rows,
    lse_ptr,
    dq_rows,
    k,
    v,
    N,
    scale,
    scale_log2,
    MASK_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write dQ of query rows m .. m + BLOCK_M; return dk and dv with these rows' part added."""
    offs_m = m + tl.arange(0, BLOCK_M)
    q = load_tile(q_rows, offs_m, N, MASK_M, D, ALIGN)
    do = load_tile(do_rows, offs_m, N, MASK_M, D, ALIGN)
    delta = row_dots(load_tile(o_rows, offs_m, N, MASK_M, D, ALIGN), do)
    # Rows past N take lse = +inf, hence p = 0.
    lse = load_rows(lse_ptr, offs_m, N, MASK_M, float("inf"))
    # dQ is summed transposed for any BLOCK_M.
    dq = zero_tile(BLOCK_M, D, True)
    new_dk = ()
    new_dv = ()
    for i in tl.static_range(len(k)):
        offs_n = piece_offsets(KEYS, 128, i)
        dk_i, dv_i, dq = _bwd_tile(
            dk[i],
            dv[i],
            dq,
            q,
            do,
            k[i],
            v[i],
            lse,
            delta,
            offs_n < N,
            scale_log2,
            is_narrow(piece_size(KEYS, 128, i)),
            is_last(KEYS, 128, i),
            PRECISION,
        )
        new_dk = new_dk + (dk_i,)
        new_dv = new_dv + (dv_i,)
    store_tile(dq_rows, finish_tile(dq, scale, True), offs_m, N, MASK_M, D, ALIGN)
    return new_dk, new_dv


@triton.jit(do_not_specialize=["H", "N"])
def _attention_bwd_resident_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    do_ptr,
    lse_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
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
    stride_dqb,
    stride_dqn,
    H,
    N,
    scale,
    scale_log2,
    HAS_FULL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAIL_M: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq, dk and dv share their strides and have contiguous (H, D)."""
    pid_h, pid_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    q_rows = rows_of(q_ptr, pid_b * stride_qb + pid_h * stride_qh, stride_qn, stride_qd, ALIGN)
    k_rows = rows_of(k_ptr, pid_b * stride_kb + pid_h * stride_kh, stride_kn, stride_kd, ALIGN)
    v_rows = rows_of(v_ptr, pid_b * stride_vb + pid_h * stride_vh, stride_vn, stride_vd, ALIGN)
    o_rows = rows_of(o_ptr, (pid_b * N * H + pid_h) * D, H * D, 1, ALIGN)
    do_rows = rows_of(
        do_ptr, pid_b * stride_dob + pid_h * stride_doh, stride_don, stride_dod, ALIGN
    )
    offset = pid_b * stride_dqb + pid_h * D
    dq_rows = rows_of(dq_ptr, offset, stride_dqn, 1, ALIGN)
    dk_rows = rows_of(dk_ptr, offset, stride_dqn, 1, ALIGN)
    dv_rows = rows_of(dv_ptr, offset, stride_dqn, 1, ALIGN)
    lse_ptr += (pid_b * H + pid_h) * N
    k = _load_keys(k_rows, N, KEYS, D, ALIGN)
    v = _load_keys(v_rows, N, KEYS, D, ALIGN)
    dk = ()
    for i in tl.static_range(num_pieces(KEYS, 128)):
        dk = dk + (zero_tile(piece_size(KEYS, 128, i), D, is_narrow(piece_size(KEYS, 128, i))),)
    dv = dk
    full = N // BLOCK_M * BLOCK_M
    args = (q_rows, o_rows, do_rows, lse_ptr, dq_rows, k, v, N, scale, scale_log2)
    if HAS_FULL:
        for m in tl.range(0, full, BLOCK_M, disable_licm=True):
            dk, dv = _bwd_rows(m, dk, dv, *args, False, BLOCK_M, KEYS, D, ALIGN, PRECISION)
    if TAIL_M:
        for m in tl.range(full, N, TAIL_M, num_stages=1, disable_licm=True):
            dk, dv = _bwd_rows(m, dk, dv, *args, True, TAIL_M, KEYS, D, ALIGN, PRECISION)
    for i in tl.static_range(num_pieces(KEYS, 128)):
        offs_n = piece_offsets(KEYS, 128, i)
        dk_out = finish_tile(dk[i], scale, is_narrow(piece_size(KEYS, 128, i)))
        dv_out = finish_tile(dv[i], 1.0, is_narrow(piece_size(KEYS, 128, i)))
        store_tile(dk_rows, dk_out, offs_n, N, is_last(KEYS, 128, i), D, ALIGN)
        store_tile(dv_rows, dv_out, offs_n, N, is_last(KEYS, 128, i), D, ALIGN)
