"""The Vision Transformer: stem, pre-norm encoder, head. State-dict names and shapes are timm's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastvit import ops, reference

POOLS = ("cls", "mean")


def pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """An int or a (height, width) pair as a pair of positive ints."""
    sizes = (value, value) if isinstance(value, int) else tuple(value)
    if len(sizes) != 2 or not all(isinstance(s, int) and s > 0 for s in sizes):
        raise ValueError(f"{name} must be a positive int or a pair of them, got {value!r}")
    return sizes


class PatchEmbed(nn.Module):
    """Non-overlapping patches, each projected to `dim`. Holds the weights of one convolution."""

    def __init__(
        self, image_size: tuple[int, int], patch_size: tuple[int, int], channels: int, dim: int
    ) -> None:
        super().__init__()
        for side, name in enumerate(("height", "width")):
            if image_size[side] % patch_size[side]:
                raise ValueError(
                    f"image_size {image_size} is not a multiple of patch_size {patch_size} "
                    f"in {name}"
                )
        self.img_size, self.patch_size = image_size, patch_size
        self.grid_size = (image_size[0] // patch_size[0], image_size[1] // patch_size[1])
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(channels, dim, patch_size, stride=patch_size)

    def forward(self, images: Tensor, pos: Tensor | None, prefix: Tensor | None) -> Tensor:
        """images: (B, C, H, W); pos: (m, dim); prefix: (P, dim) -> (B, P + m, dim)."""
        channels = self.proj.in_channels
        if images.ndim != 4 or images.shape[1:] != (channels, *self.img_size):
            raise ValueError(
                f"images must be (B, {channels}, {self.img_size[0]}, {self.img_size[1]}), "
                f"got {tuple(images.shape)}"
            )
        return ops.patch_embed(images, self.proj.weight, self.proj.bias, pos, prefix)


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))


class Attention(nn.Module):
    """x + Attention(norm(x)), heads side by side in one packed projection."""

    def __init__(
        self, dim: int, heads: int, dim_head: int, qkv_bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.heads, self.dim_head, self.dropout = heads, dim_head, dropout
        self.qkv = nn.Linear(dim, 3 * heads * dim_head, bias=qkv_bias)
        self.proj = nn.Linear(heads * dim_head, dim)

    def project(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """q, k, v of norm(x), packed: (B, N, C) -> (B, N, 3, H, D)."""
        qkv = ops.layernorm_linear(
            x, norm.weight, norm.bias, self.qkv.weight, self.qkv.bias, norm.eps
        )
        return qkv.unflatten(-1, (3, self.heads, self.dim_head))

    def forward(
        self,
        x: Tensor,
        norm: nn.LayerNorm,
        layer_scale: Tensor | None = None,
        path_scale: Tensor | None = None,
    ) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        o = ops.attention_qkv(self.project(x, norm), dropout=dropout)
        return ops.linear_residual(
            o.flatten(2), self.proj.weight, self.proj.bias, x, layer_scale, path_scale, dropout
        )


class Mlp(nn.Module):
    """x + MLP(norm(x)), MLP = fc2(GELU(fc1(.)))."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(
        self,
        x: Tensor,
        norm: nn.LayerNorm,
        layer_scale: Tensor | None = None,
        path_scale: Tensor | None = None,
    ) -> Tensor:
        fc1, fc2 = self.fc1, self.fc2
        return ops.layernorm_mlp(
            x,
            norm.weight,
            norm.bias,
            fc1.weight,
            fc1.bias,
            fc2.weight,
            fc2.bias,
            layer_scale,
            path_scale,
            norm.eps,
            dropout=self.dropout if self.training else 0.0,
        )


