"""One function per fused op: checks its arguments, then calls the Triton kernel or the reference.

Signatures, shapes and semantics are those of `fastvit.reference`; only here is a backend chosen.
Kernels are imported on first use, so that `import fastvit` is light and works without Triton.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from fastvit_kernels import limits
from torch import Tensor

from fastvit import reference
from fastvit.backend import choose_triton
from fastvit.errors import UsageError

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
NORMS = ("layernorm", "rmsnorm")
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
    device = _operand(op, "images", images)
    _rank(op, "weight", weight, 4, device)
    dim, channels, p_h, p_w = weight.shape
    if not p_h or not p_w:
        raise UsageError(
            f"{op}: weight must be (dim, C, p_h, p_w) of sizes >= 1, got {_shape(weight)}"
        )
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(f"{op}: images must be (B, {channels}, H, W), got {_shape(images)}")
    height, width = images.shape[2:]
    if height % p_h or width % p_w:
        raise ValueError(
            f"{op}: image size {height}x{width} is not a multiple of patch size {p_h}x{p_w}"
        )
    if not height or not width:
        raise UsageError(f"{op}: images must hold at least one patch, got {_shape(images)}")
    m = (height // p_h) * (width // p_w)
    _optional(op, "bias", bias, (dim,), device)
    _optional(op, "pos", pos, (m, dim), device)
    if prefix is not None:
        _on(op, "prefix", prefix, device)
        if prefix.ndim != 2 or prefix.shape[1] != dim:
            raise ValueError(f"{op}: prefix must be (P, {dim}), got {_shape(prefix)}")
    dtype = _compute_dtype(op, "images", images, weight=weight, bias=bias)
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
    device = _operand(op, "x", x)
    _norm_kind(op, norm_kind)
    _rank(op, "weight", weight, 2, device)
    out_features, in_features = weight.shape
    _last(op, "x", x, in_features)
    _norm(op, "norm_weight", norm_weight, in_features, x, norm_kind, device)
    _norm(op, "norm_bias", norm_bias, in_features, x, norm_kind, device)
    _optional(op, "bias", bias, (out_features,), device)
    dtype = _compute_dtype(op, "x", x, weight=weight, bias=bias)
    if choose_triton(op, x, dtype, limits.linear(in_features, out_features)):
        from fastvit_kernels.layernorm_linear import layernorm_linear as kernel

        return kernel(x, norm_weight, norm_bias, weight, bias, eps, norm_kind == "rmsnorm", dtype)
    args = (x, norm_weight, norm_bias, weight, bias, eps, norm_kind)
    return reference.layernorm_linear_fork(*args)


def swiglu(x: Tensor) -> Tensor:
    """SiLU(x[..., :F]) * x[..., F:]. x: (..., 2 F) -> (..., F)."""
    op = "swiglu"
    _operand(op, "x", x)
    if x.ndim < 1 or x.shape[-1] % 2 or not x.shape[-1]:
        raise UsageError(f"{op}: x must end in an even size >= 2, got {_shape(x)}")
    if choose_triton(op, x, x.dtype, None):
        from fastvit_kernels.swiglu import swiglu as kernel

        return kernel(x)
    return reference.swiglu(x)


def pool_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for a few queries. q: (B, M, H, D) -> (B, M, H, D). No kernel yet.

    k, v: (B, N, H, D), as in attention pooling, where one learned query reads all tokens.
    """
    op = "pool_attention"
    device = _operand(op, "q", q)
    _rank(op, "q", q, 4, device)
    _rank(op, "k", k, 4, device)
    if (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(f"{op}: q {_shape(q)} and k {_shape(k)} may differ only in tokens")
    _shaped(op, "v", v, _shape(k), device)
    choose_triton(op, k, _compute_dtype(op, "q", q, k=k, v=v), _NO_KERNEL)
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
    device = _operand(op, "q", q)
    _rank(op, "q", q, 4, device)
    _shaped(op, "k", k, tuple(q.shape), device)
    _shaped(op, "v", v, tuple(q.shape), device)
    _integers(op, "key_padding", key_padding, q.shape[0], device)
    _rate(op, dropout)
    dtype = _compute_dtype(op, "q", q, k=k, v=v)
    unsupported = limits.attention(q.shape[-1], scale, _batch(q))
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
    device = _operand(op, "qkv", qkv)
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"{op}: qkv must be (B, N, 3, H, D), got {_shape(qkv)}")
    _integers(op, "key_padding", key_padding, qkv.shape[0], device)
    _rate(op, dropout)
    _check_qk(op, qkv, device, q_weight, q_bias, k_weight, k_bias, cos, sin, norm_kind)
    dtype = _compute_dtype(op, "qkv", qkv)
    params = (q_weight, q_bias, k_weight, k_bias, cos, sin, eps, norm_kind, interleaved)
    unsupported = limits.attention(qkv.shape[-1], scale, _batch(qkv))
    unsupported = unsupported or _no_gradient("cos and sin", cos, sin)
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
    device = _operand(op, "qkv", qkv)
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"{op}: qkv must be (total, 3, H, D), got {_shape(qkv)}")
    _rank(op, "cu_seqlens", cu_seqlens, 1, device)
    if len(cu_seqlens) < 1:
        raise ValueError(f"{op}: cu_seqlens must be (B + 1,), got {_shape(cu_seqlens)}")
    _integers(op, "cu_seqlens", cu_seqlens, len(cu_seqlens), device)
    if max_seqlen < 1:
        raise ValueError(f"{op}: max_seqlen must be at least 1, got {max_seqlen}")
    if not isinstance(max_seqlen, (int, torch.SymInt)):
        max_seqlen = int(max_seqlen)  # numpy's
    _rate(op, dropout)
    _check_qk(op, qkv[None], device, q_weight, q_bias, k_weight, k_bias, cos, sin, norm_kind)
    _optional(op, "cos", cos, (len(qkv), qkv.shape[-1] // 2), device)
    _check_bounds(op, cu_seqlens, len(qkv), max_seqlen)
    dtype = _compute_dtype(op, "qkv", qkv)
    params = (q_weight, q_bias, k_weight, k_bias, cos, sin, eps, norm_kind, interleaved)
    unsupported = limits.attention(qkv.shape[-1], scale, _batch(cu_seqlens))
    unsupported = unsupported or _no_gradient("cos and sin", cos, sin)
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
    device = _operand(op, "qkv", qkv)
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"{op}: qkv must be (B, N, 3, H, D), got {_shape(qkv)}")
    _check_qk(op, qkv, device, q_weight, q_bias, k_weight, k_bias, cos, sin, norm_kind)
    dtype = _compute_dtype(op, "qkv", qkv)
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
    device = _operand(op, "q", q)
    _rank(op, "q", q, 4, device)
    _shaped(op, "k", k, tuple(q.shape), device)
    _integers(op, "key_padding", key_padding, q.shape[0], device)
    dtype = _compute_dtype(op, "q", q, k=k)
    if choose_triton(op, q, dtype, limits.attention(q.shape[-1], scale, _batch(q))):
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
    device = _operand(op, "q", q)
    _rank(op, "q", q, 4, device)
    _shaped(op, "k", k, tuple(q.shape), device)
    B, N, H, D = q.shape
    wrong = [row for row in rows if not -N <= row < N]
    if wrong:
        raise ValueError(f"{op}: rows {wrong} are out of range for {N} tokens")
    rows = [row % N for row in rows]
    _optional(op, "lse", lse, (B, H, N), device)
    dtype = _compute_dtype(op, "q", q, k=k)
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
    device = _operand(op, "x", x)
    _rate(op, dropout)
    _rank(op, "weight", weight, 2, device)
    out_features, in_features = weight.shape
    _rank(op, "x", x, 3, device)
    _last(op, "x", x, in_features)
    _optional(op, "bias", bias, (out_features,), device)
    _shaped(op, "residual", residual, (*x.shape[:-1], out_features), device)
    _optional(op, "layer_scale", layer_scale, (out_features,), device)
    _optional(op, "path_scale", path_scale, (x.shape[0],), device)
    dtype = _compute_dtype(op, "x", x, weight=weight, bias=bias)
    unsupported = limits.linear(in_features, out_features) or (_NO_DROPOUT if dropout else None)
    unsupported = unsupported or _no_gradient("path_scale", path_scale)
    if choose_triton(op, x, dtype, unsupported):
        from fastvit_kernels.linear_residual import linear_residual as kernel

        return kernel(x, weight, bias, residual, layer_scale, path_scale, dtype)
    return reference.linear_residual(x, weight, bias, residual, layer_scale, path_scale, dropout)


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
    device = _operand(op, "x", x)
    _rate(op, dropout)
    if save not in SAVES:
        raise ValueError(f"{op}: save {save!r} is unknown; expected {SAVES}")
    _norm_kind(op, norm_kind)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation {activation!r} is unknown; expected {ACTIVATIONS}")
    _rank(op, "x", x, 3, device)
    _rank(op, "fc1_weight", fc1_weight, 2, device)
    hidden, dim = fc1_weight.shape
    _last(op, "x", x, dim)
    _norm(op, "norm_weight", norm_weight, dim, x, norm_kind, device)
    _norm(op, "norm_bias", norm_bias, dim, x, norm_kind, device)
    _optional(op, "fc1_bias", fc1_bias, (hidden,), device)
    _shaped(op, "fc2_weight", fc2_weight, (dim, hidden), device)
    _optional(op, "fc2_bias", fc2_bias, (dim,), device)
    _optional(op, "layer_scale", layer_scale, (dim,), device)
    _optional(op, "path_scale", path_scale, (x.shape[0],), device)
    dtype = _compute_dtype(
        op,
        "x",
        x,
        fc1_weight=fc1_weight,
        fc1_bias=fc1_bias,
        fc2_weight=fc2_weight,
        fc2_bias=fc2_bias,
    )
    unsupported = limits.linear(dim, hidden) or (_NO_DROPOUT if dropout else None)
    unsupported = unsupported or _no_gradient("path_scale", path_scale)
    args = (x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    if choose_triton(op, x, dtype, unsupported):
        from fastvit_kernels.layernorm_mlp import layernorm_mlp as kernel

        rms = norm_kind == "rmsnorm"
        options = (eps, rms, activation, save == "recompute", dtype)
        return kernel(*args, layer_scale, path_scale, *options)
    return reference.layernorm_mlp(
        *args, layer_scale, path_scale, eps, activation, dropout, norm_kind, save
    )


def _norm_kind(op: str, kind: str) -> None:
    if kind not in NORMS:
        raise ValueError(f"{op}: norm {kind!r} is unknown; expected {NORMS}")


def _rate(op: str, dropout: float) -> None:
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"{op}: dropout must be in [0, 1), got {dropout}")


def _check_qk(
    op: str,
    qkv: Tensor,
    device: torch.device,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm_kind: str | None,
) -> None:
    """Check the arguments of QK-norm and RoPE for qkv, (B, N, 3, H, D)."""
    B, N, _, _, D = qkv.shape
    if norm_kind not in (None, *NORMS):
        raise ValueError(f"{op}: norm_kind {norm_kind!r} is unknown; expected {NORMS}")
    params = {"q_weight": q_weight, "q_bias": q_bias, "k_weight": k_weight, "k_bias": k_bias}
    for name, param in params.items():
        _norm(op, name, param, D, qkv, norm_kind, device)
        if param is not None and norm_kind is None:
            raise ValueError(f"{op}: {name} was given without norm_kind")
    if (cos is None) != (sin is None):
        raise ValueError(f"{op}: cos and sin go together")
    if cos is not None:
        _on(op, "cos", cos, device)
        m = cos.shape[-2] if cos.ndim >= 2 else 0
        # Size by size: a compiler with dynamic shapes does not find tuples of sizes equal.
        batched = cos.ndim == 3 and cos.shape[0] == B
        if D % 2 or not (cos.ndim == 2 or batched) or cos.shape[-1] != D // 2 or m > N:
            expected = f"(m, {D // 2}) or ({B}, m, {D // 2}) with m <= {N}"
            raise ValueError(f"{op}: cos must be {expected}, got {_shape(cos)}")
        _optional(op, "sin", sin, _shape(cos), device)


def _norm(
    op: str,
    name: str,
    t: Tensor | None,
    dim: int,
    x: Tensor,
    kind: str | None,
    device: torch.device,
) -> None:
    """Check a norm's parameter: (dim,), in x's dtype, or in float32 for a 16-bit x."""
    if t is None:
        return
    if getattr(t, "device", None) != device:
        raise _misplaced(op, name, t, device)
    if t.shape != (dim,):
        raise ValueError(f"{op}: {name} must be {(dim,)}, got {_shape(t)}")
    if kind == "rmsnorm" and name.endswith("_bias"):
        raise UsageError(f"{op}: {name} must be None: RMSNorm has no bias")
    if t.dtype != x.dtype and kind == "layernorm":
        _norm_dtype(op, name, t.dtype, x)


def _norm_dtype(op: str, name: str, dtype: torch.dtype, x: Tensor) -> None:
    """Check the dtype of a LayerNorm parameter, which is not x's."""
    wide = x.dtype in (torch.float32, torch.float64)
    # Under autocast on a GPU, eager casts both.
    if (wide or dtype != torch.float32) and not (x.is_cuda and torch.is_autocast_enabled("cuda")):
        also = "" if wide else " or torch.float32"
        raise UsageError(f"{op}: {name} is {dtype}; expected x's {x.dtype}{also}")


def _check_bounds(op: str, cu_seqlens: Tensor, total: int, max_seqlen: int) -> None:
    """Check that cu_seqlens rises from 0 to total in steps of at most max_seqlen."""
    if len(cu_seqlens) == 1 and total:
        raise UsageError(f"{op}: cu_seqlens holds no sequence, but qkv has {total} rows")
    if not cu_seqlens.is_cpu or torch.compiler.is_compiling():
        return  # reading from a GPU would synchronize; a compiler has no values
    bounds = cu_seqlens.tolist()
    lengths = [b - a for a, b in pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != total or min(lengths, default=0) < 0:
        raise UsageError(f"{op}: cu_seqlens must rise from 0 to {total}, got {_brief(bounds)}")
    if max(lengths, default=0) > max_seqlen:
        raise UsageError(
            f"{op}: max_seqlen is {max_seqlen}, but a sequence has {max(lengths)} rows"
        )


def _brief(numbers: list[int]) -> str:
    """All of a short list, the two ends of a long one."""
    if len(numbers) <= 8:
        return str(numbers)
    return f"[{str(numbers[:4])[1:-1]}, ..., {str(numbers[-3:])[1:-1]}]"


def _operand(op: str, name: str, x: Tensor) -> torch.device:
    """Check that x is a floating-point tensor, and return its device."""
    if not isinstance(x, Tensor):
        raise UsageError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if not x.dtype.is_floating_point:
        raise UsageError(
            f"{op}: {name} is {x.dtype}; expected floating point: convert it by {name}.float()"
        )
    return x.device


def _compute_dtype(op: str, name: str, x: Tensor, **others: Tensor | None) -> torch.dtype:
    """The dtype the op multiplies in: autocast's, else the one that all operands must share."""
    dtype = x.dtype
    # Autocast does not know the meta device, where only shapes matter.
    if dtype != torch.float64 and not x.is_meta and torch.is_autocast_enabled(x.device.type):
        for other, tensor in others.items():
            if tensor is not None:
                _operand(op, other, tensor)
        return torch.get_autocast_dtype(x.device.type)
    for other, tensor in others.items():
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(
                f"{op}: {name} is {dtype} but {other} is {tensor.dtype}; "
                "expected one dtype, or torch.autocast"
            )
    return dtype


def _no_gradient(names: str, *tensors: Tensor | None) -> str | None:
    """The reason against a kernel that takes `tensors` as constants: one needs a gradient."""
    for t in tensors:
        if t is not None and t.requires_grad and torch.is_grad_enabled():
            return f"the kernel has no gradient of {names}"
    return None


def _batch(t: Tensor) -> int:
    """t's batch size; 1 under a compiler, where checking it would add a guard."""
    return 1 if torch.compiler.is_compiling() else len(t)


def _shape(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)


def _misplaced(op: str, name: str, t: Tensor, device: torch.device) -> UsageError:
    """The error for t, which is not a tensor or is on another device."""
    if not isinstance(t, Tensor):
        return UsageError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
    return UsageError(f"{op}: {name} is on {t.device}, expected {device}")


# These run for every argument of every call; one comparison also catches what is not a tensor.
def _on(op: str, name: str, t: Tensor, device: torch.device) -> None:
    if getattr(t, "device", None) != device:
        raise _misplaced(op, name, t, device)


def _rank(op: str, name: str, t: Tensor, rank: int, device: torch.device) -> None:
    if getattr(t, "device", None) != device:
        raise _misplaced(op, name, t, device)
    if t.ndim != rank:
        raise ValueError(f"{op}: {name} must have {rank} dimensions, got {_shape(t)}")


def _last(op: str, name: str, t: Tensor, size: int) -> None:
    if t.ndim < 1 or t.shape[-1] != size:
        raise ValueError(f"{op}: {name} must end in {size}, got {_shape(t)}")


def _integers(op: str, name: str, t: Tensor | None, size: int, device: torch.device) -> None:
    if t is None:
        return
    _shaped(op, name, t, (size,), device)
    if t.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} must be int32 or int64, got {t.dtype}")


def _optional(
    op: str, name: str, t: Tensor | None, shape: tuple[int, ...], device: torch.device
) -> None:
    if t is not None:
        _shaped(op, name, t, shape, device)


def _shaped(op: str, name: str, t: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if getattr(t, "device", None) != device:
        raise _misplaced(op, name, t, device)
    if t.shape != shape:
        raise ValueError(f"{op}: {name} must be {shape}, got {_shape(t)}")
