"""Light augmentation of a batch: one random affine map per image, flip included."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augment:
    """A random affine map per image, drawn from these ranges.

    shift: fraction of the image side; rotate: degrees; scale: zoom within 1 +- scale.
    """

    flip: bool = False
    shift: float = 0.0
    rotate: float = 0.0
    scale: float = 0.0
    padding: str = "border"

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Transform each of the float images (B, C, H, W) at random. generator: on the CPU."""
        count = len(images)
        draws = torch.rand(5, count, generator=generator) * 2 - 1
        angle = draws[0] * math.radians(self.rotate)
        zoom = 1 + draws[1] * self.scale
        flip = torch.where(draws[2] < 0, -1.0, 1.0) if self.flip else torch.ones(count)
        aspect = images.shape[-1] / images.shape[-2]
        cos, sin = angle.cos() / zoom, angle.sin() / zoom
        shift = 2 * self.shift * draws[3:]
        rows = (cos * flip, -sin / aspect, shift[0], sin * aspect * flip, cos, shift[1])
        theta = torch.stack(rows, dim=1).view(count, 2, 3).to(images.device)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode=self.padding, align_corners=False)
