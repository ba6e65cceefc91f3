"""Scaled dot-product attention for ViT: short, dense rows; scores never reach memory.

o = softmax(q k^T * scale) v; lse = log sum exp of each row of scaled scores, inside in base 2:
p = exp2(q k^T * scale * log2(e) - lse2), so that p of backward is p of forward to the last bits
ds = p * (do v^T - delta), delta = rowsum(o * do)
dv = p^T do;  dk = scale ds^T q;  dq = scale ds k

q, k, v: (B, N, H, D), any strides, or packed (B, N, 3, H, D) and, for images of different sizes,
(total, 3, H, D); D a multiple of 8 in 16..128; float32, float16 or bfloat16. o: (B, N, H, D)
contiguous; lse: (B, H, N) float32.
Saved for backward: q, k, v (or qkv), o and lse2. p is computed again, from lse, in backward.
Forward: one launch, all keys held at once up to 256 of them (`attention_resident`), else an online
softmax (`attention_long`). Backward: one launch up to 128 keys where heads are many; else dQ with
delta (float32, of the shape of lse), then dK and dV. `tuned.ATTENTION` sets the limits.
Rows are cut into tiles that end at the next multiple of 16, so N = 197 costs 208 x 208 scores: the
share of scores computed for nothing is 39 % at N = 50, 10 % at 197, 11 % at 257, 5 % at 577, 4 % at
785, 2 % at 1029 and 1 % at 1370.
FLOPs: 4 B H N^2 D forward, 10 backward in one launch, 14 in two. Bytes: each of q, k, v, o once
forward; q, k, v, o, do, dq, dk, dv once backward in one launch; tiles are read again from L2.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fastvit_kernels import library, tuned
from fastvit_kernels.attention_long import (
    _attention_bwd_dkv_kernel,
    _attention_bwd_dq_kernel,
    _attention_fwd_kernel,
)
from fastvit_kernels.attention_resident import (
    _attention_bwd_resident_kernel,
    _attention_fwd_resident_kernel,
)
from fastvit_kernels.gemm import precision

_LOG2E, _LN2 = 1.4426950408889634, 0.6931471805599453


@dataclass(frozen=True)
class Launch:
    """One kernel of a pass: what it is compiled with and how many programs share a head."""

    kernel: Any
    programs: int
    constants: dict[str, Any]
    config: tuned.Config

    def __call__(self, heads: int, batch: int, *args: Any, **constants: Any) -> None:
        self.kernel[(self.programs, heads, batch)](
            *args,
            **self.constants,
            **constants,
            num_warps=self.config.num_warps,
            num_stages=self.config.num_stages,
        )


def round_up(n: int, pieces: int, largest: int) -> int:
    """The least multiple of 16 from n up whose part under `largest` has at most `pieces` bits set:
    what a row of n costs when cut into power-of-two tiles.
    """
    n = -(-n // 16) * 16
    while (n % largest).bit_count() > pieces:
        n += n & -n
    return n


def plan_fwd(
    heads: int, N: int, D: int, dtype: torch.dtype, ragged: bool, arch: int, sms: int
) -> Launch:
    """How the forward of `heads` = B * H rows of N tokens is launched."""
    resident = tuned.attention("fwd_resident", D, dtype, arch)
    if not ragged and N <= resident.BLOCK_N:
        # Few heads: every query tile its own program, though each then loads all keys.
        splits = triton.cdiv(N, resident.BLOCK_M) if heads * 2 <= sms else 1
        constants = _resident(N, resident) | {"SPLITS": splits}
        return Launch(_attention_fwd_resident_kernel, splits, constants, resident)
    config = tuned.attention("fwd", D, dtype, arch)
    if heads * triton.cdiv(N, config.BLOCK_M) < sms:
        config = tuned.attention("fwd_small", D, dtype, arch)
    return _long(_attention_fwd_kernel, "BLOCK_M", config, N, ragged)


def plan_bwd(
    heads: int, N: int, D: int, dtype: torch.dtype, ragged: bool, arch: int, sms: int
) -> list[Launch]:
    """The backward: one launch where all keys are resident, else dQ and delta, then dK and dV."""
    for kernel in () if ragged or heads * 2 <= sms else ("bwd_64_keys", "bwd_128_keys"):
        resident = tuned.attention(kernel, D, dtype, arch)
        if N <= resident.BLOCK_N:
            constants = _resident(N, resident)
            return [Launch(_attention_bwd_resident_kernel, 1, constants, resident)]
    dq = tuned.attention("dq", D, dtype, arch)
    dkv = tuned.attention("dkv", D, dtype, arch)
    return [
        _long(_attention_bwd_dq_kernel, "BLOCK_M", dq, N, ragged),
        _long(_attention_bwd_dkv_kernel, "BLOCK_N", dkv, N, ragged),
    ]


def _resident(N: int, config: tuned.Config) -> dict[str, Any]:
    block_m = config.BLOCK_M
    return {
        "HAS_FULL": N >= block_m,
        "BLOCK_M": block_m,
        "TAIL_M": round_up(N % block_m, 1, block_m),
        "KEYS": round_up(N, 2, 128),
    }


def _long(kernel: Any, owned: str, config: tuned.Config, N: int, ragged: bool) -> Launch:
    """A kernel whose programs each own one tile of `owned` rows and walk over the other side."""
    blocks = {"M": config.BLOCK_M, "N": config.BLOCK_N}
    constants = {f"BLOCK_{side}": block for side, block in blocks.items()}
    for side, block in blocks.items():
        constants[f"TAIL_{side}"] = block if ragged else round_up(N % block, 2, block)
    block, tail = constants[owned], constants[owned.replace("BLOCK", "TAIL")]
    programs = triton.cdiv(N, block)
    if not ragged:
        programs = N // block + tail // block + (tail % block).bit_count()
    return Launch(kernel, programs, constants, config)


def _plan_facts(q: Tensor, N: int, batch: int, ragged: bool) -> tuple[Any, ...]:
    device = q.device.index
    heads = batch * q.shape[2]
    return heads, N, q.shape[3], q.dtype, ragged, tuned.arch(device), tuned.num_sms(device)


def strides_divisor(*tensors: Tensor) -> int:
    """8 where it divides every stride but the last: the loads of a row are then of 16 bytes."""
    return 8 if all(stride % 8 == 0 for t in tensors for stride in t.stride()[:-1]) else 1


def _constants(*tensors: Tensor) -> dict[str, Any]:
    """What every kernel is compiled with."""
    q = tensors[0]
    divisor = strides_divisor(*tensors)
    return {"D": q.shape[-1], "ALIGN": divisor, "PRECISION": precision(q.dtype)}


@dataclass(frozen=True)
class _Layout:
    """Where the sequences lie: a batch of rows of N, or one row of packed sequences."""

    batch: int
    longest: int
    lengths: Tensor | None
    cu_seqlens: Tensor | None

    @property
    def ragged(self) -> bool:
        return self.lengths is not None or self.cu_seqlens is not None

    def outer(self, stride: int) -> int:
        """The stride between sequences, which cu_seqlens replaces in a packed batch."""
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
    return _Layout(len(cu_seqlens) - 1, max_seqlen, lengths, cu_seqlens)


def _fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
) -> tuple[Tensor, Tensor]:
    B, N, H, D = q.shape
    o = q.new_empty((B, N, H, D))
    lse2 = q.new_empty((B, H, N), dtype=torch.float32)
    if q.numel() == 0:
        return o, lse2
    at = _layout(q, lengths, cu_seqlens, max_seqlen)
    launch = plan_fwd(*_plan_facts(q, at.longest, at.batch, at.ragged))
    strides = (*at.strides(q), *at.strides(k), *at.strides(v))
    constants = _constants(q, k, v)
    if launch.kernel is _attention_fwd_resident_kernel:
        launch(H, B, q, k, v, o, lse2, *strides, H, N, scale * _LOG2E, **constants)
        return o, lse2
    launch(
        H,
        at.batch,
        *(q, k, v, o, lse2, cu_seqlens, lengths),
        *strides,
        at.outer(o.stride(0)),
        at.outer(lse2.stride(0)),
        lse2.stride(1),
        *(H, N, scale * _LOG2E),
        **at.constants,
        **constants,
    )
    return o, lse2


def _fwd_fake(q, k, v, scale, lengths=None, cu_seqlens=None, max_seqlen=0):
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
    lse2: Tensor,
    scale: float,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
) -> None:
    """Write dq, dk and dv, whose strides are alike and whose heads lie side by side."""
    if q.numel() == 0:
        return
    B, N, H, _ = q.shape
    at = _layout(q, lengths, cu_seqlens, max_seqlen)
    launches = plan_bwd(*_plan_facts(q, at.longest, at.batch, at.ragged))
    strides = [at.strides(t) for t in (q, k, v, do)]
    strides = [stride for group in strides for stride in group]
    constants = _constants(q, k, v, do, dq)
    dq_strides = (at.outer(dq.stride(0)), dq.stride(1))
    scales = (scale, scale * _LOG2E)
    if len(launches) == 1:
        args = (q, k, v, o, do, lse2, dq, dk, dv, *strides, *dq_strides, H, N, *scales)
        launches[0](H, B, *args, **constants)
        return
    delta = torch.empty_like(lse2)
    lse_strides = (at.outer(lse2.stride(0)), lse2.stride(1))
    constants |= at.constants
    sequences = (cu_seqlens, lengths)
    to_dq, to_dkv = launches
    o_stride = at.outer(o.stride(0))
    sizes = (*dq_strides, *lse_strides, H, N, *scales)
    args = (q, k, v, o, do, lse2, delta, dq, *sequences, *strides[:12], o_stride, *strides[12:])
    to_dq(H, at.batch, *args, *sizes, **constants)
    args = (q, k, v, do, lse2, delta, dk, dv, *sequences, *strides)
    to_dkv(H, at.batch, *args, *sizes, **constants)


def _bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse2: Tensor,
    scale: float,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    args = (do, q, k, v, o, lse2, scale, lengths, cu_seqlens, max_seqlen)
    _bwd_into(dq, dk, dv, *args)
    return dq, dk, dv


def _bwd_fake(do, q, k, v, o, lse2, scale, lengths=None, cu_seqlens=None, max_seqlen=0):
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _bwd_qkv(
    do: Tensor,
    qkv: Tensor,
    o: Tensor,
    lse2: Tensor,
    scale: float,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
) -> Tensor:
    dqkv = qkv.new_empty(qkv.shape)
    args = (do, *qkv.unbind(2), o, lse2, scale, lengths, cu_seqlens, max_seqlen)
    _bwd_into(*dqkv.unbind(2), *args)
    return dqkv


def _bwd_qkv_fake(do, qkv, o, lse2, scale, lengths=None, cu_seqlens=None, max_seqlen=0):
    return qkv.new_empty(qkv.shape)


attention_fwd = library.register("attention_fwd", _fwd_fake)(_fwd)
attention_bwd = library.register("attention_bwd", _bwd_fake)(_bwd)
attention_qkv_bwd = library.register("attention_qkv_bwd", _bwd_qkv_fake)(_bwd_qkv)


class AttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, lengths: Tensor | None
    ) -> Tensor:
        o, lse2 = attention_fwd(q, k, v, scale, lengths)
        ctx.save_for_backward(q, k, v, o, lse2, lengths)
        ctx.scale = scale
        return o

    @staticmethod
    @library.first_order
    def backward(ctx: Any, do: Tensor) -> Any:
        *saved, lengths = ctx.saved_tensors
        return *attention_bwd(do, *saved, ctx.scale, lengths), None, None


class AttentionQKVFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        scale: float,
        lengths: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int,
    ) -> Tensor:
        o, lse2 = attention_fwd(*qkv.unbind(2), scale, lengths, cu_seqlens, max_seqlen)
        ctx.save_for_backward(qkv, o, lse2, lengths, cu_seqlens)
        ctx.scale, ctx.max_seqlen = scale, max_seqlen
        return o

    @staticmethod
    @library.first_order
    def backward(ctx: Any, do: Tensor) -> Any:
        *saved, lengths, cu_seqlens = ctx.saved_tensors
        dqkv = attention_qkv_bwd(do, *saved, ctx.scale, lengths, cu_seqlens, ctx.max_seqlen)
        return dqkv, None, None, None, None


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, lengths: Tensor | None = None
) -> Tensor:
    """softmax(q k^T * scale) v. q, k, v: (B, N, H, D), any strides -> (B, N, H, D).

    lengths: (B,) integers; keys from lengths[b] on are left out.
    """
    return AttentionFunction.apply(q, k, v, _scale(q, scale), lengths)


def attention_qkv(qkv: Tensor, scale: float | None = None, lengths: Tensor | None = None) -> Tensor:
    """`attention` of a packed projection, (B, N, 3, H, D); its gradient is one tensor likewise."""
    return AttentionQKVFunction.apply(qkv, _scale(qkv, scale), lengths, None, 0)


def attention_packed(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float | None = None
) -> Tensor:
    """Attention within each of the sequences that lie end to end in qkv, (total, 3, H, D).

    cu_seqlens: (B + 1,) integers, from 0 to total: sequence b is rows cu_seqlens[b] up to
    cu_seqlens[b + 1], at most max_seqlen of them. Returns (total, H, D).
    """
    scale = _scale(qkv, scale)
    return AttentionQKVFunction.apply(qkv[None], scale, None, cu_seqlens, max_seqlen)[0]


def attention_lse(
    q: Tensor, k: Tensor, scale: float | None = None, lengths: Tensor | None = None
) -> Tensor:
    """log sum exp of each row of q k^T * scale: (B, H, N) float32, without a gradient."""
    q, k = q.detach(), k.detach()
    return attention_fwd(q, k, k, _scale(q, scale), lengths)[1] * _LN2


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else float(scale)
