"""The modules of a Vision Transformer. State-dict names and shapes are timm's.

A residual branch takes the residual stream and its norm, and returns the updated stream, so that
the norm runs in the prologue of the branch's first GEMM, and LayerScale, drop path and the residual
add in the epilogue of its last. A branch that has hooks or was replaced by another module is called
as in timm: on the normed stream alone, returning the term to add.
"""

from collections.abc import Sequence
from typing import Any

import torch
from fastvit_kernels import handoff
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastvit import backend, ops, reference
from fastvit.arguments import grid_of
from fastvit.plain import (
    all_plain,
    fetch,
    has_observing_hooks,
    unwrapped,
    uses_methods_of,
    weight_and_bias,
    why_not_fused,
    why_not_patches,
    why_not_tensors,
)
from fastvit.pos_embed import Grid, Resample, resample_patches

Tables = tuple[Tensor, Tensor, bool]  # RoPE's cos, sin and interleaved (see Rope)


class LayerNorm(nn.LayerNorm):
    kind = "layernorm"


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight."""

    kind = "rmsnorm"
    bias = None
    eps: float


Norm = LayerNorm | RMSNorm
_NORMS = (LayerNorm, RMSNorm)
_LINEAR = (nn.Linear,)


def make_norm(kind: str, dim: int, eps: float) -> Norm:
    make = LayerNorm if kind == "layernorm" else RMSNorm
    return make(dim, float(eps))  # Triton takes no numpy scalars


class PatchEmbed(nn.Module):
    """Project non-overlapping patches to `dim`. The weights are those of one nn.Conv2d."""

    def __init__(
        self,
        image_size: tuple[int, int],
        patch_size: tuple[int, int],
        channels: int,
        dim: int,
        bias: bool = True,
        any_size: bool = False,
        crop: bool = False,
    ) -> None:
        """any_size: accept any number of whole patches; crop: ignore the pixels beyond the last
        whole patch at the right and the bottom, as a convolution does."""
        super().__init__()
        self.any_size, self.crop, self.channels = any_size, crop, channels
        self._set_sizes(image_size, patch_size)
        self.proj = nn.Conv2d(channels, dim, patch_size, stride=patch_size, bias=bias)

    def _set_sizes(self, image_size: tuple[int, int], patch_size: tuple[int, int]) -> None:
        self.grid_size = grid_of("image_size", image_size, patch_size, self.crop)
        self.img_size, self.patch_size = image_size, patch_size
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def grid(self, images: Tensor) -> Grid:
        """Check the size of images (B, C, H, W) and return their rows and columns of patches."""
        if not isinstance(images, Tensor):
            raise TypeError(f"images must be a tensor, got {type(images).__name__}")
        channels = getattr(self.proj, "in_channels", self.channels)
        sizes = tuple(images.shape[2:])
        if self.any_size:
            if images.ndim != 4 or images.shape[1] != channels:
                raise ValueError(f"images must be (B, {channels}, H, W), got {tuple(images.shape)}")
            return grid_of("images", (sizes[0], sizes[1]), self.patch_size, self.crop)
        if images.ndim != 4 or images.shape[1] != channels or sizes != self.img_size:
            raise ValueError(
                f"images must be (B, {channels}, {self.img_size[0]}, {self.img_size[1]}), "
                f"got {tuple(images.shape)}"
            )
        return self.grid_size

    def forward(
        self, images: Tensor, pos: Tensor | None = None, prefix: Tensor | None = None
    ) -> Tensor:
        """images: (B, C, H, W); pos: (m, dim); prefix: (P, dim) -> (B, P + m, dim)."""
        if self.crop:
            p_h, p_w = self.patch_size
            height, width = images.shape[2:]
            images = images[:, :, : height // p_h * p_h, : width // p_w * p_w]
        reason = why_not_fused(proj=(self.proj, (nn.Conv2d,))) or why_not_patches(self.proj)
        if reason:
            ops.record_fallback("patch_embed", images, reason)
            tokens = self.proj(images).flatten(2).transpose(1, 2)
            return reference.add_pos_and_prefix(tokens, pos, prefix)
        return ops.patch_embed(images, self.proj.weight, self.proj.bias, pos, prefix)

    def resize(self, image_size: tuple[int, int], patch_size: tuple[int, int]) -> None:
        """Change the image size and the patch size, resampling the kernel to the latter."""
        weight = None
        if patch_size != self.patch_size:
            if not isinstance(self.proj, nn.Conv2d):
                raise TypeError(f"patch_embed.proj is a {type(self.proj).__name__}, not a Conv2d")
            weight = resample_patches(self.proj.weight.detach(), patch_size, Resample())
        self._set_sizes(image_size, patch_size)
        if weight is not None:
            self.proj.weight = nn.Parameter(weight, self.proj.weight.requires_grad)
            self.proj.kernel_size = self.proj.stride = patch_size


class LayerScale(nn.Module):
    """A learned per-channel factor on a residual branch."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Activation(nn.Module):
    """An activation function of `ops.ACTIVATIONS`, by name."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        return reference.activate(x, self.kind)

    def extra_repr(self) -> str:
        return self.kind


class Attention(nn.Module):
    """x + Attention(norm(x)) with a packed QKV projection; without a norm, Attention(x) alone.

    qkv_bias "qv": a bias on q and v but not k, as in EVA and DINOv3. qk_norm: a norm over each
    head's channels of q and k. dropout is on the probabilities, proj_dropout after the output
    projection.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        qkv_bias: bool | str = True,
        dropout: float = 0.0,
        proj_dropout: float = 0.0,
        proj_bias: bool = True,
        qk_norm: Norm | None = None,
    ) -> None:
        super().__init__()
        inner = heads * dim_head
        self.heads, self.dim_head = heads, dim_head
        self.dropout, self.proj_dropout = dropout, proj_dropout
        self.qkv = nn.Linear(dim, 3 * inner, bias=qkv_bias not in (False, "qv"))
        separate = qkv_bias == "qv"
        self.q_bias = nn.Parameter(torch.zeros(inner)) if separate else None
        self.v_bias = nn.Parameter(torch.zeros(inner)) if separate else None
        self.q_norm = qk_norm
        self.k_norm = None if qk_norm is None else type(qk_norm)(dim_head, qk_norm.eps)
        self.proj = nn.Linear(inner, dim, bias=proj_bias)

    def forward(
        self,
        x: Tensor,
        norm: Norm | None = None,
        layer_scale: Tensor | None = None,
        path_scale: Tensor | None = None,
        rope: Tables | None = None,
        rows: int | None = None,
    ) -> Tensor:
        """rows: return only the first `rows` vectors, which attend to all; None: return all."""
        dropout, proj_dropout = (self.dropout, self.proj_dropout) if self.training else (0.0, 0.0)
        plain = rope is None and rows is None and not dropout and not proj_dropout
        if plain and norm is not None and (linears := self._linears_of_one_op(norm)):
            qkv, proj = map(weight_and_bias, linears)
            branch, options = (layer_scale, path_scale), (norm.eps, norm.kind)
            return ops.layernorm_attention(
                x, *weight_and_bias(norm), *qkv, *proj, self.heads, *branch, *options
            )
        qkv, x = self.project(x, norm)
        o = ops.attention_qkv(qkv, dropout=dropout, **self.qk_options(rope)).flatten(2)
        if rows is not None:
            o, x = o[:, :rows], x[:, :rows]
        if norm is None:
            return _drop(self.proj(o), proj_dropout)
        branch = (layer_scale, path_scale, proj_dropout)
        return _linear_residual("proj", self.proj, o, x, *branch)

    def _linears_of_one_op(self, norm: Norm) -> tuple[nn.Linear, nn.Linear] | None:
        """Return qkv and proj if `ops.layernorm_attention` computes what the modules would."""
        if self.q_bias is not None or self.q_norm is not None or self.k_norm is not None:
            return None
        if not uses_methods_of(self, (Attention,), "project", "qk_options"):
            return None
        qkv, proj = fetch(self, "qkv"), fetch(self, "proj")
        parts = {"norm": (norm, _NORMS), "qkv": (qkv, _LINEAR), "proj": (proj, _LINEAR)}
        return None if why_not_fused(**parts) else (qkv, proj)

    def project(self, x: Tensor, norm: Norm | None) -> tuple[Tensor, Tensor]:
        """Packed q, k, v of norm(x), and x: (B, N, C) -> (B, N, 3, H, D), (B, N, C)."""
        bias = getattr(self.qkv, "bias", None)
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        reason = None
        if norm is not None:
            reason = why_not_fused(norm=(norm, _NORMS), qkv=(self.qkv, _LINEAR))
        if reason:
            ops.record_fallback("layernorm_linear", x, reason)
        if norm is None or reason:
            qkv = self.qkv(x if norm is None else norm(x))
            qkv = qkv if self.q_bias is None else qkv + bias
        else:
            qkv, x = ops.layernorm_linear_fork(
                x, norm.weight, norm.bias, self.qkv.weight, bias, norm.eps, norm.kind
            )
        qkv = qkv.unflatten(-1, (3, self.heads, self.dim_head))
        if reason := self._why_qk_norm_unfused():
            ops.record_fallback("qk_norm_rope", qkv, reason)
            q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, H, N, D), as timm's norms get it
            q = q if self.q_norm is None else self.q_norm(q)
            k = k if self.k_norm is None else self.k_norm(k)
            qkv = torch.stack([q.to(v.dtype), k.to(v.dtype), v], dim=2).transpose(1, 3)
        return qkv, x

    def _why_qk_norm_unfused(self) -> str | None:
        q, k = self.q_norm, self.k_norm
        if q is None and k is None:
            return None
        if reason := why_not_fused(q_norm=(q, _NORMS), k_norm=(k, _NORMS)):
            return reason
        alike = q is not None and k is not None and (q.kind, q.eps) == (k.kind, k.eps)
        return None if alike else "q_norm and k_norm differ in kind or eps"

    def qk_options(self, rope: Tables | None) -> dict[str, Any]:
        """Keyword arguments of `ops.attention_qkv` and `ops.qk_norm_rope`: RoPE, and QK-norm unless
        `project` has applied it.
        """
        options: dict[str, Any] = {}
        if self.q_norm is not None and self.k_norm is not None and not self._why_qk_norm_unfused():
            q, k = self.q_norm, self.k_norm
            options |= {"q_weight": q.weight, "q_bias": q.bias, "eps": q.eps, "norm_kind": q.kind}
            options |= {"k_weight": k.weight, "k_bias": k.bias}
        if rope is not None:
            options |= dict(zip(("cos", "sin", "interleaved"), rope, strict=True))
        return options


