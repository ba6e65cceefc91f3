"""One function per fused op: checks its arguments, then calls the Triton kernel or the reference.

Signatures, shapes and semantics are those of `fastvit.reference`; only here is a backend chosen.
Kernels are imported on first use, so that `import fastvit` is light and works without Triton.
"""

from collections.abc import Sequence

import torch
from fastvit_kernels import limits
from torch import Tensor

from fastvit import reference
from fastvit.backend import choose_triton
from fastvit.errors import UsageError
from fastvit.op_checks import (
    batch_of,
    check_bounds,
    check_device,
    check_integers,
    check_last,
    check_norm,
    check_norm_kind,
    check_operand,
    check_optional,
    check_qk,
    check_rank,
    check_rate,
    check_shape,
    compute_dtype,
    no_gradient,
    shape_of,
)

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
SAVES = ("all", "recompute")
_NO_DROPOUT = "dropout inside the op is not in the kernel"
_NO_KERNEL = "the op has no kernel yet"


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pos: Tensor | None = None,
    prefix: Tensor | None = None,
) -> Tensor:
    """[prefix; patches(images) weight^T + bias + pos]: (B, C, H, W) -> (B, P + m, dim).

    weight: (dim, C, p_h, p_w); bias: (dim,); pos: (m, dim); prefix: (P, dim).
    The output has the promoted dtype of the product, pos and prefix, as in eager.
    """
    op = "patch_embed"
    device = check_operand(op, "images", images)
    check_rank(op, "weight", weight, 4, device)
    dim, channels, p_h, p_w = weight.shape
    if not p_h or not p_w:
        raise UsageError(
            f"{op}: weight must be (dim, C, p_h, p_w) of sizes >= 1, got {shape_of(weight)}"
        )
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(f"{op}: images must be (B, {channels}, H, W), got {shape_of(images)}")
    height, width = images.shape[2:]
    if height % p_h or width % p_w:
        raise ValueError(
            f"{op}: image size {height}x{width} is not a multiple of patch size {p_h}x{p_w}"
        )
    if not height or not width:
        raise UsageError(f"{op}: images must hold at least one patch, got {shape_of(images)}")
    m = (height // p_h) * (width // p_w)
    check_optional(op, "bias", bias, (dim,), device)
    check_optional(op, "pos", pos, (m, dim), device)
    if prefix is not None:
        check_device(op, "prefix", prefix, device)
        if prefix.ndim != 2 or prefix.shape[1] != dim:
            raise ValueError(f"{op}: prefix must be (P, {dim}), got {shape_of(prefix)}")
    dtype = compute_dtype(op, "images", images, weight=weight, bias=bias)
    if choose_triton(op, images, dtype, limits.patch_embed(dim)):
        from fastvit_kernels.patch_embed import patch_embed as kernel

        return kernel(images, weight, bias, pos, prefix, dtype)
    return reference.patch_embed(images, weight, bias, pos, prefix)


def record_fallback(op: str, x: Tensor, reason: str) -> None:
    """Record that modules run instead of `op`, for `reason`; raises under backend 'triton'."""
    choose_triton(op, x, x.dtype, reason)


def layernorm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    norm_kind: str = "layernorm",
) -> Tensor:
    """norm(x) weight^T + bias. x: (..., C); weight: (O, C) -> (..., O).

    norm_kind: 'layernorm' or 'rmsnorm'.
    """
    return layernorm_linear_fork(x, norm_weight, norm_bias, weight, bias, eps, norm_kind)[0]


def layernorm_linear_fork(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    norm_kind: str = "layernorm",
) -> tuple[Tensor, Tensor]:
    """`layernorm_linear`, and x for the residual that branches off there: the norm's backward adds
    the residual's gradient as it writes dx, which saves a separate pass.
    """
    op = "layernorm_linear"
    device = check_operand(op, "x", x)
    check_norm_kind(op, norm_kind)
    check_rank(op, "weight", weight, 2, device)
    out_features, in_features = weight.shape
    check_last(op, "x", x, in_features)
    check_norm(op, "norm_weight", norm_weight, in_features, x, norm_kind, device)
    check_norm(op, "norm_bias", norm_bias, in_features, x, norm_kind, device)
    check_optional(op, "bias", bias, (out_features,), device)
    dtype = compute_dtype(op, "x", x, weight=weight, bias=bias)
    if choose_triton(op, x, dtype, limits.linear(in_features, out_features)):
        from fastvit_kernels.layernorm_linear import layernorm_linear as kernel

        return kernel(x, norm_weight, norm_bias, weight, bias, eps, norm_kind == "rmsnorm", dtype)
    args = (x, norm_weight, norm_bias, weight, bias, eps, norm_kind)
    return reference.layernorm_linear(*args), x


