"""Translate the tensor names of other libraries' checkpoints into ours.

Each dialect is a table of key patterns plus postprocessing, such as joining q, k and v or folding
positions into <cls>. `read` finds the dialect by a key that only its family has, and strips any
prefix (`module.`, `vit.`, `backbone.`, `visual.`) before that key.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvit.errors import UsageError
from fastvit.plain import WRAPPERS
from fastvit.pos_embed import DINOV2, HUGGING_FACE, NAFLEX, TORCHVISION, Resample
from fastvit.shapes import check_tensors

State = dict[str, Tensor]
Config = Mapping[str, Any]
Rules = list[tuple[str, str | None]]
Ranks = dict[str, tuple[int, ...]]

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
INCEPTION = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
CLIP = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}


EVA_POOL = (
    "the attention pooling of timm's Eva reads <cls> and registers too, fastvit's the patches alone"
)


@dataclass
class Reading:
    """A checkpoint under our names. known: `fastvit.ViT` arguments fixed by its config or dialect;
    dropped: keys without a counterpart in a ViT; notes: what was folded or guessed; data: image
    preprocessing."""

    dialect: str
    state: State
    known: dict[str, Any] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    head_without_bias: bool = False  # the head is a projection, as in CLIP


# Tensors that nearly every dialect has outside its blocks, and their allowed ranks.
_ALWAYS: Ranks = {"cls_token": (3,), "pos_embed": (3,), "patch_embed.proj.bias": (1,)}
_BIASED: dict[str, Any] = dict(qkv_bias=True, proj_bias=True, mlp_bias=True)
_P = r"(weight|bias)"
_B = r"blocks\.(\d+)\."
_OURS: Rules = [
    (r"(cls_token|pos_embed|reg_token)", r"\1"),
    (rf"(patch_embed\.proj|norm_pre|norm|fc_norm|head|head\.0|head\.2)\.{_P}", r"\1.\2"),
    (rf"{_B}(norm1|norm2|attn\.(?:qkv|proj|q_norm|k_norm))\.{_P}", r"blocks.\1.\2.\3"),
    (rf"{_B}attn\.(q_bias|v_bias)", r"blocks.\1.attn.\2"),
    (rf"{_B}mlp\.(fc1|fc2|fc1_g|fc1_x)\.{_P}", r"blocks.\1.mlp.\2.\3"),
    (rf"{_B}(ls1|ls2)\.gamma", r"blocks.\1.\2.gamma"),
    (rf"{_B}gamma_([12])", r"blocks.\1.ls\2.gamma"),
    (r"attn_pool\.latent", r"attn_pool.latent"),
    (rf"attn_pool\.(q|kv|proj|norm|mlp\.fc1|mlp\.fc2)\.{_P}", r"attn_pool.\1.\2"),
]


def _read_timm(state: State, outside: State, config: Config) -> Reading:
    """Read timm's VisionTransformer and Eva, fastvit, DeiT III and DINO, which share names."""
    rules = [
        *_OURS,
        (rf"pre_logits\.fc\.{_P}", r"head.0.\1"),
        (r"mask_token", None),
        (rf"(head_dist|norm_head)\.{_P}", None),
    ]
    if "pre_logits.fc.weight" in state:
        rules.insert(0, (rf"head\.{_P}", r"head.2.\1"))
    _refuse_distilled(state, "dist_token")
    if any(k.endswith("mlp.norm.weight") for k in state):
        raise UsageError("checkpoint: this EVA has a norm inside its MLP, which fastvit.ViT lacks")
    pools = "attn_pool.latent" in state
    if pools and "blocks.0.gamma_1" in state:
        raise UsageError(f"checkpoint: {EVA_POOL}")
    known: dict[str, Any] = {}
    data = {}
    if "head.2.weight" in state:
        known["head_activation"] = "gelu"
    if "pre_logits.fc.weight" in state:
        known["head_activation"] = "tanh"
    if "norm_pre.weight" in state:
        known["norm_eps"], data = 1e-5, CLIP
    gammas = "blocks.0.gamma_1" in state
    keys_without_bias = not any(k.endswith("qkv.bias") for k in state)
    if gammas and "reg_token" in state and "pos_embed" not in state and keys_without_bias:
        known.update(rope="dinov3", norm_eps=1e-5, pool="mean", dynamic_img_size=True)
        data = IMAGENET
    elif "blocks.0.attn.q_bias" in state and "pos_embed" in state and not gammas:
        fc1, fc2 = (state.get(f"blocks.0.mlp.fc{i}.weight") for i in (1, 2))
        if fc1 is not None and fc2 is not None and len(fc1) == 2 * fc2.shape[1]:  # not EVA-01
            known.update(rope="eva", rope_grid=16)
        known["pool"], data = "map" if pools else "mean", CLIP
    elif gammas or "blocks.0.ls1.gamma" in state:
        data = IMAGENET
    reading = _finish("timm", state, outside, rules, known, data)
    if pools and "blocks.0.attn.q_bias" in state:
        reading.notes.append(f"taken for fastvit's own: {EVA_POOL}")
    return reading


