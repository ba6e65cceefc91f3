"""Chosen rows of softmax(q k^T * scale), from the lse that attention gave: no N x N is built.

maps[b, h, i, n] = exp(scale q[b, rows[i], h] . k[b, n, h] - lse[b, h, rows[i]])
q, k: (B, N, H, D) at any strides; lse: (B, H, N) float32; rows: (R,) -> (B, H, R, N) float32.
Bytes: k once for every 16 rows, and the maps. No gradient.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels import library
from fastvit_kernels.attention import strides_divisor
from fastvit_kernels.attention_tiles import dot_rows, load_tile, rows_of
from fastvit_kernels.common import LOG2E, exp2, mul_rn
from fastvit_kernels.gemm import precision

_BLOCK_N = 64


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
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid_r, pid_n, pid_bh = tl.program_id(1), tl.program_id(2), tl.program_id(0).to(tl.int64)
    pid_b, pid_h = pid_bh // H, pid_bh % H
    q_rows = rows_of(q_ptr, pid_b * stride_qb + pid_h * stride_qh, stride_qn, stride_qd, ALIGN)
    k_rows = rows_of(k_ptr, pid_b * stride_kb + pid_h * stride_kh, stride_kn, stride_kd, ALIGN)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_r, mask_n = offs_r < R, offs_n < N
    rows = tl.load(rows_ptr + offs_r, mask=mask_r, other=0)
    q = load_tile(q_rows, rows, N, True, D, ALIGN)
    k = load_tile(k_rows, offs_n, N, True, D, ALIGN)
    lse = tl.load(lse_ptr + pid_bh * N + rows) * LOG2E
    # Keys x rows, as elsewhere: the keys are the side with 64 of them.
    p = exp2(mul_rn(dot_rows(k, q, PRECISION), scale_log2) - lse[None, :])
    offs = (pid_bh * R + offs_r)[None, :] * N + offs_n[:, None]
    tl.store(maps_ptr + offs, p, mask=mask_n[:, None] & mask_r[None, :])


def _maps(q: Tensor, k: Tensor, lse: Tensor, rows: Tensor, scale: float) -> Tensor:
    B, N, H, D = q.shape
    R = len(rows)
    maps = lse.new_empty((B, H, R, N))
    if maps.numel() == 0:
        return maps
    _attention_maps_kernel[(B * H, triton.cdiv(R, 16), triton.cdiv(N, _BLOCK_N))](
        *(q, k, lse.contiguous(), rows, maps),
        *q.stride(),
        *k.stride(),
        *(H, N, R, scale * 1.4426950408889634),
        BLOCK_R=16,
        BLOCK_N=_BLOCK_N,
        D=D,
        ALIGN=strides_divisor(q, k),
        PRECISION=precision(q.dtype),
        num_warps=4,
        num_stages=1,
    )
    return maps


def _maps_fake(q, k, lse, rows, scale):
    B, N, H, _ = q.shape
    return lse.new_empty((B, H, len(rows), N))


attention_maps_fwd = library.register("attention_maps", _maps_fake)(_maps)


def attention_maps(
    q: Tensor, k: Tensor, lse: Tensor, rows: Tensor, scale: float | None = None
) -> Tensor:
    """Rows `rows` (R,) of the probabilities whose log sum exp is lse -> (B, H, R, N) float32."""
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return attention_maps_fwd(q.detach(), k.detach(), lse, rows, scale)
