"""The shapes that are measured: those of ViT-Ti to ViT-H on a GPU, small ones on a CPU."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness import Case


@dataclass(frozen=True)
class Size:
    """One model: fastvit's arguments, and the batch of its training step."""

    name: str
    dim: int
    depth: int
    heads: int
    batch: int
    patch: int = 16
    image: int = 224
    layer_scale: float | None = None

    @property
    def tokens(self) -> int:
        return (self.image // self.patch) ** 2 + 1

    @property
    def flops(self) -> float:
        """FLOPs of one image's forward pass: matrix products on real tokens, the head included.

        Those of the standard model, for every provider: fastvit computes only <cls> after the last
        block's attention, about a sixteenth less for ViT-B, and that counts as speed.
        """
        n, d = self.tokens, self.dim
        block = 2 * n * 12 * d * d + 4 * n * n * d
        return self.depth * block + 2 * (n - 1) * 3 * self.patch**2 * d + 2000 * d

    @property
    def parameters(self) -> int:
        d = self.dim
        block = 12 * d * d + 13 * d + (2 * d if self.layer_scale is not None else 0)
        stem = (3 * self.patch**2 + 1) * d + (self.tokens + 1) * d
        return self.depth * block + stem + 2 * d + 1000 * (d + 1)

    def bytes(self, kind: str, batch: int, itemsize: int) -> float:
        """The least bytes that one batch moves: images and weights once; in training float32
        weights, gradients and AdamW's two moments, each read and written as the step needs them.
        """
        images = batch * 3 * self.image**2
        if kind == "infer":
            return (self.parameters + images) * itemsize
        # weights: read twice, written; gradients: written, read; moments: each read, written.
        return 4 * (9 * self.parameters + images)

    def arguments(self) -> dict:
        return {
            "image_size": self.image,
            "patch_size": self.patch,
            "dim": self.dim,
            "depth": self.depth,
            "heads": self.heads,
            "mlp_dim": 4 * self.dim,
            "layer_scale": self.layer_scale,
        }


SIZES = {
    size.name: size
    for size in (
        Size("Ti/16", 192, 12, 3, 1024),
        Size("S/16", 384, 12, 6, 512),
        Size("B/16", 768, 12, 12, 256),
        Size("L/16", 1024, 24, 16, 128),
        Size("H/14", 1280, 32, 16, 64, patch=14),
        Size("B/16 384", 768, 12, 12, 64, image=384),
        Size("DINOv2-L/14 518", 1024, 24, 16, 16, patch=14, image=518, layer_scale=1e-5),
    )
}
# Small enough for every code path to run in a second on a CPU.
TOY = Size("toy", 64, 2, 2, 4, image=32)

# Widths and batches of the GEMM-like ops.
WIDTHS = {"Ti": 192, "S": 384, "B": 768, "L": 1024, "H": 1280}
BATCHES = (256, 1)
ATTENTION_TOKENS = (50, 197, 257, 577, 1029, 1370)
ATTENTION_HEAD_DIMS = (64, 80, 128)
INFERENCE_BATCHES = (1, 8, 64, 256)


def row_shapes(device: torch.device) -> list[tuple[str, int, int]]:
    """(name, images, width) of ops on (images * 197, width) rows, most informative first."""
    if device.type != "cuda":
        return [("Ti", 2, 192)]
    order = ("B", "L", "S", "H", "Ti")
    return [(name, batch, WIDTHS[name]) for batch in BATCHES for name in order]


def attention_shapes(device: torch.device) -> list[tuple[int, int, int, int]]:
    """(B, N, H, D), with about the same B * N for all N; ViT-B's first, and last at batch 1."""
    if device.type != "cuda":
        return [(2, 197, 3, 64), (2, 50, 2, 80)]
    shapes = [
        (max(1, 50_432 // n), n, 768 // d if d == 64 else 1280 // d, d)
        for d in ATTENTION_HEAD_DIMS
        for n in ATTENTION_TOKENS
    ]
    first = [s for s in shapes if s[1:] == (197, 12, 64)]
    return [*first, *(s for s in shapes if s not in first), (1, 197, 12, 64)]


def op_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def row_cases(case: Callable[..., Case], device: torch.device) -> list[Case]:
    """`case` at every one of `row_shapes`, forward alone and with backward."""
    dtype = op_dtype(device)
    return [
        case(device, *shape, dtype, backward)
        for shape in row_shapes(device)
        for backward in (False, True)
    ]


def draw(
    device: torch.device, dtype: torch.dtype, grad: bool, *shape: int, scale: float = 1.0
) -> Tensor:
    """A random argument of an op; grad: it gets a gradient."""
    return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_(grad)
