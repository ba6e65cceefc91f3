"""Optimizer parameter groups: no weight decay for vectors, lower rates for earlier layers."""

import re
from typing import Any

from torch import nn

from fastvit.errors import UsageError
from fastvit.plain import WRAPPERS, bare_name, unwrapped

_WRAPPERS = (*WRAPPERS, "module")  # "module" is DDP's


def param_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.05, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Groups of trainable parameters, each with `lr`, `weight_decay`, `lr_scale` and its `names`.

    Vectors (biases, norms, LayerScale) and the names in `model.no_weight_decay()` do not decay.
    With layer_decay g the rate of layer i is lr * g^(last - i): the stem is layer 0, block i is
    layer i + 1, the final norm is in the last block's layer, the head is a layer of its own, the
    last where there is one. These are the groups of timm's `param_groups_layer_decay`. model: a
    fastvit.ViT or a ViT of timm, compiled, in DDP or FSDP, or inside another module, whose other
    layers are in the head's layer.
    """
    if not lr > 0:
        raise ValueError(f"lr must be positive, got {lr!r}")
    if weight_decay < 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay!r}")
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be in (0, 1], got {layer_decay!r}")
    kept = {
        prefix + name
        for prefix, owner in _outermost(model, "no_weight_decay").items()
        for name in map(_bare, owner.no_weight_decay())
    }
    vit, patterns, depth = "", {}, 0
    if layer_decay is not None:
        vit, patterns, depth = _layers(model)
    layers = {
        name: _layer(bare.removeprefix(vit), patterns, depth)
        if layer_decay is not None and bare.startswith(vit)
        else depth + 1
        for name, _ in model.named_parameters()
        for bare in (_bare(name),)
    }
    last = max(layers.values(), default=0)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        bare = _bare(name)
        if bare.endswith("_flat_param"):
            raise UsageError(
                f"model holds {name!r}, many parameters in one; expected FSDP with use_orig_params"
            )
        decays = parameter.ndim > 1 and bare not in kept
        layer = layers[name]
        scale = 1.0 if layer_decay is None else layer_decay ** (last - layer)
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


def _bare(name: str) -> str:
    """The parameter name without the parts that wrappers insert."""
    return bare_name(name, _WRAPPERS)


def _outermost(model: nn.Module, *attributes: str) -> dict[str, Any]:
    """The outermost modules that have all these attributes, by name prefix."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if all(hasattr(module, a) for a in attributes):
            prefix = f"{bare}." if (bare := _bare(name)) else ""
            if not any(prefix.startswith(outer) for outer in found):
                found[prefix] = module
    return found


def _layers(model: nn.Module) -> tuple[str, dict[str, Any], int]:
    """The one ViT in the model: its name prefix, its group_matcher patterns and its depth."""
    vits = {
        prefix: vit
        for prefix, vit in _outermost(model, "group_matcher", "blocks").items()
        if any(p.requires_grad for p in vit.parameters())
    }
    if len(vits) != 1:
        raise UsageError(
            f"layer_decay needs a model with group_matcher() and blocks, as fastvit's and timm's "
            f"ViTs have, or one such inside; got {type(model).__name__} with {len(vits)} to train"
        )
    ((prefix, vit),) = vits.items()
    blocks: Any = unwrapped(vit.blocks)
    return prefix, vit.group_matcher(), len(blocks)


def _layer(name: str, patterns: dict[str, Any], depth: int) -> int:
    if re.match(patterns["stem"], name):
        return 0
    (block, _), (norm, _) = patterns["blocks"]
    if match := re.match(block, name):
        return int(match[1]) + 1
    return depth if re.match(norm, name) else depth + 1