class Mlp(nn.Module):
    """x + MLP(norm(x)), MLP = fc2(activation(fc1(.))); without a norm, MLP(x) alone."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        dropout: float = 0.0,
        bias: bool = True,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        self.dropout, self.save = dropout, "all"
        self.fc1 = nn.Linear(dim, hidden_dim, bias=bias)
        self.act = Activation(activation)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(
        self,
        x: Tensor,
        norm: Norm | None = None,
        layer_scale: Tensor | None = None,
        path_scale: Tensor | None = None,
    ) -> Tensor:
        fc1, act, fc2 = (fetch(self, name) for name in ("fc1", "act", "fc2"))
        dropout = self.dropout if self.training else 0.0
        if norm is None:
            return _drop(self._branch(x, dropout), dropout)
        if reason := why_not_fused(
            norm=(norm, _NORMS),
            fc1=(fc1, _LINEAR),
            act=(act, (Activation,)),
            fc2=(fc2, _LINEAR),
        ):
            ops.record_fallback("layernorm_mlp", x, reason)
            branch = self._branch(norm(x), dropout)
            return reference.add_branch(x, branch, layer_scale, path_scale, dropout)
        tensors = (*weight_and_bias(norm), *weight_and_bias(fc1), *weight_and_bias(fc2))
        options = (norm.eps, act.kind, dropout, norm.kind, self.save)
        return ops.layernorm_mlp(x, *tensors, layer_scale, path_scale, *options)

    def _branch(self, x: Tensor, dropout: float) -> Tensor:
        return self.fc2(_drop(self.act(self.fc1(x)), dropout))


class SwiGlu(nn.Module):
    """x + fc2(SiLU(gate) * value), where gate and value are projections of norm(x) to hidden_dim;
    without a norm, projections of x, and x is not added.

    packed: both in fc1, gate first, as in DINOv2; else fc1_g and fc1_x, as in EVA and DINOv3.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        dropout: float = 0.0,
        bias: bool = True,
        packed: bool = True,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(dim, 2 * hidden_dim, bias=bias) if packed else None
        self.fc1_g = None if packed else nn.Linear(dim, hidden_dim, bias=bias)
        self.fc1_x = None if packed else nn.Linear(dim, hidden_dim, bias=bias)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=bias)

    def project(self, x: Tensor, norm: Norm | None) -> tuple[Tensor, Tensor]:
        """Packed gate and value of norm(x), and x: (B, N, C) -> (B, N, 2 F), (B, N, C)."""
        if self.fc1 is not None:
            parts = {"fc1": self.fc1}
        else:
            parts = {"fc1_g": self.fc1_g, "fc1_x": self.fc1_x}
        linears = [m for m in parts.values() if m is not None]
        reason = None
        if norm is not None:
            fused = {name: (linear, _LINEAR) for name, linear in parts.items()}
            reason = why_not_fused(norm=(norm, _NORMS), **fused)
            if reason is None and len({m.bias is None for m in linears}) > 1:
                reason = "only one of fc1_g and fc1_x has a bias"
        if reason:
            ops.record_fallback("layernorm_linear", x, reason)
        if norm is None or reason:
            y = x if norm is None else norm(x)
            return torch.cat([linear(y) for linear in linears], dim=-1), x
        weights: list[Tensor] = [m.weight for m in linears]
        biases: list[Tensor] = [m.bias for m in linears if m.bias is not None]
        return ops.layernorm_linear_fork(
            x,
            norm.weight,
            norm.bias,
            weights[0] if len(weights) == 1 else torch.cat(weights),
            None if not biases else biases[0] if len(biases) == 1 else torch.cat(biases),
            norm.eps,
            norm.kind,
        )

    def forward(
        self,
        x: Tensor,
        norm: Norm | None = None,
        layer_scale: Tensor | None = None,
        path_scale: Tensor | None = None,
    ) -> Tensor:
        hidden, x = self.project(x, norm)
        dropout = self.dropout if self.training else 0.0
        hidden = _drop(ops.swiglu(hidden), dropout)
        if norm is None:
            return _drop(self.fc2(hidden), dropout)
        return _linear_residual("fc2", self.fc2, hidden, x, layer_scale, path_scale, dropout)


