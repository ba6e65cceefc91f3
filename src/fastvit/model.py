"""The Vision Transformer: stem, pre-norm encoder, head. State-dict names and shapes are timm's."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastvit.arguments import (
    HEAD_ACTIVATIONS,
    POOLS,
    check_arguments,
    check_choice,
    check_sizes,
    check_unmasked,
    grid_of,
    pair,
)
from fastvit.errors import UsageError
from fastvit.features import Features
from fastvit.layers import (
    Attention,
    AttentionPool,
    Block,
    Blocks,
    LayerScale,
    Mlp,
    PatchEmbed,
    SwiGlu,
    Tables,
    make_norm,
    run_block,
)
from fastvit.plain import has_observing_hooks, unwrapped, uses_methods_of, why_not_plain
from fastvit.pos_embed import Grid, Resample, resample_positions
from fastvit.reference import add_pos_and_prefix
from fastvit.rope import Rope
from fastvit.vit_pytorch import VitPytorchNames


class ViT(Features, VitPytorchNames, nn.Module):
    """Vision Transformer (Dosovitskiy et al., 2021, arXiv:2010.11929).

    Defaults are ViT-B/16. `image_size` and `patch_size` are ints or (height, width). `dim_head`
    None means dim / heads. `num_classes` 0 omits the head; `head_hidden_dim` makes the head Linear,
    `head_activation` ("gelu" or "tanh"), Linear.

    `pool`: "cls" classifies the <cls> vector after the final norm; "mean", "max" and "avgmax" (half
    the sum of the two) pool the patch vectors, then norm (`fc_norm` False: norm, then pool);
    "cls_mean" concatenates <cls> and the patch mean (DINOv2's classifiers); "map" is attention
    pooling (SigLIP); "none" keeps all vectors.

    Tokens: `class_token` adds <cls>; `registers` is the number of register tokens after it;
    `pos_embed` is "learned" or "none"; with `no_embed_class` only patches have positions. `rope`
    rotates q and k of the patches by their grid position: "eva" (theta 10000; `rope_grid`: the grid
    that indices are rescaled to) or "dinov3" (theta 100); `rope_theta` overrides theta.
    `dynamic_img_size` accepts images of any whole number of patches and resamples the position
    table by `resample`: a mapping of mode, antialias, align_corners and offset
    (`fastvit.pos_embed.Resample`). `crop_remainder` ignores the pixels beyond the last whole patch,
    as a convolution does.

    Blocks: `norm` is "layernorm" or "rmsnorm" with `norm_eps`; `pre_norm` adds a norm before the
    first block (and drops the patch bias, unless `patch_bias` is set); `final_norm`; `qk_norm`;
    `layer_scale` is its initial value; `mlp` is "mlp", "swiglu" or "swiglu_packed", `mlp_dim` wide
    per branch; `activation` is "gelu", "gelu_tanh" or "quick_gelu"; `qkv_bias` is True, False or
    "qv" (none on k); `proj_bias`; `mlp_bias`.

    Rates: `dropout` acts on attention probabilities, after the output projection and twice in the
    MLP, unless `attn_dropout`, `proj_dropout` or `mlp_dropout` overrides it; `emb_dropout` acts
    after the position embedding, `head_dropout` before the head; `patch_dropout` is the share of
    patches dropped in training; `drop_path` is the stochastic depth rate of the last block, rising
    linearly from 0 at the first. Rates inside blocks are numbers, not nn.Dropout modules: for Monte
    Carlo dropout call `train()` on each `attn` and `mlp` of an eval model's blocks.

    `config` holds these arguments: `ViT(**model.config)` builds the same architecture.
    `default_cfg` describes image preprocessing under timm's names.
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
        qkv_bias: bool | str = True,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        registers: int = 0,
        norm_eps: float = 1e-6,
        head_hidden_dim: int | None = None,
        head_activation: str = "gelu",
        class_token: bool = True,
        pos_embed: str = "learned",
        no_embed_class: bool = False,
        fc_norm: bool | None = None,
        final_norm: bool = True,
        pre_norm: bool = False,
        patch_bias: bool | None = None,
        norm: str = "layernorm",
        qk_norm: bool = False,
        mlp: str = "mlp",
        activation: str = "gelu",
        proj_bias: bool = True,
        mlp_bias: bool = True,
        rope: str | None = None,
        rope_theta: float | None = None,
        rope_grid: int | tuple[int, int] | None = None,
        attn_dropout: float | None = None,
        proj_dropout: float | None = None,
        mlp_dropout: float | None = None,
        head_dropout: float = 0.0,
        patch_dropout: float = 0.0,
        dynamic_img_size: bool = False,
        resample: Mapping[str, Any] | None = None,
        crop_remainder: bool = False,
    ) -> None:
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.config: dict[str, Any] = config
        check_arguments(config)
        config["qkv_bias"] = qkv_bias = qkv_bias if qkv_bias == "qv" else bool(qkv_bias)
        dim_head = dim // heads if dim_head is None else dim_head

        self.pool = pool
        self.num_classes = num_classes
        self.num_features = self.embed_dim = self.head_hidden_size = dim
        self.num_reg_tokens, self.has_class_token = registers, class_token
        self.num_prefix_tokens = int(class_token) + registers
        self.no_embed_class = no_embed_class
        self.patch_dropout = patch_dropout
        self.resample = Resample.of(resample)
        self.grad_checkpointing = False
        self.load_report: Any = None  # what load_checkpoint or load_weights did

        patch_bias = not pre_norm if patch_bias is None else patch_bias
        self.patch_embed = PatchEmbed(
            pair("image_size", image_size),
            pair("patch_size", patch_size),
            channels,
            dim,
            patch_bias,
            dynamic_img_size,
            crop_remainder,
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, registers, dim)) if registers else None
        tokens = self._prefix_positions + self.patch_embed.num_patches
        self.pos_embed = (
            nn.Parameter(torch.empty(1, tokens, dim)) if pos_embed == "learned" else None
        )
        self.rope = None
        if rope is not None:
            grid = None if rope_grid is None else pair("rope_grid", rope_grid)
            theta = {"dinov3": 100.0}.get(rope, 10000.0) if rope_theta is None else rope_theta
            self.rope = Rope(rope, dim_head, theta, grid)
        self.pos_drop = nn.Dropout(emb_dropout)
        self.norm_pre = make_norm(norm, dim, norm_eps) if pre_norm else nn.Identity()
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks: Any = Blocks(
            *(
                Block(
                    dim,
                    heads,
                    dim_head,
                    mlp_dim,
                    qkv_bias,
                    dropout if attn_dropout is None else attn_dropout,
                    rate,
                    layer_scale,
                    norm_eps,
                    proj_dropout=dropout if proj_dropout is None else proj_dropout,
                    mlp_dropout=dropout if mlp_dropout is None else mlp_dropout,
                    proj_bias=proj_bias,
                    mlp_bias=mlp_bias,
                    qk_norm=qk_norm,
                    norm=norm,
                    mlp=mlp,
                    activation=activation,
                )
                for rate in rates
            )
        )
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": dim, "reduction": max(self.patch_embed.patch_size)}
            for i in range(depth)
        ]
        pools_then_norms = pool in ("mean", "max", "avgmax") if fc_norm is None else fc_norm
        norms = (final_norm and not pools_then_norms, final_norm and pools_then_norms)
        self.norm, self.fc_norm = (
            make_norm(norm, dim, norm_eps) if on else nn.Identity() for on in norms
        )
        self.attn_pool = None
        if pool == "map":
            pool_norm = make_norm(norm, dim, norm_eps)
            self.attn_pool = AttentionPool(dim, heads, mlp_dim, pool_norm, activation)
        self.head_drop = nn.Dropout(head_dropout)
        self.head = self._make_head(num_classes, head_hidden_dim)
        self.default_cfg: dict[str, Any] = {
            "input_size": (channels, *self.patch_embed.img_size),
            "num_classes": num_classes,
            "mean": (0.5,) * channels,
            "std": (0.5,) * channels,
            "interpolation": "bicubic",
            "crop_pct": 0.9,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialize as timm does: truncated normal of std 0.02, zero biases, prefix tokens near 0.

        needs_reset: also reset all other tensors, as needed after `to_empty`; with the same seed
        all weights then equal a newly built model's. False: the modules were just constructed.
        """
        if needs_reset:
            for module in self.modules():
                self._reset(module)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _init_linear(module)
        if self.attn_pool is not None:
            nn.init.trunc_normal_(self.attn_pool.latent, std=self.embed_dim**-0.5)

    def _reset(self, module: nn.Module) -> None:
        """Reset the module's own tensors as its constructor does, with the same random draws."""
        surface: Any = module
        if isinstance(module, LayerScale):
            nn.init.constant_(module.gamma, self.config["layer_scale"])
        elif isinstance(module, Attention):
            for bias in (module.q_bias, module.v_bias):
                if bias is not None:
                    nn.init.zeros_(bias)
        elif hasattr(module, "reset_parameters"):
            surface.reset_parameters()

    def forward(self, images: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """images: (B, channels, H, W) -> logits (B, num_classes); (B, N, .) with pool "none".

        If only <cls> is read, the last block's output projection and MLP and the final norm run
        on <cls> only. attn_mask, is_causal: for timm's signature; setting one raises UsageError.
        """
        check_unmasked(attn_mask, is_causal)
        if self._reads_cls_alone():
            return self.forward_head(self.norm(self.encode(images, rows=1)))
        return self.forward_head(self.forward_features(images))

    def _reads_cls_alone(self) -> bool:
        """Return whether the last block may drop all vectors but <cls> after its attention.

        All later layers act on each vector separately, so logits and gradients do not change.
        """
        blocks: Any = self.blocks
        if not uses_methods_of(
            blocks, (Blocks, nn.Sequential, nn.ModuleList), "forward"
        ) or not len(blocks):
            return False
        block: Any = blocks[-1]
        methods = ("forward_features", "forward_head", "pooled", "encode")
        # Overridden methods, replaced modules and hooks may read any vector. Dropout needs a draw
        # for every vector to drop the same elements as timm from the same seed.
        return (
            self.pool == "cls"
            and uses_methods_of(self, (ViT,), *methods)
            and uses_methods_of(block, (Block,), "forward")
            and uses_methods_of(block.attn, (Attention,), "forward")
            and uses_methods_of(block.mlp, (Mlp, SwiGlu), "forward")
            and uses_methods_of(self.norm, (nn.LayerNorm, nn.RMSNorm, nn.Identity), "forward")
            and not (block.training and (block.attn.proj_dropout or block.mlp.dropout))
            and not has_observing_hooks(blocks, block, block.attn, block.mlp, self.norm)
            and block.why_tail_needs_all_rows() is None
        )

    def forward_features(
        self, images: Tensor, attn_mask: None = None, is_causal: bool = False
    ) -> Tensor:
        """All vectors after the final norm: (B, channels, H, W) -> (B, N, dim), N = prefix + m."""
        check_unmasked(attn_mask, is_causal)
        return self.norm(self.encode(images))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, norm and classify: (B, N, dim) -> (B, num_classes), or (B, dim) before the head."""
        x = self.head_drop(self.fc_norm(self.pooled(x)))
        return x if pre_logits else self.head(x)

    def pooled(self, x: Tensor) -> Tensor:
        """Pool forward_features: (B, N, dim) -> (B, dim), (B, 2 dim) for "cls_mean"."""
        if self.pool == "none":
            return x
        if self.pool == "cls":
            return x[:, 0]
        patches = x[:, self.num_prefix_tokens :]
        if self.attn_pool is not None:
            return self.attn_pool(patches)
        if self.pool == "max":
            return patches.amax(dim=1)
        mean = patches.mean(dim=1)
        if self.pool == "avgmax":
            return 0.5 * (patches.amax(dim=1) + mean)
        return torch.cat([x[:, 0], mean], dim=1) if self.pool == "cls_mean" else mean

    def embed(self, images: Tensor) -> tuple[Tensor, Tables | None]:
        """Patches, positions, prefix tokens: (B, channels, H, W) -> (B, N, dim), RoPE tables."""
        stem = self.patch_embed
        grid = stem.grid(images) if hasattr(stem, "grid") else None
        if grid is None and self.rope is not None:
            name = type(stem).__name__
            raise TypeError(f"patch_embed: {name} has no grid(images), which RoPE needs")
        pos, prefix = self.positions(grid)
        if uses_methods_of(stem, (PatchEmbed,), "forward") and not has_observing_hooks(stem):
            x = self.pos_drop(stem(images, pos, prefix))
        else:  # a hooked or replaced stem returns patches only, as in timm
            x = self.pos_drop(add_pos_and_prefix(stem(images), pos, prefix))
        tables = None
        if self.rope is not None and grid is not None:
            tables = self.rope.tables(grid, x.device)
        if self.patch_dropout and self.training:
            x, tables = self._drop_patches(x, tables)
        rope = None
        if self.rope is not None and tables is not None:
            rope = (*tables, self.rope.interleaved)
        return self.norm_pre(x), rope

    @property
    def _prefix_positions(self) -> int:
        """How many rows of the position table are those of prefix tokens."""
        return 0 if self.no_embed_class else self.num_prefix_tokens

    def positions(self, grid: Grid | None) -> tuple[Tensor | None, Tensor | None]:
        """Return the patches' position embeddings (m, dim) and the prefix tokens (P, dim).

        grid: resample the position table to this grid; None: return the table as it is.
        """
        tokens: list[Tensor] = [t for t in (self.cls_token, self.reg_token) if t is not None]
        prefix = torch.cat(tokens, dim=1)[0] if tokens else None
        if self.pos_embed is None:
            return None, prefix
        covered = self._prefix_positions
        # Under no_grad a view of a leaf requires grad but has no grad_fn: FlopCounterMode asserts.
        # A trace is the same with and without gradients.
        keep = torch.is_grad_enabled() or torch._C._get_tracing_state() is not None
        pos = self.pos_embed if keep else self.pos_embed.detach()
        own, table = pos[0].tensor_split([covered])
        if prefix is not None and covered:
            prefix = prefix + own
        if grid is not None:
            table = resample_positions(table, self.patch_embed.grid_size, grid, self.resample)
        return table, prefix

    def _drop_patches(
        self, x: Tensor, tables: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Keep a random subset of each sample's patches, in random order, and all prefix tokens."""
        prefix, patches = x.tensor_split([self.num_prefix_tokens], dim=1)
        B, m, dim = patches.shape
        kept = max(1, int(m * (1.0 - self.patch_dropout)))
        index = torch.randn(B, m, device=x.device).argsort(dim=1)[:, :kept]
        patches = patches.gather(1, index[:, :, None].expand(-1, -1, dim))
        if tables is not None:
            tables = (tables[0][index], tables[1][index])
        return torch.cat([prefix, patches], dim=1), tables

    def encode(self, images: Tensor, rows: int | None = None) -> Tensor:
        """Stem and blocks, before the final norm: (B, channels, H, W) -> (B, N, dim).

        rows: the last block may return its first `rows` vectors only.
        """
        x, rope = self.embed(images)
        blocks, checkpointing = self.blocks, self.grad_checkpointing
        if isinstance(unwrapped(blocks), Blocks):
            return blocks(x, rope=rope, rows=rows, checkpointing=checkpointing)
        plain = uses_methods_of(blocks, (nn.Sequential, nn.ModuleList), "forward")
        if plain and not why_not_plain("blocks", blocks, bool(blocks._forward_hooks)):
            return Blocks.forward(blocks, x, rope, rows, checkpointing)
        return run_block(blocks, x, rope, None, checkpointing)  # custom container: one call

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new Linear, or none for 0. global_pool: timm's or our pool name.

        The norm stays before or after the pool, as it was; pool "map" can be removed, not added.
        """
        pool = self.pool if global_pool is None else TIMM_POOLS.get(global_pool, global_pool)
        check_sizes(0, num_classes=num_classes)
        check_choice(POOLS, global_pool=pool)
        if pool in ("cls", "cls_mean") and not self.has_class_token:
            raise ValueError(f"global_pool {pool!r} needs a class token")
        if pool == "map" and self.attn_pool is None:
            raise ValueError("global_pool 'map' cannot be added to a model built without it")
        after = not isinstance(self.fc_norm, nn.Identity)
        if pool != "map":
            self.attn_pool = None
        self.pool, self.num_classes = pool, num_classes
        self.config.update(pool=pool, num_classes=num_classes, fc_norm=after, head_hidden_dim=None)
        self.default_cfg["num_classes"] = num_classes
        self.default_cfg.pop("label_names", None)  # of the old head
        # Any floating-point parameter: the stem may be replaced, quantized weights are integers.
        like = next((p for p in self.parameters() if p.is_floating_point()), torch.empty(0))
        self.head = self._make_head(num_classes, None).to(like.device, like.dtype)
        self.head.train(self.training)
        self.reset_head()

    def reset_head(self) -> None:
        """Reinitialize the head's weights."""
        for module in self.head.modules():
            if isinstance(module, nn.Linear):
                _init_linear(module)

    def _make_head(self, num_classes: int, hidden_dim: int | None) -> nn.Module:
        dim = self.embed_dim * (2 if self.pool == "cls_mean" else 1)
        if num_classes == 0:
            return nn.Identity()
        if hidden_dim is None:
            return nn.Linear(dim, num_classes)
        activation = HEAD_ACTIVATIONS[self.config["head_activation"]]
        return nn.Sequential(
            nn.Linear(dim, hidden_dim), activation(), nn.Linear(hidden_dim, num_classes)
        )

    @torch.no_grad()
    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Change the image or patch size, resampling the position table and the patch kernel.

        The resampled parameters are new objects: create the optimizer afterwards.
        """
        stem = self.patch_embed
        if not isinstance(stem, PatchEmbed):
            raise UsageError(
                f"set_input_size: patch_embed is a {type(stem).__name__}; expected fastvit's own "
                "PatchEmbed, whose kernel and sizes are known"
            )
        size = stem.img_size if img_size is None else pair("img_size", img_size)
        patch = stem.patch_size if patch_size is None else pair("patch_size", patch_size)
        grid, pos = grid_of("img_size", size, patch, stem.crop), self.pos_embed
        if pos is not None and grid != stem.grid_size:
            own, table = pos.data[0].tensor_split([self._prefix_positions])
            table = resample_positions(table, stem.grid_size, grid, self.resample)
            pos = nn.Parameter(torch.cat([own, table])[None], pos.requires_grad)
        stem.resize(size, patch)  # may fail, so the positions change after it
        self.pos_embed = pos
        self.config.update(image_size=stem.img_size, patch_size=stem.patch_size)
        channels = getattr(stem.proj, "in_channels", stem.channels)
        self.default_cfg["input_size"] = (channels, *stem.img_size)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input for backward and recompute the rest."""
        self.grad_checkpointing = enable

    def set_mlp_recompute(self, enable: bool = True) -> None:
        """Do not keep the MLPs' hidden activations for backward, which then recomputes fc1.

        Saves mlp_dim values per token and block, at least a third of what a ViT-B block keeps, for
        a tenth more arithmetic. SwiGLU still keeps its activations.
        """
        for module in self.modules():
            if isinstance(module, Mlp):
                module.save = "recompute" if enable else "all"

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that optimizers should not decay, besides biases and norms."""
        return {"pos_embed", "cls_token", "reg_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns that sort parameter names into stem, blocks and final norm."""
        return {
            "stem": r"^cls_token|^reg_token|^pos_embed|^patch_embed|^norm_pre",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    @property
    def class_names(self) -> list[str]:
        """The class names of the checkpoint, or [] if the model has another number of classes."""
        names = self.default_cfg.get("label_names") or ()
        return [str(name) for name in names] if len(names) == self.num_classes else []

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        return self.default_cfg

    def load_weights(self, source: Any, strict: bool = True) -> Any:
        """Load a checkpoint of any known dialect: `fastvit.load_weights(self, source, strict)`."""
        from fastvit.checkpoints import load_weights

        return load_weights(self, source, strict)


TIMM_POOLS = {"token": "cls", "avg": "mean", "": "none"}


def _init_linear(module: nn.Linear) -> None:
    nn.init.trunc_normal_(module.weight, std=0.02)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