def _refuse_distilled(state: State, token: str) -> None:
    if token in state:
        raise UsageError(
            f"checkpoint: a distilled DeiT (key {token!r}) has two heads, which "
            "fastvit.ViT does not hold"
        )


def _read_dinov2(state: State, outside: State, config: Config) -> Reading:
    state = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", k): v for k, v in state.items()}
    registers = "register_tokens" in state
    rules = [
        (r"register_tokens", "reg_token"),
        (r"mask_token", None),
        (rf"{_B}mlp\.w12\.{_P}", r"blocks.\1.mlp.fc1.\2"),
        (rf"{_B}mlp\.w3\.{_P}", r"blocks.\1.mlp.fc2.\2"),
        *_OURS,
    ]
    known: dict[str, Any] = dict(dynamic_img_size=True, no_embed_class=False)
    known["resample"] = _options(Resample() if registers else DINOV2)
    reading = _finish("dinov2", state, outside, rules, known, IMAGENET, _ALWAYS)
    for name in ("weight", "bias"):
        head = outside.get(f"linear_head.{name}")
        if head is not None:
            reading.state[f"head.{name}"] = head
            reading.dropped.remove(f"linear_head.{name}")
    _fold_prefix(reading, registers)
    return reading


def _read_dinov3(state: State, outside: State, config: Config) -> Reading:
    state = dict(state)
    for key in [k for k in state if re.fullmatch(rf"{_B}attn\.qkv\.bias", k)]:
        i = key.split(".")[1]
        mask = state.get(f"{key}_mask")
        bias = state.pop(key)
        shape = tuple(bias.shape if mask is None else mask.shape)
        if bias.ndim != 1 or len(bias) % 3 or shape != (len(bias),):
            raise UsageError(
                f"checkpoint: {key} is {tuple(bias.shape)}, its mask {shape}; expected one "
                "dimension of three equal parts"
            )
        q, k, v = (bias if mask is None else bias.where(mask != 0, 0)).chunk(3)
        if mask is not None and not k.any():
            state[f"blocks.{i}.attn.q_bias"], state[f"blocks.{i}.attn.v_bias"] = q, v
        else:
            state[key] = bias
    rules = [
        (r"storage_tokens", "reg_token"),
        (r"mask_token|rope_embed\.periods", None),
        (r".*\.bias_mask", None),
        (rf"(local_cls_norm|cls_norm)\.{_P}", None),
        (rf"{_B}mlp\.w1\.{_P}", r"blocks.\1.mlp.fc1_g.\2"),
        (rf"{_B}mlp\.w2\.{_P}", r"blocks.\1.mlp.fc1_x.\2"),
        (rf"{_B}mlp\.w3\.{_P}", r"blocks.\1.mlp.fc2.\2"),
        *_OURS,
    ]
    known = dict(rope="dinov3", norm_eps=1e-5, dynamic_img_size=True, pool="cls")
    always = {k: v for k, v in _ALWAYS.items() if k != "pos_embed"}
    return _finish("dinov3", state, outside, rules, known, IMAGENET, always)


