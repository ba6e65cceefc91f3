"""Named models, under timm's names: each is the keyword arguments of `fastvit.ViT`.

`PRESETS` holds those arguments, `DATA` the image preprocessing, and `TAGS` the weights that
`pretrained=True` loads from the hub when the name has no ".tag".
"""

import difflib
import fnmatch
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastvit.model import ViT
from fastvit.timm_kwargs import translate

log = logging.getLogger("fastvit")

INCEPTION = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CLIP = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))

# name: width, depth, heads, MLP width
_SIZES = {
    "tiny": (192, 12, 3, 768),
    "wee": (256, 14, 4, 1280),
    "little": (320, 14, 5, 1792),
    "small": (384, 12, 6, 1536),
    "medium": (512, 12, 8, 2048),
    "mediumd": (512, 20, 8, 2048),
    "betwixt": (640, 12, 10, 2560),
    "base": (768, 12, 12, 3072),
    "so150m2": (832, 21, 13, 2176),
    "so150m": (896, 18, 14, 2304),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "huge": (1280, 32, 16, 5120),
    "giant": (1408, 40, 16, 6144),
    "giantopt": (1536, 40, 16, 6144),
    "gigantic": (1664, 48, 16, 8192),
}

# Images are resized to the input size regardless of aspect ratio, not cropped to it.
_SQUASHED = {
    "vit_medium_patch16_gap_384",
    "vit_so150m2_patch16_reg1_gap_448",
    "vit_base_patch16_clip_384",
    "vit_large_patch14_clip_336",
    "vit_huge_patch14_clip_336",
}

PRESETS: dict[str, dict[str, Any]] = {}
DATA: dict[str, dict[str, Any]] = {}
TAGS: dict[str, str] = {}


def _size(name: str) -> dict[str, Any]:
    return dict(zip(("dim", "depth", "heads", "mlp_dim"), _SIZES[name], strict=True))


def _add(name: str, tag: str | None, data: dict[str, Any], crop: float, **args: Any) -> None:
    PRESETS[name] = args
    mode = "squash" if name in _SQUASHED else "center"
    DATA[name] = {**data, "crop_pct": crop, "crop_mode": mode, "interpolation": "bicubic"}
    if tag is not None:
        TAGS[name] = tag


def _add_plain() -> None:
    for size, variants in {
        "tiny": ((16, 224), (16, 384)),
        "small": ((8, 224), (16, 224), (16, 384), (32, 224), (32, 384)),
        "base": ((8, 224), (16, 224), (16, 384), (32, 224), (32, 384)),
        "large": ((14, 224), (16, 224), (16, 384), (32, 224), (32, 384)),
        "huge": ((14, 224),),
        "giant": ((14, 224),),
        "gigantic": ((14, 224),),
    }.items():
        for patch, image in variants:
            name = f"vit_{size}_patch{patch}_{image}"
            crop = 1.0 if image == 384 else 0.9
            tag = {
                "vit_small_patch8_224": "dino",
                "vit_base_patch8_224": "augreg2_in21k_ft_in1k",
                "vit_base_patch16_224": "augreg2_in21k_ft_in1k",
                "vit_large_patch14_224": None,
                "vit_large_patch32_224": "orig_in21k",
                "vit_large_patch32_384": "orig_in21k_ft_in1k",
                "vit_huge_patch14_224": "orig_in21k",
                "vit_giant_patch14_224": None,
                "vit_gigantic_patch14_224": None,
            }.get(name, "augreg_in21k_ft_in1k")
            data = IMAGENET if name == "vit_small_patch8_224" else INCEPTION
            headless = {"num_classes": 0} if tag in ("dino", "orig_in21k") else {}
            args = dict(patch_size=patch, image_size=image, **headless)
            _add(name, tag, data, crop, **_size(size), **args)


