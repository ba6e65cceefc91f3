"""Scaled dot-product attention for ViT: short, dense sequences; scores never reach memory.

o = softmax(q k^T * scale) v
lse = (log sum exp of each row of q k^T * scale) / scale
p = exp2((q k^T - lse) * scale * log2(e)); forward has the row's maximum in place of lse, and
subtracts it before scaling, so that the largest p is exactly 1 however large the scores are
ds = p * (do v^T - delta), delta = rowsum(o * do)
dv = p^T do;  dk = scale ds^T q;  dq = scale ds k

q, k, v: (B, N, H, D), any strides, or packed (B, N, 3, H, D) and, for images of different sizes,
(total, 3, H, D); D a multiple of 8 in 16..128; float32, float16 or bfloat16. o: (B, N, H, D)
contiguous; lse: (B, H, N) float32.
Saved for backward: q, k, v (or qkv), o and lse. Backward recomputes p from lse.
Forward: one launch. Up to 256 keys are held at once (`attention_resident`; on some parts fewer, as
224 at D = 64 on sm_80 and sm_120), more take an online softmax (`attention_long`).
Backward: with many heads and up to 128 keys, one launch of one program per head
(`attention_resident`); with few heads and up to 384 keys, one launch with programs for dQ and
programs for dK, dV side by side (`attention_long_bwd`); else a launch for dQ and delta (float32,
shaped as lse), then one for dK and dV. `attention_plan` chooses.
Dropout zeroes p with probability `dropout` before the product with v, and scales the rest by 1 /
(1 - dropout). The mask is a function of a seed, the head, the row and the key, recomputed in
backward. The seed is one number on the device, drawn by torch's generator of that device:
torch.manual_seed reproduces it and activation checkpointing restores it, without a host sync.
FLOPs: 4 B H N^2 D forward; backward 10 where one program owns a head, else 14. Bytes: forward q, k,
v, o once; backward q, k, v, o, do, dq, dk, dv once in one launch; in two, q, k, v and do twice.
Rereads of tiles hit L2.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvit_kernels import library, tuned
from fastvit_kernels.attention_plan import plan_bwd, plan_fwd
from fastvit_kernels.attention_resident import (
    _attention_bwd_resident_kernel,
    _attention_fwd_resident_kernel,
)
from fastvit_kernels.common import LOG2E
from fastvit_kernels.operands import contiguous, precision


def _plan_facts(q: Tensor, at: "_Layout", dropout: float) -> tuple[Any, ...]:
    device = q.device.index
    facts = (at.batch * q.shape[2], at.longest, q.shape[3], q.dtype, at.ragged)
    return *facts, tuned.arch(device), tuned.num_sms(device), dropout > 0


def _dropout_args(dropout: float) -> tuple[int, float]:
    """(threshold, inv_keep): p is kept if a random int32 >= threshold, and scaled by inv_keep."""
    return int(dropout * 2**32) - 2**31, 1.0 / (1.0 - dropout)


def strides_divisor(*tensors: Tensor) -> int:
    """8 if it divides every stride but the last, which permits 16-byte loads of rows; else 1."""
    return 8 if all(stride % 8 == 0 for t in tensors for stride in t.stride()[:-1]) else 1


def with_int32_offsets(t: Tensor, tokens: int = 0) -> Tensor:
    """t, copied if its heads, its channels or `tokens` of its rows are so far apart that their
    offsets overflow 32 bits. The kernels use 32-bit offsets there: 64-bit ones cost instructions
    in their loops, and some of them a quarter more registers.

    RuntimeError: the gradient of a packed qkv of so many tokens, whose rows lie 3 H D apart, would
    overflow too.
    """
    (H, D), (stride_n, stride_h, stride_d) = t.shape[-2:], t.stride()[-3:]
    if 3 * tokens * H * D >= 2**31:
        raise RuntimeError(
            f"attention: q, k and v of one sequence, {tokens} tokens, {H} heads and head dim {D}, "
            "must have under 2**31 elements"
        )
    within = max(tokens * stride_n, H * stride_h, D * stride_d) < 2**31
    return t if within else t.contiguous()


def _constants(*tensors: Tensor) -> dict[str, Any]:
    """The constexprs common to all kernels."""
    q = tensors[0]
    divisor = strides_divisor(*tensors)
    return {"D": q.shape[-1], "ALIGN": divisor, "PRECISION": precision(q.dtype)}


@dataclass(frozen=True)
class _Layout:
    """Layout of the sequences: a batch of B with N tokens each, or packed end to end."""

    batch: int
    longest: int
    lengths: Tensor | None
    cu_seqlens: Tensor | None

    @property
    def ragged(self) -> bool:
        return self.lengths is not None or self.cu_seqlens is not None

    def outer(self, stride: int) -> int:
        """The stride between sequences; 0 in a packed batch, where cu_seqlens takes its place."""
        return stride if self.cu_seqlens is None else 0

    def strides(self, t: Tensor) -> tuple[int, ...]:
        return self.outer(t.stride(0)), *t.stride()[1:]

    @property
    def constants(self) -> dict[str, bool]:
        return {"PACKED": self.cu_seqlens is not None, "HAS_LENGTHS": self.lengths is not None}


def _layout(
    q: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int
) -> _Layout:
    if cu_seqlens is None:
        return _Layout(q.shape[0], q.shape[1], lengths, None)
    return _Layout(len(cu_seqlens) - 1, min(max_seqlen, q.shape[1]), lengths, cu_seqlens)


def _fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    B, N, H, D = q.shape
    o = q.new_empty((B, N, H, D))
    lse = q.new_empty((B, H, N), dtype=torch.float32)
    if q.numel() == 0:
        return o, lse
    at = _layout(q, lengths, cu_seqlens, max_seqlen)
    q, k, v = (with_int32_offsets(t, at.longest) for t in (q, k, v))
    plan = plan_fwd(*_plan_facts(q, at, dropout))
    strides = (*at.strides(q), *at.strides(k), *at.strides(v))
    constants = _constants(q, k, v)
    if plan.kernel is _attention_fwd_resident_kernel:
        plan(H, B, q, k, v, o, lse, *strides, H, N, scale * LOG2E.value, **constants)
        return o, lse
    plan(
        H,
        at.batch,
        *(q, k, v, o, lse, cu_seqlens, lengths, seed),
        *strides,
        at.outer(o.stride(0)),
        at.outer(lse.stride(0)),
        lse.stride(1),
        *(H, at.longest, scale * LOG2E.value, *_dropout_args(dropout)),
        **at.constants,
        **constants,
    )
    return o, lse


def _fwd_fake(q, k, v, scale, lengths=None, cu_seqlens=None, max_seqlen=0, dropout=0.0, seed=None):
    B, N, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, N), dtype=torch.float32)


def _bwd_into(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    dropout: float,
    seed: Tensor | None,
) -> None:
    """Write dq, dk and dv, which must have equal strides and contiguous (H, D)."""
    if q.numel() == 0:
        return
    H = q.shape[2]
    at = _layout(q, lengths, cu_seqlens, max_seqlen)
    q, k, v, do = (with_int32_offsets(t, at.longest) for t in (q, k, v, do))
    plans = plan_bwd(*_plan_facts(q, at, dropout))
    strides = [at.strides(t) for t in (q, k, v, do)]
    strides = [stride for group in strides for stride in group]
    constants = _constants(q, k, v, do, dq)
    dq_strides = (at.outer(dq.stride(0)), dq.stride(1))
    sizes = (H, at.longest, scale, scale * LOG2E.value)
    if plans[0].kernel is _attention_bwd_resident_kernel:
        args = (q, k, v, o, do, lse, dq, dk, dv, *strides, *dq_strides, *sizes)
        plans[0](H, at.batch, *args, **constants)
        return
    delta = torch.empty_like(lse) if len(plans) > 1 else None
    strides += [at.outer(o.stride(0)), *dq_strides, at.outer(lse.stride(0)), lse.stride(1)]
    sequences = (cu_seqlens, lengths, seed)
    sizes += _dropout_args(dropout)
    for plan in plans:
        # Each part gets only the tensors that it touches: `traffic` counts arguments as bytes.
        part = plan.constants["PART"]
        own_o = None if part == "dkv" else o
        own_dq = None if part == "dkv" else dq
        own_dk, own_dv = (None, None) if part == "dq" else (dk, dv)
        args = (q, k, v, own_o, do, lse, delta, own_dq, own_dk, own_dv, *sequences)
        plan(H, at.batch, *args, *strides, *sizes, **at.constants, **constants)


def _bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    args = (do, q, k, v, o, lse, scale, lengths, cu_seqlens, max_seqlen, dropout, seed)
    _bwd_into(dq, dk, dv, *args)
    return dq, dk, dv


def _bwd_fake(do, q, *_, **__):
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _bwd_qkv(
    do: Tensor,
    qkv: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    dqkv = qkv.new_empty(qkv.shape)
    args = (o, lse, scale, lengths, cu_seqlens, max_seqlen, dropout, seed)
    _bwd_into(*dqkv.unbind(2), do, *qkv.unbind(2), *args)
    return dqkv


def _bwd_qkv_fake(do, qkv, *_, **__):
    return qkv.new_empty(qkv.shape)


attention_fwd = library.register("attention_fwd", _fwd_fake)(_fwd)
attention_bwd = library.register("attention_bwd", _bwd_fake)(_bwd)
attention_qkv_bwd = library.register("attention_qkv_bwd", _bwd_qkv_fake)(_bwd_qkv)


class AttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        lengths: Tensor | None,
        dropout: float,
        seed: Tensor | None,
    ) -> Tensor:
        o, lse = attention_fwd(q, k, v, scale, lengths, None, 0, dropout, seed)
        ctx.save_for_backward(q, k, v, o, lse, lengths, seed)
        ctx.scale, ctx.dropout = scale, dropout
        return o

    @staticmethod
    @library.once_differentiable
    def backward(ctx: Any, do: Tensor) -> Any:
        *saved, lengths, seed = ctx.saved_tensors
        grads = attention_bwd(do, *saved, ctx.scale, lengths, None, 0, ctx.dropout, seed)
        return *grads, *[None] * 4


class AttentionQKVFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        scale: float,
        lengths: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int,
        dropout: float,
        seed: Tensor | None,
    ) -> Tensor:
        sequences = (lengths, cu_seqlens, max_seqlen)
        o, lse = attention_fwd(*qkv.unbind(2), scale, *sequences, dropout, seed)
        ctx.save_for_backward(qkv, o, lse, lengths, cu_seqlens, seed)
        ctx.scale, ctx.max_seqlen, ctx.dropout = scale, max_seqlen, dropout
        return o

    @staticmethod
    @library.once_differentiable
    def backward(ctx: Any, do: Tensor) -> Any:
        *saved, lengths, cu_seqlens, seed = ctx.saved_tensors
        sequences = (lengths, cu_seqlens, ctx.max_seqlen)
        dqkv = attention_qkv_bwd(do, *saved, ctx.scale, *sequences, ctx.dropout, seed)
        return dqkv, *[None] * 6


def draw_seed(q: Tensor, dropout: float) -> Tensor | None:
    """A fresh seed from the generator of q's device, on that device; None without dropout."""
    if not dropout:
        return None
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=q.device)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    lengths: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q k^T * scale) v. q, k, v: (B, N, H, D), any strides -> (B, N, H, D).

    lengths: (B,) integers; keys from lengths[b] on are masked. dropout: rate, on the probabilities.
    """
    options = (_scale(q, scale), *contiguous(lengths), dropout, draw_seed(q, dropout))
    return library.apply(AttentionFunction, q, k, v, *options)


def attention_qkv(
    qkv: Tensor, scale: float | None = None, lengths: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """`attention` of a packed projection (B, N, 3, H, D), whose gradient is packed as well."""
    sequences = (*contiguous(lengths), None, 0)
    seed = draw_seed(qkv, dropout)
    return library.apply(AttentionQKVFunction, qkv, _scale(qkv, scale), *sequences, dropout, seed)


def attention_packed(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention within each of the sequences that lie end to end in qkv, (total, 3, H, D).

    cu_seqlens: (B + 1,) integers, from 0 to total: sequence b is rows cu_seqlens[b] up to
    cu_seqlens[b + 1], at most max_seqlen of them. Returns (total, H, D).
    """
    sequences = (None, cu_seqlens.contiguous(), max_seqlen)
    args = (_scale(qkv, scale), *sequences, dropout, draw_seed(qkv, dropout))
    return library.apply(AttentionQKVFunction, qkv[None], *args)[0]


def attention_lse(
    q: Tensor, k: Tensor, scale: float | None = None, lengths: Tensor | None = None
) -> Tensor:
    """log sum exp of each row of q k^T * scale: (B, H, N) float32, without a gradient."""
    q, k = q.detach(), k.detach()
    scale = _scale(q, scale)
    return attention_fwd(q, k, k, scale, *contiguous(lengths))[1] * scale


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else float(scale)
