"""One GEMM family for every projection of the model, forward and backward.

`gemm`:   C[M, N] = epilogue(prologue(A)[M, K] B[K, N])
`gemm_dw`: dW[N, K] = G[M, N]^T prologue(X)[M, K], and db[N], the column sums of G

Prologues act on the A (or X) tile between its load and the product, so that no normalised,
activated or scaled copy is ever in memory:
    "none"       a
    "layernorm"  (a - mean) * rstd * norm_weight + norm_bias, statistics read, not recomputed
    "branch"     a * layer_scale[k] * path_scale[sample]: the gradient that enters a residual branch
    "gelu"       GELU(a), of a saved pre-activation
Epilogues act on the float32 accumulator:
    "none"       acc + bias
    "gelu"       u = acc + bias is stored beside GELU(u)
    "dgelu"      acc * GELU'(u)
    "residual"   residual + path_scale[sample] * layer_scale * (acc + bias)

Operands are multiplied in the compute dtype with float32 accumulation. dW is summed over M in fixed
slabs and the slabs are added in order: no atomics, bitwise repeatable.
Bytes: A once per column of tiles (from L2 but for the first), B, and C once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels import tuned
from fastvit_kernels.common import dgelu, dot, gelu, tile_order


@triton.jit
def _prologue(
    a,
    offs_m,
    offs_k,
    mask_k,
    mean,
    rstd,
    norm_weight_ptr,
    norm_bias_ptr,
    layer_scale_ptr,
    path_scale,
    PROLOGUE: tl.constexpr,
    HAS_LAYER_SCALE: tl.constexpr,
    HAS_PATH_SCALE: tl.constexpr,
    TANH: tl.constexpr,
    EXACT: tl.constexpr,
):
    if PROLOGUE == "layernorm":
        a = (a.to(tl.float32) - mean[:, None]) * rstd[:, None]
        if norm_weight_ptr is not None:
            a *= tl.load(norm_weight_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
        if norm_bias_ptr is not None:
            a += tl.load(norm_bias_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
    elif PROLOGUE == "gelu":
        a = gelu(a.to(tl.float32), TANH, EXACT)
    elif PROLOGUE == "branch":
        if HAS_LAYER_SCALE:
            w = tl.load(layer_scale_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
            a = a.to(tl.float32) * w[None, :]
        if HAS_PATH_SCALE:
            a = a.to(tl.float32) * path_scale[:, None]
    return a


@triton.jit
def _epilogue(
    acc,
    c_ptr,
    u_ptr,
    residual_ptr,
    bias_ptr,
    layer_scale_ptr,
    path_scale,
    offs_m,
    offs_n,
    M,
    N,
    EPILOGUE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LAYER_SCALE: tl.constexpr,
    HAS_PATH_SCALE: tl.constexpr,
    TANH: tl.constexpr,
    EXACT: tl.constexpr,
):
    mask_n = offs_n < N
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    offs = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if EPILOGUE == "gelu":
        tl.store(u_ptr + offs, acc.to(u_ptr.dtype.element_ty), mask=mask)
        acc = gelu(acc, TANH, EXACT)
    elif EPILOGUE == "dgelu":
        u = tl.load(u_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        acc = acc * dgelu(u, TANH, EXACT)
    elif EPILOGUE == "residual":
        if HAS_LAYER_SCALE:
            w = tl.load(layer_scale_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            acc = acc * w[None, :]
        if HAS_PATH_SCALE:
            acc = acc * path_scale[:, None]
        acc += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(c_ptr + offs, acc.to(c_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "tokens"])
def _gemm_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    u_ptr,
    residual_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    mean_ptr,
    rstd_ptr,
    layer_scale_ptr,
    path_scale_ptr,
    M,
    N,
    K,
    tokens,
    stride_am,
    stride_bk,
    stride_bn,
    PROLOGUE: tl.constexpr,
    EPILOGUE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LAYER_SCALE: tl.constexpr,
    HAS_PATH_SCALE: tl.constexpr,
    TANH: tl.constexpr,
    EXACT: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
):
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid_m, pid_n = tile_order(tl.program_id(0), num_m, num_n, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # Rows and columns past the end wrap to real ones: loads stay unmasked, stores are masked.
    rows = (offs_m % M).to(tl.int64)
    cols = tl.max_contiguous(tl.multiple_of(offs_n % N, 8), 8)
    a_ptrs = a_ptr + rows[:, None] * stride_am + offs_k[None, :]
    b_ptrs = b_ptr + offs_k.to(tl.int64)[:, None] * stride_bk + cols[None, :] * stride_bn

    mean = tl.zeros([BLOCK_M], tl.float32)
    rstd = mean
    path_scale = mean
    if PROLOGUE == "layernorm":
        mean = tl.load(mean_ptr + rows)
        rstd = tl.load(rstd_ptr + rows)
    if HAS_PATH_SCALE:
        path_scale = tl.load(path_scale_ptr + rows // tokens).to(tl.float32)

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = k + offs_k < K
        if EVEN_K:
            a = tl.load(a_ptrs)
            b = tl.load(b_ptrs)
        else:
            a = tl.load(a_ptrs, mask=mask_k[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=mask_k[:, None], other=0.0)
        a = _prologue(
            a,
            offs_m,
            k + offs_k,
            mask_k,
            mean,
            rstd,
            norm_weight_ptr,
            norm_bias_ptr,
            layer_scale_ptr,
            path_scale,
            PROLOGUE,
            HAS_LAYER_SCALE,
            HAS_PATH_SCALE,
            TANH,
            EXACT,
        )
        acc = dot(a.to(b.dtype), b, acc, PRECISION)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * stride_bk

    HALF: tl.constexpr = BLOCK_N // SUBTILES
    if SUBTILES == 2:
        # Two halves in turn need half the registers for the epilogue's temporaries.
        halves = tl.permute(tl.reshape(acc, [BLOCK_M, 2, HALF]), [0, 2, 1])
        acc, acc1 = tl.split(halves)
        _epilogue(
            acc1,
            c_ptr,
            u_ptr,
            residual_ptr,
            bias_ptr,
            layer_scale_ptr,
            path_scale,
            offs_m,
            pid_n * BLOCK_N + HALF + tl.arange(0, HALF),
            M,
            N,
            EPILOGUE,
            HAS_BIAS,
            HAS_LAYER_SCALE,
            HAS_PATH_SCALE,
            TANH,
            EXACT,
        )
    _epilogue(
        acc,
        c_ptr,
        u_ptr,
        residual_ptr,
        bias_ptr,
        layer_scale_ptr,
        path_scale,
        offs_m,
        pid_n * BLOCK_N + tl.arange(0, HALF),
        M,
        N,
        EPILOGUE,
        HAS_BIAS,
        HAS_LAYER_SCALE,
        HAS_PATH_SCALE,
        TANH,
        EXACT,
    )


@triton.jit(do_not_specialize=["M", "tokens", "slab"])
def _gemm_dw_kernel(
    g_ptr,
    x_ptr,
    dw_ptr,
    db_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    mean_ptr,
    rstd_ptr,
    path_scale_ptr,
    M,
    N,
    K,
    tokens,
    slab,
    stride_gm,
    stride_xm,
    PROLOGUE: tl.constexpr,
    HAS_PATH_SCALE: tl.constexpr,
    TANH: tl.constexpr,
    EXACT: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid_n, pid_k, pid_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n, mask_k = offs_n < N, offs_k < K
    cols_n = tl.max_contiguous(tl.multiple_of(offs_n % N, 8), 8)
    cols_k = tl.max_contiguous(tl.multiple_of(offs_k % K, 8), 8)
    norm_weight = tl.zeros([BLOCK_K], tl.float32)
    norm_bias = norm_weight
    if PROLOGUE == "layernorm":
        if norm_weight_ptr is not None:
            norm_weight = tl.load(norm_weight_ptr + cols_k).to(tl.float32)
        if norm_bias_ptr is not None:
            norm_bias = tl.load(norm_bias_ptr + cols_k).to(tl.float32)

    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    db = tl.zeros([BLOCK_N], tl.float32)
    first = pid_s * slab
    for m in range(first, tl.minimum(first + slab, M), BLOCK_M):
        offs_m = (m + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = offs_m < M
        g = tl.load(
            g_ptr + offs_m[:, None] * stride_gm + cols_n[None, :], mask=mask_m[:, None], other=0.0
        )
        x = tl.load(
            x_ptr + offs_m[:, None] * stride_xm + cols_k[None, :], mask=mask_m[:, None], other=0.0
        )
        if PROLOGUE == "layernorm":
            mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)
            rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)
            x = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
            if norm_weight_ptr is not None:
                x *= norm_weight[None, :]
            if norm_bias_ptr is not None:
                x += norm_bias[None, :]
        elif PROLOGUE == "gelu":
            x = gelu(x.to(tl.float32), TANH, EXACT)
        if HAS_PATH_SCALE:
            path_scale = tl.load(path_scale_ptr + offs_m // tokens, mask=mask_m, other=0.0)
            g = g.to(tl.float32) * path_scale.to(tl.float32)[:, None]
        if pid_k == 0:
            db += tl.sum(g.to(tl.float32), axis=0)
        acc = dot(tl.trans(g.to(COMPUTE)), x.to(COMPUTE), acc, PRECISION)

    mask = mask_n[:, None] & mask_k[None, :]
    offs = (pid_s * N + offs_n).to(tl.int64)[:, None] * K + offs_k[None, :]
    tl.store(dw_ptr + offs, acc.to(dw_ptr.dtype.element_ty), mask=mask)
    if pid_k == 0:
        tl.store(db_ptr + pid_s * N + offs_n, db, mask=mask_n)


@triton.jit(do_not_specialize=["S"])
def _reduce_slabs_kernel(
    slabs_ptr,
    db_slabs_ptr,
    weight_ptr,
    bias_ptr,
    layer_scale_ptr,
    dw_ptr,
    db_ptr,
    dlayer_scale_ptr,
    N,
    K,
    S,
    HAS_BIAS: tl.constexpr,
    HAS_LAYER_SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add the slabs in order. With LayerScale, whose branch is layer_scale * y, y = x W^T + b and
    G = g^T x: dW = layer_scale * G, db = layer_scale * sum(g), dlayer_scale = <W, G> + b sum(g).
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    db = tl.zeros([BLOCK_N], tl.float32)
    for s in range(S):
        db += tl.load(db_slabs_ptr + s * N + offs_n, mask=mask_n, other=0.0)
    layer_scale = tl.zeros([BLOCK_N], tl.float32)
    dlayer_scale = tl.zeros([BLOCK_N], tl.float32)
    if HAS_LAYER_SCALE:
        layer_scale = tl.load(layer_scale_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask = mask_n[:, None] & (offs_k < K)[None, :]
        offs = offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
        dw = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        slab_ptrs = slabs_ptr + offs
        for _ in range(S):
            dw += tl.load(slab_ptrs, mask=mask, other=0.0)
            slab_ptrs += N * K
        if HAS_LAYER_SCALE:
            weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            dlayer_scale += tl.sum(dw * weight, axis=1)
            dw = dw * layer_scale[:, None]
        tl.store(dw_ptr + offs, dw.to(dw_ptr.dtype.element_ty), mask=mask)
    if HAS_LAYER_SCALE:
        if HAS_BIAS:
            bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            dlayer_scale += bias * db
        dlayer_dtype: tl.constexpr = dlayer_scale_ptr.dtype.element_ty
        tl.store(dlayer_scale_ptr + offs_n, dlayer_scale.to(dlayer_dtype), mask=mask_n)
        db = db * layer_scale
    if HAS_BIAS:
        tl.store(db_ptr + offs_n, db.to(db_ptr.dtype.element_ty), mask=mask_n)


def precision(dtype: torch.dtype) -> str:
    """How float32 products run: IEEE unless PyTorch's TF32 switch is on."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


