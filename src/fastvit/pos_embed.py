"""Resample position tables and patch kernels when the grid or the patch changes.

Libraries resample differently, which changes the outputs, so each model carries its own rule.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]
MODES = ("bicubic", "bilinear", "nearest")


@dataclass(frozen=True)
class Resample:
    """How a position table is resampled to another grid; the defaults are timm's.

    offset: DINOv2's models without registers scale by (new + 0.1) / old instead of new / old.
    """

    mode: str = "bicubic"
    antialias: bool = True
    align_corners: bool = False
    offset: float = 0.0

    @classmethod
    def of(cls, options: "Mapping[str, Any] | Resample | None") -> "Resample":
        if isinstance(options, Resample):
            return options
        options = {} if options is None else options
        if not isinstance(options, Mapping):
            raise ValueError(f"resample must be a mapping of options, got {options!r}")
        known = [f.name for f in fields(cls)]
        if unknown := sorted(options.keys() - set(known)):
            raise ValueError(f"resample: {unknown[0]!r} is unknown; expected {', '.join(known)}")
        how = cls(**{"antialias": options.get("mode") != "nearest", **options})
        if how.mode not in MODES:
            raise ValueError(f"resample: mode must be one of {MODES}, got {how.mode!r}")
        if how.mode == "nearest" and (how.antialias or how.align_corners):
            raise ValueError("resample: mode 'nearest' takes neither antialias nor align_corners")
        return how


HUGGING_FACE = Resample(antialias=False)
TORCHVISION = Resample(antialias=False, align_corners=True)
DINOV2 = Resample(antialias=False, offset=0.1)
NAFLEX = Resample(mode="bilinear")
JAX = Resample(mode="bilinear", antialias=False, align_corners=True)


def resample_positions(table: Tensor, old: Grid, new: Grid, how: Resample) -> Tensor:
    """table: (old_h * old_w, C) -> (new_h * new_w, C), computed in float32 or wider."""
    if _same(old, new):
        return table
    plane = table.to(torch.promote_types(table.dtype, torch.float32)).reshape(*old, -1)
    traced = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    if traced and torch.is_grad_enabled() and table.requires_grad:
        # PyTorch cannot trace the backward of interpolation to a symbolic size, but it can trace
        # matrix products. In float64, which neither TF32 nor autocast rounds.
        rows, columns = (_matrix(o, n, how, table.device) for o, n in zip(old, new, strict=True))
        plane = (rows @ plane.double().flatten(1)).unflatten(1, (old[1], -1))
        plane = columns @ plane
    else:
        plane = _interpolate(plane.permute(2, 0, 1)[None], old, new, how)[0].permute(1, 2, 0)
    return plane.reshape(new[0] * new[1], -1).to(table.dtype)


def _same(old: Grid, new: Grid) -> bool:
    if not torch.compiler.is_exporting():
        return old == new
    # Comparing symbolic sizes would specialize the exported program to its example size.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return all(statically_known_true(o == n) for o, n in zip(old, new, strict=True))


def _matrix(old: int, new: int, how: Resample, device: torch.device) -> Tensor:
    """Interpolation of one side as a (new, old) float64 matrix; it is separable."""
    # Two columns: with one, antialiasing on CPU mistakes the planes' memory format.
    basis = torch.eye(old, dtype=torch.float64, device=device)[None, :, :, None].repeat(1, 1, 1, 2)
    return _interpolate(basis, (old, 2), (new, 2), how)[0, :, :, 0].mT


def _interpolate(planes: Tensor, old: Grid, new: Grid, how: Resample) -> Tensor:
    """(B, C, *old) -> (B, C, *new)."""
    options: dict[str, Any] = {"mode": how.mode, "antialias": how.antialias}
    if how.mode != "nearest":
        options["align_corners"] = how.align_corners
    if not how.offset:
        return F.interpolate(planes, size=new, **options)
    scale = [(n + how.offset) / o for n, o in zip(new, old, strict=True)]
    planes = F.interpolate(planes, scale_factor=scale, **options)
    if tuple(planes.shape[-2:]) != new:
        raise ValueError(f"resample: offset {how.offset} takes grid {old} past {new}")
    return planes


def resample_patches(weight: Tensor, new: Grid, how: Resample) -> Tensor:
    """Resample a patch kernel to another patch size, (O, C, h, w) -> (O, C, *new).

    With R the matrix that resizes a patch from the old size to the new one, the new kernel is
    pinv(R^T) w: its output on a resized patch is that of w on the patch (FlexiViT, 2212.08013).
    """
    old = (weight.shape[-2], weight.shape[-1])
    if old == new:
        return weight
    basis = torch.eye(math.prod(old), device=weight.device).reshape(-1, 1, *old)
    resized = F.interpolate(basis, size=new, mode=how.mode, antialias=how.antialias)
    inverse = torch.linalg.pinv(resized.flatten(1))  # R^T is (old, new)
    return (weight.float().flatten(2) @ inverse.mT).unflatten(2, new).to(weight.dtype)
