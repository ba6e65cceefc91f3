"""The attention and MLP halves of another library's Transformer block, as fused ops take them.

A block of such a library (a "peer") is described by an `AttentionHalf` and an `MlpHalf` or
`GatedHalf`, rebuilt at every call to see replaced parameters, LoRA layers and new hooks. `why_not`
decides at the call and also supplies the report's reasons; it costs some microseconds per block,
and nothing under torch.compile. `run`, not `__call__`: Dynamo of torch 2.10 cannot call a tuple.
"""

import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from fastvit_kernels import limits
from torch import Tensor, nn

from fastvit import ops
from fastvit.op_checks import NORMS
from fastvit.plain import why_not_any, why_not_plain

_CAPTURE = "transformers.utils.output_capturing"
HF = "transformers.models"
DINOV2 = (f"{HF}.dinov2.modeling_dinov2.Dinov2",)
DINOV2 += (f"{HF}.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegisters",)
_KIND_OF = {
    "torch.nn.modules.linear.Linear": "linear",
    "torch.nn.modules.linear.NonDynamicallyQuantizableLinear": "linear",
    "torch.nn.modules.linear.Identity": "identity",
    "torch.nn.modules.dropout.Dropout": "dropout",
    "torch.nn.modules.conv.Conv2d": "conv",
    "torch.nn.modules.normalization.LayerNorm": "layernorm",
    "timm.layers.norm.LayerNorm": "layernorm",
    "timm.layers.norm.LayerNormFp32": "layernorm",
    "torch.nn.modules.normalization.RMSNorm": "rmsnorm",
    "timm.layers.norm.RmsNorm": "rmsnorm",
    "torch.nn.modules.activation.GELU": "gelu",
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
    "timm.layers.activations.QuickGELU": "quick_gelu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.QuickGELUActivation": "quick_gelu",
    "torch.nn.modules.activation.SiLU": "silu",
    "transformers.activations.SiLUActivation": "silu",
    "torch.nn.modules.activation.MultiheadAttention": "packed_attention",
    "timm.layers.attention.Attention": "attention",
    "timm.models.vision_transformer.Attention": "attention",
    "timm.layers.mlp.Mlp": "mlp",
    "timm.layers.mlp.GluMlp": "gated",
    "timm.layers.mlp.SwiGLU": "gated",
    "timm.layers.layer_scale.LayerScale": "layer_scale",
    "timm.models.vision_transformer.LayerScale": "layer_scale",
    "timm.layers.drop.DropPath": "drop_path",
    f"{HF}.vit.modeling_vit.ViTAttention": "attention",
    f"{HF}.vit.modeling_vit.ViTMLP": "mlp",
    **{f"{d}Attention": "attention" for d in DINOV2},
    **{f"{d}SelfAttention": "attention" for d in DINOV2},
    **{f"{d}SelfOutput": "output" for d in DINOV2},
    **{f"{d}MLP": "mlp" for d in DINOV2},
    **{f"{d}SwiGLUFFN": "gated" for d in DINOV2},
    **{f"{d}LayerScale": "layer_scale" for d in DINOV2},
    **{f"{d}DropPath": "drop_path" for d in DINOV2},
    "torchvision.models.vision_transformer.MLPBlock": "mlp",
    "torch.nn.modules.container.Sequential": "sequential",
    "torch.nn.modules.activation.Softmax": "softmax",
    "einops.layers.torch.Rearrange": "rearrange",
    "vit_pytorch.vit.Attention": "attention",
    "vit_pytorch.vit.FeedForward": "mlp",
}
_KINDS: dict[type, str] = {}
Peer = Any  # a peer's module; its kind implies its attributes