def _add_pooled() -> None:
    """Models without <cls>: mean pooling, with or without registers."""
    free = dict(class_token=False, pool="mean", patch_size=16)
    for size, image, tag in (
        ("medium", 240, "sw_in12k"),
        ("medium", 256, "sw_in12k_ft_in1k"),
        ("medium", 384, "sw_in12k_ft_in1k"),
        ("betwixt", 256, None),
    ):
        args = dict(fc_norm=False, qkv_bias=False, layer_scale=1e-6, image_size=image)
        headless = {"num_classes": 11821} if tag == "sw_in12k" else {}
        name, crop = f"vit_{size}_patch16_gap_{image}", 0.95
        _add(name, tag, INCEPTION, crop, **_size(size), **free, **args, **headless)
    registers = dict(free, no_embed_class=True, layer_scale=1e-5)
    for size, count, image, tag in (
        ("wee", 1, 256, "sbb_in1k"),
        ("little", 1, 256, "sbb_in12k_ft_in1k"),
        ("little", 4, 256, "sbb_in1k"),
        ("medium", 1, 256, "sbb_in1k"),
        ("medium", 4, 256, "sbb_in12k_ft_in1k"),
        ("mediumd", 4, 256, "sbb2_e200_in12k_ft_in1k"),
        ("mediumd", 4, 384, "sbb2_e200_in12k_ft_in1k"),
        ("betwixt", 1, 256, "sbb_in1k"),
        ("betwixt", 4, 256, "sbb2_e200_in12k_ft_in1k"),
        ("betwixt", 4, 384, "sbb2_e200_in12k_ft_in1k"),
        ("base", 4, 256, None),
    ):
        args: dict[str, Any] = dict(registers, registers=count, image_size=image)
        crop = 1.0 if image == 384 else 0.95
        if size == "base":
            args["layer_scale"], crop = None, 0.9
        name = f"vit_{size}_patch16_reg{count}_gap_{image}"
        _add(name, tag, INCEPTION, crop, **_size(size), **args)
    for image in (256, 384):
        args = dict(free, fc_norm=False, registers=4, image_size=image)
        tag, crop = "sbb_e250_in12k_ft_in1k", 1.0 if image == 384 else 0.95
        _add(
            f"vit_so150m_patch16_reg4_gap_{image}", tag, INCEPTION, crop, **_size("so150m"), **args
        )
    for image in (256, 384, 448):
        args = dict(free, qkv_bias=False, layer_scale=1e-5, registers=1, image_size=image)
        name, tag = f"vit_so150m2_patch16_reg1_gap_{image}", "sbb_e200_in12k_ft_in1k"
        _add(name, tag, INCEPTION, 1.0, **_size("so150m2"), **args)


def _add_deit() -> None:
    for size in ("tiny", "small", "base"):
        args = dict(patch_size=16, image_size=224)
        _add(f"deit_{size}_patch16_224", "fb_in1k", IMAGENET, 0.9, **_size(size), **args)
    args = dict(patch_size=16, image_size=384)
    _add("deit_base_patch16_384", "fb_in1k", IMAGENET, 1.0, **_size("base"), **args)
    for size, patch, images in (
        ("small", 16, (224, 384)),
        ("medium", 16, (224,)),
        ("base", 16, (224, 384)),
        ("large", 16, (224, 384)),
        ("huge", 14, (224,)),
    ):
        for image in images:
            args = dict(no_embed_class=True, layer_scale=1e-6, patch_size=patch, image_size=image)
            name, crop = f"deit3_{size}_patch{patch}_{image}", 1.0 if image == 384 else 0.9
            _add(name, "fb_in1k", IMAGENET, crop, **_size(size), **args)


def _add_dinov2() -> None:
    shared = dict(patch_size=14, image_size=518, num_classes=0, layer_scale=1e-5)
    sizes = {size: _size(size) for size in ("small", "base", "large")}
    sizes["giant"] = dict(dim=1536, depth=40, heads=24, mlp_dim=4096, mlp="swiglu_packed")
    for size, args in sizes.items():
        _add(f"vit_{size}_patch14_dinov2", "lvd142m", IMAGENET, 1.0, **args, **shared)
        more = dict(registers=4, no_embed_class=True)
        name = f"vit_{size}_patch14_reg4_dinov2"
        _add(name, "lvd142m", IMAGENET, 1.0, **args, **shared, **more)


