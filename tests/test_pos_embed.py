"""Position resampling under tracing: torch.compile in training, dynamic sizes in torch.export."""

from typing import Any

import pytest
import torch
from peers import assert_same, timm_twins, weights
from torch import Tensor

from fastvit import pos_embed
from fastvit.pos_embed import Resample

NAME = "vit_tiny_patch16_224"
SMALL: dict[str, Any] = dict(img_size=32, patch_size=8, embed_dim=32, num_heads=2, depth=1)
SMALL |= dict(num_classes=5, dynamic_img_size=True)
SIZES = ((32, 32), (40, 40), (24, 48), (32, 48), (16, 64))
RULES = {
    "timm": Resample(),
    "hugging face": pos_embed.HUGGING_FACE,
    "torchvision": pos_embed.TORCHVISION,
    "dinov2": pos_embed.DINOV2,
    "naflex": pos_embed.NAFLEX,
    "nearest": Resample(mode="nearest", antialias=False),
}


@pytest.mark.parametrize("how", RULES.values(), ids=RULES)
def test_products_stretch_as_interpolation_does(how: Resample) -> None:
    torch._dynamo.reset()
    table = torch.randn(5 * 7, 6, dtype=torch.float64)

    def run(new: tuple[int, int], resample: Any) -> list[Tensor]:
        t = table.clone().requires_grad_()
        out = resample(t, (5, 7), new, how)
        (out * weights(out[None])).sum().backward()
        assert t.grad is not None
        return [out.detach(), t.grad]

    traced = torch.compile(
        pos_embed.resample_positions, backend="eager", fullgraph=True, dynamic=True
    )
    for new in ((3, 4), (9, 7), (1, 20)):
        eager = run(new, pos_embed.resample_positions)
        for a, b in zip(run(new, traced), eager, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_compiled_training_takes_varying_sizes() -> None:
    theirs, ours = timm_twins(NAME, **SMALL)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for size in SIZES:
        images, grads = torch.randn(2, 3, *size), []
        for model, run in ((theirs, theirs), (ours, compiled)):
            model.zero_grad()
            out = run(images)
            (out * weights(out)).sum().backward()
            grads.append([out.detach(), model.pos_embed.grad])
        for expected, got in zip(*grads, strict=True):
            assert_same(expected, got)


@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_both_sizes_dynamic(strict: bool) -> None:
    theirs, ours = timm_twins(NAME, **SMALL)
    auto = torch.export.Dim.AUTO
    shapes = ({2: auto, 3: auto},)
    for native in SIZES[:2]:
        images = (torch.randn(2, 3, *native),)
        with torch.no_grad():
            program = torch.export.export(ours, images, dynamic_shapes=shapes, strict=strict)
            for size in SIZES:
                images = torch.randn(2, 3, *size)
                got = program.module()(images)
                assert_same(theirs(images), got)
