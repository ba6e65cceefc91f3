"""SiLU(gate) * value, the middle of a SwiGLU MLP; one projection gives gate and value.

x: (..., 2 F), gate first -> (..., F) in x's dtype; computed in float32.
Saved for backward: x. dgate = dy value s (1 + gate (1 - s)), dvalue = dy gate s, s = sigmoid(gate).
Bytes: x read, y written; backward dy and x read, dx written, once each.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels import library, tuned
from fastvit_kernels.common import sigmoid
from fastvit_kernels.launch import cdiv, launch
from fastvit_kernels.operands import as_rows


@triton.jit(do_not_specialize=["M"])
def _swiglu_fwd_kernel(x_ptr, y_ptr, M, F, stride_xm, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (offs_m < M)[:, None] & (offs_f < F)[None, :]
    ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm + offs_f[None, :]
    gate = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(ptrs + F, mask=mask, other=0.0).to(tl.float32)
    y = gate * sigmoid(gate) * value
    offs = offs_m.to(tl.int64)[:, None] * F + offs_f[None, :]
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _swiglu_bwd_kernel(
    dy_ptr,
    x_ptr,
    dx_ptr,
    M,
    F,
    stride_dym,
    stride_xm,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    offs_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (offs_m < M)[:, None] & (offs_f < F)[None, :]
    ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_f[None, :]
    gate = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(ptrs + F, mask=mask, other=0.0).to(tl.float32)
    dy_ptrs = dy_ptr + offs_m[:, None] * stride_dym + offs_f[None, :]
    dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
    s = sigmoid(gate)
    dgate = dy * value * s * (1.0 + gate * (1.0 - s))
    dvalue = dy * gate * s
    dx_ptrs = dx_ptr + offs_m[:, None] * (2 * F) + offs_f[None, :]
    tl.store(dx_ptrs, dgate.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dx_ptrs + F, dvalue.to(dx_ptr.dtype.element_ty), mask=mask)


def _grid(M: int, F: int) -> tuple[int, int]:
    return cdiv(M, tuned.SWIGLU.BLOCK_M), cdiv(F, tuned.SWIGLU.BLOCK_N)


def _blocks() -> dict[str, int]:
    config = tuned.SWIGLU
    return {
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_F": config.BLOCK_N,
        "num_warps": config.num_warps,
    }


def _fwd(x: Tensor) -> Tensor:
    M, F = len(x), x.shape[1] // 2
    y = x.new_empty((M, F))
    if y.numel():
        launch(_swiglu_fwd_kernel, _grid(M, F), x, y, M, F, x.stride(0), **_blocks())
    return y


def _bwd(dy: Tensor, x: Tensor) -> Tensor:
    M, F = dy.shape
    dx = x.new_empty((M, 2 * F))
    if dx.numel():
        sizes = (M, F, dy.stride(0), x.stride(0))
        launch(_swiglu_bwd_kernel, _grid(M, F), dy, x, dx, *sizes, **_blocks())
    return dx


def _fwd_fake(x):
    return x.new_empty((x.shape[0], x.shape[1] // 2))


swiglu_fwd = library.register("swiglu_fwd", _fwd_fake)(_fwd)
swiglu_bwd = library.register("swiglu_bwd", lambda dy, x: x.new_empty(x.shape))(_bwd)


class SwiGluFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x2 = as_rows(x)
        ctx.save_for_backward(x2)
        return library.reshaped(swiglu_fwd(x2), *x.shape[:-1], x.shape[-1] // 2)

    @staticmethod
    @library.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return swiglu_bwd(as_rows(dy), x).view(*dy.shape[:-1], x.shape[1])


def swiglu(x: Tensor) -> Tensor:
    """SiLU(x[..., :F]) * x[..., F:]. x: (..., 2 F) -> (..., F)."""
    return library.apply(SwiGluFunction, x)