class Block(nn.Module):
    """A pre-norm encoder block. x: (B, N, C) -> (B, N, C)."""

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        mlp_dim: int,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim, norm_eps)
        self.attn = Attention(dim, heads, dim_head, qkv_bias, dropout)
        self.ls1 = None if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, norm_eps)
        self.mlp = Mlp(dim, mlp_dim, dropout)
        self.ls2 = None if layer_scale is None else LayerScale(dim, layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        gamma1, gamma2 = (None if ls is None else ls.gamma for ls in (self.ls1, self.ls2))
        x = self.attn(x, self.norm1, gamma1, self.path_scale(x))
        return self.mlp(x, self.norm2, gamma2, self.path_scale(x))

    def path_scale(self, x: Tensor) -> Tensor | None:
        """Drop path's factor per sample: 0 with probability drop_path, else 1 / keep. (B,)."""
        if not self.training or not self.drop_path:
            return None
        keep = 1.0 - self.drop_path
        scale = torch.empty(len(x), dtype=torch.float32, device=x.device)
        return scale.bernoulli_(keep).div_(keep)


class ViT(nn.Module):
    """Vision Transformer (Dosovitskiy et al., 2021, arXiv:2010.11929).

    Defaults are ViT-B/16. `image_size` and `patch_size` are ints or (height, width). `dim_head`
    None means dim / heads. `pool`: "cls" classifies the <cls> vector after the final norm; "mean"
    averages the patch vectors, then norms (timm's avg with fc_norm). `dropout` acts on attention
    probabilities, after the output projection and twice in the MLP; `emb_dropout` after the
    position embedding. `drop_path` is stochastic depth's rate at the last block, rising linearly
    from 0. `layer_scale`: LayerScale's initial value. `registers`: learned tokens behind <cls>.
    `config` holds these arguments, so that `ViT(**model.config)` is the same architecture.
    `num_classes` 0 leaves the head out; `head_hidden_dim` makes it Linear, GELU, Linear.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        num_classes: int = 1000,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_dim: int = 3072,
        pool: str = "cls",
        channels: int = 3,
        dim_head: int | None = None,
        dropout: float = 0.0,
        emb_dropout: float = 0.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        registers: int = 0,
        norm_eps: float = 1e-6,
        head_hidden_dim: int | None = None,
    ) -> None:
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.config: dict[str, Any] = config
        sizes = {"dim": dim, "depth": depth, "heads": heads, "mlp_dim": mlp_dim}
        _check_sizes(1, channels=channels, **sizes)
        _check_sizes(0, num_classes=num_classes, registers=registers)
        _check_rates(dropout=dropout, emb_dropout=emb_dropout, drop_path=drop_path)
        if pool not in POOLS:
            raise ValueError(f"pool must be one of {POOLS}, got {pool!r}")
        if dim_head is None and dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}; pass dim_head")
        dim_head = dim // heads if dim_head is None else dim_head
        _check_sizes(1, dim_head=dim_head)

        self.pool = pool
        self.num_classes = num_classes
        self.num_features = self.embed_dim = dim
        self.num_prefix_tokens = 1 + registers
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(
            pair("image_size", image_size), pair("patch_size", patch_size), channels, dim
        )
        tokens = self.num_prefix_tokens + self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.reg_token = nn.Parameter(torch.empty(1, registers, dim)) if registers else None
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, dim))
        self.pos_drop = nn.Dropout(emb_dropout)
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.Sequential(
            *(
                Block(dim, heads, dim_head, mlp_dim, qkv_bias, dropout, rate, layer_scale, norm_eps)
                for rate in rates
            )
        )
        self.norm = nn.LayerNorm(dim, norm_eps) if pool == "cls" else nn.Identity()
        self.fc_norm = nn.LayerNorm(dim, norm_eps) if pool == "mean" else nn.Identity()
        self.head = _make_head(dim, head_hidden_dim, num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """timm's: truncated normal of std 0.02, zero biases, prefix tokens near zero."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, channels, H, W) -> logits (B, num_classes)."""
        x = self.encode(images)
        if self.pool == "cls":
            x = x[:, :1]  # the final norm acts on each vector alone, so only <cls> needs it
        return self.forward_head(self.norm(x))

    def forward_features(self, images: Tensor) -> Tensor:
        """All vectors after the final norm: (B, channels, H, W) -> (B, N, dim), N = prefix + m."""
        return self.norm(self.encode(images))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, norm and classify: (B, N, dim) -> (B, num_classes), or (B, dim) before the head."""
        x = x[:, 0] if self.pool == "cls" else x[:, self.num_prefix_tokens :].mean(dim=1)
        x = self.fc_norm(x)
        return x if pre_logits else self.head(x)

    def embed(self, images: Tensor) -> Tensor:
        """Stem: patches, positions, prefix tokens. (B, channels, H, W) -> (B, N, dim)."""
        tokens = [self.cls_token] if self.reg_token is None else [self.cls_token, self.reg_token]
        prefix, pos = self.pos_embed[0].split(
            [self.num_prefix_tokens, self.patch_embed.num_patches]
        )
        prefix = torch.cat(tokens, dim=1)[0] + prefix
        return self.pos_drop(self.patch_embed(images, pos, prefix))

    def encode(self, images: Tensor) -> Tensor:
        """Stem and body, before the final norm. (B, channels, H, W) -> (B, N, dim)."""
        x = self.embed(images)
        for block in self.blocks:
            x = self._run(block, x)
        return x

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input for backward and recompute the rest."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters that optimizers should not decay, beside biases and norms."""
        return {"pos_embed", "cls_token", "reg_token"}

    @torch.no_grad()
    def attention_maps(
        self, images: Tensor, layers: Sequence[int] = (-1,), rows: str | Sequence[int] = "cls"
    ) -> Tensor:
        """Where chosen tokens look: (B, len(layers), heads, len(rows), N), rows summing to 1.

        rows: "cls", "all" or token indices. Recomputed per layer; no N x N matrix unless asked.
        """
        depth = len(self.blocks)
        for layer in layers:
            if not -depth <= layer < depth:
                raise ValueError(f"layers: {layer} is out of range for depth {depth}")
        wanted = [layer % depth for layer in layers]
        x = self.embed(images)
        if isinstance(rows, str):
            if rows not in ("cls", "all"):
                raise ValueError(f"rows must be 'cls', 'all' or indices, got {rows!r}")
            rows = (0,) if rows == "cls" else range(x.shape[1])
        maps = {}
        for i, block in enumerate(self.blocks[: max(wanted) + 1]):
            if i in wanted:
                q, k, _ = block.attn.project(x, block.norm1).unbind(2)
                maps[i] = reference.attention_rows(q, k, rows)
            x = block(x)
        return torch.stack([maps[i] for i in wanted], dim=1)


def _make_head(dim: int, hidden_dim: int | None, num_classes: int) -> nn.Module:
    if num_classes == 0:
        return nn.Identity()
    if hidden_dim is None:
        return nn.Linear(dim, num_classes)
    _check_sizes(1, head_hidden_dim=hidden_dim)
    return nn.Sequential(nn.Linear(dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, num_classes))


def _check_sizes(least: int, **sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < least:
            raise ValueError(f"{name} must be an int >= {least}, got {size!r}")


def _check_rates(**rates: float) -> None:
    for name, rate in rates.items():
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"{name} must be in [0, 1), got {rate!r}")
