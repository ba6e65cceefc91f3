"""Forwards on fastvit.ops for classes of timm, transformers, torchvision and vit-pytorch (peers).

`REROUTES` maps the dotted name of a peer's class to its `Reroute`; peers are recognized by name and
never imported. Each forward falls back in steps: the fused half, then the peer's modules with only
attention itself replaced, then the peer's own forward.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastvit_kernels import handoff, limits
from torch import Tensor, nn

from fastvit import ops
from fastvit.halves import (
    DINOV2,
    HF,
    AttentionHalf,
    GatedHalf,
    MlpHalf,
    active_rate,
    is_kind,
    refused_attention,
    refused_mlp,
    wants_attentions,
    why_not_kind,
    why_not_module,
    why_not_rate,
)
from fastvit.plain import why_not_any, why_not_patches

# Implementations of softmax attention: without a mask all compute the same as ops.attention.
_HF_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_HF_MASKS = ("attention_mask", "head_mask", "output_attentions", "is_causal")
CORE = "attention core"
Parts = list[tuple[str, str, Callable[[bool | None], str | None]]]


@dataclass(frozen=True)
class Reroute:
    """forward: replaces the peer's. parts(module): a (submodule, part, why_not) for each part that
    it can take; why_not(training) returns the reason why it cannot, or None."""

    forward: Callable[..., Any]
    parts: Callable[[Any], Parts]


def _given(args: tuple[Any, ...]) -> bool:
    """True if any mask or flag is set."""
    return any(a is not None and a is not False for a in args)


def _single(part: str, reason: Callable[..., str | None]) -> Callable[[Any], Parts]:
    return lambda module: [("", part, lambda training: reason(module, training))]


def _block(
    attention: Callable[[Any], AttentionHalf], mlp: Callable[[Any], MlpHalf | GatedHalf]
) -> Callable:
    def parts(block: Any) -> Parts:
        return [
            ("", "attention", lambda training: attention(block).why_not(training)),
            ("", "mlp", lambda training: mlp(block).why_not(training)),
        ]

    return parts


# --- timm


def _timm_attention_half(b: Any) -> AttentionHalf:
    a = b.attn
    if reason := why_not_module("attn", a, "attention"):
        return refused_attention(b.norm1, a, reason)
    bypassed = (
        ("attn", a, "attention"),
        ("q_norm", a.q_norm, "identity"),
        ("k_norm", a.k_norm, "identity"),
        ("attn.norm", getattr(a, "norm", None), "identity"),
        ("proj_drop", a.proj_drop, "dropout"),
    )
    peer_reason = None if getattr(a, "gate", None) is None else "attention is gated"
    return AttentionHalf(
        b.norm1,
        (a.qkv,),
        a.proj,
        a.num_heads,
        a.scale,
        _timm_dropout_switch(a),
        _rate(a.attn_drop),
        b.ls1,
        b.drop_path1,
        bypassed,
        peer_reason or why_not_module("attn_drop", a.attn_drop, "dropout"),
    )


def _rate(dropout: Any) -> float:
    """The rate of a Dropout, 0 for any other module: why_not_module rejects it."""
    return getattr(dropout, "p", 0.0)


def _timm_dropout_switch(a: Any) -> Any:
    """The module whose `training` enables attention dropout: the attention itself with SDPA."""
    return a if a.fused_attn else a.attn_drop


def _timm_mlp_half(b: Any) -> MlpHalf | GatedHalf:
    m = b.mlp
    if reason := why_not_module("mlp", m, "mlp", "gated"):
        return refused_mlp(b.norm2, m, reason)
    bypassed = (
        ("mlp", m, "mlp", "gated"),
        ("mlp.norm", getattr(m, "norm", None), "identity"),
        ("mlp.drop1", m.drop1, "dropout"),
        ("mlp.drop2", m.drop2, "dropout"),
    )
    if is_kind(m, "mlp"):
        return MlpHalf(b.norm2, m.fc1, m.act, m.fc2, b.ls2, b.drop_path2, bypassed)
    peer_reason = "the gate comes last" if getattr(m, "gate_last", False) else None
    fc1 = (m.fc1,) if hasattr(m, "fc1") else (m.fc1_g, m.fc1_x)
    return GatedHalf(b.norm2, fc1, m.act, m.fc2, b.ls2, b.drop_path2, bypassed, peer_reason)


@handoff.within
def _timm_block(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    half = _timm_attention_half(self)
    if not _given((*args, *kwargs.values())) and x.ndim == 3 and half.why_not() is None:
        x = half.run(x)
    else:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), *args, **kwargs)))
    half = _timm_mlp_half(self)
    if x.ndim == 3 and half.why_not() is None:
        return half.run(x)
    return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def _timm_attention_reason(a: Any, training: bool | None = None) -> str | None:
    if getattr(a, "gate", None) is not None:
        return "attention is gated"
    norms = ("identity", "layernorm", "rmsnorm")
    return (
        why_not_module("attn_drop", a.attn_drop, "dropout")
        or why_not_rate(a.attn_drop.p, _timm_dropout_switch(a), training)
        or why_not_module("q_norm", a.q_norm, *norms)
        or why_not_module("k_norm", a.k_norm, *norms)
        or limits.attention(a.head_dim)
    )


def _timm_attention(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if _given((*args, *kwargs.values())) or x.ndim != 3 or _timm_attention_reason(self):
        return self._fastvit_peer.forward(self, x, *args, **kwargs)
    q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
    rate = active_rate(self.attn_drop.p, _timm_dropout_switch(self))
    o = ops.attention(self.q_norm(q), self.k_norm(k), v, self.scale, rate).flatten(2)
    return self.proj_drop(self.proj(self.norm(o) if hasattr(self, "norm") else o))


# --- transformers


def _hf_core(attention: Any) -> tuple[Any, Any, tuple[Any, Any, Any], Any, Any]:
    """core, projection, (q, k, v), the projection's dropout and container, in either layout."""
    if hasattr(attention, "q_proj"):
        linears = (attention.q_proj, attention.k_proj, attention.v_proj)
        return attention, attention.o_proj, linears, None, None
    core, output = attention.attention, attention.output
    return core, output.dense, (core.query, core.key, core.value), output.dropout, output


