"""Rotary position embedding over the patch grid, in the forms of EVA-02 and of DINOv3.

Of the D / 2 channel pairs of a head, half are rotated in proportion to the patch's row and half to
its column. EVA: angle = index * theta^(-4 i / D), pairs are adjacent channels. DINOv3: angle =
2 pi * centre * theta^(-4 i / D), centres in (-1, 1), pairs are D / 2 apart. Nothing is learned.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvit.pos_embed import Grid

FORMS = ("eva", "dinov3")


@dataclass(frozen=True)
class Rope:
    """reference_grid: EVA rescales its indices to this grid, whatever the image's grid."""

    form: str
    dim_head: int
    theta: float
    reference_grid: Grid | None = None

    def __post_init__(self) -> None:
        if self.dim_head % 4:
            raise ValueError(f"rope needs a head dim that is a multiple of 4, got {self.dim_head}")

    @property
    def interleaved(self) -> bool:
        """True if channel 2 i is paired with 2 i + 1, False if channel i with i + D / 2."""
        return self.form == "eva"

    def angles(self, grid: Grid, device: torch.device | None = None) -> Tensor:
        """Angles (h * w, D / 2) float32: D / 4 for the row, then D / 4 for the column."""
        quarter = self.dim_head // 4
        exponents = torch.arange(quarter, dtype=torch.float32, device=device) / quarter
        frequencies = 1.0 / self.theta**exponents
        axes = []
        for axis, size in enumerate(grid):
            index = torch.arange(size, dtype=torch.float32, device=device)
            if self.form == "dinov3":
                index = ((index + 0.5) / size * 2.0 - 1.0) * (2 * math.pi)
            elif self.reference_grid is not None:
                index = index / size * self.reference_grid[axis]
            axes.append(index[:, None] * frequencies)
        rows = axes[0][:, None].expand(-1, grid[1], -1)
        columns = axes[1][None].expand(grid[0], -1, -1)
        return torch.cat([rows, columns], dim=-1).flatten(0, 1)

    def tables(self, grid: Grid, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin of the angles, each (h * w, D / 2) float32."""
        angles = self.angles(grid, device)
        return angles.cos(), angles.sin()
