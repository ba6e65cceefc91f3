"""Translate the tensor names of other libraries' checkpoints into ours.

Each dialect is a table of key patterns plus postprocessing, such as joining q, k and v or folding
positions into <cls>. `read` finds the dialect by a key that only its family has, and strips any
prefix (`module.`, `vit.`, `backbone.`, `visual.`) before that key.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from fastvit import dialects_hf
from fastvit.dialect_rules import (
    ALWAYS,
    BIASED,
    BLOCK,
    EVA_POOL,
    PARAM,
    Config,
    Ranks,
    Reading,
    Rules,
    State,
    adopt_head,
    finish,
    fold_prefix,
    is_bare,
    options_of,
    refuse_distilled,
    tensor_of,
)
from fastvit.errors import UsageError
from fastvit.plain import bare_name
from fastvit.pos_embed import DINOV2, TORCHVISION, Resample
from fastvit.presets import CLIP, IMAGENET

_OURS: Rules = [
    (r"(cls_token|pos_embed|reg_token)", r"\1"),
    (rf"(patch_embed\.proj|norm_pre|norm|fc_norm|head|head\.0|head\.2)\.{PARAM}", r"\1.\2"),
    (rf"{BLOCK}(norm1|norm2|attn\.(?:qkv|proj|q_norm|k_norm))\.{PARAM}", r"blocks.\1.\2.\3"),
    (rf"{BLOCK}attn\.(q_bias|v_bias)", r"blocks.\1.attn.\2"),
    (rf"{BLOCK}mlp\.(fc1|fc2|fc1_g|fc1_x)\.{PARAM}", r"blocks.\1.mlp.\2.\3"),
    (rf"{BLOCK}(ls1|ls2)\.gamma", r"blocks.\1.\2.gamma"),
    (rf"{BLOCK}gamma_([12])", r"blocks.\1.ls\2.gamma"),
    (r"attn_pool\.latent", r"attn_pool.latent"),
    (rf"attn_pool\.(q|kv|proj|norm|mlp\.fc1|mlp\.fc2)\.{PARAM}", r"attn_pool.\1.\2"),
]


def _read_timm(state: State, outside: State, config: Config) -> Reading:
    """Read timm's VisionTransformer and Eva, fastvit, DeiT III and DINO, which share names."""
    rules = [
        *_OURS,
        (rf"pre_logits\.fc\.{PARAM}", r"head.0.\1"),
        (r"mask_token", None),
        (rf"(head_dist|norm_head)\.{PARAM}", None),
    ]
    if "pre_logits.fc.weight" in state:
        rules.insert(0, (rf"head\.{PARAM}", r"head.2.\1"))
    refuse_distilled(state, "dist_token")
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
    reading = finish("timm", state, outside, rules, known, data)
    if pools and "blocks.0.attn.q_bias" in state:
        reading.notes.append(f"taken for fastvit's own: {EVA_POOL}")
    return reading


def _read_dinov2(state: State, outside: State, config: Config) -> Reading:
    state = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", k): v for k, v in state.items()}
    registers = "register_tokens" in state
    rules = [
        (r"register_tokens", "reg_token"),
        (r"mask_token", None),
        (rf"{BLOCK}mlp\.w12\.{PARAM}", r"blocks.\1.mlp.fc1.\2"),
        (rf"{BLOCK}mlp\.w3\.{PARAM}", r"blocks.\1.mlp.fc2.\2"),
        *_OURS,
    ]
    known: dict[str, Any] = dict(dynamic_img_size=True, no_embed_class=False)
    known["resample"] = options_of(Resample() if registers else DINOV2)
    reading = finish("dinov2", state, outside, rules, known, IMAGENET, ALWAYS)
    adopt_head(reading, outside, "linear_head")
    fold_prefix(reading, registers)
    return reading


def _read_dinov3(state: State, outside: State, config: Config) -> Reading:
    state = dict(state)
    for key in [k for k in state if re.fullmatch(rf"{BLOCK}attn\.qkv\.bias", k)]:
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
        (rf"(local_cls_norm|cls_norm)\.{PARAM}", None),
        (rf"{BLOCK}mlp\.w1\.{PARAM}", r"blocks.\1.mlp.fc1_g.\2"),
        (rf"{BLOCK}mlp\.w2\.{PARAM}", r"blocks.\1.mlp.fc1_x.\2"),
        (rf"{BLOCK}mlp\.w3\.{PARAM}", r"blocks.\1.mlp.fc2.\2"),
        *_OURS,
    ]
    known = dict(rope="dinov3", norm_eps=1e-5, dynamic_img_size=True, pool="cls")
    always = {k: v for k, v in ALWAYS.items() if k != "pos_embed"}
    return finish("dinov3", state, outside, rules, known, IMAGENET, always)


