"""Attention backward for sequences too long for one program, key-padded or packed, and for dropout.

Programs that own query tiles sum dQ, programs that own key tiles sum dK and dV, each in a fixed
order: no atomics, no float32 copy of dQ. PART says what a launch computes. "dq" also writes delta =
rowsum(o * do), which "dkv" reads. "both" is one grid with both kinds of program, where each key
tile computes delta for itself: for few heads, where two launches take longer.

Above 128 keys no program owns a whole head, as it does in `attention_resident`: with 208 keys at
D = 64, sm_90, 8 warps and tiles of 32 query rows take 230 registers, so that one CTA fills an SM,
and for N = 197 some 30 % more instructions than both kernels here. Tiles of 64 rows spill.
"""

import triton
import triton.language as tl

from fastvit_kernels.attention_tiles import (
    broadcast_rows,
    dot_rows,
    dot_tile,
    dropout_of,
    finish_tile,
    is_narrow,
    keep_mask,
    load_rows,
    load_tile,
    num_pieces,
    piece_bounds,
    piece_size,
    piece_start,
    row_dots,
    rows_of,
    sequence_of,
    store_tile,
    zero_tile,
)
from fastvit_kernels.common import exp2, fma


@triton.jit
def _exponent_terms(lse, scale_log2):
    """(factor, shift, excess) of each row: exp2(s * factor - shift) is 2**excess times p.

    One FFMA then makes the exponent, where a difference and its scaling take two instructions; that
    `shift` is rounded costs only the excess, which is a row's own and so a factor of dQ. Where it
    could exceed 8, two scores that differ do so by 2**16 in p at least: there the next power of two
    as a factor makes no difference, and rounds nothing.
    """
    bits = tl.cast(tl.cast(scale_log2, tl.float32), tl.int32, bitcast=True)
    power_of_two = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    is_small = tl.abs(lse * scale_log2) < 2.0**28
    factor = tl.where(is_small, scale_log2, power_of_two)
    shift = lse * factor
    return factor, shift, tl.where(is_small, fma(lse, factor, -shift), 0.0)