def _add_dinov3() -> None:
    """qkvb: biases on q and v. As in timm the pool is the patch mean; the originals use <cls>."""
    shared = dict(
        patch_size=16,
        image_size=256,
        num_classes=0,
        layer_scale=1e-5,
        norm_eps=1e-5,
        registers=4,
        pos_embed="none",
        rope="dinov3",
        dynamic_img_size=True,
        pool="mean",
        fc_norm=False,
    )
    sizes = {size: _size(size) for size in ("tiny", "small", "base", "large")}
    sizes["small_plus"] = dict(_size("small"), mlp="swiglu")
    sizes["huge_plus"] = dict(dim=1280, depth=32, heads=20, mlp_dim=5120, mlp="swiglu")
    sizes["7b"] = dict(dim=4096, depth=40, heads=32, mlp_dim=8192, mlp="swiglu")
    for size, args in sizes.items():
        for suffix, bias in (("", False), ("_qkvb", "qv")):
            if (size, bias) in (("7b", "qv"), ("tiny", False)):
                continue
            name = f"vit_{size}_patch16_dinov3{suffix}"
            tag = "eupe_lvd1689m" if size == "tiny" else "lvd1689m"
            _add(name, tag, IMAGENET, 1.0, **args, **shared, qkv_bias=bias)


def _add_siglip() -> None:
    """The vision towers of SigLIP and, where the tag begins with v2, SigLIP 2."""
    shared = dict(class_token=False, num_classes=0)
    for size, patch, image in (
        ("base", 32, 256),
        *(("base", 16, image) for image in (224, 256, 384, 512)),
        *(("large", 16, image) for image in (256, 384, 512)),
        *(("so400m", 14, image) for image in (224, 378, 384)),
        *(("so400m", 16, image) for image in (256, 384, 512)),
        *(("giantopt", 16, image) for image in (256, 384)),
    ):
        args: dict[str, Any] = dict(shared, patch_size=patch, image_size=image)
        # As in timm: tanh GELU, except where SigLIP 1 has the same name and was trained with erf.
        tanh = patch == 32 or size == "giantopt" or (size, patch) == ("so400m", 16)
        if tanh or (size, image) == ("large", 512):
            args["activation"] = "gelu_tanh"
        tag = "webli" if (patch, image) == (14, 384) else "v2_webli"
        if image % patch:
            args["crop_remainder"] = True
        end = f"_{image}"
        _add(
            f"vit_{size}_patch{patch}_siglip{end}",
            tag,
            INCEPTION,
            0.9,
            **_size(size),
            **args,
            pool="map",
        )
        crop = 1.0 if (patch, image) == (14, 384) else 0.9
        gap = dict(args, pool="mean", fc_norm=False)
        _add(f"vit_{size}_patch{patch}_siglip_gap{end}", tag, INCEPTION, crop, **_size(size), **gap)


def _add_clip() -> None:
    shared = dict(pre_norm=True, norm_eps=1e-5)
    laion, meta, dfn = "laion2b_ft_in12k_in1k", "metaclip_2pt5b", "dfn5b"
    for name, tag, classes, crop in (
        ("base_patch32_clip_224", laion, 1000, 0.9),
        ("base_patch32_clip_384", laion, 1000, 1.0),
        ("base_patch32_clip_448", laion, 1000, 1.0),
        ("base_patch16_clip_224", laion, 1000, 0.95),
        ("base_patch16_clip_384", laion, 1000, 1.0),
        ("large_patch14_clip_224", laion, 1000, 1.0),
        ("large_patch14_clip_336", laion, 1000, 1.0),
        ("huge_patch14_clip_224", laion, 1000, 1.0),
        ("huge_patch14_clip_336", laion, 1000, 1.0),
        ("huge_patch14_clip_378", dfn, 1024, 1.0),
        ("giant_patch14_clip_224", "laion2b", 1024, 1.0),
        ("gigantic_patch14_clip_224", "laion2b", 1280, 1.0),
        ("base_patch32_clip_quickgelu_224", "laion400m_e32", 512, 0.9),
        ("base_patch16_clip_quickgelu_224", meta, 512, 1.0),
        ("large_patch14_clip_quickgelu_224", "dfn2b", 768, 1.0),
        ("large_patch14_clip_quickgelu_336", "openai", 768, 1.0),
        ("huge_patch14_clip_quickgelu_224", dfn, 1024, 1.0),
        ("huge_patch14_clip_quickgelu_378", dfn, 1024, 1.0),
        ("gigantic_patch14_clip_quickgelu_224", meta, 1280, 1.0),
    ):
        size, patch, *_, image = name.split("_")
        args: dict[str, Any] = dict(
            patch_size=int(patch[5:]), image_size=int(image), num_classes=classes
        )
        if "quickgelu" in name:
            args["activation"] = "quick_gelu"
        half = size == "large" and tag == laion
        data = INCEPTION if half else CLIP
        _add(f"vit_{name}", tag, data, crop, **_size(size), **shared, **args)


