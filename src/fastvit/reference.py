"""The ops in eager PyTorch: the specification, the test oracle, and what runs without a GPU.

Every function here has a twin of the same name and meaning in `fastvit_kernels`. No Triton, no
dispatch. Under torch.autocast these lines define what "the same as eager" means.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


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
    tokens = F.linear(patches, weight.flatten(1), bias)
    if pos is not None:
        tokens = tokens + pos
    if prefix is not None:
        tokens = torch.cat([prefix.expand(len(tokens), -1, -1), tokens], dim=1)
    return tokens


def layernorm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """LayerNorm(x) weight^T + bias. x: (..., C); weight: (O, C) -> (..., O)."""
    return F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps), weight, bias)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    dropout: float = 0.0,
    key_padding: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v. q, k, v: (B, N, H, D) -> (B, N, H, D); scale is D**-0.5.

    dropout: rate at which probabilities are zeroed, the rest scaled by 1 / (1 - dropout).
    key_padding: (B,) integers, how many keys of each sample are real; the rest are left out, and a
    sample without any gives zeros.
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


def attention_qkv(
    qkv: Tensor,
    scale: float | None = None,
    dropout: float = 0.0,
    key_padding: Tensor | None = None,
) -> Tensor:
    """Attention on the packed output of a QKV projection. qkv: (B, N, 3, H, D) -> (B, N, H, D)."""
    return attention(*qkv.unbind(2), scale, dropout, key_padding)


def attention_packed(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float | None = None
) -> Tensor:
    """Attention within each of the sequences that lie end to end in qkv, (total, 3, H, D).

    cu_seqlens: (B + 1,) int32, from 0 to total, their bounds; max_seqlen: the longest. Returns
    (total, H, D).
    """
    lengths = cu_seqlens.diff().tolist()
    return torch.cat([attention_qkv(x[None], scale)[0] for x in qkv.split(lengths)])


def attention_lse(
    q: Tensor, k: Tensor, scale: float | None = None, key_padding: Tensor | None = None
) -> Tensor:
    """log sum exp of each row of q k^T * scale. q, k: (B, N, H, D) -> (B, H, N) float32."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k).float() * scale
    if key_padding is not None:
        keys = torch.arange(k.shape[1], device=k.device) < key_padding[:, None]
        scores = scores.masked_fill(~keys[:, None, None], -torch.inf)
    return scores.logsumexp(-1)


def attention_maps(
    q: Tensor, k: Tensor, lse: Tensor, rows: Sequence[int] = (0,), scale: float | None = None
) -> Tensor:
    """Chosen rows of the probabilities whose log sum exp is lse: exp(q[rows] k^T * scale - lse).

    q, k: (B, N, H, D); lse: (B, H, N), as attention gives it -> (B, H, len(rows), N) float32.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("brhd,bnhd->bhrn", q[:, list(rows)], k) * scale
    return (scores - lse[:, :, list(rows), None]).exp().float()


def attention_rows(
    q: Tensor, k: Tensor, rows: Sequence[int] = (0,), scale: float | None = None
) -> Tensor:
    """Chosen rows of softmax(q k^T * scale). q, k: (B, N, H, D) -> (B, H, len(rows), N)."""
    q = q[:, list(rows)] * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = torch.einsum("brhd,bnhd->bhrn", q, k)
    return scores.float().softmax(-1)


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
    return _add_branch(residual, F.linear(x, weight, bias), layer_scale, path_scale, dropout)


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
) -> Tensor:
    """x + path_scale * layer_scale * MLP(LayerNorm(x)), MLP = fc2(activation(fc1(.))).

    x: (B, N, C); fc1_weight: (F, C); fc2_weight: (C, F); layer_scale: (C,); path_scale: (B,).
    activation: 'gelu' (erf) or 'gelu_tanh'. Returns (B, N, C) in x's dtype. Dropout acts on the
    hidden activation and on the output, as in timm.
    """
    hidden = layernorm_linear(x, norm_weight, norm_bias, fc1_weight, fc1_bias, eps)
    hidden = F.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")
    if dropout:
        hidden = F.dropout(hidden, dropout)
    return _add_branch(x, F.linear(hidden, fc2_weight, fc2_bias), layer_scale, path_scale, dropout)


def _add_branch(
    residual: Tensor,
    branch: Tensor,
    layer_scale: Tensor | None,
    path_scale: Tensor | None,
    dropout: float,
) -> Tensor:
    if dropout:
        branch = F.dropout(branch, dropout)
    if layer_scale is not None:
        branch = branch * layer_scale
    if path_scale is not None:
        branch = branch * path_scale.to(branch.dtype).view(-1, 1, 1)
    return residual + branch