def rows(x: Tensor) -> Tensor:
    """x as a matrix of rows. Copied only where its rows do not lie at one stride."""
    return x.reshape(-1, x.shape[-1]) if x.stride(-1) == 1 else x.contiguous().flatten(0, -2)


def gemm(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    prologue: str = "none",
    epilogue: str = "none",
    bias: Tensor | None = None,
    norm: tuple[Tensor | None, Tensor | None, Tensor, Tensor] | None = None,
    u: Tensor | None = None,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    path_scale: Tensor | None = None,
    tokens: int = 1,
    tanh: bool = False,
) -> Tensor:
    """out = epilogue(prologue(a) b). a: (M, K) rows; b: (K, N) any strides; out: (M, N).

    b's dtype is the compute dtype. norm: (norm_weight, norm_bias, mean, rstd). u: (M, N), written
    by epilogue "gelu", read by "dgelu". tokens: rows per sample, for path_scale (B,).
    """
    (M, K), N = a.shape, b.shape[1]
    if M == 0:
        return out
    if residual is not None:
        residual = residual.contiguous()
    norm_weight, norm_bias, mean, rstd = norm if norm is not None else (None,) * 4
    config = tuned.gemm(M, N, K, b.dtype, epilogue, a.device.index)
    grid = (triton.cdiv(M, config.BLOCK_M) * triton.cdiv(N, config.BLOCK_N),)
    _gemm_kernel[grid](
        a,
        b,
        out,
        u,
        residual,
        bias,
        norm_weight,
        norm_bias,
        mean,
        rstd,
        layer_scale,
        path_scale,
        M,
        N,
        K,
        tokens,
        a.stride(0),
        b.stride(0),
        b.stride(1),
        **gemm_constexprs(prologue, epilogue, b.dtype, K, config, tanh),
        HAS_BIAS=bias is not None,
        HAS_LAYER_SCALE=layer_scale is not None,
        HAS_PATH_SCALE=path_scale is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def gemm_constexprs(
    prologue: str, epilogue: str, dtype: torch.dtype, K: int, config: tuned.Config, tanh: bool
) -> dict:
    return {
        "PROLOGUE": prologue,
        "EPILOGUE": epilogue,
        "TANH": tanh,
        "EXACT": dtype == torch.float32,
        "EVEN_K": K % config.BLOCK_K == 0,
        "PRECISION": precision(dtype),
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_K": config.BLOCK_K,
        "GROUP_M": config.GROUP_M,
        "SUBTILES": config.SUBTILES,
    }


TL_DTYPE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def gemm_dw(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    prologue: str = "none",
    norm: tuple[Tensor | None, Tensor | None, Tensor, Tensor] | None = None,
    layer_scale: Tensor | None = None,
    path_scale: Tensor | None = None,
    tokens: int = 1,
    tanh: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dW, db, dlayer_scale, each in its parameter's dtype. g: (M, N); x: (M, K); weight: (N, K)."""
    (M, N), K = g.shape, x.shape[1]
    if M == 0:
        params = (weight, bias, layer_scale)
        return tuple(None if p is None else torch.zeros_like(p) for p in params)
    norm_weight, norm_bias, mean, rstd = norm if norm is not None else (None,) * 4
    config, splits = tuned.gemm_dw(M, N, K, dtype, g.device.index)
    slab = triton.cdiv(triton.cdiv(M, splits), config.BLOCK_M) * config.BLOCK_M
    slabs, db_slabs = new_slabs(triton.cdiv(M, slab), N, K, g.device)
    grid = (triton.cdiv(N, config.BLOCK_N), triton.cdiv(K, config.BLOCK_K), len(slabs))
    _gemm_dw_kernel[grid](
        g,
        x,
        slabs,
        db_slabs,
        norm_weight,
        norm_bias,
        mean,
        rstd,
        path_scale,
        M,
        N,
        K,
        tokens,
        slab,
        g.stride(0),
        x.stride(0),
        PROLOGUE=prologue,
        HAS_PATH_SCALE=path_scale is not None,
        TANH=tanh,
        EXACT=dtype == torch.float32,
        COMPUTE=TL_DTYPE[dtype],
        PRECISION=precision(dtype),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return reduce_slabs(slabs, db_slabs, weight, bias, layer_scale)


def new_slabs(splits: int, N: int, K: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Float32 room for the parts of dW and db: (S, N, K), (S, N)."""
    slabs = torch.empty((splits, N, K), dtype=torch.float32, device=device)
    return slabs, torch.empty((splits, N), dtype=torch.float32, device=device)


def reduce_slabs(
    slabs: Tensor,
    db_slabs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dW, db, dlayer_scale in their parameters' dtypes, the slabs added in order."""
    S, N, K = slabs.shape
    dw = torch.empty((N, K), dtype=weight.dtype, device=weight.device)
    db = None if bias is None else torch.empty_like(bias)
    dlayer_scale = None if layer_scale is None else torch.empty_like(layer_scale)
    config = tuned.REDUCE_SLABS
    _reduce_slabs_kernel[(triton.cdiv(N, config.BLOCK_N),)](
        slabs,
        db_slabs,
        weight,
        bias,
        layer_scale,
        dw,
        db,
        dlayer_scale,
        N,
        K,
        S,
        HAS_BIAS=bias is not None,
        HAS_LAYER_SCALE=layer_scale is not None,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        num_warps=config.num_warps,
    )
    return dw, db, dlayer_scale
