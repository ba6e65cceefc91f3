"""Parameter groups for an optimizer: no decay for vectors, lower rates for earlier layers."""

import re
from typing import Any

from torch import nn


def param_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.05, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Groups of trainable parameters, each with `lr`, `weight_decay`, `lr_scale` and its `names`.

    Vectors (biases, norms, LayerScale) and what `model.no_weight_decay()` names do not decay. With
    layer_decay g the rate of layer i is lr * g^(depth + 1 - i): the stem is layer 0, block i layer
    i + 1, the final norm goes with the last block, the head is layer depth + 1. These are the
    groups of timm's `param_groups_layer_decay`. model: a fastvit.ViT or a ViT of timm.
    """
    if not lr > 0:
        raise ValueError(f"lr must be positive, got {lr!r}")
    if weight_decay < 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay!r}")
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be in (0, 1], got {layer_decay!r}")
    surface: Any = model
    kept = surface.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    patterns: dict[str, Any] = {}
    depth = 0
    if layer_decay is not None:
        if not (hasattr(model, "group_matcher") and hasattr(model, "blocks")):
            raise ValueError(
                f"layer_decay needs a model with group_matcher() and blocks, as fastvit's and "
                f"timm's ViTs have; got {type(model).__name__}"
            )
        patterns, depth = surface.group_matcher(), len(surface.blocks)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim > 1 and name not in kept
        layer = _layer(name, patterns, depth) if patterns else depth + 1
        scale = 1.0 if layer_decay is None else layer_decay ** (depth + 1 - layer)
        group = groups.setdefault(
            (layer, decays),
            {
                "params": [],
                "names": [],
                "lr": lr * scale,
                "lr_scale": scale,
                "weight_decay": weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


def _layer(name: str, patterns: dict[str, Any], depth: int) -> int:
    if re.match(patterns["stem"], name):
        return 0
    (block, _), (norm, _) = patterns["blocks"]
    if match := re.match(block, name):
        return int(match[1]) + 1
    return depth if re.match(norm, name) else depth + 1