def swiglu(x: Tensor) -> Tensor:
    """SiLU(x[..., :F]) * x[..., F:]. x: (..., 2 F) -> (..., F)."""
    op = "swiglu"
    check_operand(op, "x", x)
    if x.ndim < 1 or x.shape[-1] % 2 or not x.shape[-1]:
        raise UsageError(f"{op}: x must end in an even size >= 2, got {shape_of(x)}")
    if choose_triton(op, x, x.dtype, None):
        from fastvit_kernels.swiglu import swiglu as kernel

        return kernel(x)
    return reference.swiglu(x)


def pool_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for a few queries. q: (B, M, H, D) -> (B, M, H, D). No kernel yet.

    k, v: (B, N, H, D), as in attention pooling, where one learned query reads all tokens.
    """
    op = "pool_attention"
    device = check_operand(op, "q", q)
    check_rank(op, "q", q, 4, device)
    check_rank(op, "k", k, 4, device)
    if (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(f"{op}: q {shape_of(q)} and k {shape_of(k)} may differ only in tokens")
    check_shape(op, "v", v, shape_of(k), device)
    choose_triton(op, k, compute_dtype(op, "q", q, k=k, v=v), _NO_KERNEL)
    return reference.pool_attention(q, k, v)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    dropout: float = 0.0,
    key_padding: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v. q, k, v: (B, N, H, D), any strides -> (B, N, H, D).

    key_padding: (B,) int32 or int64, the number of valid keys per sample; the rest are masked, and
    a sample without valid keys gives zeros.
    """
    op = "attention"
    device = check_operand(op, "q", q)
    check_rank(op, "q", q, 4, device)
    check_shape(op, "k", k, tuple(q.shape), device)
    check_shape(op, "v", v, tuple(q.shape), device)
    check_integers(op, "key_padding", key_padding, q.shape[0], device)
    check_rate(op, dropout)
    dtype = compute_dtype(op, "q", q, k=k, v=v)
    unsupported = limits.attention(q.shape[-1], scale, batch_of(q))
    if choose_triton(op, q, dtype, unsupported):
        from fastvit_kernels.attention import attention as kernel

        return kernel(q.to(dtype), k.to(dtype), v.to(dtype), scale, key_padding, dropout)
    return reference.attention(q, k, v, scale, dropout, key_padding)


def attention_qkv(
    qkv: Tensor,
    scale: float | None = None,
    dropout: float = 0.0,
    key_padding: Tensor | None = None,
    q_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
    norm_kind: str | None = None,
    interleaved: bool = False,
) -> Tensor:
    """`attention` on a packed projection. qkv: (B, N, 3, H, D) -> (B, N, H, D).

    norm_kind: 'layernorm' or 'rmsnorm' normalizes q and k over D, with weights and biases (D,).
    cos, sin: (m, D / 2) or (B, m, D / 2), RoPE of the last m tokens, after the norm: rotates the
    channel pairs (i, i + D / 2), or (2 i, 2 i + 1) if interleaved.
    """
    op = "attention"
    device = check_operand(op, "qkv", qkv)
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"{op}: qkv must be (B, N, 3, H, D), got {shape_of(qkv)}")
    check_integers(op, "key_padding", key_padding, qkv.shape[0], device)
    check_rate(op, dropout)
    check_qk(op, qkv, device, q_weight, q_bias, k_weight, k_bias, cos, sin, norm_kind)
    dtype = compute_dtype(op, "qkv", qkv)
    params = (q_weight, q_bias, k_weight, k_bias, cos, sin, eps, norm_kind, interleaved)
    unsupported = limits.attention(qkv.shape[-1], scale, batch_of(qkv))
    unsupported = unsupported or no_gradient("cos and sin", cos, sin)
    if choose_triton(op, qkv, dtype, unsupported):
        if norm_kind is not None or cos is not None:
            from fastvit_kernels.attention_qk import attention_qk as kernel

            return kernel(qkv.to(dtype), *params, scale, key_padding, dropout=dropout)
        from fastvit_kernels.attention import attention_qkv as kernel

        return kernel(qkv.to(dtype), scale, key_padding, dropout)
    return reference.attention_qkv(qkv, scale, dropout, key_padding, *params)


