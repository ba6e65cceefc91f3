"""softmax(q k^T * scale) v, flash style: scores live in registers alone.

q, k, v: (B, N, H, D) at any strides, or packed (B, N, 3, H, D) -> o: (B, N, H, D).
Saved for backward: q, k, v, o and lse = log(sum(exp(scores))), (B, H, N) float32.

    p = exp(scores - lse)   delta = rowsum(o do)     dv = p^T do
    ds = p (do v^T - delta)  dq = ds k * scale       dk = ds^T q * scale

Rows are cut into full tiles and one tail of its own size (197 keys: 3 x 64 + 16), and a head dim
such as 72 or 96 into two powers of two (64 + 16, 64 + 32), so that little is computed for nothing.
Backward is two launches: dq by query tiles, which also writes delta, then dk and dv by key tiles;
each gradient is summed by one program in a fixed order, straight into the packed dqkv.
FLOPs: 4 B H N^2 D forward, 14 B H N^2 D backward. Bytes: q, k, v, o once forward (k and v again from
L2 for each query tile); q, k, v twice, o once, do twice and dqkv once backward.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels import library, tuned
from fastvit_kernels.common import LN2, LOG2E, dot, exp2
from fastvit_kernels.gemm import precision


@triton.jit
def _load(
    ptr,
    rows,
    stride,
    N,
    COL: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Columns COL .. COL + WIDTH of some rows, zeros past D and, in a tail, past row N."""
    cols = COL + tl.arange(0, WIDTH)
    ptrs = ptr + rows[:, None] * stride + cols[None, :]
    if TAIL and COL + WIDTH > D:
        return tl.load(ptrs, mask=(rows < N)[:, None] & (cols < D)[None, :], other=0.0)
    elif TAIL:
        return tl.load(ptrs, mask=(rows < N)[:, None], other=0.0)
    elif COL + WIDTH > D:
        return tl.load(ptrs, mask=(cols < D)[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def _store(ptr, x, rows, stride, N, COL: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    cols = COL + tl.arange(0, WIDTH)
    mask = (rows < N)[:, None] & (cols < D)[None, :]
    tl.store(ptr + rows[:, None] * stride + cols[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _fwd_keys(
    q0,
    q1,
    acc0,
    acc1,
    m_i,
    l_i,
    k_ptr,
    v_ptr,
    start,
    stride_kn,
    stride_vn,
    N,
    scale_log2e,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of keys: scores, the running maximum and sum, and o's accumulator."""
    offs_n = start + tl.arange(0, BLOCK_N)
    k = _load(k_ptr, offs_n, stride_kn, N, 0, D0, D, TAIL)
    s = dot(q0, tl.trans(k), None, PRECISION)
    if D1:
        k = _load(k_ptr, offs_n, stride_kn, N, D0, D1, D, TAIL)
        s = dot(q1, tl.trans(k), s, PRECISION)
    if TAIL:
        s += tl.where(offs_n < N, 0.0, float("-inf"))[None, :]
    m_new = tl.maximum(m_i, tl.max(s, axis=1) * scale_log2e)
    # A row whose scores are all -inf so far has no maximum to subtract.
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = exp2(s * scale_log2e - shift[:, None])
    alpha = exp2(m_i - shift)
    l_i = l_i * alpha + tl.sum(p, axis=1)
    v = _load(v_ptr, offs_n, stride_vn, N, 0, D0, D, TAIL)
    p = p.to(v.dtype)
    acc0 = dot(p, v, acc0 * alpha[:, None], PRECISION)
    if D1:
        v = _load(v_ptr, offs_n, stride_vn, N, D0, D1, D, TAIL)
        acc1 = dot(p, v, acc1 * alpha[:, None], PRECISION)
    return acc0, acc1, m_new, l_i


@triton.jit
def _fwd_rows(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    first,
    stride_qn,
    stride_kn,
    stride_vn,
    stride_on,
    N,
    scale_log2e,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o and lse of BLOCK_M query rows of one head."""
    offs_m = first + tl.arange(0, BLOCK_M)
    q0 = _load(q_ptr, offs_m, stride_qn, N, 0, D0, D, True)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    q1, acc1 = q0, l_i
    if D1:
        q1 = _load(q_ptr, offs_m, stride_qn, N, D0, D1, D, True)
        acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    full = N // BLOCK_N * BLOCK_N
    for start in range(0, full, BLOCK_N):
        acc0, acc1, m_i, l_i = _fwd_keys(
            q0,
            q1,
            acc0,
            acc1,
            m_i,
            l_i,
            k_ptr,
            v_ptr,
            start,
            stride_kn,
            stride_vn,
            N,
            scale_log2e,
            D,
            D0,
            D1,
            BLOCK_N,
            False,
            PRECISION,
        )
    if TAIL_N:
        acc0, acc1, m_i, l_i = _fwd_keys(
            q0,
            q1,
            acc0,
            acc1,
            m_i,
            l_i,
            k_ptr,
            v_ptr,
            full,
            stride_kn,
            stride_vn,
            N,
            scale_log2e,
            D,
            D0,
            D1,
            TAIL_N,
            True,
            PRECISION,
        )
    inverse = 1.0 / l_i
    _store(o_ptr, acc0 * inverse[:, None], offs_m, stride_on, N, 0, D0, D)
    if D1:
        _store(o_ptr, acc1 * inverse[:, None], offs_m, stride_on, N, D0, D1, D)
    tl.store(lse_ptr + offs_m, (m_i + tl.log2(l_i)) * LN2, mask=offs_m < N)


@triton.jit
def _attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    N,
    H,
    scale_log2e,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAIL_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    num_m = tl.cdiv(N, BLOCK_M)
    pid_m, bh = tl.program_id(0) % num_m, tl.program_id(0) // num_m
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    o_ptr += (b * N * H + h) * D
    lse_ptr += bh.to(tl.int64) * N
    first = pid_m * BLOCK_M
    if TAIL_M == BLOCK_M or first + BLOCK_M <= N:
        _fwd_rows(
            q_ptr,
            k_ptr,
            v_ptr,
            o_ptr,
            lse_ptr,
            first,
            stride_qn,
            stride_kn,
            stride_vn,
            H * D,
            N,
            scale_log2e,
            D,
            D0,
            D1,
            BLOCK_M,
            BLOCK_N,
            TAIL_N,
            PRECISION,
        )
    else:
        _fwd_rows(
            q_ptr,
            k_ptr,
            v_ptr,
            o_ptr,
            lse_ptr,
            first,
            stride_qn,
            stride_kn,
            stride_vn,
            H * D,
            N,
            scale_log2e,
            D,
            D0,
            D1,
            TAIL_M,
            BLOCK_N,
            TAIL_N,
            PRECISION,
        )


@triton.jit
def _dq_keys(
    q0,
    q1,
    do0,
    do1,
    dq0,
    dq1,
    lse,
    delta,
    k_ptr,
    v_ptr,
    start,
    stride_kn,
    stride_vn,
    N,
    scale_log2e,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What one tile of keys adds to dq / scale."""
    offs_n = start + tl.arange(0, BLOCK_N)
    k0 = _load(k_ptr, offs_n, stride_kn, N, 0, D0, D, TAIL)
    v = _load(v_ptr, offs_n, stride_vn, N, 0, D0, D, TAIL)
    s = dot(q0, tl.trans(k0), None, PRECISION)
    dp = dot(do0, tl.trans(v), None, PRECISION)
    k1 = k0
    if D1:
        k1 = _load(k_ptr, offs_n, stride_kn, N, D0, D1, D, TAIL)
        v = _load(v_ptr, offs_n, stride_vn, N, D0, D1, D, TAIL)
        s = dot(q1, tl.trans(k1), s, PRECISION)
        dp = dot(do1, tl.trans(v), dp, PRECISION)
    p = exp2(s * scale_log2e - lse[:, None])
    if TAIL:
        p = tl.where((offs_n < N)[None, :], p, 0.0)
    ds = (p * (dp - delta[:, None])).to(k0.dtype)
    dq0 = dot(ds, k0, dq0, PRECISION)
    if D1:
        dq1 = dot(ds, k1, dq1, PRECISION)
    return dq0, dq1


@triton.jit
def _attention_bwd_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    N,
    H,
    scale,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_dob,
    stride_don,
    stride_doh,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    num_m = tl.cdiv(N, BLOCK_M)
    pid_m, bh = tl.program_id(0) % num_m, tl.program_id(0) // num_m
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    do_ptr += b * stride_dob + h * stride_doh
    o_ptr += (b * N * H + h) * D
    dq_ptr += (b * N * 3 * H + h) * D
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < N

    q0 = _load(q_ptr, offs_m, stride_qn, N, 0, D0, D, True)
    do0 = _load(do_ptr, offs_m, stride_don, N, 0, D0, D, True)
    o = _load(o_ptr, offs_m, H * D, N, 0, D0, D, True)
    delta = tl.sum(o.to(tl.float32) * do0.to(tl.float32), axis=1)
    dq0 = tl.zeros([BLOCK_M, D0], tl.float32)
    q1, do1, dq1 = q0, do0, delta
    if D1:
        q1 = _load(q_ptr, offs_m, stride_qn, N, D0, D1, D, True)
        do1 = _load(do_ptr, offs_m, stride_don, N, D0, D1, D, True)
        o = _load(o_ptr, offs_m, H * D, N, D0, D1, D, True)
        delta += tl.sum(o.to(tl.float32) * do1.to(tl.float32), axis=1)
        dq1 = tl.zeros([BLOCK_M, D1], tl.float32)
    tl.store(delta_ptr + bh.to(tl.int64) * N + offs_m, delta, mask=mask_m)
    lse = tl.load(lse_ptr + bh.to(tl.int64) * N + offs_m, mask=mask_m, other=0.0) * LOG2E

    scale_log2e = scale * LOG2E
    full = N // BLOCK_N * BLOCK_N
    for start in range(0, full, BLOCK_N):
        dq0, dq1 = _dq_keys(
            q0,
            q1,
            do0,
            do1,
            dq0,
            dq1,
            lse,
            delta,
            k_ptr,
            v_ptr,
            start,
            stride_kn,
            stride_vn,
            N,
            scale_log2e,
            D,
            D0,
            D1,
            BLOCK_N,
            False,
            PRECISION,
        )
    if TAIL_N:
        dq0, dq1 = _dq_keys(
            q0,
            q1,
            do0,
            do1,
            dq0,
            dq1,
            lse,
            delta,
            k_ptr,
            v_ptr,
            full,
            stride_kn,
            stride_vn,
            N,
            scale_log2e,
            D,
            D0,
            D1,
            TAIL_N,
            True,
            PRECISION,
        )
    _store(dq_ptr, dq0 * scale, offs_m, 3 * H * D, N, 0, D0, D)
    if D1:
        _store(dq_ptr, dq1 * scale, offs_m, 3 * H * D, N, D0, D1, D)


@triton.jit
def _dkdv_queries(
    k0,
    k1,
    v0,
    v1,
    dk0,
    dk1,
    dv0,
    dv1,
    q_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    start,
    stride_qn,
    stride_don,
    N,
    scale_log2e,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What one tile of queries adds to dv and dk / scale; scores are held transposed."""
    offs_m = start + tl.arange(0, BLOCK_M)
    q0 = _load(q_ptr, offs_m, stride_qn, N, 0, D0, D, TAIL)
    do0 = _load(do_ptr, offs_m, stride_don, N, 0, D0, D, TAIL)
    s = dot(k0, tl.trans(q0), None, PRECISION)
    dp = dot(v0, tl.trans(do0), None, PRECISION)
    q1, do1 = q0, do0
    if D1:
        q1 = _load(q_ptr, offs_m, stride_qn, N, D0, D1, D, TAIL)
        do1 = _load(do_ptr, offs_m, stride_don, N, D0, D1, D, TAIL)
        s = dot(k1, tl.trans(q1), s, PRECISION)
        dp = dot(v1, tl.trans(do1), dp, PRECISION)
    if TAIL:
        # Rows past N: exp2(s - inf) = 0, and zeros in q and do.
        lse = tl.load(lse_ptr + offs_m, mask=offs_m < N, other=float("inf"))
        delta = tl.load(delta_ptr + offs_m, mask=offs_m < N, other=0.0)
    else:
        lse = tl.load(lse_ptr + offs_m)
        delta = tl.load(delta_ptr + offs_m)
    p = exp2(s * scale_log2e - (lse * LOG2E)[None, :])
    dv0 = dot(p.to(do0.dtype), do0, dv0, PRECISION)
    ds = (p * (dp - delta[None, :])).to(q0.dtype)
    dk0 = dot(ds, q0, dk0, PRECISION)
    if D1:
        dv1 = dot(p.to(do1.dtype), do1, dv1, PRECISION)
        dk1 = dot(ds, q1, dk1, PRECISION)
    return dk0, dk1, dv0, dv1


@triton.jit
def _attention_bwd_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    N,
    H,
    scale,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_dob,
    stride_don,
    stride_doh,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAIL_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    num_n = tl.cdiv(N, BLOCK_N)
    pid_n, bh = tl.program_id(0) % num_n, tl.program_id(0) // num_n
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    do_ptr += b * stride_dob + h * stride_doh
    dk_ptr += (b * N * 3 * H + h) * D
    dv_ptr += (b * N * 3 * H + h) * D
    lse_ptr += bh.to(tl.int64) * N
    delta_ptr += bh.to(tl.int64) * N
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)

    k0 = _load(k_ptr, offs_n, stride_kn, N, 0, D0, D, True)
    v0 = _load(v_ptr, offs_n, stride_vn, N, 0, D0, D, True)
    dk0 = tl.zeros([BLOCK_N, D0], tl.float32)
    dv0 = tl.zeros([BLOCK_N, D0], tl.float32)
    k1, v1, dk1, dv1 = k0, v0, dk0, dv0
    if D1:
        k1 = _load(k_ptr, offs_n, stride_kn, N, D0, D1, D, True)
        v1 = _load(v_ptr, offs_n, stride_vn, N, D0, D1, D, True)
        dk1 = tl.zeros([BLOCK_N, D1], tl.float32)
        dv1 = tl.zeros([BLOCK_N, D1], tl.float32)

    scale_log2e = scale * LOG2E
    full = N // BLOCK_M * BLOCK_M
    for start in range(0, full, BLOCK_M):
        dk0, dk1, dv0, dv1 = _dkdv_queries(
            k0,
            k1,
            v0,
            v1,
            dk0,
            dk1,
            dv0,
            dv1,
            q_ptr,
            do_ptr,
            lse_ptr,
            delta_ptr,
            start,
            stride_qn,
            stride_don,
            N,
            scale_log2e,
            D,
            D0,
            D1,
            BLOCK_M,
            False,
            PRECISION,
        )
    if TAIL_M:
        dk0, dk1, dv0, dv1 = _dkdv_queries(
            k0,
            k1,
            v0,
            v1,
            dk0,
            dk1,
            dv0,
            dv1,
            q_ptr,
            do_ptr,
            lse_ptr,
            delta_ptr,
            full,
            stride_qn,
            stride_don,
            N,
            scale_log2e,
            D,
            D0,
            D1,
            TAIL_M,
            True,
            PRECISION,
        )
    _store(dk_ptr, dk0 * scale, offs_n, 3 * H * D, N, 0, D0, D)
    _store(dv_ptr, dv0, offs_n, 3 * H * D, N, 0, D0, D)
    if D1:
        _store(dk_ptr, dk1 * scale, offs_n, 3 * H * D, N, D0, D1, D)
        _store(dv_ptr, dv1, offs_n, 3 * H * D, N, D0, D1, D)


def head_dim_pieces(D: int) -> tuple[int, int]:
    """D as one or two powers of two, each at least 16: 64 -> (64, 0), 72 -> (64, 16)."""
    first = 1 << (D.bit_length() - 1)
    if first == D:
        return D, 0
    second = max(16, triton.next_power_of_2(D - first))
    return (first, second) if second < first else (2 * first, 0)


def tail(N: int, block: int) -> int:
    """Size of the tile that takes the rows behind the last full tile; 0 where there are none."""
    left = N % block
    return max(16, triton.next_power_of_2(left)) if left else 0


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for t in tensors for stride in t.stride()[:3]]


def _fwd(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    B, N, H, D = q.shape
    o = torch.empty((B, N, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, N), dtype=torch.float32, device=q.device)
    if o.numel() == 0:
        return o, lse
    D0, D1 = head_dim_pieces(D)
    config = tuned.attention("fwd", D, q.dtype, q.device.index)
    _attention_fwd_kernel[(triton.cdiv(N, config.BLOCK_M) * B * H,)](
        q,
        k,
        v,
        o,
        lse,
        N,
        H,
        scale * LOG2E.value,
        *_strides(q, k, v),
        D=D,
        D0=D0,
        D1=D1,
        BLOCK_M=config.BLOCK_M,
        TAIL_M=tail(N, config.BLOCK_M) or config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        TAIL_N=tail(N, config.BLOCK_N),
        PRECISION=precision(q.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return o, lse


def _fwd_fake(q, k, v, scale):
    B, N, H, D = q.shape
    return q.new_empty((B, N, H, D)), q.new_empty((B, H, N), dtype=torch.float32)


def _bwd(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> Tensor:
    """dq, dk, dv packed: (B, N, 3, H, D)."""
    B, N, H, D = q.shape
    dqkv = torch.empty((B, N, 3, H, D), dtype=q.dtype, device=q.device)
    if dqkv.numel() == 0:
        return dqkv
    delta = torch.empty_like(lse)
    D0, D1 = head_dim_pieces(D)
    dq, dk, dv = dqkv.unbind(2)
    head = {"D": D, "D0": D0, "D1": D1, "PRECISION": precision(q.dtype)}
    strides = _strides(q, k, v, do)
    config = tuned.attention("bwd_dq", D, q.dtype, q.device.index)
    _attention_bwd_dq_kernel[(triton.cdiv(N, config.BLOCK_M) * B * H,)](
        q,
        k,
        v,
        o,
        do,
        lse,
        delta,
        dq,
        N,
        H,
        scale,
        *strides,
        **head,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        TAIL_N=tail(N, config.BLOCK_N),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    config = tuned.attention("bwd_dkdv", D, q.dtype, q.device.index)
    _attention_bwd_dkdv_kernel[(triton.cdiv(N, config.BLOCK_N) * B * H,)](
        q,
        k,
        v,
        do,
        lse,
        delta,
        dk,
        dv,
        N,
        H,
        scale,
        *strides,
        **head,
        BLOCK_M=config.BLOCK_M,
        TAIL_M=tail(N, config.BLOCK_M),
        BLOCK_N=config.BLOCK_N,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return dqkv


def _bwd_fake(do, q, k, v, o, lse, scale):
    B, N, H, D = q.shape
    return q.new_empty((B, N, 3, H, D))


attention_fwd = library.register("attention_fwd", _fwd_fake)(_fwd)
attention_bwd = library.register("attention_bwd", _bwd_fake)(_bwd)


class AttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = (_dense_rows(t) for t in (q, k, v))
        o, lse = attention_fwd(q, k, v, scale)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.scale = scale
        return o

    @staticmethod
    @library.first_order
    def backward(ctx: Any, do: Tensor) -> Any:
        dqkv = attention_bwd(_dense_rows(do), *ctx.saved_tensors, ctx.scale)
        return *dqkv.unbind(2), None


class AttentionQkvFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, scale: float) -> Tensor:
        qkv = _dense_rows(qkv)
        o, lse = attention_fwd(*qkv.unbind(2), scale)
        ctx.save_for_backward(qkv, o, lse)
        ctx.scale = scale
        return o

    @staticmethod
    @library.first_order
    def backward(ctx: Any, do: Tensor) -> Any:
        qkv, o, lse = ctx.saved_tensors
        return attention_bwd(_dense_rows(do), *qkv.unbind(2), o, lse, ctx.scale), None


def _dense_rows(t: Tensor) -> Tensor:
    """t itself where the head dim is dense, as the kernels read it; else a copy."""
    return t if t.stride(-1) == 1 else t.contiguous()


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(q k^T * scale) v. q, k, v: (B, N, H, D) -> (B, N, H, D); scale is D**-0.5."""
    return AttentionFunction.apply(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)


def attention_qkv(qkv: Tensor, scale: float | None = None) -> Tensor:
    """The same on a packed projection. qkv: (B, N, 3, H, D) -> (B, N, H, D)."""
    return AttentionQkvFunction.apply(qkv, qkv.shape[-1] ** -0.5 if scale is None else scale)
