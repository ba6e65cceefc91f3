"""LayerNorm folded into the product that follows it, for x in the product's own 16 bits.

norm(x) W^T + b = rstd (x W'^T - mean s) + b'
W' = norm_weight W,  s = W' 1,  b' = b + W norm_bias

The product takes x itself through TMA and its epilogue the rest, two instructions an element of its
output: no normed copy of x is written and read (2 C of 16 bits a token, two thirds of what the row
kernel moves), and no tile of x passes through registers on its way to the tensor cores. s is summed
from W' as rounded, so a row's mean cancels but for float32 accumulation, however far it lies from
zero; rounding W' instead of the normed x is an error of the same size. One launch makes W', s and
b' (2 N C of 16 bits, 7 MB for qkv of ViT-B) and the rows' statistics (x read once).
RMSNorm has mean = 0. A float32 x, as under autocast, would be rounded before its mean is taken off.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels import tuned
from fastvit_kernels.launch import cdiv, launch
from fastvit_kernels.layernorm import statistics


@triton.jit(do_not_specialize=["M"])
def _layernorm_fold_kernel(
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    folded_ptr,
    sums_ptr,
    folded_bias_ptr,
    M,
    C,
    N,
    stride_xm,
    stride_wn,
    eps,
    RMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The first programs take rows of the weight, the others rows of x."""
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    pid, num_n = tl.program_id(0), tl.cdiv(N, BLOCK_M)
    if pid < num_n:
        offs_n = pid * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_n = offs_n < N
        mask = mask_n[:, None] & mask_c[None, :]
        rows = offs_n.to(tl.int64)[:, None]
        w = tl.load(weight_ptr + rows * stride_wn + offs_c[None, :], mask=mask, other=0.0)
        w = w.to(tl.float32)
        bias = tl.zeros([BLOCK_M], tl.float32)
        if bias_ptr is not None:
            bias += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        if norm_bias_ptr is not None:
            norm_bias = tl.load(norm_bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
            bias += tl.sum(w * norm_bias[None, :], axis=1)
        if norm_weight_ptr is not None:
            norm_weight = tl.load(norm_weight_ptr + offs_c, mask=mask_c, other=0.0)
            w *= norm_weight.to(tl.float32)[None, :]
        folded = w.to(folded_ptr.dtype.element_ty)
        tl.store(folded_ptr + rows * C + offs_c[None, :], folded, mask=mask)
        tl.store(sums_ptr + offs_n, tl.sum(folded.to(tl.float32), axis=1), mask=mask_n)
        tl.store(folded_bias_ptr + offs_n, bias, mask=mask_n)
    else:
        offs_m = (pid - num_n) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_c[None, :]
        x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm + offs_c[None, :]
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        mean, rstd = statistics(x, offs_c, C, eps, RMS)
        tl.store(mean_ptr + offs_m, mean, mask=mask_m)
        tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)


def layernorm_fold(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """W' (N, C) in the weight's dtype; s, b' (N,), mean and rstd (M,), float32.

    x: (M, C) rows; weight: (N, C).
    """
    (M, C), N = x.shape, len(weight)
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    folded = torch.empty((N, C), dtype=weight.dtype, device=x.device)
    sums = torch.empty(N, dtype=torch.float32, device=x.device)
    folded_bias = torch.empty_like(sums)
    mean = torch.empty(M, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    config = tuned.layernorm_fwd(C)
    launch(
        _layernorm_fold_kernel,
        (cdiv(N, config.BLOCK_M) + cdiv(M, config.BLOCK_M),),
        x,
        mean,
        rstd,
        weight,
        bias,
        norm_weight,
        norm_bias,
        folded,
        sums,
        folded_bias,
        M,
        C,
        N,
        x.stride(0),
        weight.stride(0),
        eps,
        RMS=rms,
        BLOCK_M=config.BLOCK_M,
        BLOCK_C=config.BLOCK_N,
        num_warps=config.num_warps,
    )
    return folded, sums, folded_bias, mean, rstd
