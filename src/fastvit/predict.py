"""Classify image files with a model."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastvit.errors import UsageError
from fastvit.model import ViT
from fastvit.read_image import read_image


def _check(model: ViT) -> None:
    """Raise UsageError unless the model classifies images that a file can hold."""
    channels = model.patch_embed.proj.in_channels
    if channels not in (1, 3):
        raise UsageError(f"checkpoint: it takes images of {channels} channels; files have 1 or 3")
    if model.num_classes == 0:
        raise UsageError("checkpoint: it has no classifier")
    if getattr(model.load_report, "projection", False):
        raise UsageError("checkpoint: it has no classifier; its head projects to embeddings")
    if model.pool == "none":
        raise UsageError("checkpoint: with pool 'none' it classifies each patch, not the image")


@torch.no_grad()
def predict(
    model: ViT, paths: Sequence[Path], top: int = 5, invert: bool = False
) -> Iterator[tuple[Path, list[tuple[str, float]] | UsageError]]:
    """Yield each path with its `top` classes and probabilities, or the error from reading it.

    Images are cropped to the aspect ratio of the model's and resized; mean, std and class names are
    those of `model.default_cfg`, where a checkpoint's come from.
    """
    _check(model)
    size, channels = model.patch_embed.img_size, model.patch_embed.proj.in_channels
    device = model.patch_embed.proj.weight.device
    cfg = model.default_cfg
    mean, std = (torch.tensor(cfg[k]).view(-1, 1, 1).to(device) for k in ("mean", "std"))
    classes = model.class_names or [f"class {i}" for i in range(model.num_classes)]
    model.eval()
    for path in paths:
        try:
            image = read_image(path, size, channels, invert)
        except UsageError as error:
            yield path, error
            continue
        x = (image[None].to(device).float() / 255 - mean) / std
        yield path, _top_classes(model(x).float().softmax(-1)[0], classes, top)


def _top_classes(
    probabilities: Tensor, classes: Sequence[str], top: int
) -> list[tuple[str, float]]:
    """The `top` most probable classes, most probable first."""
    values, indices = probabilities.topk(min(top, len(classes)))
    return [(classes[int(i)], float(p)) for i, p in zip(indices, values, strict=True)]