def _add_eva02() -> None:
    for size, dim, heads, hidden in (("tiny", 192, 3, 512), ("small", 384, 6, 1024)):
        for image in (224, 336):
            tag = "mim_in22k" if image == 224 else "mim_in22k_ft_in1k"
            _add(
                f"eva02_{size}_patch14_{image}",
                tag,
                CLIP,
                0.9 if image == 224 else 1.0,
                dim=dim,
                depth=12,
                heads=heads,
                mlp_dim=hidden,
                mlp="swiglu_packed",
                qkv_bias="qv",
                rope="eva",
                rope_grid=16,
                pool="mean",
                patch_size=14,
                image_size=image,
                num_classes=0 if image == 224 else 1000,
            )


for _family in (
    _add_plain,
    _add_pooled,
    _add_deit,
    _add_dinov2,
    _add_dinov3,
    _add_siglip,
    _add_clip,
    _add_eva02,
):
    _family()


def create_model(
    name: str,
    pretrained: bool = False,
    *,
    checkpoint_path: str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> ViT:
    """Build a `fastvit.ViT` by its timm name; kwargs, timm's or ours, override the preset's.

    The name may end in ".tag", timm's name for a set of weights; `pretrained` loads those weights
    (by default those in `TAGS`) from the hub, or only from its cache if HF_HUB_OFFLINE is set.
    Otherwise the weights are random, or those of `checkpoint_path`.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {name!r}")
    architecture, _, tag = name.partition(".")
    if architecture not in PRESETS:
        near = difflib.get_close_matches(architecture, PRESETS, 5, 0.4)
        near = f", such as {', '.join(near)}" if near else ""
        raise ValueError(
            f"unknown model {name!r}; expected one of fastvit.list_models(){near}. A hub id goes "
            "to fastvit.load_checkpoint"
        )
    preset = PRESETS[architecture]
    overrides = translate(kwargs, preset)  # before a download, which a bad argument would waste
    if pretrained:
        model = _pretrained(architecture, tag, kwargs)
    else:
        model = ViT(**{**preset, **overrides})
        usual = not tag or tag == TAGS.get(architecture)
        model.default_cfg.update(architecture=architecture, tag=tag if tag and usual else None)
        if not usual:
            log.warning(
                "create_model: %s: number of classes and preprocessing are fastvit's defaults, not "
                "those of the tag %r",
                name,
                tag,
            )
        elif model.patch_embed.proj.in_channels == 3:
            model.default_cfg.update(DATA[architecture])
    if checkpoint_path:
        model.load_weights(checkpoint_path)
    return model.to(device=device, dtype=dtype)


def _pretrained(architecture: str, tag: str, kwargs: dict[str, Any]) -> ViT:
    from fastvit.checkpoints import load_checkpoint

    tag = tag or TAGS.get(architecture, "")
    if not tag:
        raise ValueError(f"{architecture!r} has no usual weights; name some as {architecture}.TAG")
    return load_checkpoint(f"timm/{architecture}.{tag}", **kwargs)


def list_models(filter: str | Sequence[str] = "*") -> list[str]:
    """Return the names that `create_model` takes and that match a shell pattern such as '*base*',
    or any of several."""
    patterns = [filter] if isinstance(filter, str) else filter
    return [name for name in PRESETS if any(fnmatch.fnmatch(name, p) for p in patterns)]
