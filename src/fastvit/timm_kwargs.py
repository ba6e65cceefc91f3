"""Translate timm's constructor arguments to those of `fastvit.ViT`."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastvit.errors import UsageError
from fastvit.model import TIMM_POOLS, ViT

_RENAMED = {
    "img_size": "image_size",
    "in_chans": "channels",
    "embed_dim": "dim",
    "num_heads": "heads",
    "reg_tokens": "registers",
    "init_values": "layer_scale",
    "drop_rate": "head_dropout",
    "pos_drop_rate": "emb_dropout",
    "patch_drop_rate": "patch_dropout",
    "attn_drop_rate": "attn_dropout",
    "drop_path_rate": "drop_path",
    "act_layer": "activation",
    "mlp_layer": "mlp",
    "norm_layer": "norm",
    "global_pool": "pool",
    # names that only Eva has
    "num_reg_tokens": "registers",
    "use_fc_norm": "fc_norm",
    "use_pre_transformer_norm": "pre_norm",
    "rope_temperature": "rope_theta",
    "ref_feat_shape": "rope_grid",
}
_SAME = {
    "patch_size",
    "num_classes",
    "depth",
    "qkv_bias",
    "qk_norm",
    "proj_bias",
    "class_token",
    "no_embed_class",
    "pos_embed",
    "pre_norm",
    "final_norm",
    "fc_norm",
    "dynamic_img_size",
}
_UNSUPPORTED = {  # arguments that fastvit does not support: the only value accepted
    "scale_attn_norm": False,
    "scale_mlp_norm": False,
    "pool_include_prefix": False,
    "dynamic_img_pad": False,
    "weight_init": "",
    "fix_init": False,
    "embed_norm_layer": None,
    "attn_layer": "attn",
    "embed_layer": "PatchEmbed",
    "block_fn": "Block",
    "scale_mlp": False,
    "scale_attn_inner": False,
    "attn_type": "eva",
    "use_post_norm": False,
    "rope_grid_offset": 0.0,
    "rope_grid_indexing": "ij",
    "drop_block_rate": None,
    "bn_momentum": None,
    "bn_eps": None,
    "scriptable": False,
    "features_only": False,
    "pretrained_cfg": {},
    "pretrained_cfg_overlay": {},
    "cache_dir": None,
}
_INSTEAD = {
    "cache_dir": "set HF_HUB_CACHE instead",
    "features_only": "model.forward_intermediates(images) gives features",
    "pretrained_cfg": "load_checkpoint(source) takes weights from elsewhere",
    "pretrained_cfg_overlay": "load_checkpoint(source) takes weights from elsewhere",
}
_BY_VALUE = {  # the arguments of ours that each value sets; most are Eva's
    "strict_img_size": {True: {}, False: {"dynamic_img_size": True}},
    "exportable": {True: {}, False: {}},
    "no_jit": {True: {}, False: {}},
    "use_abs_pos_emb": {True: {"pos_embed": "learned"}, False: {"pos_embed": "none"}},
    "use_rot_pos_emb": {True: {}, False: {"rope": None}},
    "rope_type": {"cat": {"rope": "eva"}, "dinov3": {"rope": "dinov3"}},
    "swiglu_mlp": {True: {}, False: {}},  # see _translate_eva: with swiglu_align_to
    "swiglu_align_to": {0: {}, 8: {}, 64: {}},
    "rope_rotate_half": {True: {}, False: {}},  # _translate_eva checks it against rope
    "qkv_fused": {True: {}},
}
TIMM_NAMES = {*_RENAMED, *_SAME, *_UNSUPPORTED, *_BY_VALUE, "mlp_ratio", "proj_drop_rate"}

_OURS = inspect.signature(ViT).parameters.keys()

_ACTIVATIONS = {
    "gelu": "gelu",
    "GELU": "gelu",
    "gelu_tanh": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "QuickGELU": "quick_gelu",
    "silu": "silu",
    "SiLU": "silu",
}
_NORMS = {
    "layernorm": "layernorm",
    "LayerNorm": "layernorm",
    "rmsnorm": "rmsnorm",
    "RmsNorm": "rmsnorm",
    "RMSNorm": "rmsnorm",
}
_MLPS = {"Mlp": "mlp", "SwiGLU": "swiglu", "SwiGLUPacked": "swiglu_packed"}


def translate(kwargs: dict[str, Any], preset: dict[str, Any]) -> dict[str, Any]:
    """Translate kwargs in timm's names, ours or both to ours. preset: the values they override.

    mlp_ratio as in timm: relative to dim, for both branches together in a packed SwiGLU except in
    Eva. proj_bias as in timm: False also removes the MLP's biases, unless mlp_bias is given. What
    only timm supports raises UsageError with the argument's name. None for timm's names is ignored.
    """
    kwargs = {k: v for k, v in kwargs.items() if v is not None or k not in TIMM_NAMES}
    ours = {k: v for k, v in kwargs.items() if k not in TIMM_NAMES - _SAME}
    for name in ours.keys() - _OURS:
        known = f"timm's {', '.join(sorted(TIMM_NAMES))}, or {', '.join(sorted(_OURS))}"
        raise UsageError(f"{name!r} is unknown; expected {known}")
    for name, value in kwargs.items():
        if name in ours or name in ("mlp_ratio", "proj_drop_rate"):
            continue
        if name in _UNSUPPORTED:
            if _name_of(value) != _UNSUPPORTED[name]:
                instead = _INSTEAD.get(name, "fastvit does not support it")
                raise UsageError(f"{name}={_name_of(value)!r} is timm's alone; {instead}")
            continue
        if name in _BY_VALUE:
            if value not in _BY_VALUE[name]:
                raise UsageError(f"{name}={value!r} is timm's alone; fastvit does not support it")
            continue
        _set_once(ours, name, _RENAMED[name], value)
    eva = preset.get("rope") is not None or preset.get("qkv_bias") == "qv" or "qkv_fused" in kwargs
    _translate_eva(ours, kwargs, preset)
    if eva:
        _translate_eva_pool(ours, kwargs, preset)
    if eva and ours.get("qkv_bias") is True:
        ours["qkv_bias"] = "qv"
    if "proj_bias" in ours:
        ours.setdefault("mlp_bias", ours["proj_bias"])
    if "norm_layer" in kwargs:
        ours.setdefault("norm_eps", _norm_eps(kwargs["norm_layer"]))
    _translate_values(ours)
    _check_gate(ours, kwargs, preset)
    if "proj_drop_rate" in kwargs:
        for mine in ("proj_dropout", "mlp_dropout"):
            _set_once(ours, "proj_drop_rate", mine, kwargs["proj_drop_rate"])
    if "mlp_ratio" in kwargs:
        ratio = kwargs["mlp_ratio"]
        if not (isinstance(ratio, (int, float)) and ratio > 0):
            raise UsageError(f"mlp_ratio must be a positive number, got {ratio!r}")
        hidden = int({"dim": 768, **preset, **ours}["dim"] * ratio)
        packed = {**preset, **ours}.get("mlp") == "swiglu_packed"
        hidden = hidden // 2 if packed and not eva else hidden
        _set_once(ours, "mlp_ratio", "mlp_dim", _aligned(hidden, ours, kwargs, preset))
    elif "mlp_dim" not in ours and "mlp_dim" in preset and {"dim", "mlp"} & ours.keys():
        hidden = ours.get("dim", preset["dim"]) * preset["mlp_dim"] // preset["dim"]
        ours["mlp_dim"] = _aligned(hidden, ours, kwargs, preset)
    return ours


def _aligned(
    hidden: int, ours: dict[str, Any], kwargs: dict[str, Any], preset: dict[str, Any]
) -> int:
    """Round a width up, as Eva does for a SwiGLU with separate projections."""
    gated = {**preset, **ours}.get("mlp") == "swiglu"
    align = kwargs.get("swiglu_align_to", 8 if preset.get("mlp") == "swiglu" else 0)
    return hidden + -hidden % align if gated and align else hidden


def _translate_eva(ours: dict[str, Any], kwargs: dict[str, Any], preset: dict[str, Any]) -> None:
    """Apply `_BY_VALUE`, RoPE's arguments and those that choose a SwiGLU."""
    for name, meanings in _BY_VALUE.items():
        if name in kwargs:
            ours.update(meanings[kwargs[name]])
    halves = preset.get("rope") == "dinov3"
    if "rope_type" in kwargs:
        ours.setdefault("rope_theta", preset.get("rope_theta") or (100.0 if halves else 10000.0))
    if kwargs.get("use_rot_pos_emb") is False:
        ours["rope"] = None
    rope = ours.get("rope", preset.get("rope"))
    if kwargs.get("use_rot_pos_emb") and rope is None:
        raise UsageError("use_rot_pos_emb=True: this model has no RoPE; pass rope_type")
    told = kwargs.get("rope_rotate_half", halves)
    if {"rope_type", "rope_rotate_half"} & kwargs.keys() and rope and told != (rope == "dinov3"):
        raise UsageError(
            f"rope_rotate_half={told} is timm's alone with this rope_type; fastvit pairs halves "
            "with 'dinov3' and neighbours with 'cat'"
        )
    if {"swiglu_mlp", "swiglu_align_to"} & kwargs.keys():
        before = preset.get("mlp", "mlp")
        gated = kwargs.get("swiglu_mlp", before != "mlp")
        align = kwargs.get("swiglu_align_to", 8 if before == "swiglu" else 0)
        ours["mlp"] = "mlp" if not gated else "swiglu" if align else "swiglu_packed"


