"""The ops in eager PyTorch: the specification, the test oracle, and what runs without a GPU.

Every op of `fastvit.ops` is here under the same name, with the functions it is built from; kernels
are in `fastvit_kernels`. No Triton, no dispatch. Under torch.autocast this code defines what "the
same as eager" means.
"""

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pos: Tensor | None = None,
    prefix: Tensor | None = None,
) -> Tensor:
    """[prefix; patches(images) weight^T + bias + pos].

    images: (B, C, H, W); weight: (dim, C, p_h, p_w); bias: (dim,); pos: (m, dim) with
    m = (H / p_h) * (W / p_w), row-major; prefix: (P, dim), its positions already added.
    Returns (B, P + m, dim).
    """
    p_h, p_w = weight.shape[-2:]
    patches = rearrange(images, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=p_h, pw=p_w)
    return add_pos_and_prefix(F.linear(patches, weight.flatten(1), bias), pos, prefix)


def add_pos_and_prefix(tokens: Tensor, pos: Tensor | None, prefix: Tensor | None) -> Tensor:
    """[prefix; tokens + pos]. tokens: (B, m, dim); pos: (m, dim); prefix: (P, dim)."""
    if pos is not None:
        tokens = tokens + pos
    if prefix is not None:
        tokens = torch.cat([prefix.expand(tokens.shape[0], -1, -1), tokens], dim=1)
    return tokens


def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-6,
    kind: str = "layernorm",
) -> Tensor:
    """LayerNorm, or RMSNorm x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""
    shape = x.shape[-1:]
    if torch._C._get_tracing_state() is not None:
        with warnings.catch_warnings():  # that the size is a constant in the trace: ONNX needs it
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
            shape = (int(x.shape[-1]),)
    if kind == "rmsnorm":
        return F.rms_norm(x, shape, weight, eps)
    return F.layer_norm(x, shape, weight, bias, eps)


def layernorm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    norm_kind: str = "layernorm",
) -> Tensor:
    """LayerNorm(x) weight^T + bias. x: (..., C); weight: (O, C) -> (..., O)."""
    return F.linear(norm(x, norm_weight, norm_bias, eps, norm_kind), weight, bias)


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the channel pairs of the last m tokens by their angles; other tokens are unchanged.

    x: (B, N, ..., D); cos, sin: (m, D / 2) or (B, m, D / 2). interleaved: channel 2 i pairs with
    2 i + 1, else i with i + D / 2. Computed in float32 or wider, returned in x's dtype.
    """
    m = cos.shape[-2]
    prefix, tokens = x.split([x.shape[1] - m, m], dim=1)
    wide = tokens.to(torch.promote_types(x.dtype, torch.float32))
    if cos.ndim == 2:
        cos, sin = cos[None], sin[None]
    for _ in range(x.ndim - 3):
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    a, b = (wide[..., ::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim=-1)
    turned = (a * cos - b * sin, b * cos + a * sin)
    out = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat([prefix, out.to(x.dtype)], dim=1)


def swiglu(x: Tensor) -> Tensor:
    """SiLU(x[..., :F]) * x[..., F:]. x: (..., 2 F) -> (..., F)."""
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def pool_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v. q: (B, M, H, D); k, v: (B, N, H, D) -> (B, M, H, D)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    dropout: float = 0.0,
    key_padding: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v. q, k, v: (B, N, H, D) -> (B, N, H, D); scale: D**-0.5 if None.

    dropout: rate at which probabilities are zeroed, the rest scaled by 1 / (1 - dropout).
    key_padding: (B,) integers, the number of valid keys per sample; the rest are masked, and a
    sample without valid keys gives zeros.
    """
    mask = None
    if key_padding is not None:
        real = torch.arange(q.shape[1], device=q.device) < key_padding[:, None]
        k, v = (t.masked_fill(~real[:, :, None, None], 0) for t in (k, v))
        # A sample without keys attends to zeros.
        mask = (real | (key_padding == 0)[:, None])[:, None, None]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, scale=scale)
    return o.transpose(1, 2)


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
    """q and k of qkv, (B, N, 3, H, D), after `norm` of norm_kind and `rope`, where given."""
    q, k, _ = qkv.unbind(2)
    if norm_kind is not None:
        q, k = norm(q, q_weight, q_bias, eps, norm_kind), norm(k, k_weight, k_bias, eps, norm_kind)
    if cos is not None and sin is not None:
        q, k = rope(q, cos, sin, interleaved), rope(k, cos, sin, interleaved)
    return q, k


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
    """Attention on the packed output of a QKV projection. qkv: (B, N, 3, H, D) -> (B, N, H, D).

    The other arguments are those of `attention` and `qk_norm_rope`.
    """
    params = (q_weight, q_bias, k_weight, k_bias, cos, sin)
    q, k = qk_norm_rope(qkv, *params, eps, norm_kind, interleaved)
    v = qkv.select(2, 2)
    return attention(q.to(v.dtype), k.to(v.dtype), v, scale, dropout, key_padding)


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

    cu_seqlens: (B + 1,) integers, the sequences' bounds, from 0 to total; max_seqlen: unused here.
    cos, sin: (total, D / 2). Returns (total, H, D).
    """
    lengths = cu_seqlens.diff().tolist()
    params = (q_weight, q_bias, k_weight, k_bias, cos, sin)
    q, k = qk_norm_rope(qkv[None], *params, eps, norm_kind, interleaved)
    tensors = (q.to(qkv.dtype), k.to(qkv.dtype), qkv[None, :, 2])
    parts = zip(*(t.split(lengths, dim=1) for t in tensors), strict=True)
    sequences = [attention(q, k, v, scale, dropout)[0] for q, k, v in parts]
    return torch.cat(sequences) if sequences else qkv[:, 2]


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def attention_lse(
    q: Tensor, k: Tensor, scale: float | None = None, key_padding: Tensor | None = None
) -> Tensor:
    """Log-sum-exp of each row of q k^T * scale. q, k: (B, N, H, D) -> (B, H, N) float32."""
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k).float() * _scale(q, scale)
    if key_padding is not None:
        keys = torch.arange(k.shape[1], device=k.device) < key_padding[:, None]
        scores = scores.masked_fill(~keys[:, None, None], -torch.inf)
    return scores.logsumexp(-1)