def _drop(x: Tensor, rate: float) -> Tensor:
    return nn.functional.dropout(x, rate) if rate else x


def _linear_residual(
    name: str,
    linear: nn.Linear,
    x: Tensor,
    residual: Tensor,
    layer_scale: Tensor | None,
    path_scale: Tensor | None,
    dropout: float,
) -> Tensor:
    branch = (layer_scale, path_scale, dropout)
    if reason := why_not_fused(**{name: (linear, _LINEAR)}):
        ops.record_fallback("linear_residual", x, reason)
        return reference.add_branch(residual, linear(x), *branch)
    return ops.linear_residual(x, linear.weight, linear.bias, residual, *branch)


_BRANCHES = (Attention, Mlp, SwiGlu)


class Block(nn.Module):
    """A pre-norm encoder block. x: (B, N, C) -> (B, N, C), or only its first `rows` vectors."""

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        mlp_dim: int,
        qkv_bias: bool | str = True,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        norm_eps: float = 1e-6,
        *,
        proj_dropout: float | None = None,
        mlp_dropout: float | None = None,
        proj_bias: bool = True,
        mlp_bias: bool = True,
        qk_norm: bool = False,
        norm: str = "layernorm",
        mlp: str = "mlp",
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        proj_dropout, mlp_dropout = (
            dropout if rate is None else rate for rate in (proj_dropout, mlp_dropout)
        )
        self.norm1 = make_norm(norm, dim, norm_eps)
        head_norm = make_norm(norm, dim_head, norm_eps) if qk_norm else None
        self.attn = Attention(
            dim, heads, dim_head, qkv_bias, dropout, proj_dropout, proj_bias, head_norm
        )
        self.ls1 = None if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = make_norm(norm, dim, norm_eps)
        if mlp == "mlp":
            self.mlp = Mlp(dim, mlp_dim, mlp_dropout, mlp_bias, activation)
        else:
            self.mlp = SwiGlu(dim, mlp_dim, mlp_dropout, mlp_bias, packed=mlp == "swiglu_packed")
        self.ls2 = None if layer_scale is None else LayerScale(dim, layer_scale)

    @handoff.within
    def forward(self, x: Tensor, rope: Tables | None = None, rows: int | None = None) -> Tensor:
        norm1, attn, ls1 = (fetch(self, name) for name in ("norm1", "attn", "ls1"))
        path = self.path_scale(x)
        if reason := _why_branch_unfused("attn", attn, "ls1", ls1):
            ops.record_fallback("layernorm_attention", x, reason)
            y = attn(norm1(x)) if rope is None else attn(norm1(x), rope=rope)
            x = _add(x, y, ls1, path)[:, :rows]
        else:
            x = attn(x, norm1, None if ls1 is None else ls1.gamma, path, rope, rows)
        norm2, mlp, ls2 = (fetch(self, name) for name in ("norm2", "mlp", "ls2"))
        path = self.path_scale(x)
        if reason := _why_branch_unfused("mlp", mlp, "ls2", ls2):
            ops.record_fallback("layernorm_mlp", x, reason)
            return _add(x, mlp(norm2(x)), ls2, path)
        return mlp(x, norm2, None if ls2 is None else ls2.gamma, path)

    def why_tail_needs_all_rows(self) -> str | None:
        """Return why a module after the attention may need all vectors; None: all are plain."""
        mlp = {n: m for n, m in self.mlp.named_children() if n in _TAIL_KINDS}
        tail = {"norm2": self.norm2, "proj": self.attn.proj, **mlp}
        tail |= {name: ls for name, ls in (("ls1", self.ls1), ("ls2", self.ls2)) if ls is not None}
        parts = {name: (module, _TAIL_KINDS[name]) for name, module in tail.items()}
        return None if all_plain(*parts.values()) else why_not_fused(**parts)

    def path_scale(self, x: Tensor) -> Tensor | None:
        """Drop path's factor per sample, (B,): 0 with probability drop_path, else 1 / keep."""
        if not self.training or not self.drop_path:
            return None
        keep = 1.0 - self.drop_path
        # x.new_empty rather than torch.empty: vmap then draws for each of its samples.
        scale = x.new_empty(x.shape[0], dtype=torch.float32)
        return scale.bernoulli_(keep).div_(keep)