_L = r"(?:encoder\.)?(?:model\.)?layers?\.(\d+)\."


def _read_hf_vit(state: State, outside: State, config: Config) -> Reading:
    """Read transformers' ViT, Dinov2 and Dinov2WithRegisters, with old or new keys."""
    _refuse_distilled(state, "embeddings.distillation_token")
    for owner in ("encoder", "backbone_config", "vision_config"):  # composite models
        config = config[owner] if isinstance(config.get(owner), Mapping) else config
    dinov2 = any(k.endswith("layer_scale1.lambda1") for k in state)
    registers = "embeddings.register_tokens" in state
    rules = [
        (r"embeddings\.cls_token", "cls_token"),
        (r"embeddings\.position_embeddings", "pos_embed"),
        (r"embeddings\.register_tokens", "reg_token"),
        (r"embeddings\.mask_token", None),
        (rf"embeddings\.patch_embeddings\.projection\.{_P}", r"patch_embed.proj.\1"),
        (rf"{_L}(?:layernorm_before|norm1)\.{_P}", r"blocks.\1.norm1.\2"),
        (rf"{_L}(?:layernorm_after|norm2)\.{_P}", r"blocks.\1.norm2.\2"),
        (rf"{_L}attention\.attention\.(q|k|v)[a-z]+\.{_P}", r"blocks.\1.attn.\2.\3"),
        (rf"{_L}attention\.(q|k|v)_proj\.{_P}", r"blocks.\1.attn.\2.\3"),
        (rf"{_L}attention\.(?:output\.dense|o_proj)\.{_P}", r"blocks.\1.attn.proj.\2"),
        (rf"{_L}(?:intermediate\.dense|mlp\.fc1|mlp\.weights_in)\.{_P}", r"blocks.\1.mlp.fc1.\2"),
        (rf"{_L}(?:output\.dense|mlp\.fc2|mlp\.weights_out)\.{_P}", r"blocks.\1.mlp.fc2.\2"),
        (rf"{_L}mlp\.gate_proj\.{_P}", r"blocks.\1.mlp.fc1.gate.\2"),
        (rf"{_L}mlp\.up_proj\.{_P}", r"blocks.\1.mlp.fc1.up.\2"),
        (rf"{_L}mlp\.down_proj\.{_P}", r"blocks.\1.mlp.fc2.\2"),
        (rf"{_L}layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
        (rf"layernorm\.{_P}", r"norm.\1"),
        (rf"pooler\.dense\.{_P}", None),
        (rf"classifier\.{_P}", r"head.\1"),
    ]
    how = Resample() if registers else HUGGING_FACE
    known = {"resample": _options(how), **_hf_known(config, 1e-6 if dinov2 else 1e-12)}
    known.update(proj_bias=True, mlp_bias=True, no_embed_class=False)
    if dinov2:
        known["dynamic_img_size"] = True
    always = dict(_ALWAYS)
    if not dinov2 and config.get("model_type") in (None, "ijepa"):
        del always["cls_token"]  # I-JEPA has none; without a config, the number of positions tells
    name = "hf dinov2 with registers" if registers else "hf dinov2" if dinov2 else "hf vit"
    data = IMAGENET if dinov2 else INCEPTION
    reading = _finish(name, state, outside, rules, known, data, always)
    _adopt_classifier(reading, outside)
    if _is_bare(config):
        reading.notes.append(f"no config: norm_eps {known['norm_eps']:g}, transformers' default")
    if any(k.startswith("pooler.") for k in reading.dropped):
        reading.notes.append("the tanh pooler was left out; forward gives the normed <cls>")
    _concat_parts(reading.state, ("gate", "up"), "mlp.fc1")
    _concat_parts(reading.state, ("q", "k", "v"), "attn.qkv", "attn.")
    if dinov2:
        _fold_prefix(reading, registers)
    return reading


def _read_hf_dinov3(state: State, outside: State, config: Config) -> Reading:
    gated = any(k.endswith("gate_proj.weight") for k in state)
    rules = [
        (r"embeddings\.cls_token", "cls_token"),
        (r"embeddings\.register_tokens", "reg_token"),
        (r"embeddings\.mask_token", None),
        (rf"embeddings\.patch_embeddings\.{_P}", r"patch_embed.proj.\1"),
        (rf"{_L}(norm[12])\.{_P}", r"blocks.\1.\2.\3"),
        (rf"{_L}attention\.(q|k|v)_proj\.{_P}", r"blocks.\1.attn.\2.\3"),
        (rf"{_L}attention\.o_proj\.{_P}", r"blocks.\1.attn.proj.\2"),
        (rf"{_L}mlp\.gate_proj\.{_P}", r"blocks.\1.mlp.fc1_g.\2"),
        (rf"{_L}mlp\.up_proj\.{_P}", rf"blocks.\1.mlp.fc1{'_x' if gated else ''}.\2"),
        (rf"{_L}mlp\.down_proj\.{_P}", r"blocks.\1.mlp.fc2.\2"),
        (rf"{_L}layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
        (rf"norm\.{_P}", r"norm.\1"),
    ]
    config = dict(config)
    if gated and config.pop("hidden_act", "silu") != "silu":
        raise UsageError("checkpoint: a gated MLP with another hidden_act than 'silu'")
    known = {**_hf_known(config, 1e-5), "rope": "dinov3", "dynamic_img_size": True}
    known.update(rope_theta=float(config.get("rope_theta", 100.0)), pool="cls")
    for ours, theirs in (("qkv_bias", "query_bias"), ("proj_bias",) * 2, ("mlp_bias",) * 2):
        known[ours] = config.get(theirs)
    always = {"cls_token": (3,), "reg_token": (3,), "patch_embed.proj.bias": (1,)}
    reading = _finish("hf dinov3", state, outside, rules, known, IMAGENET, always)
    _concat_parts(reading.state, ("q", "k", "v"), "attn.qkv", "attn.", bare_keys=True)
    if reading.state["reg_token"].shape[1] == 0:
        del reading.state["reg_token"]
    return reading


def _read_hf_siglip_or_clip(state: State, outside: State, config: Config) -> Reading:
    clip = "embeddings.class_embedding" in state
    config = config.get("vision_config") or config
    rules = [
        (r"embeddings\.class_embedding", "cls_token"),
        (r"embeddings\.position_ids", None),
        (r"embeddings\.position_embedding\.weight", "pos_embed"),
        (rf"embeddings\.patch_embedding\.{_P}", r"patch_embed.proj.\1"),
        (rf"pre_layrnorm\.{_P}", r"norm_pre.\1"),
        (rf"{_L}layer_norm([12])\.{_P}", r"blocks.\1.norm\2.\3"),
        (rf"{_L}self_attn\.(q|k|v)_proj\.{_P}", r"blocks.\1.attn.\2.\3"),
        (rf"{_L}self_attn\.out_proj\.{_P}", r"blocks.\1.attn.proj.\2"),
        (rf"{_L}mlp\.(fc[12])\.{_P}", r"blocks.\1.mlp.\2.\3"),
        (rf"post_layernorm\.{_P}", r"norm.\1"),
        (r"head\.probe", "attn_pool.latent"),
        (rf"head\.attention\.in_proj_{_P}", r"attn_pool.qkv.\1"),
        (rf"head\.attention\.out_proj\.{_P}", r"attn_pool.proj.\1"),
        (rf"head\.layernorm\.{_P}", r"attn_pool.norm.\1"),
        (rf"head\.mlp\.(fc[12])\.{_P}", r"attn_pool.mlp.\1.\2"),
        (rf"classifier\.{_P}", r"head.\1"),
    ]
    act = "quick_gelu" if clip else "gelu_tanh"
    known = {"activation": act, **_hf_known(config, 1e-5 if clip else 1e-6)}
    known.update(qkv_bias=True, proj_bias=True, mlp_bias=True, pre_norm=clip, no_embed_class=False)
    name = "hf clip" if clip else "hf siglip"
    always: Ranks = {"pos_embed": (2,), "patch_embed.proj.weight": (4,) if clip else (2, 4)}
    always |= {"cls_token": (1,)} if clip else {"patch_embed.proj.bias": (1,)}
    reading = _finish(name, state, outside, rules, known, CLIP if clip else INCEPTION, always)
    _adopt_classifier(reading, outside)
    ours = reading.state
    _concat_parts(ours, ("q", "k", "v"), "attn.qkv", "attn.")
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
    known["resample"] = _options(how)
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


def _read_torchvision(state: State, outside: State, config: Config) -> Reading:
    layer = r"encoder\.layers\.encoder_layer_(\d+)\."
    hidden = "heads.pre_logits.weight" in state
    rules: Rules = [
        (r"class_token", "cls_token"),
        (r"encoder\.pos_embedding", "pos_embed"),
        (rf"conv_proj\.{_P}", r"patch_embed.proj.\1"),
        (rf"{layer}ln_([12])\.{_P}", r"blocks.\1.norm\2.\3"),
        (rf"{layer}self_attention\.in_proj_{_P}", r"blocks.\1.attn.qkv.\2"),
        (rf"{layer}self_attention\.out_proj\.{_P}", r"blocks.\1.attn.proj.\2"),
        (rf"{layer}mlp\.(?:0|linear_1)\.{_P}", r"blocks.\1.mlp.fc1.\2"),
        (rf"{layer}mlp\.(?:3|linear_2)\.{_P}", r"blocks.\1.mlp.fc2.\2"),
        (rf"encoder\.ln\.{_P}", r"norm.\1"),
        (rf"heads\.pre_logits\.{_P}", r"head.0.\1"),
        (rf"heads\.head\.{_P}", r"head.2.\1" if hidden else r"head.\1"),
    ]
    known = {"resample": _options(TORCHVISION), "no_embed_class": False, **_BIASED}
    if hidden:
        known["head_activation"] = "tanh"
    return _finish("torchvision", state, outside, rules, known, IMAGENET, _ALWAYS)


def _read_openai(state: State, outside: State, config: Config) -> Reading:
    layer = r"transformer\.resblocks\.(\d+)\."
    rules: Rules = [
        (r"class_embedding", "cls_token"),
        (r"positional_embedding", "pos_embed"),
        (r"conv1\.weight", "patch_embed.proj.weight"),
        (rf"ln_pre\.{_P}", r"norm_pre.\1"),
        (rf"ln_post\.{_P}", r"norm.\1"),
        (rf"{layer}ln_([12])\.{_P}", r"blocks.\1.norm\2.\3"),
        (rf"{layer}attn\.in_proj_{_P}", r"blocks.\1.attn.qkv.\2"),
        (rf"{layer}attn\.out_proj\.{_P}", r"blocks.\1.attn.proj.\2"),
        (rf"{layer}mlp\.c_fc\.{_P}", r"blocks.\1.mlp.fc1.\2"),
        (rf"{layer}mlp\.c_proj\.{_P}", r"blocks.\1.mlp.fc2.\2"),
        (rf"{layer}ls_([12])\.gamma", r"blocks.\1.ls\2.gamma"),
        (r"proj", "head.weight"),
    ]
    quick = "input_resolution" in outside
    settings = config.get("model_cfg", config)
    activation = "quick_gelu" if quick or settings.get("quick_gelu") else "gelu"
    known: dict[str, Any] = {"norm_eps": 1e-5, "activation": activation, **_BIASED}
    known.update(no_embed_class=False, pre_norm=quick)  # optional in open_clip (no_ln_pre)
    name, always = "openai" if quick else "open_clip", {"cls_token": (1,), "pos_embed": (2,)}
    reading = _finish(name, state, outside, rules, known, CLIP, always)
    reading.head_without_bias = True
    ours = reading.state
    width = (settings.get("vision_cfg") or {}).get("head_width")
    if width:
        known["heads"] = len(ours["cls_token"]) // width
    ours["cls_token"] = ours["cls_token"].view(1, 1, -1)
    ours["pos_embed"] = ours["pos_embed"][None]
    if "head.weight" in ours:
        ours["head.weight"] = ours["head.weight"].mT
    if not quick and _is_bare(config):
        reading.notes.append(
            "activation 'gelu' assumed; for weights trained on QuickGELU pass "
            "activation='quick_gelu'"
        )
    return reading


def _read_vit_pytorch(state: State, outside: State, config: Config) -> Reading:
    """Read vit-pytorch models with a bare Linear patch projection: its older ViT and some later."""
    if state["to_patch_embedding.1.weight"].ndim == 1:
        raise UsageError(
            "checkpoint: this is a vit-pytorch ViT. It has a LayerNorm before and one after its "
            "patch projection, which no standard ViT has, so fastvit.ViT cannot hold it; "
            "fastvit.accelerate(model) runs the vit-pytorch model itself on fastvit's kernels"
        )
    layer = r"transformer\.layers\.(\d+)\."
    old = any(k.endswith("1.fn.net.0.weight") for k in state)
    first, second = (0, 3) if old else (1, 4)
    rules: Rules = [
        (r"cls_token", "cls_token"),
        (r"pos_embedding", "pos_embed"),
        (rf"to_patch_embedding\.1\.{_P}", r"patch_embed.proj.\1"),
        (rf"{layer}0\.norm\.{_P}", r"blocks.\1.norm1.\2"),
        (rf"{layer}0\.(?:fn\.)?to_qkv\.weight", r"blocks.\1.attn.qkv.weight"),
        (rf"{layer}0\.(?:fn\.)?to_out\.0\.{_P}", r"blocks.\1.attn.proj.\2"),
        (rf"{layer}1\.{'norm' if old else 'net.0'}\.{_P}", r"blocks.\1.norm2.\2"),
        (rf"{layer}1\.(?:fn\.)?net\.{first}\.{_P}", r"blocks.\1.mlp.fc1.\2"),
        (rf"{layer}1\.(?:fn\.)?net\.{second}\.{_P}", r"blocks.\1.mlp.fc2.\2"),
        (rf"mlp_head\.0\.{_P}", r"norm.\1"),
        (rf"mlp_head\.1\.{_P}", r"head.\1"),
    ]
    known: dict[str, Any] = {"norm_eps": 1e-5, "pool": "cls", **_BIASED, "qkv_bias": False}
    always: Ranks = {"cls_token": (1, 2, 3), "pos_embed": (2, 3), "patch_embed.proj.bias": (1,)}
    always["patch_embed.proj.weight"] = (2,)
    reading = _finish("vit-pytorch", state, outside, rules, known, {}, always)
    ours = reading.state
    weight, pos = ours["patch_embed.proj.weight"], ours["pos_embed"]
    guesses = tuple(dict.fromkeys((config.get("channels", 3), 3, 1, 4, 2)))
    sides = {c: math.isqrt(weight.shape[1] // c) for c in guesses}
    channels = next((c for c, side in sides.items() if side**2 * c == weight.shape[1]), None)
    if channels is None:
        raise UsageError(
            f"checkpoint: {weight.shape[1]} values make no square patch of {guesses} channels"
        )
    grid = weight.reshape(len(weight), sides[channels], sides[channels], channels)
    ours["patch_embed.proj.weight"] = grid.permute(0, 3, 1, 2)
    ours["pos_embed"] = pos if pos.ndim == 3 else pos[None]
    ours["cls_token"] = ours["cls_token"].reshape(1, 1, -1)
    reading.notes.append(
        "pool 'cls' assumed; pool='mean' of vit-pytorch averages <cls> too, as fastvit.ViT does not"
    )
    return reading


def _is_dinov3(state: State) -> bool:
    return "storage_tokens" in state or "rope_embed.periods" in state


def _is_dinov2(state: State) -> bool:
    chunked = any(re.match(r"blocks\.\d+\.\d+\.", k) for k in state)
    packed = any(k.endswith("mlp.w12.weight") for k in state)
    return "register_tokens" in state or packed or chunked or _has_dinov2_mask(state)


def _has_dinov2_mask(state: State) -> bool:
    return "mask_token" in state and "pos_embed" in state and "blocks.0.ls1.gamma" in state


Reader = Callable[[State, State, Config], Reading]
# A key that identifies the family, a further condition, and the reader; the first match is used.
_FAMILIES: list[tuple[str, Callable[[State], bool], Reader]] = [
    ("patch_embed.proj.weight", _is_dinov3, _read_dinov3),
    ("patch_embed.proj.weight", _is_dinov2, _read_dinov2),
    ("patch_embed.proj.weight", lambda s: True, _read_timm),
    ("embeddings.patch_embeddings.projection.weight", lambda s: True, _read_hf_vit),
    ("embeddings.patch_embeddings.weight", lambda s: True, _read_hf_dinov3),
    ("embeddings.patch_embedding.weight", lambda s: True, _read_hf_siglip_or_clip),
    ("conv_proj.weight", lambda s: True, _read_torchvision),
    ("conv1.weight", lambda s: "class_embedding" in s, _read_openai),
    ("to_patch_embedding.1.weight", lambda s: True, _read_vit_pytorch),
]


def read(state: Mapping[str, Any], config: Config | None = None) -> Reading:
    """Translate any checkpoint into our names. Raises UsageError if no dialect matches."""
    state, within = unwrap(state)
    if not any(isinstance(v, Tensor) for v in state.values()):
        state = {k: tensor_of(k, v) if isinstance(v, np.ndarray) else v for k, v in state.items()}
    tensors = {WRAPPER_NAMES.sub("", k): v for k, v in state.items() if isinstance(v, Tensor)}
    for anchor, holds, reader in _FAMILIES:
        found = [k for k in tensors if k == anchor or k.endswith("." + anchor)]
        vits = {}
        for prefix in sorted((k.removesuffix(anchor) for k in found), key=_order):
            inside = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            if holds(inside):
                vits[prefix] = inside
        if not vits:
            continue
        prefix, *left = vits
        outside = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
        reading = reader(vits[prefix], outside, config or {})
        if within not in (None, *_WITHIN):
            reading.notes.append(f"its weights under {within!r} were taken")
        if left:
            others = ", ".join(map(repr, left))
            reading.notes.append(f"its weights under {prefix!r} were taken, not those of {others}")
        return reading
    some = ", ".join(list(tensors)[:5]) or "no tensors at all"
    if state and not tensors:
        some += f", only entries such as {', '.join(map(repr, list(state)[:5]))}; pass the state "
        some += "dict if it is one of them"
    raise UsageError(
        "checkpoint: unknown dialect; expected a ViT of timm, transformers, torchvision, DINOv2, "
        f"DINOv3, OpenAI or open_clip, or a JAX npz. Its keys begin: {some}"
    )


_AVERAGED = re.compile(r"(?:^|[._])(?:ema|teacher)(?=[._])")


def _order(prefix: str) -> tuple[bool, int]:
    """Sort key of prefixes: averaged weights before others, then shorter prefixes first."""
    return _AVERAGED.search(prefix) is None, len(prefix)


# Name parts that torch.compile, activation checkpointing and FSDP insert for wrapped modules.
WRAPPER_NAMES = re.compile(rf"\b({'|'.join(WRAPPERS)})\.")


# Keys under which training scripts store their weights, other than averaged ones.
_WITHIN = ("state_dict", "model_state_dict", "model", "net", "module")


def unwrap(state: Mapping[str, Any]) -> tuple[Mapping[str, Any], str | None]:
    """The state dict nested in a training checkpoint, averaged weights before others, and its key
    there, or None if it was not nested."""
    for name in ("state_dict_ema", "model_ema", "teacher", *_WITHIN):
        inner = state.get(name)
        if isinstance(inner, Mapping) and inner:
            return unwrap(inner)[0], name
    return state, None


def _finish(
    dialect: str,
    state: State,
    outside: State,
    rules: Rules,
    known: dict[str, Any],
    data: dict[str, Any],
    always: Ranks | None = None,
) -> Reading:
    """Rename each key by the first pattern that matches all of it. Raises UsageError for keys that
    no pattern matches, and for tensors of `always` that are missing or of another rank."""
    patterns = [(re.compile(pattern), new) for pattern, new in rules]
    reading = Reading(dialect, {}, known, list(outside), data=dict(data))
    unknown = []
    for key, value in state.items():
        for pattern, new in patterns:
            match = pattern.fullmatch(key)
            if match is None:
                continue
            if new is None:
                reading.dropped.append(key)
            else:
                reading.state[match.expand(new)] = value
            break
        else:
            unknown.append(key)
    if unknown:
        raise UsageError(
            f"checkpoint: read as {dialect}, but it has the unexpected {', '.join(unknown)}"
        )
    lacking = [name for name in always or () if name not in reading.state]
    if lacking:
        raise UsageError(f"checkpoint: read as {dialect}, but it lacks {', '.join(lacking)}")
    check_tensors(reading.state, always)
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


def _is_bare(config: Config) -> bool:
    """True if no config came with the tensors; `channels` is from the caller."""
    return not config.keys() - {"channels"}


def tensor_of(name: str, array: np.ndarray) -> Tensor:
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:  # bfloat16, which numpy lacks
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).float()
    if array.dtype.kind not in "fiu":
        raise UsageError(f"checkpoint: {name} has dtype {array.dtype}, expected numbers")
    array = np.ascontiguousarray(array)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _options(how: Resample) -> dict[str, Any]:
    return {k: v for k, v in vars(how).items() if v != getattr(Resample(), k)}


def _adopt_classifier(reading: Reading, outside: State) -> None:
    for name in ("weight", "bias"):
        if f"classifier.{name}" in outside:
            reading.state[f"head.{name}"] = outside[f"classifier.{name}"]
            reading.dropped.remove(f"classifier.{name}")


def _fold_prefix(reading: Reading, registers: bool) -> None:
    """With registers, DINOv2 adds positions to <cls> and patches only: fold <cls>'s into it."""
    if registers:
        cls, pos = (reading.state[name] for name in ("cls_token", "pos_embed"))
        if not pos.shape[1] or cls.shape != pos[:, :1].shape:
            raise UsageError(
                f"checkpoint: cls_token is {tuple(cls.shape)}, pos_embed {tuple(pos.shape)}; "
                "expected (1, 1, dim) and a row for each patch and one for <cls>"
            )
        reading.state["cls_token"] = reading.state["cls_token"] + pos[:, :1]
        reading.state["pos_embed"] = pos[:, 1:]
        reading.known["no_embed_class"] = True


def _concat_parts(
    state: State,
    parts: tuple[str, ...],
    name: str,
    within: str = "mlp.fc1.",
    bare_keys: bool = False,
) -> None:
    """Concatenate blocks.i.attn.{q, k, v}.* to blocks.i.attn.qkv.*, or likewise other parts.

    bare_keys: k may lack a bias; those of q and v then become q_bias and v_bias.
    """
    for i in sorted({k.split(".")[1] for k in state if k.startswith("blocks.")}, key=int):
        block = f"blocks.{i}."
        for kind in ("weight", "bias"):
            found = {p: state.pop(f"{block}{within}{p}.{kind}", None) for p in parts}
            tensors = {p: t for p, t in found.items() if t is not None}
            if len({tuple(t.shape) for t in tensors.values()}) > 1:
                shapes = ", ".join(f"{p} {tuple(t.shape)}" for p, t in tensors.items())
                raise UsageError(
                    f"checkpoint: {block}{within}*.{kind} are {shapes}; expected one shape"
                )
            if len(tensors) == len(parts):
                state[f"{block}{name}.{kind}"] = torch.cat([*tensors.values()])
            elif bare_keys and kind == "bias" and tensors.keys() == {"q", "v"}:
                state[f"{block}attn.q_bias"], state[f"{block}attn.v_bias"] = tensors.values()
            elif tensors:
                lacking = ", ".join(f"{block}{within}{p}.{kind}" for p in parts if p not in tensors)
                raise UsageError(f"checkpoint: it lacks {lacking}")
