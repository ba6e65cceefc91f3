"""The parts of a `fastvit.ViT` under vit-pytorch's names, so that its wrappers take one as encoder.

`MAE` and `SimMIM` patchify, embed, add positions and run the encoder's blocks themselves, through
the attributes `to_patch_embedding`, `pos_embedding` and `transformer`.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fastvit.layers import run_block
from fastvit.plain import why_not_fused

Model = Any  # the ViT that these names belong to


class VitPytorchNames:
    """Properties with vit-pytorch's names, views of a `fastvit.ViT` that own no parameters.

    A model without a position table has no `pos_embedding`; one with RoPE, whose blocks need the
    patches' places in the grid, has no `transformer`.
    """

    @property
    def to_patch_embedding(self: Model) -> nn.Sequential:
        """[0] cuts images into (B, m, p_h * p_w * channels), [1:] projects them to (B, m, dim)."""
        return nn.Sequential(_Patches(self), nn.Identity(), _Projection(self))

    @property
    def pos_embedding(self: Model) -> Tensor:
        """(1, m, dim), after a row for <cls> if `pool` is "cls", as MAE and SimMIM expect."""
        grid = self.patch_embed.grid_size
        table, _ = self.positions(grid)
        if table is None:
            raise AttributeError("pos_embedding")
        if self.pool != "cls":
            return table[None]
        own = torch.zeros_like(table[:1]) if self.no_embed_class else self.pos_embed[0, :1]
        return torch.cat([own, table])[None]

    @property
    def transformer(self: Model) -> nn.Module:
        """Blocks and final norm on tokens: (B, n, dim) -> (B, n, dim)."""
        if self.rope is not None:
            raise AttributeError("transformer")
        return _Transformer(self)


class _View(nn.Module):
    """A module that runs on a model's modules without registering them as its own."""

    model: Model

    def __init__(self, model: Model) -> None:
        super().__init__()
        object.__setattr__(self, "model", model)


class _Patches(_View):
    def forward(self, images: Tensor) -> Tensor:
        p_h, p_w = self.model.patch_embed.patch_size
        h, w = self.model.patch_embed.grid(images)
        images = images[:, :, : h * p_h, : w * p_w]  # crop_remainder
        x = images.unflatten(3, (w, p_w)).unflatten(2, (h, p_h))  # (B, C, h, p_h, w, p_w)
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


class _Projection(_View):
    @property
    def weight(self) -> Tensor:
        """(dim, p_h * p_w * channels): the patch kernel in vit-pytorch's pixel order."""
        return self.model.patch_embed.proj.weight.permute(0, 2, 3, 1).flatten(1)

    def forward(self, patches: Tensor) -> Tensor:
        proj, (p_h, p_w) = self.model.patch_embed.proj, self.model.patch_embed.patch_size
        if not why_not_fused(proj=(proj, (nn.Conv2d,))):
            return nn.functional.linear(patches, self.weight, proj.bias)
        # Hooked or replaced: it runs on one image per patch.
        images = patches.flatten(0, 1).unflatten(1, (p_h, p_w, -1)).permute(0, 3, 1, 2)
        return proj(images).flatten(1).unflatten(0, patches.shape[:2])


class _Transformer(_View):
    def forward(self, x: Tensor) -> Tensor:
        x = self.model.norm_pre(x)
        for block in self.model.blocks:
            x = run_block(block, x, checkpointing=self.model.grad_checkpointing)
        return self.model.norm(x)

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            "fastvit.ViT has no module 'transformer' to hook; hook a block, as with "
            "Extractor(model, layer=model.blocks[-1])"
        )

    def modules(self, remove_duplicate: bool = True) -> NoReturn:
        raise TypeError(
            "Recorder looks for the softmax of vit-pytorch's Attention, which fastvit does not "
            "run; use model.attention_maps(images, layers=range(depth), rows='all')"
        )