def _translate_eva_pool(
    ours: dict[str, Any], kwargs: dict[str, Any], preset: dict[str, Any]
) -> None:
    pool = kwargs.get("global_pool")
    if pool == "map":
        raise UsageError(
            "global_pool='map' of timm's Eva reads <cls> and registers too; fastvit's pool='map' "
            "the patches alone"
        )
    if pool in ("max", "avgmax"):  # Eva norms after pooling only for the mean
        ours.setdefault("fc_norm", preset.get("fc_norm", False))


def _set_once(ours: dict[str, Any], theirs: str, name: str, value: Any) -> None:
    if name in ours:
        raise UsageError(f"{theirs} and {name} are the same; give one of them")
    ours[name] = value


def _check_gate(ours: dict[str, Any], kwargs: dict[str, Any], preset: dict[str, Any]) -> None:
    """Raise if timm would gate without SiLU: it passes act_layer, by default GELU, to any MLP."""
    gated = ours.get("mlp", preset.get("mlp", "mlp")) != "mlp"
    told = "act_layer" in kwargs or ("mlp_layer" in kwargs and preset.get("mlp", "mlp") == "mlp")
    act = _name_of(kwargs.get("act_layer", "gelu"))
    if gated and told and _ACTIVATIONS.get(act) != "silu":
        raise UsageError(f"mlp_layer: timm gates with act_layer, here {act!r}; fastvit with 'silu'")