def _hf_rate(core: Any) -> float:
    return core.attention_dropout if hasattr(core, "attention_dropout") else core.dropout_prob


def _hf_implementation(core: Any) -> str | None:
    name = core.config._attn_implementation
    return None if name in _HF_ATTENTION else f"attention implementation is {name!r}"


def _hf_attention_half(b: Any) -> AttentionHalf:
    a = b.attention
    norm = b.layernorm_before if hasattr(b, "layernorm_before") else b.norm1
    if reason := why_not_module("attention", a, "attention"):
        return refused_attention(norm, a, reason)
    core, proj, linears, dropout, output = _hf_core(a)
    bypassed = (
        ("attention", a, "attention"),
        ("attention", core, "attention"),
        ("attention output", output, "output"),
        ("dropout", dropout, "dropout"),
        ("dropout", getattr(b, "dropout", None), "dropout"),
    )
    return AttentionHalf(
        norm,
        linears,
        proj,
        core.num_attention_heads,
        core.scaling,
        core,
        _hf_rate(core),
        getattr(b, "layer_scale1", None),
        getattr(b, "drop_path", None),
        bypassed,
        _hf_implementation(core),
    )


def _hf_mlp_half(b: Any) -> MlpHalf | GatedHalf:
    m = b.mlp
    norm = b.layernorm_after if hasattr(b, "layernorm_after") else b.norm2
    if reason := why_not_module("mlp", m, "mlp", "gated"):
        return refused_mlp(norm, m, reason)
    bypassed = (("mlp", m, "mlp", "gated"), ("dropout", getattr(b, "dropout", None), "dropout"))
    gamma, path = getattr(b, "layer_scale2", None), getattr(b, "drop_path", None)
    if is_kind(m, "gated"):
        new = hasattr(m, "gate_proj")
        fc1, fc2 = (
            ((m.gate_proj, m.up_proj), m.down_proj) if new else ((m.weights_in,), m.weights_out)
        )
        return GatedHalf(norm, fc1, getattr(m, "act_fn", None), fc2, gamma, path, bypassed)
    activation = m.activation_fn if hasattr(m, "activation_fn") else m.activation
    return MlpHalf(norm, m.fc1, activation, m.fc2, gamma, path, bypassed)