def attention_packed(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None = None,
    dropout: float = 0.0,
    q_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
    norm_kind: str | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Attention within each of the sequences packed end to end in qkv, (total, 3, H, D).

    cu_seqlens: (B + 1,) int32 or int64, the sequences' bounds, from 0 to total; max_seqlen: at
    least the longest length. So images of different sizes form one batch without padding. cos, sin:
    (total, D / 2); the other arguments are those of `attention_qkv`. Returns (total, H, D).

    The bounds are checked on a CPU only, since reading them from a GPU would synchronize: there
    wrong bounds go unnoticed and the result is undefined.
    """
    op = "attention"
    device = check_operand(op, "qkv", qkv)
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"{op}: qkv must be (total, 3, H, D), got {shape_of(qkv)}")
    check_rank(op, "cu_seqlens", cu_seqlens, 1, device)
    if len(cu_seqlens) < 1:
        raise ValueError(f"{op}: cu_seqlens must be (B + 1,), got {shape_of(cu_seqlens)}")
    check_integers(op, "cu_seqlens", cu_seqlens, len(cu_seqlens), device)
    if max_seqlen < 1:
        raise ValueError(f"{op}: max_seqlen must be at least 1, got {max_seqlen}")
    if not isinstance(max_seqlen, (int, torch.SymInt)):
        max_seqlen = int(max_seqlen)  # numpy's
    check_rate(op, dropout)
    check_qk(op, qkv[None], device, q_weight, q_bias, k_weight, k_bias, cos, sin, norm_kind)
    check_optional(op, "cos", cos, (len(qkv), qkv.shape[-1] // 2), device)
    check_bounds(op, cu_seqlens, len(qkv), max_seqlen)
    dtype = compute_dtype(op, "qkv", qkv)
    params = (q_weight, q_bias, k_weight, k_bias, cos, sin, eps, norm_kind, interleaved)
    unsupported = limits.attention(qkv.shape[-1], scale, batch_of(cu_seqlens))
    unsupported = unsupported or no_gradient("cos and sin", cos, sin)
    if choose_triton(op, qkv, dtype, unsupported):
        if norm_kind is not None or cos is not None:
            from fastvit_kernels.attention_qk import attention_qk

            x = qkv.to(dtype)[None]
            return attention_qk(x, *params, scale, None, cu_seqlens, max_seqlen, dropout)[0]
        from fastvit_kernels.attention import attention_packed as kernel

        return kernel(qkv.to(dtype), cu_seqlens, max_seqlen, scale, dropout)
    return reference.attention_packed(qkv, cu_seqlens, max_seqlen, scale, dropout, *params)


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
    norm_kind: str | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """q and k after the norm and RoPE that `attention_qkv` applies to them; no gradient.

    qkv: (B, N, 3, H, D) -> two (B, N, H, D), inputs of `attention_maps`.
    """
    op = "qk_norm_rope"
    device = check_operand(op, "qkv", qkv)
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"{op}: qkv must be (B, N, 3, H, D), got {shape_of(qkv)}")
    check_qk(op, qkv, device, q_weight, q_bias, k_weight, k_bias, cos, sin, norm_kind)
    dtype = compute_dtype(op, "qkv", qkv)
    params = (q_weight, q_bias, k_weight, k_bias, cos, sin, eps, norm_kind, interleaved)
    if choose_triton(op, qkv, dtype, limits.attention(qkv.shape[-1])):
        from fastvit_kernels.attention_qk import qk_norm_rope as kernel

        q, k = kernel(qkv.to(dtype), *params).unbind(2)
        return q, k
    with torch.no_grad():
        q, k = reference.qk_norm_rope(qkv, *params)
    return q.to(dtype), k.to(dtype)


def attention_lse(
    q: Tensor, k: Tensor, scale: float | None = None, key_padding: Tensor | None = None
) -> Tensor:
    """Log-sum-exp of each row of q k^T * scale, no gradient. q, k: (B, N, H, D) -> (B, H, N)."""
    op = "attention"
    device = check_operand(op, "q", q)
    check_rank(op, "q", q, 4, device)
    check_shape(op, "k", k, tuple(q.shape), device)
    check_integers(op, "key_padding", key_padding, q.shape[0], device)
    dtype = compute_dtype(op, "q", q, k=k)
    if choose_triton(op, q, dtype, limits.attention(q.shape[-1], scale, batch_of(q))):
        from fastvit_kernels.attention import attention_lse as kernel

        return kernel(q.to(dtype), k.to(dtype), scale, key_padding)
    return reference.attention_lse(q.detach(), k.detach(), scale, key_padding)


def attention_maps(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    rows: Sequence[int] = (0,),
    scale: float | None = None,
) -> Tensor:
    """Selected rows of softmax(q k^T * scale); no other row is computed, and there is no gradient.

    q, k: (B, N, H, D); lse: (B, H, N) from `attention_lse`, if known; rows: indices into N,
    negative ones from the end. Returns (B, H, len(rows), N) float32.
    """
    op = "attention_maps"
    device = check_operand(op, "q", q)
    check_rank(op, "q", q, 4, device)
    check_shape(op, "k", k, tuple(q.shape), device)
    B, N, H, D = q.shape
    wrong = [row for row in rows if not -N <= row < N]
    if wrong:
        raise ValueError(f"{op}: rows {wrong} are out of range for {N} tokens")
    rows = [row % N for row in rows]
    check_optional(op, "lse", lse, (B, H, N), device)
    dtype = compute_dtype(op, "q", q, k=k)
    if choose_triton(op, q, dtype, limits.attention(D, scale)):
        from fastvit_kernels.attention_maps import attention_maps as kernel

        index = torch.tensor(rows, dtype=torch.int32, device=q.device)
        return kernel(q.to(dtype), k.to(dtype), lse, index, scale)
    return reference.attention_maps(q.detach(), k.detach(), lse, rows, scale)


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None = None,
    path_scale: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """residual + path_scale * layer_scale * dropout(x weight^T + bias).

    x: (B, N, K); weight: (C, K); residual: (B, N, C); layer_scale: (C,); path_scale: (B,).
    """
    op = "linear_residual"
    device = check_operand(op, "x", x)
    check_rate(op, dropout)
    check_rank(op, "weight", weight, 2, device)
    out_features, in_features = weight.shape
    check_rank(op, "x", x, 3, device)
    check_last(op, "x", x, in_features)
    check_optional(op, "bias", bias, (out_features,), device)
    check_shape(op, "residual", residual, (*x.shape[:-1], out_features), device)
    check_optional(op, "layer_scale", layer_scale, (out_features,), device)
    check_optional(op, "path_scale", path_scale, (x.shape[0],), device)
    dtype = compute_dtype(op, "x", x, weight=weight, bias=bias)
    unsupported = limits.linear(in_features, out_features) or (_NO_DROPOUT if dropout else None)
    unsupported = unsupported or no_gradient("path_scale", path_scale)
    if choose_triton(op, x, dtype, unsupported):
        from fastvit_kernels.linear_residual import linear_residual as kernel

        return kernel(x, weight, bias, residual, layer_scale, path_scale, dtype)
    return reference.linear_residual(x, weight, bias, residual, layer_scale, path_scale, dropout)


def layernorm_attention(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    heads: int,
    layer_scale: Tensor | None = None,
    path_scale: Tensor | None = None,
    eps: float = 1e-6,
    norm_kind: str = "layernorm",
    scale: float | None = None,
) -> Tensor:
    """x + path_scale * layer_scale * proj(attention(qkv(LayerNorm(x)))). x: (B, N, C).

    qkv_weight: (3 * heads * D, C); proj_weight: (C, heads * D); layer_scale: (C,); path_scale:
    (B,). The same as `layernorm_linear`, `attention_qkv` and `linear_residual`, in less CPU time.
    """
    op = "layernorm_attention"
    device = check_operand(op, "x", x)
    check_norm_kind(op, norm_kind)
    check_rank(op, "x", x, 3, device)
    check_rank(op, "qkv_weight", qkv_weight, 2, device)
    packed, dim = qkv_weight.shape
    if heads < 1 or packed % (3 * heads):
        raise ValueError(
            f"{op}: heads must divide a third of qkv_weight's {packed} rows, got {heads}"
        )
    inner = packed // 3
    check_last(op, "x", x, dim)
    check_norm(op, "norm_weight", norm_weight, dim, x, norm_kind, device)
    check_norm(op, "norm_bias", norm_bias, dim, x, norm_kind, device)
    check_optional(op, "qkv_bias", qkv_bias, (packed,), device)
    check_shape(op, "proj_weight", proj_weight, (dim, inner), device)
    check_optional(op, "proj_bias", proj_bias, (dim,), device)
    check_optional(op, "layer_scale", layer_scale, (dim,), device)
    check_optional(op, "path_scale", path_scale, (x.shape[0],), device)
    dtype = compute_dtype(
        op,
        "x",
        x,
        qkv_weight=qkv_weight,
        qkv_bias=qkv_bias,
        proj_weight=proj_weight,
        proj_bias=proj_bias,
    )
    if limits.attention(inner // heads, scale, batch_of(x)):
        # The projections have kernels even where attention has none.
        norm = (norm_weight, norm_bias)
        qkv, x = layernorm_linear_fork(x, *norm, qkv_weight, qkv_bias, eps, norm_kind)
        o = attention_qkv(qkv.unflatten(-1, (3, heads, -1)), scale).flatten(2)
        return linear_residual(o, proj_weight, proj_bias, x, layer_scale, path_scale)
    unsupported = limits.linear(dim, packed) or limits.linear(inner, dim)
    unsupported = unsupported or no_gradient("path_scale", path_scale)
    args = (x, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias)
    if choose_triton(op, x, dtype, unsupported):
        from fastvit_kernels.layernorm_attention import layernorm_attention as kernel

        rms = norm_kind == "rmsnorm"
        return kernel(*args, layer_scale, path_scale, heads, scale, eps, rms, dtype)
    return reference.layernorm_attention(
        *args, heads, layer_scale, path_scale, eps, norm_kind, scale
    )


def layernorm_mlp(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    layer_scale: Tensor | None = None,
    path_scale: Tensor | None = None,
    eps: float = 1e-6,
    activation: str = "gelu",
    dropout: float = 0.0,
    norm_kind: str = "layernorm",
    save: str = "all",
) -> Tensor:
    """x + path_scale * layer_scale * fc2(activation(fc1(LayerNorm(x)))). x: (B, N, C).

    fc1_weight: (F, C); fc2_weight: (C, F); activation: 'gelu', 'gelu_tanh' or 'quick_gelu';
    norm_kind: 'layernorm' or 'rmsnorm'; save: 'all', or 'recompute', which saves no hidden
    activation and runs fc1 again in backward (a sixth more arithmetic).
    """
    op = "layernorm_mlp"
    device = check_operand(op, "x", x)
    check_rate(op, dropout)
    if save not in SAVES:
        raise ValueError(f"{op}: save {save!r} is unknown; expected {SAVES}")
    check_norm_kind(op, norm_kind)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation {activation!r} is unknown; expected {ACTIVATIONS}")
    check_rank(op, "x", x, 3, device)
    check_rank(op, "fc1_weight", fc1_weight, 2, device)
    hidden, dim = fc1_weight.shape
    check_last(op, "x", x, dim)
    check_norm(op, "norm_weight", norm_weight, dim, x, norm_kind, device)
    check_norm(op, "norm_bias", norm_bias, dim, x, norm_kind, device)
    check_optional(op, "fc1_bias", fc1_bias, (hidden,), device)
    check_shape(op, "fc2_weight", fc2_weight, (dim, hidden), device)
    check_optional(op, "fc2_bias", fc2_bias, (dim,), device)
    check_optional(op, "layer_scale", layer_scale, (dim,), device)
    check_optional(op, "path_scale", path_scale, (x.shape[0],), device)
    dtype = compute_dtype(
        op,
        "x",
        x,
        fc1_weight=fc1_weight,
        fc1_bias=fc1_bias,
        fc2_weight=fc2_weight,
        fc2_bias=fc2_bias,
    )
    unsupported = limits.linear(dim, hidden) or (_NO_DROPOUT if dropout else None)
    unsupported = unsupported or no_gradient("path_scale", path_scale)
    args = (x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    if choose_triton(op, x, dtype, unsupported):
        from fastvit_kernels.layernorm_mlp import layernorm_mlp as kernel

        rms = norm_kind == "rmsnorm"
        options = (eps, rms, activation, save == "recompute", dtype)
        return kernel(*args, layer_scale, path_scale, *options)
    return reference.layernorm_mlp(
        *args, layer_scale, path_scale, eps, activation, dropout, norm_kind, save
    )
