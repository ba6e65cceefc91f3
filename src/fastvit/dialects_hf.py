"""Readers of transformers' checkpoints: ViT, Dinov2, DINOv3, Siglip, Siglip2 and CLIP."""

from collections.abc import Mapping
from typing import Any

import torch

from fastvit.dialect_rules import (
    ALWAYS,
    PARAM,
    Config,
    Ranks,
    Reading,
    State,
    adopt_head,
    concat_parts,
    finish,
    fold_prefix,
    is_bare,
    options_of,
    refuse_distilled,
)
from fastvit.errors import UsageError
from fastvit.pos_embed import HUGGING_FACE, NAFLEX, Resample
from fastvit.presets import CLIP, IMAGENET, INCEPTION

_LAYER = r"(?:encoder\.)?(?:model\.)?layers?\.(\d+)\."


def read_vit(state: State, outside: State, config: Config) -> Reading:
    """Read transformers' ViT, Dinov2 and Dinov2WithRegisters, with old or new keys."""
    refuse_distilled(state, "embeddings.distillation_token")
    for owner in ("encoder", "backbone_config", "vision_config"):  # composite models
        config = config[owner] if isinstance(config.get(owner), Mapping) else config
    dinov2 = any(k.endswith("layer_scale1.lambda1") for k in state)
    registers = "embeddings.register_tokens" in state
    rules = [
        (r"embeddings\.cls_token", "cls_token"),
        (r"embeddings\.position_embeddings", "pos_embed"),
        (r"embeddings\.register_tokens", "reg_token"),
        (r"embeddings\.mask_token", None),
        (rf"embeddings\.patch_embeddings\.projection\.{PARAM}", r"patch_embed.proj.\1"),
        (rf"{_LAYER}(?:layernorm_before|norm1)\.{PARAM}", r"blocks.\1.norm1.\2"),
        (rf"{_LAYER}(?:layernorm_after|norm2)\.{PARAM}", r"blocks.\1.norm2.\2"),
        (rf"{_LAYER}attention\.attention\.(q|k|v)[a-z]+\.{PARAM}", r"blocks.\1.attn.\2.\3"),
        (rf"{_LAYER}attention\.(q|k|v)_proj\.{PARAM}", r"blocks.\1.attn.\2.\3"),
        (rf"{_LAYER}attention\.(?:output\.dense|o_proj)\.{PARAM}", r"blocks.\1.attn.proj.\2"),
        (
            rf"{_LAYER}(?:intermediate\.dense|mlp\.fc1|mlp\.weights_in)\.{PARAM}",
            r"blocks.\1.mlp.fc1.\2",
        ),
        (rf"{_LAYER}(?:output\.dense|mlp\.fc2|mlp\.weights_out)\.{PARAM}", r"blocks.\1.mlp.fc2.\2"),
        (rf"{_LAYER}mlp\.gate_proj\.{PARAM}", r"blocks.\1.mlp.fc1.gate.\2"),
        (rf"{_LAYER}mlp\.up_proj\.{PARAM}", r"blocks.\1.mlp.fc1.up.\2"),
        (rf"{_LAYER}mlp\.down_proj\.{PARAM}", r"blocks.\1.mlp.fc2.\2"),
        (rf"{_LAYER}layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
        (rf"layernorm\.{PARAM}", r"norm.\1"),
        (rf"pooler\.dense\.{PARAM}", None),
        (rf"classifier\.{PARAM}", r"head.\1"),
    ]
    how = Resample() if registers else HUGGING_FACE
    known = {"resample": options_of(how), **_hf_known(config, 1e-6 if dinov2 else 1e-12)}
    known.update(proj_bias=True, mlp_bias=True, no_embed_class=False)
    if dinov2:
        known["dynamic_img_size"] = True
    always = dict(ALWAYS)
    if not dinov2 and config.get("model_type") in (None, "ijepa"):
        del always["cls_token"]  # I-JEPA has none; without a config, the number of positions tells
    name = "hf dinov2 with registers" if registers else "hf dinov2" if dinov2 else "hf vit"
    data = IMAGENET if dinov2 else INCEPTION
    reading = finish(name, state, outside, rules, known, data, always)
    adopt_head(reading, outside, "classifier")
    if is_bare(config):
        reading.notes.append(f"no config: norm_eps {known['norm_eps']:g}, transformers' default")
    if any(k.startswith("pooler.") for k in reading.dropped):
        reading.notes.append("the tanh pooler was left out; forward gives the normed <cls>")
    concat_parts(reading.state, ("gate", "up"), "mlp.fc1")
    concat_parts(reading.state, ("q", "k", "v"), "attn.qkv", "attn.")
    if dinov2:
        fold_prefix(reading, registers)
    return reading


def read_dinov3(state: State, outside: State, config: Config) -> Reading:
    gated = any(k.endswith("gate_proj.weight") for k in state)
    rules = [
        (r"embeddings\.cls_token", "cls_token"),
        (r"embeddings\.register_tokens", "reg_token"),
        (r"embeddings\.mask_token", None),
        (rf"embeddings\.patch_embeddings\.{PARAM}", r"patch_embed.proj.\1"),
        (rf"{_LAYER}(norm[12])\.{PARAM}", r"blocks.\1.\2.\3"),
        (rf"{_LAYER}attention\.(q|k|v)_proj\.{PARAM}", r"blocks.\1.attn.\2.\3"),
        (rf"{_LAYER}attention\.o_proj\.{PARAM}", r"blocks.\1.attn.proj.\2"),
        (rf"{_LAYER}mlp\.gate_proj\.{PARAM}", r"blocks.\1.mlp.fc1_g.\2"),
        (rf"{_LAYER}mlp\.up_proj\.{PARAM}", rf"blocks.\1.mlp.fc1{'_x' if gated else ''}.\2"),
        (rf"{_LAYER}mlp\.down_proj\.{PARAM}", r"blocks.\1.mlp.fc2.\2"),
        (rf"{_LAYER}layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
        (rf"norm\.{PARAM}", r"norm.\1"),
    ]
    config = dict(config)
    if gated and config.pop("hidden_act", "silu") != "silu":
        raise UsageError("checkpoint: a gated MLP with another hidden_act than 'silu'")
    known = {**_hf_known(config, 1e-5), "rope": "dinov3", "dynamic_img_size": True}
    known.update(rope_theta=float(config.get("rope_theta", 100.0)), pool="cls")
    for ours, theirs in (("qkv_bias", "query_bias"), ("proj_bias",) * 2, ("mlp_bias",) * 2):
        known[ours] = config.get(theirs)
    always = {"cls_token": (3,), "reg_token": (3,), "patch_embed.proj.bias": (1,)}
    reading = finish("hf dinov3", state, outside, rules, known, IMAGENET, always)
    concat_parts(reading.state, ("q", "k", "v"), "attn.qkv", "attn.", bare_keys=True)
    if reading.state["reg_token"].shape[1] == 0:
        del reading.state["reg_token"]
    return reading


def read_siglip_or_clip(state: State, outside: State, config: Config) -> Reading:
    clip = "embeddings.class_embedding" in state
    config = config.get("vision_config") or config
    rules = [
        (r"embeddings\.class_embedding", "cls_token"),
        (r"embeddings\.position_ids", None),
        (r"embeddings\.position_embedding\.weight", "pos_embed"),
        (rf"embeddings\.patch_embedding\.{PARAM}", r"patch_embed.proj.\1"),
        (rf"pre_layrnorm\.{PARAM}", r"norm_pre.\1"),
        (rf"{_LAYER}layer_norm([12])\.{PARAM}", r"blocks.\1.norm\2.\3"),
        (rf"{_LAYER}self_attn\.(q|k|v)_proj\.{PARAM}", r"blocks.\1.attn.\2.\3"),
        (rf"{_LAYER}self_attn\.out_proj\.{PARAM}", r"blocks.\1.attn.proj.\2"),
        (rf"{_LAYER}mlp\.(fc[12])\.{PARAM}", r"blocks.\1.mlp.\2.\3"),
        (rf"post_layernorm\.{PARAM}", r"norm.\1"),
        (r"head\.probe", "attn_pool.latent"),
        (rf"head\.attention\.in_proj_{PARAM}", r"attn_pool.qkv.\1"),
        (rf"head\.attention\.out_proj\.{PARAM}", r"attn_pool.proj.\1"),
        (rf"head\.layernorm\.{PARAM}", r"attn_pool.norm.\1"),
        (rf"head\.mlp\.(fc[12])\.{PARAM}", r"attn_pool.mlp.\1.\2"),
        (rf"classifier\.{PARAM}", r"head.\1"),
    ]
    act = "quick_gelu" if clip else "gelu_tanh"
    known = {"activation": act, **_hf_known(config, 1e-5 if clip else 1e-6)}
    known.update(qkv_bias=True, proj_bias=True, mlp_bias=True, pre_norm=clip, no_embed_class=False)
    name = "hf clip" if clip else "hf siglip"
    always: Ranks = {"pos_embed": (2,), "patch_embed.proj.weight": (4,) if clip else (2, 4)}
    always |= {"cls_token": (1,)} if clip else {"patch_embed.proj.bias": (1,)}
    reading = finish(name, state, outside, rules, known, CLIP if clip else INCEPTION, always)
    adopt_head(reading, outside, "classifier")
    ours = reading.state
    concat_parts(ours, ("q", "k", "v"), "attn.qkv", "attn.")
    ours["pos_embed"] = ours["pos_embed"][None]
    how = HUGGING_FACE
    if clip:
        if "head.weight" in ours:  # transformers classifies the mean of the patches, without a norm
            known.update(pool="mean", fc_norm=False, final_norm=False)
            reading.dropped += [k for k in ours if k.startswith("norm.")]
            ours = reading.state = {k: v for k, v in ours.items() if not k.startswith("norm.")}
        ours["cls_token"] = ours["cls_token"].view(1, 1, -1)
        if "visual_projection.weight" in outside:
            ours["head.weight"] = outside["visual_projection.weight"]
            reading.dropped.remove("visual_projection.weight")
            reading.head_without_bias = True
    if ours["patch_embed.proj.weight"].ndim == 2:
        reading.dialect, how = "hf siglip2", NAFLEX
        known.update(dynamic_img_size=True)
        weight, channels = ours["patch_embed.proj.weight"], int(config.get("num_channels", 3))
        p = config.get("patch_size") or round((weight.shape[1] / channels) ** 0.5)
        if p * p * channels != weight.shape[1]:
            raise UsageError(
                f"checkpoint: patch_embed.proj.weight is {tuple(weight.shape)}, expected "
                f"{p} x {p} x {channels} columns"
            )
        weight = weight.reshape(len(weight), p, p, channels).permute(0, 3, 1, 2)
        ours["patch_embed.proj.weight"] = weight
    known["resample"] = options_of(how)
    for kind in ("weight", "bias"):
        packed = ours.pop(f"attn_pool.qkv.{kind}", None)
        if packed is not None:
            if len(packed) % 3:
                raise UsageError(
                    f"checkpoint: head.attention.in_proj_{kind} is {tuple(packed.shape)}, expected "
                    "three equal parts"
                )
            q, k, v = packed.chunk(3)
            ours[f"attn_pool.q.{kind}"], ours[f"attn_pool.kv.{kind}"] = q, torch.cat([k, v])
    if "head.weight" in ours and not clip and "attn_pool.latent" in ours:
        reading.dropped += [k for k in ours if k.startswith("attn_pool.")]
        reading.state = {k: v for k, v in ours.items() if not k.startswith("attn_pool.")}
        reading.notes.append("the classifier reads the mean of the patches; MAP head left out")
    return reading


def _hf_known(config: Config, default_eps: float) -> dict[str, Any]:
    """The arguments that a transformers config gives; tensors are checked against them later."""
    known: dict[str, Any] = {}
    for ours, theirs, kind in (
        ("norm_eps", "layer_norm_eps", (float, int)),
        ("heads", "num_attention_heads", int),
        ("depth", "num_hidden_layers", int),
        ("dim", "hidden_size", int),
        ("image_size", "image_size", (int, list, tuple)),
        ("patch_size", "patch_size", (int, list, tuple)),
        ("registers", "num_register_tokens", int),
        ("qkv_bias", "qkv_bias", bool),
    ):
        value = config.get(theirs)
        if value is None:
            continue
        if not isinstance(value, kind) or (isinstance(value, (list, tuple)) and len(value) != 2):
            raise UsageError(f"checkpoint: its config says {theirs} {value!r}")
        known[ours] = tuple(value) if isinstance(value, list) else value
    known["norm_eps"] = float(known.get("norm_eps", default_eps))
    heads = ("ForImageClassification", "WithProjection")
    if any(str(a).endswith(heads) for a in config.get("architectures") or ()):
        names = config.get("id2label")
        known["num_classes"] = len(names) if isinstance(names, Mapping) else 2  # the default
    activation = config.get("hidden_act")
    if activation is not None:
        names = {"gelu": "gelu", "quick_gelu": "quick_gelu"}
        names |= dict.fromkeys(("gelu_pytorch_tanh", "gelu_new"), "gelu_tanh")
        if activation not in names:
            raise UsageError(f"checkpoint: hidden_act {activation!r} is not one of {list(names)}")
        known["activation"] = names[activation]
    return known