def _hf_masked(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return _given((*args, *(kwargs.get(name) for name in _HF_MASKS)))


@handoff.within
def _hf_layer(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    x = hidden_states
    half = _hf_attention_half(self)
    if not _hf_masked(args, kwargs) and half.why_not() is None:
        x = half.run(x)
    else:
        branch = self.attention(half.norm(x), *args, **kwargs)
        x = _hf_branch(self, branch[0] if isinstance(branch, tuple) else branch, 1) + x
    half = _hf_mlp_half(self)
    if half.why_not() is None:
        return half.run(x)
    return _hf_branch(self, self.mlp(half.norm(x)), 2) + x


def _hf_branch(b: Any, branch: Tensor, i: int) -> Tensor:
    if hasattr(b, "layer_scale1"):
        return b.drop_path((b.layer_scale1 if i == 1 else b.layer_scale2)(branch))
    return b.dropout(branch)


def _hf_attention_reason(a: Any, training: bool | None = None) -> str | None:
    head_dim = a.head_dim if hasattr(a, "head_dim") else a.attention_head_size
    return (
        why_not_rate(_hf_rate(a), a, training)
        or _hf_implementation(a)
        or limits.attention(head_dim)
    )


def _hf_attention_parts(a: Any) -> Parts:
    # In the older layout this class may be the container of the attention core.
    if not hasattr(a, "q_proj") and not hasattr(a, "query"):
        return []
    return _single(CORE, _hf_attention_reason)(a)


def _hf_attention(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    masked = _hf_masked(args, kwargs) or wants_attentions(self)
    if masked or hidden_states.ndim != 3 or _hf_attention_reason(self):
        return self._fastvit_peer.forward(self, hidden_states, *args, **kwargs)
    new = hasattr(self, "q_proj")
    names = ("q_proj", "k_proj", "v_proj") if new else ("query", "key", "value")
    heads = self.num_attention_heads
    q, k, v = (getattr(self, n)(hidden_states).unflatten(-1, (heads, -1)) for n in names)
    o = ops.attention(q, k, v, self.scaling, active_rate(_hf_rate(self), self)).flatten(2)
    return (self.o_proj(o) if new else o), None


# --- torchvision


def _tv_attention_half(b: Any) -> AttentionHalf:
    a = b.self_attention
    bypassed = (("self_attention", a, "packed_attention"), ("dropout", b.dropout, "dropout"))
    peer_reason = None
    if a.in_proj_weight is None or not a.batch_first or a.bias_k is not None or a.add_zero_attn:
        peer_reason = (
            "self_attention has separate projections, bias_k, add_zero_attn or no batch_first"
        )
    return AttentionHalf(
        b.ln_1, (a,), a.out_proj, a.num_heads, None, a, a.dropout, None, None, bypassed, peer_reason
    )


def _tv_mlp_half(b: Any) -> MlpHalf:
    m = b.mlp
    if reason := why_not_module("mlp", m, "mlp"):
        return refused_mlp(b.ln_2, m, reason)
    bypassed = (("mlp", m, "mlp"), ("mlp.2", m[2], "dropout"), ("mlp.4", m[4], "dropout"))
    return MlpHalf(b.ln_2, m[0], m[1], m[3], None, None, bypassed)


@handoff.within
def _tv_block(self: Any, input: Tensor) -> Tensor:
    x = input
    if x.ndim != 3:
        return self._fastvit_peer.forward(self, x)
    half = _tv_attention_half(self)
    if half.why_not() is None:
        x = half.run(x)
    else:
        y = self.ln_1(x)
        x = self.dropout(self.self_attention(y, y, y, need_weights=False)[0]) + x
    half = _tv_mlp_half(self)
    return half.run(x) if half.why_not() is None else x + self.mlp(self.ln_2(x))


# --- vit-pytorch


def _vp_attention_half(a: Any) -> AttentionHalf:
    if reason := why_not_module("attention", a, "attention"):
        return refused_attention(a, a, reason)
    out = a.to_out
    if why_not_module("to_out", out, "sequential"):
        return refused_attention(a.norm, a, "no projection")
    bypassed = (
        ("attention", a, "attention"),
        ("attend", a.attend, "softmax"),
        ("to_out", out, "sequential"),
        ("to_out.1", out[1], "dropout"),
    )
    return AttentionHalf(
        a.norm,
        (a.to_qkv,),
        out[0],
        a.heads,
        a.scale,
        a.dropout,
        _rate(a.dropout),
        None,
        None,
        bypassed,
        why_not_module("dropout", a.dropout, "dropout"),
    )


def _vp_mlp_half(m: Any) -> MlpHalf:
    if reason := why_not_module("feed-forward", m, "mlp"):
        return refused_mlp(m, m, reason)
    net = m.net
    bypassed = (
        ("feed-forward", m, "mlp"),
        ("net", net, "sequential"),
        ("net.3", net[3], "dropout"),
        ("net.5", net[5], "dropout"),
    )
    return MlpHalf(net[0], net[1], net[2], net[4], None, None, bypassed)


def _vp_transformer(self: Any, x: Tensor) -> Tensor:
    for attention, feed_forward in self.layers:
        half = _vp_attention_half(attention)
        x = half.run(x) if half.why_not() is None else attention(x) + x
        half = _vp_mlp_half(feed_forward)
        x = half.run(x) if half.why_not() is None else feed_forward(x) + x
    return self.norm(x)


def _vp_transformer_parts(transformer: Any) -> Parts:
    parts: Parts = []
    for i, (a, m) in enumerate(transformer.layers):
        parts.append((f"layers.{i}.0", "attention", _vp_attention_half(a).why_not))
        parts.append((f"layers.{i}.1", "mlp", _vp_mlp_half(m).why_not))
    return parts


def _vp_attention_reason(a: Any, training: bool | None = None) -> str | None:
    return (
        why_not_any()
        or why_not_module("attend", a.attend, "softmax")
        or why_not_module("dropout", a.dropout, "dropout")
        or why_not_rate(a.dropout.p, a.dropout, training)
        or limits.attention(round(a.scale**-2))  # to_qkv may be replaced, so not from it
    )


def _vp_attention(self: Any, x: Tensor) -> Tensor:
    if x.ndim != 3 or _vp_attention_reason(self):
        return self._fastvit_peer.forward(self, x)
    qkv = self.to_qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))
    rate = active_rate(self.dropout.p, self.dropout)
    return self.to_out(ops.attention_qkv(qkv, self.scale, rate).flatten(2))


# --- patch embedding: only the convolution, so that the owner's hooks, padding and norms stay


def _conv_reason(conv: Any, training: bool | None = None) -> str | None:
    if reason := why_not_kind("projection", conv, "conv"):
        return reason
    return why_not_patches(conv) or limits.patch_embed(conv.out_channels)


def _patch_projection(self: Any, input: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, dim, H / p_h, W / p_w), a view of the op's (B, m, dim) output that the
    owner's flatten and transpose undo without a copy."""
    p_h, p_w = self.kernel_size
    fits = input.ndim == 4 and input.shape[2] % p_h == 0 and input.shape[3] % p_w == 0
    # The module's hooks still fire around this forward, so they need no check.
    if not fits or why_not_patches(self) or type(self.weight) not in (nn.Parameter, Tensor):
        return self._fastvit_peer.forward(self, input)
    grid = (input.shape[2] // p_h, input.shape[3] // p_w)
    return ops.patch_embed(input, self.weight, self.bias).transpose(1, 2).unflatten(2, grid)


def _vp_stem_reason(stem: Any, training: bool | None = None) -> str | None:
    if reason := why_not_kind("stem", stem, "sequential"):
        return reason
    if len(stem) != 4:
        return f"{len(stem)} layers, not 4"
    return (
        why_not_any()
        or why_not_module("norm", stem[1], "layernorm")
        or why_not_module("projection", stem[2], "linear")
        or limits.linear(stem[2].in_features, stem[2].out_features)
    )


def _vp_stem(self: Any, input: Tensor) -> Tensor:
    if _vp_stem_reason(self):
        return self._fastvit_peer.forward(self, input)
    rearrange, norm, linear, norm_out = self
    args = (norm.weight, norm.bias, linear.weight, linear.bias, norm.eps)
    return norm_out(ops.layernorm_linear(rearrange(input), *args))


_timm = Reroute(_timm_block, _block(_timm_attention_half, _timm_mlp_half))
_timm_core = Reroute(_timm_attention, _single(CORE, _timm_attention_reason))
_hf = Reroute(_hf_layer, _block(_hf_attention_half, _hf_mlp_half))
_hf_core_reroute = Reroute(_hf_attention, _hf_attention_parts)
_CONV = Reroute(_patch_projection, _single("patch projection", _conv_reason))
_STEM = Reroute(_vp_stem, _single("patch projection", _vp_stem_reason))

REROUTES: dict[str, Reroute] = {
    "timm.models.vision_transformer.Block": _timm,
    "timm.models.vision_transformer.Attention": _timm_core,
    "timm.layers.attention.Attention": _timm_core,
    f"{HF}.vit.modeling_vit.ViTLayer": _hf,
    f"{HF}.vit.modeling_vit.ViTAttention": _hf_core_reroute,
    **{f"{d}Layer": _hf for d in DINOV2},
    **{f"{d}Attention": _hf_core_reroute for d in DINOV2},
    **{f"{d}SelfAttention": _hf_core_reroute for d in DINOV2},
    "torchvision.models.vision_transformer.EncoderBlock": Reroute(
        _tv_block, _block(_tv_attention_half, _tv_mlp_half)
    ),
    "vit_pytorch.vit.Transformer": Reroute(_vp_transformer, _vp_transformer_parts),
    "vit_pytorch.vit.Attention": Reroute(_vp_attention, _single(CORE, _vp_attention_reason)),
}

# The peers' patch embeddings: class that holds the module -> (attribute, reroute).
STEMS: dict[str, tuple[str, Reroute]] = {
    "timm.layers.patch_embed.PatchEmbed": ("proj", _CONV),
    f"{HF}.vit.modeling_vit.ViTPatchEmbeddings": ("projection", _CONV),
    **{f"{d}PatchEmbeddings": ("projection", _CONV) for d in DINOV2},
    "torchvision.models.vision_transformer.VisionTransformer": ("conv_proj", _CONV),
    "vit_pytorch.vit.ViT": ("to_patch_embedding", _STEM),
}