@triton.jit
def _dq_keys(
    n,
    dq,
    q,
    do,
    factor,
    shift,
    delta,
    k_rows,
    v_rows,
    keys,
    offs_m,
    drop,
    T: tl.constexpr,
    MASK_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq plus the contribution of keys n .. n + BLOCK_N."""
    offs_n = n + tl.arange(0, BLOCK_N)
    k = load_tile(k_rows, offs_n, keys, MASK_N, D, ALIGN)
    v = load_tile(v_rows, offs_n, keys, MASK_N, D, ALIGN)
    s = dot_rows(q, k, PRECISION, T)
    p = exp2(fma(s, broadcast_rows(factor, T), -broadcast_rows(shift, T)))
    if MASK_N:
        p = tl.where(broadcast_rows(offs_n < keys, not T), p, 0.0)
    dp = dot_rows(do, v, PRECISION, T)
    if len(drop):
        dp = tl.where(keep_mask(drop, offs_m, n, BLOCK_N, T), dp * drop[2], 0.0)
    ds = p * (dp - broadcast_rows(delta, T))
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
    drop,
    MASK_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq and delta of query rows m .. m + BLOCK_M."""
    T: tl.constexpr = is_narrow(BLOCK_M)
    offs_m = m + tl.arange(0, BLOCK_M)
    q = load_tile(q_rows, offs_m, N, MASK_M, D, ALIGN)
    do = load_tile(do_rows, offs_m, N, MASK_M, D, ALIGN)
    delta = row_dots(load_tile(o_rows, offs_m, N, MASK_M, D, ALIGN), do)
    if delta_ptr is not None:
        tl.store(delta_ptr + offs_m, delta, mask=offs_m < N)
    lse = load_rows(lse_ptr, offs_m, N, MASK_M, float("inf"))
    dq = zero_tile(BLOCK_M, D, T)
    factor, shift, excess = _exponent_terms(lse, scale_log2)
    args = (q, do, factor, shift, delta, k_rows, v_rows, keys, offs_m, drop)
    full = keys // BLOCK_N * BLOCK_N
    for n in range(0, full, BLOCK_N):
        dq = _dq_keys(n, dq, *args, T, False, BLOCK_N, D, ALIGN, PRECISION)
    for i in tl.static_range(num_pieces(TAIL_N, BLOCK_N)):
        first, end = piece_bounds(full, keys, TAIL_N, BLOCK_N, i)
        for n in tl.range(first, end, piece_size(TAIL_N, BLOCK_N, i), num_stages=1):
            dq = _dq_keys(
                n, dq, *args, T, True, piece_size(TAIL_N, BLOCK_N, i), D, ALIGN, PRECISION
            )
    dq = finish_tile(dq, broadcast_rows(scale * exp2(-excess), T), T)
    store_tile(dq_rows, dq, offs_m, N, MASK_M, D, ALIGN)


@triton.jit
def _dkv_rows(
    m,
    dk,
    dv,
    k,
    v,
    n,
    mask_n,
    q_rows,
    o_rows,
    do_rows,
    lse_ptr,
    delta_ptr,
    N,
    scale_log2,
    drop,
    T: tl.constexpr,
    MASK_M: tl.constexpr,
    RAGGED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv plus the contribution of query rows m .. m + BLOCK_M."""
    offs_m = m + tl.arange(0, BLOCK_M)
    q = load_tile(q_rows, offs_m, N, MASK_M, D, ALIGN)
    do = load_tile(do_rows, offs_m, N, MASK_M, D, ALIGN)
    # Rows past N take lse = +inf, hence p = 0. Beside the load of o, one of lse without a mask has
    # ptxas serialize all wgmmas.
    lse = load_rows(lse_ptr, offs_m, N, MASK_M or delta_ptr is None, float("inf"))
    if delta_ptr is not None:
        delta = load_rows(delta_ptr, offs_m, N, MASK_M, 0.0)
    else:
        delta = row_dots(load_tile(o_rows, offs_m, N, MASK_M, D, ALIGN), do)
    # Keys x queries: p and ds are then the left operands of dV and dK, still in registers.
    p = exp2((dot_rows(k, q, PRECISION, T) - broadcast_rows(lse, not T)) * scale_log2)
    # Padded keys get a gradient, of zero. Keys past N get none, and no other's depends on their p.
    if RAGGED:
        p = tl.where(broadcast_rows(mask_n, T), p, 0.0)
    kept = p
    if len(drop):
        keep = keep_mask(drop, offs_m, n, BLOCK_N, not T)
        kept = tl.where(keep, p, 0.0)
    dv = dot_tile(dv, kept, do, PRECISION, T)
    dp = dot_rows(v, do, PRECISION, T)
    if len(drop):
        dp = tl.where(keep, dp * drop[2], 0.0)
    ds = p * (dp - broadcast_rows(delta, not T))
    dk = dot_tile(dk, ds, q, PRECISION, T)
    return dk, dv


@triton.jit
def _dkv_keys(
    n,
    q_rows,
    k_rows,
    v_rows,
    o_rows,
    do_rows,
    dk_rows,
    dv_rows,
    lse_ptr,
    delta_ptr,
    N,
    keys,
    scale,
    scale_log2,
    drop,
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
    T: tl.constexpr = is_narrow(BLOCK_N)
    offs_n = n + tl.arange(0, BLOCK_N)
    k = load_tile(k_rows, offs_n, keys, MASK_N, D, ALIGN)
    v = load_tile(v_rows, offs_n, keys, MASK_N, D, ALIGN)
    dk = zero_tile(BLOCK_N, D, T)
    dv = dk
    args = (
        k,
        v,
        n,
        offs_n < keys,
        q_rows,
        o_rows,
        do_rows,
        lse_ptr,
        delta_ptr,
        N,
        scale_log2,
        drop,
    )
    full = N // BLOCK_M * BLOCK_M
    for m in range(0, full, BLOCK_M):
        dk, dv = _dkv_rows(
            m, dk, dv, *args, T, False, RAGGED, BLOCK_M, BLOCK_N, D, ALIGN, PRECISION
        )
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
                RAGGED,
                piece_size(TAIL_M, BLOCK_M, i),
                BLOCK_N,
                D,
                ALIGN,
                PRECISION,
            )
    store_tile(dk_rows, finish_tile(dk, scale, T), offs_n, N, MASK_N, D, ALIGN)
    inv_keep = 1.0
    if len(drop):
        inv_keep = drop[2]
    store_tile(dv_rows, finish_tile(dv, inv_keep, T), offs_n, N, MASK_N, D, ALIGN)


@triton.jit(do_not_specialize=["H", "N", "stride_lseb", "stride_lseh"])
def _attention_bwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
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
    stride_dob,
    stride_don,
    stride_doh,
    stride_dod,
    stride_ob,
    stride_dqb,
    stride_dqn,
    stride_lseb,
    stride_lseh,
    H,
    N,
    scale,
    scale_log2,
    threshold,
    inv_keep,
    PART: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAIL_M: tl.constexpr,
    STEP_N: tl.constexpr,
    STEP_TAIL_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
    STEP_M: tl.constexpr,
    STEP_TAIL_M: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ: BLOCK_M queries per program, STEP_N keys per step. dK, dV: BLOCK_N keys, STEP_M queries.

    dq, dk and dv share their strides and have contiguous (H, D).
    """
    pid, pid_h, pid_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    RAGGED: tl.constexpr = PACKED or HAS_LENGTHS
    longest = N
    start, N, keys = sequence_of(pid_b, cu_seqlens_ptr, lengths_ptr, N, PACKED, HAS_LENGTHS)
    q_offset = pid_b * stride_qb + start * stride_qn + pid_h * stride_qh
    k_offset = pid_b * stride_kb + start * stride_kn + pid_h * stride_kh
    v_offset = pid_b * stride_vb + start * stride_vn + pid_h * stride_vh
    o_offset = pid_b * stride_ob + (start * H + pid_h) * D
    do_offset = pid_b * stride_dob + start * stride_don + pid_h * stride_doh
    dq_offset = pid_b * stride_dqb + start * stride_dqn + pid_h * D
    lse_offset = pid_b * stride_lseb + pid_h * stride_lseh + start
    q_rows = rows_of(q_ptr, q_offset, stride_qn, stride_qd, ALIGN)
    k_rows = rows_of(k_ptr, k_offset, stride_kn, stride_kd, ALIGN)
    v_rows = rows_of(v_ptr, v_offset, stride_vn, stride_vd, ALIGN)
    o_rows = q_rows
    if o_ptr is not None:
        o_rows = rows_of(o_ptr, o_offset, H * D, 1, ALIGN)
    do_rows = rows_of(do_ptr, do_offset, stride_don, stride_dod, ALIGN)
    lse_ptr += lse_offset
    if delta_ptr is not None:
        delta_ptr += lse_offset
    drop = dropout_of(seed_ptr, threshold, inv_keep, pid_b.to(tl.int32) * H + pid_h)
    dq_tiles = 0
    if PART != "dkv":
        dq_tiles = tl.cdiv(longest, BLOCK_M) if RAGGED else N // BLOCK_M
        dq_rows = rows_of(dq_ptr, dq_offset, stride_dqn, 1, ALIGN)
        args = (q_rows, k_rows, v_rows, o_rows, do_rows, dq_rows, lse_ptr, delta_ptr)
        args += (N, keys, scale, scale_log2, drop)
        # In a packed batch a short sequence has fewer tiles than the grid has programs.
        if pid < (tl.minimum(dq_tiles, tl.cdiv(N, BLOCK_M)) if RAGGED else dq_tiles):
            _dq_rows(
                pid * BLOCK_M,
                *args,
                RAGGED,
                BLOCK_M,
                STEP_N,
                STEP_TAIL_N,
                D,
                ALIGN,
                PRECISION,
            )
        for i in tl.static_range(0 if RAGGED else num_pieces(TAIL_M, BLOCK_M)):
            if pid == dq_tiles + i:
                _dq_rows(
                    dq_tiles * BLOCK_M + piece_start(TAIL_M, BLOCK_M, i),
                    *args,
                    True,
                    piece_size(TAIL_M, BLOCK_M, i),
                    STEP_N,
                    STEP_TAIL_N,
                    D,
                    ALIGN,
                    PRECISION,
                )
        dq_tiles += 0 if RAGGED else num_pieces(TAIL_M, BLOCK_M)
    if PART != "dq":
        pid_n = pid - dq_tiles
        tiles = tl.cdiv(N, BLOCK_N) if RAGGED else N // BLOCK_N
        dk_rows = rows_of(dk_ptr, dq_offset, stride_dqn, 1, ALIGN)
        dv_rows = rows_of(dv_ptr, dq_offset, stride_dqn, 1, ALIGN)
        args = (q_rows, k_rows, v_rows, o_rows, do_rows, dk_rows, dv_rows, lse_ptr, delta_ptr)
        args += (N, keys, scale, scale_log2, drop)
        if (pid_n >= 0) & (pid_n < tiles):
            _dkv_keys(
                pid_n * BLOCK_N,
                *args,
                RAGGED,
                RAGGED,
                BLOCK_N,
                STEP_M,
                STEP_TAIL_M,
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
                    STEP_M,
                    STEP_TAIL_M,
                    D,
                    ALIGN,
                    PRECISION,
                )
