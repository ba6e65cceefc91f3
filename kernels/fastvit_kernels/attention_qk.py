"""QK-norm and rotary position embedding: q and k of a packed projection, prepared for attention.

y = norm(x) over the D channels of a head: LayerNorm or RMSNorm, with separate weights for q and k
(a', b') = (a cos - b sin, b cos + a sin) for each pair (a, b) of channels of the last m tokens
backward: rotate back by the same angles, then rstd (dy w - mean(dy w) - xhat mean(dy w xhat)), in
RMSNorm without mean(dy w)

qkv: (B, N, 3, H, D), any strides, float32, float16 or bfloat16 -> (B, N, 2, H, D) contiguous,
rounded once; cos, sin: (m, D / 2) or (B, m, D / 2) float32; weights (D,). v stays where it is.
A separate pass, not fused into attention's loads: there each query tile would normalize and rotate
all keys again, registers and shared memory would hold two tables, and the weights' gradients would
need a column sum per tile. It moves 2 x |q, k| forward and 3 x backward (2 x without a norm, as
only the norm needs x): a half to five sixths of attention's own traffic. A program owns a run of
tokens of q or of k and loops over their heads, so that angles and weights are loaded once, and the
weights' gradients stay in registers until the end: one row of partial sums per program, summed in a
fixed order, no atomics. Backward works in place on dqkv, where attention wrote dq', dk' and dv.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels import library, tuned_attention
from fastvit_kernels.attention import (
    _bwd_into,
    _scale,
    attention_fwd,
    draw_seed,
    strides_divisor,
    with_int32_offsets,
)
from fastvit_kernels.launch import cdiv, launch
from fastvit_kernels.operands import contiguous


@triton.jit
def _load_pairs(
    ptrs, stride_d, mask_t, PAIRS: tl.constexpr, D: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """Load rows of D channels as two float32 (rows, PAIRS): first and second of each pair.

    INTERLEAVED: pairs are neighbours, 2 i and 2 i + 1; else i and i + D / 2.
    """
    if INTERLEAVED:
        offs_d = tl.arange(0, 2 * PAIRS)
        mask = mask_t[:, None] & (offs_d < D)[None, :]
        x = tl.load(ptrs[:, None] + offs_d[None, :] * stride_d, mask=mask, other=0.0)
        a, b = tl.split(tl.reshape(x, [x.shape[0], PAIRS, 2]))
    else:
        offs_p = tl.arange(0, PAIRS)
        mask = mask_t[:, None] & (offs_p < D // 2)[None, :]
        a = tl.load(ptrs[:, None] + offs_p[None, :] * stride_d, mask=mask, other=0.0)
        b = tl.load(ptrs[:, None] + (offs_p + D // 2)[None, :] * stride_d, mask=mask, other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _store_pairs(
    ptrs, a, b, mask_t, PAIRS: tl.constexpr, D: tl.constexpr, INTERLEAVED: tl.constexpr
):
    a, b = a.to(ptrs.dtype.element_ty), b.to(ptrs.dtype.element_ty)
    if INTERLEAVED:
        offs_d = tl.arange(0, 2 * PAIRS)
        x = tl.reshape(tl.join(a, b), [a.shape[0], 2 * PAIRS])
        tl.store(ptrs[:, None] + offs_d[None, :], x, mask=mask_t[:, None] & (offs_d < D)[None, :])
    else:
        offs_p = tl.arange(0, PAIRS)
        mask = mask_t[:, None] & (offs_p < D // 2)[None, :]
        tl.store(ptrs[:, None] + offs_p[None, :], a, mask=mask)
        tl.store(ptrs[:, None] + (offs_p + D // 2)[None, :], b, mask=mask)


@triton.jit
def _load_angles(
    cos_ptr, sin_ptr, stride_b, b, n, first, mask_t, PAIRS: tl.constexpr, D: tl.constexpr
):
    """cos and sin of tokens n; 1 and 0 for tokens before `first`, which are not rotated."""
    offs_p = tl.arange(0, PAIRS)
    mask = (mask_t & (n >= first))[:, None] & (offs_p < D // 2)[None, :]
    offs = (b * stride_b + (n - first) * (D // 2))[:, None] + offs_p[None, :]
    return tl.load(cos_ptr + offs, mask=mask, other=1.0), tl.load(sin_ptr + offs, mask, other=0.0)


@triton.jit
def _load_param(ptr, other, PAIRS: tl.constexpr, D: tl.constexpr, INTERLEAVED: tl.constexpr):
    """A (D,) vector, or `other` if ptr is None, as two float32 (1, PAIRS) like `_load_pairs`."""
    offs_p = tl.arange(0, PAIRS)
    a = tl.full([PAIRS], other, tl.float32)
    b = a
    if ptr is not None:
        first, second = (2 * offs_p, 2 * offs_p + 1) if INTERLEAVED else (offs_p, offs_p + D // 2)
        a = tl.load(ptr + first, mask=offs_p < D // 2, other=0.0).to(tl.float32)
        b = tl.load(ptr + second, mask=offs_p < D // 2, other=0.0).to(tl.float32)
    return a[None, :], b[None, :]


@triton.jit
def _normalize(a, b, eps, NORM: tl.constexpr, PAIRS: tl.constexpr, D: tl.constexpr):
    """xhat of each row, and rstd."""
    if NORM == "layernorm":
        real = (tl.arange(0, PAIRS) < D // 2)[None, :]
        # Twice: the second pass removes the first mean's rounding error, for rows far from zero.
        for _ in tl.static_range(2):
            mean = (tl.sum(a + b, axis=1) / D)[:, None]
            a, b = tl.where(real, a - mean, 0.0), tl.where(real, b - mean, 0.0)
    rstd = (1.0 / tl.sqrt(tl.sum(a * a + b * b, axis=1) / D + eps))[:, None]
    return a * rstd, b * rstd, rstd


@triton.jit(do_not_specialize=["T", "N", "H", "first", "heads_per_program"])
def _attention_qk_fwd_kernel(
    x_ptr,
    y_ptr,
    q_weight_ptr,
    q_bias_ptr,
    k_weight_ptr,
    k_bias_ptr,
    cos_ptr,
    sin_ptr,
    stride_xb,
    stride_xn,
    stride_xs,
    stride_xh,
    stride_xd,
    stride_cos,
    T,
    N,
    H,
    first,
    heads_per_program,
    eps,
    NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PAIRS: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Programs: blocks of tokens x groups of heads x {q, k}."""
    pid_t, pid_g, which = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    b, n = (offs_t // N).to(tl.int64), offs_t % N
    if cos_ptr is not None:
        cos, sin = _load_angles(cos_ptr, sin_ptr, stride_cos, b, n, first, mask_t, PAIRS, D)
    if which == 0:
        w_a, w_b = _load_param(q_weight_ptr, 1.0, PAIRS, D, INTERLEAVED)
        bias_a, bias_b = _load_param(q_bias_ptr, 0.0, PAIRS, D, INTERLEAVED)
    else:
        w_a, w_b = _load_param(k_weight_ptr, 1.0, PAIRS, D, INTERLEAVED)
        bias_a, bias_b = _load_param(k_bias_ptr, 0.0, PAIRS, D, INTERLEAVED)
    x_offs = b * stride_xb + n.to(tl.int64) * stride_xn + which * stride_xs
    y_offs = (offs_t.to(tl.int64) * 2 + which) * H * D
    start = pid_g * heads_per_program
    for h in range(start, tl.minimum(start + heads_per_program, H)):
        x_ptrs = x_ptr + tl.multiple_of(x_offs + h * stride_xh, ALIGN)
        x_a, x_b = _load_pairs(x_ptrs, stride_xd, mask_t, PAIRS, D, INTERLEAVED)
        if NORM is not None:
            x_a, x_b, _ = _normalize(x_a, x_b, eps, NORM, PAIRS, D)
            x_a, x_b = x_a * w_a + bias_a, x_b * w_b + bias_b
        if cos_ptr is not None:
            x_a, x_b = x_a * cos - x_b * sin, x_b * cos + x_a * sin
        y_ptrs = y_ptr + tl.multiple_of(y_offs + h * D, 8)
        _store_pairs(y_ptrs, x_a, x_b, mask_t, PAIRS, D, INTERLEAVED)


@triton.jit(do_not_specialize=["T", "N", "H", "first", "heads_per_program", "blocks_per_program"])
def _attention_qk_bwd_kernel(
    dy_ptr,
    x_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    dparams_ptr,
    stride_xb,
    stride_xn,
    stride_xs,
    stride_xh,
    stride_xd,
    stride_cos,
    T,
    N,
    H,
    first,
    heads_per_program,
    blocks_per_program,
    eps,
    NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PAIRS: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Overwrite dy with dx. Programs: runs of tokens x groups of heads x {q, k}.

    dparams: partial sums, a row per run and group: dweight and dbias of q, then of k, D each.
    """
    pid_t, pid_g, which = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if which == 0:
        w_a, w_b = _load_param(q_weight_ptr, 1.0, PAIRS, D, INTERLEAVED)
    else:
        w_a, w_b = _load_param(k_weight_ptr, 1.0, PAIRS, D, INTERLEAVED)
    dw_a = tl.zeros([BLOCK_T, PAIRS], tl.float32)
    dw_b, db_a, db_b = dw_a, dw_a, dw_a
    begin = pid_t * blocks_per_program * BLOCK_T
    start = pid_g * heads_per_program
    for t in range(begin, tl.minimum(begin + blocks_per_program * BLOCK_T, T), BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        mask_t = offs_t < T
        b, n = (offs_t // N).to(tl.int64), offs_t % N
        if cos_ptr is not None:
            cos, sin = _load_angles(cos_ptr, sin_ptr, stride_cos, b, n, first, mask_t, PAIRS, D)
        x_offs = b * stride_xb + n.to(tl.int64) * stride_xn + which * stride_xs
        dy_offs = (offs_t.to(tl.int64) * 3 + which) * H * D
        for h in range(start, tl.minimum(start + heads_per_program, H)):
            dy_ptrs = dy_ptr + tl.multiple_of(dy_offs + h * D, 8)
            dy_a, dy_b = _load_pairs(dy_ptrs, 1, mask_t, PAIRS, D, INTERLEAVED)
            if cos_ptr is not None:
                dy_a, dy_b = dy_a * cos + dy_b * sin, dy_b * cos - dy_a * sin
            if NORM is not None:
                x_ptrs = x_ptr + tl.multiple_of(x_offs + h * stride_xh, ALIGN)
                x_a, x_b = _load_pairs(x_ptrs, stride_xd, mask_t, PAIRS, D, INTERLEAVED)
                x_a, x_b, rstd = _normalize(x_a, x_b, eps, NORM, PAIRS, D)
                dw_a, dw_b = dw_a + dy_a * x_a, dw_b + dy_b * x_b
                db_a, db_b = db_a + dy_a, db_b + dy_b
                dy_a, dy_b = dy_a * w_a, dy_b * w_b
                c = (tl.sum(dy_a * x_a + dy_b * x_b, axis=1) / D)[:, None]
                x_a, x_b = c * x_a, c * x_b
                if NORM == "layernorm":
                    mean = (tl.sum(dy_a + dy_b, axis=1) / D)[:, None]
                    x_a, x_b = x_a + mean, x_b + mean
                dy_a, dy_b = (dy_a - x_a) * rstd, (dy_b - x_b) * rstd
            _store_pairs(dy_ptrs, dy_a, dy_b, mask_t, PAIRS, D, INTERLEAVED)
    if NORM is not None:
        offs_p = tl.arange(0, PAIRS)
        first_d, second_d = (
            (2 * offs_p, 2 * offs_p + 1) if INTERLEAVED else (offs_p, offs_p + D // 2)
        )
        row = pid_t * tl.num_programs(1) + pid_g
        dparams_ptr += (row * 2 + which) * 2 * D
        mask = offs_p < D // 2
        tl.store(dparams_ptr + first_d, tl.sum(dw_a, axis=0), mask=mask)
        tl.store(dparams_ptr + second_d, tl.sum(dw_b, axis=0), mask=mask)
        tl.store(dparams_ptr + D + first_d, tl.sum(db_a, axis=0), mask=mask)
        tl.store(dparams_ptr + D + second_d, tl.sum(db_b, axis=0), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _attention_qk_sum_kernel(x_ptr, out_ptr, M, C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Column sums of a float32 (M, C) matrix, in a fixed order."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C], tl.float32)
    for m in range(0, M, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask = (offs_m < M)[:, None] & (offs_c < C)[None, :]
        total += tl.sum(tl.load(x_ptr + offs_m[:, None] * C + offs_c, mask=mask, other=0.0), axis=0)
    tl.store(out_ptr + offs_c, total, mask=offs_c < C)


def _arguments(
    qkv: Tensor, cos: Tensor | None, norm: str | None, interleaved: bool
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Arguments of both kernels: strides and sizes; constexprs and launch options."""
    B, N, _, H, D = qkv.shape
    config = tuned_attention.qk(D, qkv.device.index)
    stride_cos = 0 if cos is None or cos.ndim == 2 else cos.stride(0)
    first = N if cos is None else N - cos.shape[-2]
    constants = {
        "NORM": norm,
        "INTERLEAVED": interleaved and cos is not None,
        "BLOCK_T": config.BLOCK_M,
        "PAIRS": config.BLOCK_N,
        "D": D,
        "ALIGN": strides_divisor(qkv),
        "num_warps": config.num_warps,
        "maxnreg": config.maxnreg,
    }
    return (*qkv.stride(), stride_cos, B * N, N, H, first), constants


def _fwd(
    qkv: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    norm: str | None,
    interleaved: bool,
) -> Tensor:
    B, N, _, H, D = qkv.shape
    y = qkv.new_empty((B, N, 2, H, D))
    if y.numel() == 0:
        return y
    qkv = with_int32_offsets(qkv)
    sizes, constants = _arguments(qkv, cos, norm, interleaved)
    blocks = cdiv(B * N, constants["BLOCK_T"])
    groups = tuned_attention.qk_groups(blocks, H, qkv.device.index)
    heads = cdiv(H, groups)
    params = (q_weight, q_bias, k_weight, k_bias, cos, sin)
    launch(
        _attention_qk_fwd_kernel,
        (blocks, cdiv(H, heads), 2),
        qkv,
        y,
        *params,
        *sizes,
        heads,
        eps,
        **constants,
    )
    return y


def _fwd_fake(qkv, q_weight, q_bias, k_weight, k_bias, cos, sin, eps, norm, interleaved):
    B, N, _, H, D = qkv.shape
    return qkv.new_empty((B, N, 2, H, D))


def _bwd_in_place(
    dqkv: Tensor,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    norm: str | None,
    interleaved: bool,
) -> Tensor:
    """Turn dq', dk' in dqkv into dq, dk. Returns dweight and dbias of q, then of k: (4, D)."""
    B, N, _, H, D = qkv.shape
    dparams = qkv.new_zeros((4, D) if norm else (0, D), dtype=torch.float32)
    if qkv.numel() == 0:
        return dparams
    qkv = with_int32_offsets(qkv)
    sizes, constants = _arguments(qkv, cos, norm, interleaved)
    blocks = cdiv(B * N, constants["BLOCK_T"])
    groups = tuned_attention.qk_groups(blocks, H, qkv.device.index)
    heads = cdiv(H, groups)
    groups = cdiv(H, heads)
    per_program = tuned_attention.qk_run(blocks * groups, qkv.device.index) if norm else 1
    runs = cdiv(blocks, per_program)
    partial = dparams.new_empty((runs * groups if norm else 0, 4 * D))
    launch(
        _attention_qk_bwd_kernel,
        (runs, groups, 2),
        *(dqkv, qkv, q_weight, k_weight, cos, sin, partial),
        *(*sizes, heads, per_program, eps),
        **constants,
    )
    if norm:
        launch(
            _attention_qk_sum_kernel,
            (cdiv(4 * D, 16),),
            partial,
            dparams,
            len(partial),
            4 * D,
            BLOCK_M=128,
            BLOCK_C=16,
            num_warps=4,
        )
    return dparams


def _bwd(
    do: Tensor,
    qkv: Tensor,
    qk: Tensor,
    o: Tensor,
    lse: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    scale: float,
    max_seqlen: int,
    dropout: float,
    eps: float,
    norm: str | None,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """dqkv, and the parameters' gradients as `_bwd_in_place` returns them."""
    dqkv = qkv.new_empty(qkv.shape)
    q, k = qk.unbind(2)
    args = (o, lse, scale, lengths, cu_seqlens, max_seqlen, dropout, seed)
    _bwd_into(*dqkv.unbind(2), do, q, k, qkv.select(2, 2), *args)
    params = (q_weight, k_weight, cos, sin, eps, norm, interleaved)
    return dqkv, _bwd_in_place(dqkv, qkv, *params)


def _bwd_fake(do, qkv, *args):
    rows = 4 if args[-2] else 0
    return qkv.new_empty(qkv.shape), qkv.new_empty((rows, qkv.shape[-1]), dtype=torch.float32)


attention_qk_fwd = library.register("attention_qk", _fwd_fake)(_fwd)
attention_qk_bwd = library.register("attention_qk_bwd", _bwd_fake)(_bwd)


class AttentionQKFunction(torch.autograd.Function):
    """Saved for backward: qkv, q' and k', o, lse, and the weights and tables."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        q_weight: Tensor | None,
        q_bias: Tensor | None,
        k_weight: Tensor | None,
        k_bias: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        lengths: Tensor | None,
        cu_seqlens: Tensor | None,
        seed: Tensor | None,
        scale: float,
        max_seqlen: int,
        dropout: float,
        eps: float,
        norm: str | None,
        interleaved: bool,
    ) -> Tensor:
        params = (q_weight, q_bias, k_weight, k_bias)
        qk = attention_qk_fwd(qkv, *params, cos, sin, eps, norm, interleaved)
        q, k = qk.unbind(2)
        sequences = (lengths, cu_seqlens, max_seqlen)
        o, lse = attention_fwd(q, k, qkv.select(2, 2), scale, *sequences, dropout, seed)
        tensors = (q_weight, k_weight, cos, sin, lengths, cu_seqlens, seed)
        ctx.save_for_backward(qkv, qk, o, lse, *tensors)
        ctx.options = (scale, max_seqlen, dropout, eps, norm, interleaved)
        ctx.dtypes = [None if p is None else p.dtype for p in params]
        return o

    @staticmethod
    @library.once_differentiable
    def backward(ctx: Any, do: Tensor) -> Any:
        dqkv, sums = attention_qk_bwd(do, *ctx.saved_tensors, *ctx.options)
        grads = (None if t is None else s.to(t) for t, s in zip(ctx.dtypes, sums, strict=False))
        return dqkv, *(grads if len(sums) else [None] * 4), *[None] * 11


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    norm: str | None,
    interleaved: bool,
) -> Tensor:
    """q' and k' of qkv, (B, N, 3, H, D) -> (B, N, 2, H, D), without a gradient."""
    tensors = (qkv, *contiguous(q_weight, q_bias, k_weight, k_bias))
    detached = (None if t is None else t.detach() for t in tensors)
    return attention_qk_fwd(*detached, *_tables(cos, sin), eps, norm, interleaved)


def attention_qk(
    qkv: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    norm: str | None,
    interleaved: bool,
    scale: float | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
    dropout: float = 0.0,
) -> Tensor:
    """`attention_qkv` with q and k normed (norm "layernorm" or "rmsnorm") and rotated (cos, sin).

    With cu_seqlens, qkv is (1, total, 3, H, D) and cos, sin have a row for each of its tokens.
    """
    params = (*contiguous(q_weight, q_bias, k_weight, k_bias), *_tables(cos, sin))
    sequences = (*contiguous(lengths, cu_seqlens), draw_seed(qkv, dropout))
    options = (_scale(qkv, scale), max_seqlen, dropout, eps, norm, interleaved)
    return library.apply(AttentionQKFunction, qkv, *params, *sequences, *options)


def _tables(cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """cos and sin as the kernels read them: detached, float32, contiguous."""
    if cos is None or sin is None:
        return None, None
    return cos.detach().float().contiguous(), sin.detach().float().contiguous()