def _translate_values(ours: dict[str, Any]) -> None:
    pool = ours.get("pool")
    if pool is not None:
        ours["pool"] = TIMM_POOLS.get(pool, pool)
    if ours.get("pos_embed") in ("learn", ""):
        ours["pos_embed"] = {"learn": "learned", "": "none"}[ours["pos_embed"]]
    for name, words in (("activation", _ACTIVATIONS), ("norm", _NORMS), ("mlp", _MLPS)):
        value = ours.get(name)
        if value is None:
            ours.pop(name, None)
            continue
        word = _name_of(value)
        ours[name] = words.get(word, word)
    if ours.get("activation") == "silu":  # what SwiGLU always uses; timm accepts it as an argument
        del ours["activation"]


def _norm_eps(layer: Any) -> float:
    """The eps of timm's norm_layer: 1e-6 for a string, else a partial's or the class's default."""
    if isinstance(layer, str):
        return 1e-6
    said: dict[str, Any] = {}
    if isinstance(layer, functools.partial):
        said, layer = layer.keywords, layer.func
        if more := sorted(said.keys() - {"eps"}):
            raise UsageError(f"norm_layer: {more[0]}={said[more[0]]!r} is not among fastvit's")
    parameters = inspect.signature(layer).parameters
    eps = said.get("eps", parameters["eps"].default if "eps" in parameters else 1e-5)
    return torch.finfo(torch.float32).eps if eps is None else eps  # None: torch's RMSNorm


def _name_of(value: Callable[..., Any] | Any) -> Any:
    """The name of a class or of a partial of one (timm's packed SwiGLU), else the value itself."""
    if isinstance(value, functools.partial):
        harmless = ("eps", "inplace")  # `_norm_eps` reads eps
        said = {k: v for k, v in value.keywords.items() if k not in harmless}
        inner = _name_of(value.func)
        if inner == "GluMlp" and said.get("gate_last") is False:
            return "SwiGLUPacked"
        if inner == "GELU" and said == {"approximate": "tanh"}:
            return "GELUTanh"
        if said:
            raise UsageError(f"{inner} with {said} is timm's alone; fastvit does not support it")
        return inner
    if isinstance(value, type) and issubclass(value, nn.Module):
        return value.__name__
    return value
