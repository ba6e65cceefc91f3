"""Export to timm's VisionTransformer or Eva: tensor names, and a config.json for create_model."""

import logging
import re
from typing import Any

from torch import nn

from fastvit.export_rules import State, fit_patch_bias, note_resample, refuse
from fastvit.model import TIMM_POOLS, ViT
from fastvit.pos_embed import Resample

log = logging.getLogger("fastvit")
_POOLS = {ours: theirs for theirs, ours in TIMM_POOLS.items()}
_WORDS = {
    "image_size": "img_size",
    "channels": "in_chans",
    "dim": "embed_dim",
    "heads": "num_heads",
    "layer_scale": "init_values",
    "head_dropout": "drop_rate",
    "emb_dropout": "pos_drop_rate",
    "patch_dropout": "patch_drop_rate",
    "drop_path": "drop_path_rate",
    **{k: k for k in ("depth", "qkv_bias", "class_token", "no_embed_class", "dynamic_img_size")},
}


def to_timm(model: ViT, state: State) -> State:
    c = model.config
    if c["head_hidden_dim"]:
        refuse("timm", "a head of two layers (head_hidden_dim)")
    if c["pool"] == "cls_mean":
        refuse("timm", "pool 'cls_mean'")
    if c["dim_head"] not in (None, c["dim"] // c["heads"]):
        refuse("timm", f"dim_head {c['dim_head']} other than dim / heads")
    if c["mlp_bias"] != c["proj_bias"]:
        refuse("timm", f"mlp_bias={c['mlp_bias']} with proj_bias={c['proj_bias']}")
    if c["pool"] == "map" and (_is_eva(c) or c["mlp"] == "swiglu_packed"):
        refuse("timm", "this pool 'map', with RoPE or beside a packed SwiGLU")
    fit_patch_bias("timm", state, c["pre_norm"])
    if model.pos_embed is not None:
        note_resample(model, Resample(), "timm")
    if _is_eva(c):
        rename = {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}
        pattern = re.compile("|".join(rename))
        state = {pattern.sub(lambda m: rename[m[0]], k): v for k, v in state.items()}
    return state


def _is_eva(config: dict[str, Any]) -> bool:
    """True if this is an Eva in timm: only Eva has RoPE, or q and v biases without one for k."""
    return config["rope"] is not None or config["qkv_bias"] == "qv"


def timm_config(model: ViT) -> dict[str, Any]:
    """timm's config.json: a base architecture and model_args that override all its arguments."""
    c, eva = model.config, _is_eva(model.config)
    packed = c["mlp"] == "swiglu_packed"
    args = {theirs: c[ours] for ours, theirs in _WORDS.items()}
    args["img_size"], args["patch_size"] = model.patch_embed.img_size, model.patch_embed.patch_size
    args["global_pool"] = _POOLS.get(c["pool"], c["pool"])
    args["attn_drop_rate"], args["proj_drop_rate"] = (
        c["dropout"] if c[k] is None else c[k] for k in ("attn_dropout", "proj_dropout")
    )
    if args["proj_drop_rate"] != (c["dropout"] if c["mlp_dropout"] is None else c["mlp_dropout"]):
        log.warning("export: timm has one proj_drop_rate; mlp_dropout is lost")
    double = 2 if packed and not eva else 1
    args["mlp_ratio"] = c["mlp_dim"] * double / c["dim"]
    while int(c["dim"] * args["mlp_ratio"]) < c["mlp_dim"] * double:
        args["mlp_ratio"] += 1e-9
    base, eps = _eva_args(model, args) if eva else _vit_args(model, args)
    if c["norm_eps"] != eps:
        log.warning(
            "export: timm's config.json cannot say norm_eps %g; timm will take %g, unless you "
            "pass norm_layer to create_model",
            c["norm_eps"],
            eps,
        )
    left = {"architecture", "tag"} | (set() if model.class_names else {"label_names"})
    data = {k: v for k, v in model.default_cfg.items() if k not in left}
    return {
        "architecture": base,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "global_pool": args["global_pool"],
        "model_args": {k: list(v) if isinstance(v, tuple) else v for k, v in args.items()},
        "pretrained_cfg": {**data, "num_classes": model.num_classes, "fixed_input_size": True},
    }


def _vit_args(model: ViT, args: dict[str, Any]) -> tuple[str, float]:
    """Complete `args` for timm's VisionTransformer; return base architecture and its norm_eps."""
    c = model.config
    args.update(fc_norm=c["fc_norm"], qk_norm=c["qk_norm"], pre_norm=c["pre_norm"])
    args.update(final_norm=c["final_norm"], proj_bias=c["proj_bias"], reg_tokens=c["registers"])
    args["pos_embed"] = "learn" if c["pos_embed"] == "learned" else "none"
    if c["norm"] == "rmsnorm":
        args["norm_layer"] = "rmsnorm"  # with eps 1e-6
    if c["mlp"] == "swiglu":
        refuse("timm's VisionTransformer", "a SwiGLU of two projections without RoPE")
    if c["mlp"] == "swiglu_packed":
        return "vit_giant_patch14_dinov2", 1e-6
    args["act_layer"] = c["activation"]
    if c["norm_eps"] == 1e-5 and c["norm"] == "layernorm":
        return "vit_base_patch16_clip_224", 1e-5
    return "vit_base_patch16_224", 1e-6


def _eva_args(model: ViT, args: dict[str, Any]) -> tuple[str, float]:
    """Complete `args` for timm's Eva; return base architecture and its norm_eps."""
    c = model.config
    plain = dict(norm="layernorm", pre_norm=False, final_norm=True, proj_bias=True, qk_norm=False)
    for name, value in plain.items():
        if c[name] != value:
            refuse("timm's Eva", f"{name}={c[name]!r}")
    args.update(
        num_reg_tokens=c["registers"],
        use_abs_pos_emb=c["pos_embed"] == "learned",
        use_fc_norm=not isinstance(model.fc_norm, nn.Identity),
        qkv_bias=bool(c["qkv_bias"]),
        qkv_fused=True,
        swiglu_mlp=c["mlp"] != "mlp",
        swiglu_align_to=8 if c["mlp"] == "swiglu" else 0,
        use_rot_pos_emb=model.rope is not None,
    )
    if c["qkv_bias"] is True:
        refuse("timm's Eva", "a bias on the keys")
    if c["mlp"] == "mlp" and c["activation"] != "gelu":
        refuse("timm's Eva", f"activation {c['activation']!r}")
    if model.rope is not None:
        dinov3 = c["rope"] == "dinov3"
        args.update(rope_type="dinov3" if dinov3 else "cat", rope_rotate_half=dinov3)
        args["rope_temperature"] = model.rope.theta
        args["ref_feat_shape"] = model.rope.reference_grid
    if c["norm_eps"] == 1e-5:
        return "vit_small_patch16_dinov3", 1e-5
    return "eva02_small_patch14_224", 1e-6