def _read_torchvision(state: State, outside: State, config: Config) -> Reading:
    layer = r"encoder\.layers\.encoder_layer_(\d+)\."
    hidden = "heads.pre_logits.weight" in state
    rules: Rules = [
        (r"class_token", "cls_token"),
        (r"encoder\.pos_embedding", "pos_embed"),
        (rf"conv_proj\.{PARAM}", r"patch_embed.proj.\1"),
        (rf"{layer}ln_([12])\.{PARAM}", r"blocks.\1.norm\2.\3"),
        (rf"{layer}self_attention\.in_proj_{PARAM}", r"blocks.\1.attn.qkv.\2"),
        (rf"{layer}self_attention\.out_proj\.{PARAM}", r"blocks.\1.attn.proj.\2"),
        (rf"{layer}mlp\.(?:0|linear_1)\.{PARAM}", r"blocks.\1.mlp.fc1.\2"),
        (rf"{layer}mlp\.(?:3|linear_2)\.{PARAM}", r"blocks.\1.mlp.fc2.\2"),
        (rf"encoder\.ln\.{PARAM}", r"norm.\1"),
        (rf"heads\.pre_logits\.{PARAM}", r"head.0.\1"),
        (rf"heads\.head\.{PARAM}", r"head.2.\1" if hidden else r"head.\1"),
    ]
    known = {"resample": options_of(TORCHVISION), "no_embed_class": False, **BIASED}
    if hidden:
        known["head_activation"] = "tanh"
    return finish("torchvision", state, outside, rules, known, IMAGENET, ALWAYS)


def _read_openai(state: State, outside: State, config: Config) -> Reading:
    layer = r"transformer\.resblocks\.(\d+)\."
    rules: Rules = [
        (r"class_embedding", "cls_token"),
        (r"positional_embedding", "pos_embed"),
        (r"conv1\.weight", "patch_embed.proj.weight"),
        (rf"ln_pre\.{PARAM}", r"norm_pre.\1"),
        (rf"ln_post\.{PARAM}", r"norm.\1"),
        (rf"{layer}ln_([12])\.{PARAM}", r"blocks.\1.norm\2.\3"),
        (rf"{layer}attn\.in_proj_{PARAM}", r"blocks.\1.attn.qkv.\2"),
        (rf"{layer}attn\.out_proj\.{PARAM}", r"blocks.\1.attn.proj.\2"),
        (rf"{layer}mlp\.c_fc\.{PARAM}", r"blocks.\1.mlp.fc1.\2"),
        (rf"{layer}mlp\.c_proj\.{PARAM}", r"blocks.\1.mlp.fc2.\2"),
        (rf"{layer}ls_([12])\.gamma", r"blocks.\1.ls\2.gamma"),
        (r"proj", "head.weight"),
    ]
    quick = "input_resolution" in outside
    settings = config.get("model_cfg", config)
    activation = "quick_gelu" if quick or settings.get("quick_gelu") else "gelu"
    known: dict[str, Any] = {"norm_eps": 1e-5, "activation": activation, **BIASED}
    known.update(no_embed_class=False, pre_norm=quick)  # optional in open_clip (no_ln_pre)
    name, always = "openai" if quick else "open_clip", {"cls_token": (1,), "pos_embed": (2,)}
    reading = finish(name, state, outside, rules, known, CLIP, always)
    reading.head_without_bias = True
    ours = reading.state
    width = (settings.get("vision_cfg") or {}).get("head_width")
    if width:
        known["heads"] = len(ours["cls_token"]) // width
    ours["cls_token"] = ours["cls_token"].view(1, 1, -1)
    ours["pos_embed"] = ours["pos_embed"][None]
    if "head.weight" in ours:
        ours["head.weight"] = ours["head.weight"].mT
    if not quick and is_bare(config):
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
        (rf"to_patch_embedding\.1\.{PARAM}", r"patch_embed.proj.\1"),
        (rf"{layer}0\.norm\.{PARAM}", r"blocks.\1.norm1.\2"),
        (rf"{layer}0\.(?:fn\.)?to_qkv\.weight", r"blocks.\1.attn.qkv.weight"),
        (rf"{layer}0\.(?:fn\.)?to_out\.0\.{PARAM}", r"blocks.\1.attn.proj.\2"),
        (rf"{layer}1\.{'norm' if old else 'net.0'}\.{PARAM}", r"blocks.\1.norm2.\2"),
        (rf"{layer}1\.(?:fn\.)?net\.{first}\.{PARAM}", r"blocks.\1.mlp.fc1.\2"),
        (rf"{layer}1\.(?:fn\.)?net\.{second}\.{PARAM}", r"blocks.\1.mlp.fc2.\2"),
        (rf"mlp_head\.0\.{PARAM}", r"norm.\1"),
        (rf"mlp_head\.1\.{PARAM}", r"head.\1"),
    ]
    known: dict[str, Any] = {"norm_eps": 1e-5, "pool": "cls", **BIASED, "qkv_bias": False}
    always: Ranks = {"cls_token": (1, 2, 3), "pos_embed": (2, 3), "patch_embed.proj.bias": (1,)}
    always["patch_embed.proj.weight"] = (2,)
    reading = finish("vit-pytorch", state, outside, rules, known, {}, always)
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
    ("embeddings.patch_embeddings.projection.weight", lambda s: True, dialects_hf.read_vit),
    ("embeddings.patch_embeddings.weight", lambda s: True, dialects_hf.read_dinov3),
    ("embeddings.patch_embedding.weight", lambda s: True, dialects_hf.read_siglip_or_clip),
    ("conv_proj.weight", lambda s: True, _read_torchvision),
    ("conv1.weight", lambda s: "class_embedding" in s, _read_openai),
    ("to_patch_embedding.1.weight", lambda s: True, _read_vit_pytorch),
]


def read(state: Mapping[str, Any], config: Config | None = None) -> Reading:
    """Translate any checkpoint into our names. Raises UsageError if no dialect matches."""
    state, within = unwrap(state)
    if not any(isinstance(v, Tensor) for v in state.values()):
        state = {k: tensor_of(k, v) if isinstance(v, np.ndarray) else v for k, v in state.items()}
    tensors = {bare_name(k): v for k, v in state.items() if isinstance(v, Tensor)}
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
