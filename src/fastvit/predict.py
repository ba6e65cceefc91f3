"""Classify image files with a checkpoint."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvit.data import read_image
from fastvit.errors import UsageError
from fastvit.model import ViT, pair


def check_config(config: dict[str, Any]) -> None:
    """Raise UsageError if a checkpoint's JSON lacks what prediction needs."""
    channels, pool = (config["model"].get(k, v) for k, v in (("channels", 3), ("pool", "cls")))
    if channels not in (1, 3):
        raise UsageError(f"checkpoint: it takes images of {channels} channels; files have 1 or 3")
    if pool == "none":
        raise UsageError("checkpoint: with pool 'none' it classifies each patch, not the image")
    for name in ("mean", "std"):
        value: Any = config.get(name)
        numbers = isinstance(value, list) and all(isinstance(v, (int, float)) for v in value)
        if not numbers or len(value) != channels or (name == "std" and min(value) <= 0):
            raise UsageError(
                f"checkpoint: its config must hold {name!r}, a list of {channels} "
                f"{'positive ' * (name == 'std')}numbers; got {value!r}"
            )
    if not isinstance(config.get("classes"), list):
        raise UsageError(
            f"checkpoint: its config must hold 'classes', a list; got {config.get('classes')!r}"
        )
    if len(config["classes"]) != config["model"].get("num_classes"):
        raise UsageError(
            f"checkpoint: its config names {len(config['classes'])} classes, "
            f"but the model has {config['model'].get('num_classes')}"
        )


@torch.no_grad()
def predict(
    model: ViT,
    config: dict[str, Any],
    paths: Sequence[Path],
    top: int = 5,
    invert: bool = False,
) -> Iterator[tuple[Path, list[tuple[str, float]] | UsageError]]:
    """Yield each path with its `top` classes and probabilities, or the error from reading it."""
    check_config(config)
    size = pair("image_size", model.config["image_size"])
    channels = model.config["channels"]
    device = model.patch_embed.proj.weight.device
    mean, std = (torch.tensor(config[k]).view(-1, 1, 1).to(device) for k in ("mean", "std"))
    model.eval()
    for path in paths:
        try:
            image = read_image(path, size, channels, invert)
        except UsageError as error:
            yield path, error
            continue
        x = (image[None].to(device).float() / 255 - mean) / std
        yield path, best(model(x).float().softmax(-1)[0], config["classes"], top)


def best(probabilities: Tensor, classes: Sequence[str], top: int) -> list[tuple[str, float]]:
    """The `top` most probable classes, most probable first."""
    values, indices = probabilities.topk(min(top, len(classes)))
    return [(classes[int(i)], float(p)) for i, p in zip(indices, values, strict=True)]