class AttentionHalf(NamedTuple):
    """x + path * layer_scale * dropout(proj(attention(qkv(norm(x))))).

    qkv: one packed Linear, three Linears, or an nn.MultiheadAttention with a packed in_proj;
    core: the module whose `training` enables attention_dropout (on the probabilities); bypassed:
    (name, module, *allowed kinds) of all other modules that the fused op bypasses; peer_reason: why
    this peer's half cannot be fused, or None.
    """

    norm: Peer
    qkv: tuple[Peer, ...]
    proj: Peer
    heads: int
    scale: float | None
    core: Peer
    attention_dropout: float
    layer_scale: Peer | None
    drop_path: Peer | None
    bypassed: tuple[tuple[Any, ...], ...]
    peer_reason: str | None = None

    def why_not(self, training: bool | None = None) -> str | None:
        """Return why the fused op cannot take this half, or None. training: assume all dropout on
        or off; None: use the modules' flags."""
        reason = self.peer_reason or _why_not_half(self, (*self.qkv, self.proj), training)
        if reason:
            return reason
        if reason := why_not_rate(self.attention_dropout, self.core, training):
            return reason
        if len(self.qkv) > 1 and len({m.bias is None for m in self.qkv}) > 1:
            return "only some of q, k and v have a bias"
        weight, _ = self._in_projection(pack=False)
        inner = self.proj.weight.shape[1]
        return (
            limits.attention(inner // self.heads)
            or limits.linear(weight.shape[1], inner)
            or limits.linear(inner, self.proj.weight.shape[0])
        )

    def run(self, x: Tensor) -> Tensor:
        """x: (B, N, C) -> (B, N, C)."""
        weight, bias = self._in_projection()
        norm, proj = self.norm, self.proj
        rate = active_rate(self.attention_dropout, self.core)
        if not rate:
            tensors = (norm.weight, getattr(norm, "bias", None), weight, bias)
            branch = (_gamma(self.layer_scale), path_scale(self.drop_path, x))
            options = (norm.eps, _kind(norm), self.scale)
            return ops.layernorm_attention(
                x, *tensors, proj.weight, proj.bias, self.heads, *branch, *options
            )
        qkv, x = _norm_linear(x, norm, weight, bias)
        o = ops.attention_qkv(qkv.unflatten(-1, (3, self.heads, -1)), self.scale, rate)
        branch = (_gamma(self.layer_scale), path_scale(self.drop_path, x))
        return ops.linear_residual(o.flatten(2), proj.weight, proj.bias, x, *branch)

    def _in_projection(self, pack: bool = True) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of the packed projection; pack False: of its first Linear.

        Three Linears are concatenated at each call, under autograd: 6 C^2 elements moved and two
        small launches, whereas three GEMMs would read the tokens three times, recompute LayerNorm
        twice and add three gradients of x. The parameters remain the peer's.
        """
        first = self.qkv[0]
        if _kind(first) == "packed_attention":
            return first.in_proj_weight, first.in_proj_bias
        return _joined(self.qkv if pack else (first,))


class MlpHalf(NamedTuple):
    """x + path * layer_scale * dropout(fc2(activation(fc1(norm(x)))))."""

    norm: Peer
    fc1: Peer
    activation: Peer
    fc2: Peer
    layer_scale: Peer | None
    drop_path: Peer | None
    bypassed: tuple[tuple[Any, ...], ...]
    peer_reason: str | None = None

    def why_not(self, training: bool | None = None) -> str | None:
        """Return why the fused op cannot take this half, or None. training: assume all dropout on
        or off; None: use the modules' flags."""
        reason = (
            self.peer_reason
            or _why_not_half(self, (self.fc1, self.fc2), training)
            or why_not_module("activation", self.activation, *ops.ACTIVATIONS)
        )
        if reason:
            return reason
        hidden, dim = self.fc1.weight.shape
        if tuple(self.fc2.weight.shape) != (dim, hidden):
            return f"fc2 is {tuple(self.fc2.weight.shape)}, not {(dim, hidden)}"
        return limits.linear(dim, hidden)

    def run(self, x: Tensor) -> Tensor:
        """x: (B, N, C) -> (B, N, C)."""
        norm, fc1, fc2 = self.norm, self.fc1, self.fc2
        activation = _kind(self.activation)
        if getattr(self.activation, "approximate", "none") == "tanh":
            activation = "gelu_tanh"
        return ops.layernorm_mlp(
            x,
            norm.weight,
            getattr(norm, "bias", None),
            fc1.weight,
            fc1.bias,
            fc2.weight,
            fc2.bias,
            _gamma(self.layer_scale),
            path_scale(self.drop_path, x),
            norm.eps,
            activation,
            0.0,  # why_not refuses active dropout
            _kind(norm),
        )


class GatedHalf(NamedTuple):
    """x + path * layer_scale * dropout(fc2(SiLU(gate(norm(x))) * value(norm(x)))).

    fc1: one packed Linear, gate first, or the Linears of gate and value; activation: None where
    the peer calls SiLU as a function.
    """

    norm: Peer
    fc1: tuple[Peer, ...]
    activation: Peer | None
    fc2: Peer
    layer_scale: Peer | None
    drop_path: Peer | None
    bypassed: tuple[tuple[Any, ...], ...]
    peer_reason: str | None = None

    def why_not(self, training: bool | None = None) -> str | None:
        """Return why the fused ops cannot take this half, or None. training: assume all dropout on
        or off; None: use the modules' flags."""
        reason = (
            self.peer_reason
            or _why_not_half(self, (*self.fc1, self.fc2), training)
            or why_not_module("activation", self.activation, "silu")
        )
        if reason:
            return reason
        if len({m.bias is None for m in self.fc1}) > 1:
            return "only one of gate and value has a bias"
        dim, hidden = self.fc2.weight.shape
        return limits.linear(dim, 2 * hidden) or limits.linear(hidden, dim)

    def run(self, x: Tensor) -> Tensor:
        """x: (B, N, C) -> (B, N, C)."""
        fc2 = self.fc2
        u, x = _norm_linear(x, self.norm, *_joined(self.fc1))
        gamma, path = _gamma(self.layer_scale), path_scale(self.drop_path, x)
        return ops.linear_residual(ops.swiglu(u), fc2.weight, fc2.bias, x, gamma, path)


Half = AttentionHalf | MlpHalf | GatedHalf


def refused_attention(norm: Peer, module: Peer, reason: str) -> AttentionHalf:
    """The half of a `module` whose parts are unknown; `why_not` gives the reason."""
    return AttentionHalf(norm, (module,), module, 1, None, module, 0.0, None, None, (), reason)


def refused_mlp(norm: Peer, module: Peer, reason: str) -> MlpHalf:
    """The half of a `module` whose parts are unknown; `why_not` gives the reason."""
    return MlpHalf(norm, module, module, module, None, None, (), reason)


def _norm_linear(
    x: Tensor, norm: Peer, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return a Linear of norm(x), and x for the residual. RMSNorm has no bias."""
    args = (x, norm.weight, getattr(norm, "bias", None), weight, bias, norm.eps, _kind(norm))
    return ops.layernorm_linear_fork(*args)


def _joined(linears: tuple[Peer, ...]) -> tuple[Tensor, Tensor | None]:
    """Concatenate weights and biases of Linears that share an input, under autograd."""
    first = linears[0]
    if len(linears) == 1:
        return first.weight, first.bias
    weight = torch.cat([m.weight for m in linears])
    return weight, None if first.bias is None else torch.cat([m.bias for m in linears])


def _why_not_half(half: Half, linears: Iterable[Peer], training: bool | None) -> str | None:
    reason = why_not_any() or why_not_module("norm", half.norm, *NORMS)
    if reason is None and len(half.norm.normalized_shape) != 1:
        reason = f"norm is over {half.norm.normalized_shape}"
    if reason is None and half.norm.eps is None:
        reason = "norm has no eps of its own"
    for m in linears:
        reason = reason or why_not_module("projection", m, "linear", "packed_attention")
    reason = reason or why_not_module("layer scale", half.layer_scale, "layer_scale", "identity")
    reason = reason or why_not_module("drop path", half.drop_path, "drop_path", "identity")
    for name, module, *kinds in half.bypassed:
        reason = reason or why_not_module(name, module, *kinds)
        if reason is None and "dropout" in kinds and module is not None and module.p:
            reason = f"dropout {module.p} in training" if dropout_is_on(module, training) else None
    return reason


def dropout_is_on(dropout: nn.Module, training: bool | None) -> bool:
    """Return `training` if given, else the module's flag (Monte Carlo dropout: on in eval)."""
    return dropout.training if training is None else training


def why_not_rate(rate: float, core: nn.Module, training: bool | None) -> str | None:
    """Return why attention dropout at `rate`, where it is on, is not supported, or None."""
    if 0.0 <= rate < 1.0 or not dropout_is_on(core, training):
        return None
    return f"attention dropout {rate} in training"


def active_rate(rate: float, core: nn.Module) -> float:
    return rate if core.training else 0.0


def why_not_module(name: str, module: Any, *kinds: str) -> str | None:
    """Return why a fused op cannot bypass `module`, or None: a kind that the op does not support,
    a hook that would not fire, a forward replaced on the instance, a tensor subclass."""
    if module is None:
        return None
    if reason := why_not_kind(name, module, *kinds):
        return reason
    return why_not_plain(name, module, bool(module._forward_hooks) and not _idle_capture(module))


def why_not_kind(name: str, module: Any, *kinds: str) -> str | None:
    """Return why a module that is still called, with its hooks, is of another kind, or None."""
    return None if _kind(module) in kinds else f"{name} is {type(module).__name__}"


def is_kind(module: Any, kind: str) -> bool:
    return _kind(module) == kind


def wants_attentions(module: nn.Module) -> bool:
    """True while transformers collects attention probabilities from this module."""
    return any(h.__module__ == _CAPTURE for h in module._forward_hooks.values()) and (
        not _idle_capture(module)
    )


def _idle_capture(module: nn.Module) -> bool:
    """True if all forward hooks are transformers' output capturing, and it is inactive."""
    if torch.compiler.is_compiling():
        return False
    if any(hook.__module__ != _CAPTURE for hook in module._forward_hooks.values()):
        return False
    collected = sys.modules[_CAPTURE]._active_collector.get()
    return collected is None or "attentions" not in collected


def path_scale(drop_path: Peer | None, x: Tensor) -> Tensor | None:
    """Drop path's factor per sample, (B,), drawn as the peer's DropPath draws it."""
    rate = getattr(drop_path, "drop_prob", 0.0)
    if drop_path is None or not rate or not drop_path.training:
        return None
    keep = 1.0 - rate
    if hasattr(drop_path, "scale_by_keep"):
        kept = x.new_empty(x.shape[0]).bernoulli_(keep).float()
        return kept / keep if drop_path.scale_by_keep and keep > 0.0 else kept
    kept = torch.rand(x.shape[0], dtype=x.dtype, device=x.device) + keep
    return kept.floor().float() / keep


def peer_class(module: Any) -> type:
    """Return the module's original class, also if `accelerate` rerouted it."""
    return getattr(type(module), "_fastvit_peer", type(module))


def dotted(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _kind(module: Any) -> str:
    cls = peer_class(module)
    kind = _KINDS.get(cls)
    if kind is None:
        kind = _KIND_OF.get(dotted(cls), "other")
        if not torch.compiler.is_compiling():
            _KINDS[cls] = kind
    return kind


def _gamma(layer_scale: Peer | None) -> Tensor | None:
    if layer_scale is None or _kind(layer_scale) == "identity":
        return None
    return layer_scale.gamma if hasattr(layer_scale, "gamma") else layer_scale.lambda1
