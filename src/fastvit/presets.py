"""Named models, under timm's names: each is the keyword arguments of `fastvit.ViT`."""

import fnmatch
from typing import Any

from fastvit.model import ViT

_SIZES = {
    "tiny": dict(dim=192, depth=12, heads=3, mlp_dim=768),
    "small": dict(dim=384, depth=12, heads=6, mlp_dim=1536),
    "base": dict(dim=768, depth=12, heads=12, mlp_dim=3072),
    "large": dict(dim=1024, depth=24, heads=16, mlp_dim=4096),
    "huge": dict(dim=1280, depth=32, heads=16, mlp_dim=5120),
}
_VARIANTS = {
    "tiny": ((16, 224), (16, 384)),
    "small": ((8, 224), (16, 224), (16, 384), (32, 224), (32, 384)),
    "base": ((8, 224), (16, 224), (16, 384), (32, 224), (32, 384)),
    "large": ((14, 224), (16, 224), (16, 384), (32, 224), (32, 384)),
    "huge": ((14, 224),),
}
PRESETS: dict[str, dict[str, Any]] = {
    f"vit_{size}_patch{patch}_{image}": {**_SIZES[size], "patch_size": patch, "image_size": image}
    for size, variants in _VARIANTS.items()
    for patch, image in variants
}


def create_model(name: str, **kwargs: Any) -> ViT:
    """A `fastvit.ViT` by its timm name, randomly initialised; kwargs override the preset's."""
    if name not in PRESETS:
        raise ValueError(f"unknown model {name!r}; expected one of {', '.join(PRESETS)}")
    return ViT(**{**PRESETS[name], **kwargs})


def list_models(pattern: str = "*") -> list[str]:
    """Names that `create_model` takes, filtered by a shell pattern such as '*base*'."""
    return fnmatch.filter(PRESETS, pattern)