def attention_maps(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    rows: Sequence[int] = (0,),
    scale: float | None = None,
) -> Tensor:
    """Selected rows of softmax(q k^T * scale), from their log-sum-exp if it is given.

    q, k: (B, N, H, D); lse: (B, H, N) from `attention_lse` -> (B, H, len(rows), N) float32.
    """
    scores = torch.einsum("brhd,bnhd->bhrn", q[:, list(rows)] * _scale(q, scale), k)
    if lse is None:
        return scores.float().softmax(-1)
    return (scores - lse[:, :, list(rows), None]).exp().float()


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

    x: (B, N, K); weight: (C, K); residual: (B, N, C); layer_scale: (C,); path_scale: (B,), the
    drop-path factor of each sample (0 or 1 / keep). Returns (B, N, C) in the residual's dtype.
    """
    return add_branch(residual, F.linear(x, weight, bias), layer_scale, path_scale, dropout)


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

    qkv_weight: (3 heads D, C); proj_weight: (C, heads D); layer_scale: (C,); path_scale: (B,).
    """
    qkv = layernorm_linear(x, norm_weight, norm_bias, qkv_weight, qkv_bias, eps, norm_kind)
    o = attention_qkv(qkv.unflatten(-1, (3, heads, -1)), scale).flatten(2)
    return linear_residual(o, proj_weight, proj_bias, x, layer_scale, path_scale)


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
    """x + path_scale * layer_scale * MLP(LayerNorm(x)), MLP = fc2(activation(fc1(.))).

    x: (B, N, C); fc1_weight: (F, C); fc2_weight: (C, F); layer_scale: (C,); path_scale: (B,).
    activation: 'gelu' (erf), 'gelu_tanh' or 'quick_gelu', x sigmoid(1.702 x). Returns (B, N, C) in
    x's dtype. Dropout acts on the hidden activation and on the output, as in timm. save: what
    autograd saves for backward, 'all' or, with 'recompute', the arguments alone.
    """
    transformed = torch._C._are_functorch_transforms_active()  # torch.func takes no saved hooks
    if save == "recompute" and torch.is_grad_enabled() and not transformed:
        args = (x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        options = (layer_scale, path_scale, eps, activation, dropout, norm_kind)
        return checkpoint(layernorm_mlp, *args, *options, use_reentrant=False)
    hidden = layernorm_linear(x, norm_weight, norm_bias, fc1_weight, fc1_bias, eps, norm_kind)
    hidden = activate(hidden, activation)
    if dropout:
        hidden = F.dropout(hidden, dropout)
    return add_branch(x, F.linear(hidden, fc2_weight, fc2_bias), layer_scale, path_scale, dropout)


def activate(x: Tensor, activation: str) -> Tensor:
    """GELU of x: 'gelu' by erf, 'gelu_tanh', or 'quick_gelu'."""
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def add_branch(
    residual: Tensor,
    branch: Tensor,
    layer_scale: Tensor | None,
    path_scale: Tensor | None,
    dropout: float,
) -> Tensor:
    """residual + path_scale * layer_scale * dropout(branch). branch: (B, N, C)."""
    if dropout:
        branch = F.dropout(branch, dropout)
    if layer_scale is not None:
        branch = branch * layer_scale
    if path_scale is not None:
        branch = branch * path_scale.to(branch.dtype).view(-1, 1, 1)
    return residual + branch