_TAIL_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("proj", "fc1", "fc1_g", "fc1_x", "fc2"), _LINEAR),
    **dict.fromkeys(("ls1", "ls2"), (LayerScale,)),
    "norm2": _NORMS,
    "act": (Activation,),
}


class Blocks(nn.Sequential):
    """The encoder's blocks in sequence, as one module: hooks, wrappers and FSDP on it work."""

    @handoff.within
    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        rope: Tables | None = None,
        rows: int | None = None,
        checkpointing: bool = False,
        wanted: Sequence[bool] | None = None,
    ) -> Any:
        """x: (B, N, C) -> (B, N, C); with `wanted`, also a list of the wanted blocks' outputs.

        rows: the last block returns only its first `rows` vectors. wanted: one flag per block; if
        there are fewer flags than blocks, the remaining blocks do not run.
        """
        last = len(self) - 1
        kept = []
        for i, block in enumerate(self):
            if wanted is not None and i == len(wanted):
                break
            other = _runs_other_code(block)
            if other:
                handoff.forget()
            x = run_block(block, x, rope, rows if i == last else None, checkpointing)
            if other:
                handoff.forget()
            if wanted is not None and wanted[i]:
                kept.append(x)
        return x if wanted is None else (x, kept)


def _runs_other_code(block: nn.Module) -> bool:
    """Return whether code other than `Block`'s, as a hook, may change the residual stream."""
    if torch.compiler.is_compiling():
        return False
    inner = unwrapped(block)
    ours = uses_methods_of(inner, (Block,), "forward")  # also in FSDP's subclass
    return not ours or has_observing_hooks(block, inner)


