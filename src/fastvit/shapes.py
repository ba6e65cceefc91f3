"""Infer the arguments of `fastvit.ViT` from a state dict that has our tensor names."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastvit.arguments import pair
from fastvit.errors import UsageError
from fastvit.presets import PRESETS

State = Mapping[str, Tensor]


def infer(
    state: State, known: Mapping[str, Any], wanted: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Return arguments for `ViT(**...)`, and notes on what had to be guessed.

    known: arguments that the config sets; tensors override them, but a config with another dim,
    depth, registers or patch_size is an error. wanted: image_size and no_embed_class that the
    caller asks for, or None; they choose between grids with the same number of positions.
    """
    kernel, qkv = state["patch_embed.proj.weight"], state["blocks.0.attn.qkv.weight"]
    dim, channels, *patch = kernel.shape
    mlp_dim = state["blocks.0.mlp.fc2.weight"].shape[1]
    shown: dict[str, Any] = {
        "dim": dim,
        "channels": channels,
        "patch_size": tuple(patch) if patch[0] != patch[1] else patch[0],
        "patch_bias": "patch_embed.proj.bias" in state,
        "depth": 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks.")),
        "mlp_dim": mlp_dim,
        "mlp": _mlp(state),
        "registers": state["reg_token"].shape[1] if "reg_token" in state else 0,
        "class_token": "cls_token" in state,
        "qkv_bias": _qkv_bias(state),
        "proj_bias": "blocks.0.attn.proj.bias" in state,
        "mlp_bias": "blocks.0.mlp.fc2.bias" in state,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "norm": "layernorm" if "blocks.0.norm1.bias" in state else "rmsnorm",
        "pre_norm": "norm_pre.weight" in state,
        # A checkpoint without a final norm is incomplete, unless its config says there is none.
        "final_norm": "norm.weight" in state
        or "fc_norm.weight" in state
        or known.get("final_norm", True),
        "fc_norm": "fc_norm.weight" in state,
        "num_classes": 0,
    }
    for name in ("dim", "depth", "registers"):
        if (known.get(name) or shown[name]) != shown[name]:
            raise UsageError(
                f"checkpoint: its config says {name} {known[name]}, its tensors {shown[name]}"
            )
    given = known.get("patch_size")
    if given is not None and pair("patch_size", given) != (*patch,):
        raise UsageError(
            f"checkpoint: its config says patch_size {given}, its tensors {shown['patch_size']}"
        )
    if ("blocks.0.ls1.gamma" in state) != (known.get("layer_scale") is not None):
        shown["layer_scale"] = 1e-5 if "blocks.0.ls1.gamma" in state else None
    for name in ("head.weight", "head.2.weight"):
        if name in state:
            shown["num_classes"] = len(state[name])
    hidden = state.get("head.0.weight")
    shown["head_hidden_dim"] = None if hidden is None else len(hidden)
    notes: list[str] = []
    _pool(shown, state, known, hidden)
    _heads(shown, state, known, qkv.shape[0] // 3, notes)
    _image(shown, state, known, wanted, notes)
    return {**known, **shown}, notes


TOKENS = ("cls_token", "reg_token", "pos_embed", "attn_pool.latent")
# Arguments of ViT that a config or dialect may set, and a tensor that must then be present.
_TENSORS = {
    "class_token": "cls_token",
    "registers": "reg_token",
    "pos_embed": "pos_embed",
    "patch_bias": "patch_embed.proj.bias",
    "pre_norm": "norm_pre.weight",
    "norm": "blocks.0.norm1.bias",
    "qk_norm": "blocks.0.attn.q_norm.weight",
    "qkv_bias": "blocks.0.attn.qkv.bias",
    "proj_bias": "blocks.0.attn.proj.bias",
    "mlp_bias": "blocks.0.mlp.fc2.bias",
    "layer_scale": "blocks.0.ls1.gamma",
    "num_classes": "head.weight",
}
_HEADS = [
    {f"head.{n}{kind}" for n in ns for kind in ("weight", "bias")} for ns in ([""], ["0.", "2."])
]


def check_tensors(state: State, ranks: Mapping[str, tuple[int, ...]] | None = None) -> None:
    """Raise if a tensor is not plain floating point, is empty or has the wrong rank for its name.

    ranks: the allowed ranks by name, where a dialect has others.
    """
    for name, tensor in state.items():
        if what := _unfit(tensor):
            raise UsageError(f"checkpoint: {name} is {what}")
        allowed = (ranks or {}).get(name, (_rank(name),))
        shape = tuple(tensor.shape)
        if tensor.ndim not in allowed:
            expected = " or ".join(map(str, allowed))
            raise UsageError(f"checkpoint: {name} is {shape}, expected {expected} dimensions")
        if 0 in shape and name not in ("pos_embed", "reg_token"):
            raise UsageError(f"checkpoint: {name} is {shape}, which holds nothing")


def _rank(name: str) -> int:
    if name.endswith((".bias", "_bias", ".gamma")):
        return 1
    if name in TOKENS:
        return 3
    return 1 if "norm" in name else 4 if name == "patch_embed.proj.weight" else 2


def _unfit(tensor: Tensor) -> str | None:
    """Return why a tensor cannot be a weight (quantized, without data or sparse), or None."""
    if not tensor.is_floating_point():
        return f"{tensor.dtype}, not floating point"
    if tensor.is_meta or tensor.layout != torch.strided:
        return f"{'without data' if tensor.is_meta else tensor.layout}, not a plain tensor"
    return None


def check_complete(state: State, known: Mapping[str, Any]) -> None:
    """Raise unless the tensors can be those of a whole ViT: those that determine its architecture
    are present, the head is complete, and so is what `known` says the model has."""
    check_tensors(state)
    mlp = ("fc1_g", "fc1_x") if "blocks.0.mlp.fc1_x.weight" in state else ("fc1",)
    needed = ["patch_embed.proj.weight", "blocks.0.attn.qkv.weight"]
    needed += [f"blocks.0.mlp.{n}.weight" for n in (*mlp, "fc2")]
    lacking = [name for name in needed if name not in state]
    head = {name for name in state if name.startswith("head.")}
    if head and head not in _HEADS:
        whole = next((h for h in reversed(_HEADS) if h & head), _HEADS[0])
        lacking += sorted(whole - head)
        if whole < head:
            unexpected = ", ".join(sorted(head - whole))
            raise UsageError(f"checkpoint: besides a head it has the unexpected {unexpected}")
    if lacking:
        raise UsageError(f"checkpoint: it lacks {', '.join(lacking)}")
    for name, tensor in _TENSORS.items():
        others = {"blocks.0.attn.qkv.bias": "blocks.0.attn.q_bias", "head.weight": "head.0.weight"}
        value, there = known.get(name), {tensor, others.get(tensor)} & state.keys()
        if value not in (None, False, 0, "none", "rmsnorm") and not there:
            raise UsageError(
                f"checkpoint: it lacks {tensor}, but its config or dialect says {name}={value!r}"
            )
    dim = len(state["patch_embed.proj.weight"])
    for name in TOKENS[:3]:
        shape = tuple(state[name].shape) if name in state else (1, 1, dim)
        count = 1 if name == "cls_token" else shape[1]
        if shape != (1, count, dim):
            expected = (1, count if name == "cls_token" else "N", dim)
            raise UsageError(f"checkpoint: {name} is {shape}, expected {expected}")


def _mlp(state: State) -> str:
    if "blocks.0.mlp.fc1_g.weight" in state:
        return "swiglu"
    fc1, fc2 = (state[f"blocks.0.mlp.fc{i}.weight"] for i in (1, 2))
    return "swiglu_packed" if fc1.shape[0] == 2 * fc2.shape[1] else "mlp"


def _qkv_bias(state: State) -> bool | str:
    if "blocks.0.attn.q_bias" in state:
        return "qv"
    return "blocks.0.attn.qkv.bias" in state


def _pool(
    shown: dict[str, Any], state: State, known: Mapping[str, Any], hidden: Tensor | None
) -> None:
    head = state.get("head.weight", hidden)
    if "attn_pool.latent" in state:
        shown["pool"] = "map"
    elif head is not None and head.shape[1] == 2 * shown["dim"]:
        shown["pool"] = "cls_mean"
    elif known.get("pool") in (None, "map", "cls_mean"):
        with_cls = shown["class_token"] and not shown["fc_norm"]
        shown["pool"] = "cls" if with_cls else "mean"


def _heads(
    shown: dict[str, Any],
    state: State,
    known: Mapping[str, Any],
    inner: int,
    notes: list[str],
) -> None:
    norm = state.get("blocks.0.attn.q_norm.weight")
    if norm is not None:
        heads = max(1, inner // len(norm))
    elif known.get("heads"):
        heads = known["heads"]
    else:
        sizes = ("dim", "depth", "mlp_dim")
        same = [
            p["heads"]
            for p in PRESETS.values()
            if all(p[s] == shown[s] for s in sizes) and p.get("mlp", "mlp") == shown["mlp"]
        ]
        heads = same[0] if same else max(1, inner // 64)
        if not same:
            notes.append(
                f"heads {heads} guessed, {inner // heads} wide; pass heads= if it is not so"
            )
    if inner % heads:
        raise UsageError(f"checkpoint: heads {heads} do not divide the {inner} channels of q")
    shown["heads"] = heads
    if inner != shown["dim"]:
        shown["dim_head"] = inner // heads


def _image(
    shown: dict[str, Any],
    state: State,
    known: Mapping[str, Any],
    wanted: Mapping[str, Any],
    notes: list[str],
) -> None:
    """Infer image size and whether prefix tokens have positions from the number of positions."""
    p_h, p_w = pair("patch_size", shown["patch_size"])
    size, given = known.get("image_size"), wanted["image_size"]
    if "pos_embed" not in state:
        shown["pos_embed"] = "none"
        height, width = 224 // p_h * p_h, 224 // p_w * p_w
        shown["image_size"] = size or (height if height == width else (height, width))
        return
    shown["pos_embed"] = "learned"
    count = state["pos_embed"].shape[1]
    covers = _candidate_patch_counts(
        count, shown["registers"] + shown["class_token"], known, wanted
    )
    if size is None and given is not None and _table_fits(covers, _patches(given, (p_h, p_w))):
        size = given
    if size is not None:
        patches = _patches(size, (p_h, p_w))
        if patches in covers:
            height, width = pair("image_size", size)
            shown["no_embed_class"] = covers[patches]
            shown["image_size"] = size
            if height % p_h or width % p_w:
                shown["crop_remainder"] = True
            return
    for patches, alone in covers.items():
        if _square(patches):
            side = math.isqrt(patches)
            shown["no_embed_class"] = alone
            shown["image_size"] = side * p_h if p_h == p_w else (side * p_h, side * p_w)
            if size is not None:
                notes.append(f"image_size {size} of the config does not fit {count} positions")
            return
    if not shown["class_token"] and _square(count - 1):
        raise UsageError(
            f"checkpoint: {count} positions make no square grid; with one for <cls> they "
            "would, but cls_token is missing; pass image_size=(height, width) if that is right"
        )
    hint = "pass image_size=(height, width)" if given is None else f"nor are they those of {given}"
    raise UsageError(f"checkpoint: {count} positions make no square grid; {hint}")


def _candidate_patch_counts(
    count: int, prefix: int, known: Mapping[str, Any], wanted: Mapping[str, Any]
) -> dict[int, bool]:
    """Map each number of patches that a table of `count` positions may cover, likelier first, to
    whether the prefix tokens then have no positions."""
    settled = known.get("no_embed_class")
    if settled is not None:
        return {count if settled else count - prefix: bool(settled)}
    if not prefix:
        return {count: bool(wanted["no_embed_class"])}
    covers = {count: True, count - prefix: False}
    return dict(sorted(covers.items(), key=lambda c: c[1] != bool(wanted["no_embed_class"])))


def _table_fits(covers: Mapping[int, bool], patches: int) -> bool:
    """Return whether the table covers `patches` patches. As in timm, any grid of them will do."""
    likelier = next(iter(covers))
    return patches == likelier or (patches in covers and not _square(likelier))


def _square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def _patches(size: int | tuple[int, int], patch: tuple[int, int]) -> int:
    height, width = pair("image_size", size)
    return (height // patch[0]) * (width // patch[1])