def run_block(
    block: nn.Module,
    x: Tensor,
    rope: Tables | None = None,
    rows: int | None = None,
    checkpointing: bool = False,
) -> Tensor:
    # Only arguments that are set, by keyword: a replaced block takes x alone, as in timm, and a
    # forward pre-hook that returns new arguments returns the positional ones.
    options: dict[str, Any] = {}
    if rope is not None:
        options["rope"] = rope
    if rows is not None:
        options["rows"] = rows
    if checkpointing and torch.is_grad_enabled():
        # Dynamo does not support such a context_fn, and traces both passes on one backend anyway.
        if not torch.compiler.is_compiling():
            options["context_fn"] = backend.both_contexts
        return checkpoint(block, x, use_reentrant=False, **options)
    return block(x, **options)


def _why_branch_unfused(
    name: str, branch: nn.Module, scale_name: str = "", scale: Any = None
) -> str | None:
    """Return why a branch must be called on the normed stream alone, as in timm; or None."""
    if not all_plain((branch, _BRANCHES)):
        if not uses_methods_of(branch, _BRANCHES, "forward"):
            return f"{name} is {type(branch).__name__} or has its forward replaced"
        if has_observing_hooks(branch):
            return f"{name} has hooks"
    if reason := why_not_tensors(name, branch):
        return reason
    if scale is None:
        return None
    if all_plain((scale, (LayerScale,))):
        return why_not_tensors(scale_name, scale)
    return why_not_fused(**{scale_name: (scale, (LayerScale,))})


def _add(x: Tensor, branch: Tensor, layer_scale: Any, path_scale: Tensor | None) -> Tensor:
    branch = branch if layer_scale is None else layer_scale(branch)
    return reference.add_branch(x, branch, None, path_scale, 0.0)


class AttentionPool(nn.Module):
    """SigLIP's head: a learned query attends to all tokens, then an MLP. (B, N, C) -> (B, C)."""

    def __init__(
        self, dim: int, heads: int, mlp_dim: int, norm: Norm, activation: str = "gelu"
    ) -> None:
        super().__init__()
        self.heads = heads
        self.latent = nn.Parameter(torch.empty(1, 1, dim))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = norm
        self.mlp = Mlp(dim, mlp_dim, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(self.latent).expand(x.shape[0], -1, -1).unflatten(-1, (self.heads, -1))
        k, v = self.kv(x).unflatten(-1, (2, self.heads, -1)).unbind(2)
        o = self.proj(ops.pool_attention(q, k, v).flatten(2))
        if reason := _why_branch_unfused("mlp", self.mlp):
            ops.record_fallback("layernorm_mlp", o, reason)
            return (o + self.mlp(self.norm(o)))[:, 0]
        return self.mlp(o, self.norm)[:, 0]
