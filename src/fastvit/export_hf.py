"""Export to transformers' ViT, Dinov2, Dinov2WithRegisters, DINOv3ViT, SiglipVision or CLIPVision:
tensor names, and a config.json for from_pretrained."""

import re
from typing import Any

import torch

from fastvit.export_rules import State, fit_patch_bias, note_resample, refuse
from fastvit.model import ViT
from fastvit.pos_embed import HUGGING_FACE, Resample


def preprocessor(model: ViT) -> dict[str, Any]:
    """The config of transformers' ViTImageProcessor: resize to the model's size, normalize."""
    cfg, (height, width) = model.default_cfg, model.patch_embed.img_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 2 if cfg.get("interpolation") == "bilinear" else 3,  # Pillow's numbers
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": cfg["mean"],
        "image_std": cfg["std"],
    }


def to_hf(model: ViT, state: State) -> tuple[State, dict[str, Any]]:
    c = model.config
    for name, plain in (("qk_norm", False), ("norm", "layernorm"), ("head_hidden_dim", None)):
        if c[name] != plain:
            refuse("transformers", f"{name}={c[name]!r}")
    if c["dim_head"] not in (None, c["dim"] // c["heads"]):
        refuse("transformers", f"dim_head {c['dim_head']} other than dim / heads")
    fit_patch_bias("transformers", state, c["pre_norm"])
    state = _unpack_qkv(state)
    (height, width), (p_h, p_w) = model.patch_embed.img_size, model.patch_embed.patch_size
    config = {
        "hidden_size": c["dim"],
        "num_hidden_layers": c["depth"],
        "num_attention_heads": c["heads"],
        "intermediate_size": c["mlp_dim"],
        "hidden_act": "gelu_pytorch_tanh" if c["activation"] == "gelu_tanh" else c["activation"],
        "layer_norm_eps": c["norm_eps"],
        "image_size": height if height == width else [height, width],
        "num_channels": c["channels"],
        "patch_size": p_h if p_h == p_w else [p_h, p_w],
    }
    if model.num_classes:
        names = model.class_names or [f"LABEL_{i}" for i in range(model.num_classes)]
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        config["label2id"] = {name: i for i, name in enumerate(names)}
    if c["rope"] == "dinov3":
        return _to_dinov3(model, state, config)
    if c["rope"] is not None or c["pos_embed"] != "learned":
        refuse("transformers", "this RoPE, or a ViT without positions")
    _fill_biases(state, ("attn.proj", "mlp.fc1", "mlp.fc2"))
    if c["pool"] == "map":
        return _to_siglip(model, state, config)
    if c["pre_norm"]:
        return _to_clip(model, state, config)
    return _to_vit(model, state, config)


def _fill_biases(state: State, names: tuple[str, ...]) -> None:
    """Add zero biases where transformers always has a bias."""
    for key, weight in list(state.items()):
        if key.startswith("blocks.") and key.endswith(tuple(f"{n}.weight" for n in names)):
            state.setdefault(f"{key.removesuffix('weight')}bias", weight.new_zeros(len(weight)))


def _unpack_qkv(state: State) -> State:
    out = {}
    for key, value in state.items():
        match = re.fullmatch(r"(blocks\.\d+\.attn\.)qkv\.(weight|bias)", key)
        if match is None:
            out[key] = value
            continue
        for name, part in zip("qkv", value.chunk(3), strict=True):
            out[f"{match[1]}{name}.{match[2]}"] = part
    return out


def _rename(state: State, rules: list[tuple[str, str]], dialect: str) -> State:
    patterns = [(re.compile(p), new) for p, new in rules]
    out = {}
    for key, value in state.items():
        match = next(((m, new) for p, new in patterns if (m := p.fullmatch(key))), None)
        if match is None:
            refuse(dialect, key)
        else:
            out[match[0].expand(match[1])] = value
    return out


_P = r"(weight|bias)"
_B = r"blocks\.(\d+)\."


def _to_vit(model: ViT, state: State, config: dict[str, Any]) -> tuple[State, dict[str, Any]]:
    c = model.config
    dinov2 = c["layer_scale"] is not None
    kind = "Dinov2WithRegisters" if c["registers"] else "Dinov2" if dinov2 else "ViT"
    if c["registers"] and not dinov2:
        refuse("transformers", "registers without LayerScale")
    if not c["class_token"] or "norm.weight" not in state:
        refuse("transformers' ViT", f"pool {c['pool']!r} or class_token={c['class_token']}")
    pool = "cls_mean" if dinov2 else "cls"
    if model.num_classes and c["pool"] != pool:
        refuse(f"{kind}ForImageClassification", f"a head on pool {c['pool']!r}, only on {pool!r}")
    if c["mlp"] == "swiglu" or (c["mlp"] == "swiglu_packed" and not dinov2):
        refuse(kind, f"mlp {c['mlp']!r}")
    grid = model.patch_embed.grid_size
    if dinov2 and grid[0] != grid[1]:  # Dinov2 assumes a square
        refuse(kind, f"an oblong table of {grid} positions; set_input_size resamples it")
    state = _positions_for_hf(model, state)
    layer = r"encoder.layer.\1."
    norms = ("norm1", "norm2") if dinov2 else ("layernorm_before", "layernorm_after")
    fc1, fc2 = ("intermediate.dense", "output.dense")
    if dinov2:
        packed = c["mlp"] == "swiglu_packed"
        fc1, fc2 = ("mlp.weights_in", "mlp.weights_out") if packed else ("mlp.fc1", "mlp.fc2")
    rules = [
        (r"cls_token", "embeddings.cls_token"),
        (r"reg_token", "embeddings.register_tokens"),
        (r"pos_embed", "embeddings.position_embeddings"),
        (rf"patch_embed\.proj\.{_P}", r"embeddings.patch_embeddings.projection.\1"),
        (rf"{_B}norm1\.{_P}", rf"{layer}{norms[0]}.\2"),
        (rf"{_B}norm2\.{_P}", rf"{layer}{norms[1]}.\2"),
        *(
            (rf"{_B}attn\.{n[0]}\.{_P}", rf"{layer}attention.attention.{n}.\2")
            for n in ("query", "key", "value")
        ),
        (rf"{_B}attn\.proj\.{_P}", rf"{layer}attention.output.dense.\2"),
        (rf"{_B}mlp\.fc1\.{_P}", rf"{layer}{fc1}.\2"),
        (rf"{_B}mlp\.fc2\.{_P}", rf"{layer}{fc2}.\2"),
        (rf"{_B}ls([12])\.gamma", rf"{layer}layer_scale\2.lambda1"),
        (rf"norm\.{_P}", r"layernorm.\1"),
        (rf"head\.{_P}", r"classifier.\1"),
    ]
    state = _rename(state, rules, f"transformers' {kind}")
    if dinov2:
        state["embeddings.mask_token"] = torch.zeros(1, c["dim"])
        config.update(mlp_ratio=_mlp_ratio(c), use_swiglu_ffn=c["mlp"] == "swiglu_packed")
        del config["intermediate_size"]
        if c["registers"]:
            config["num_register_tokens"] = c["registers"]
        native = Resample() if c["registers"] else HUGGING_FACE
    else:
        native = HUGGING_FACE
    config.update(qkv_bias=bool(c["qkv_bias"]), model_type=_MODEL_TYPES[kind])
    config["architectures"] = [
        f"{kind}{'ForImageClassification' if model.num_classes else 'Model'}"
    ]
    note_resample(model, native, kind)
    if model.num_classes:
        head = ("classifier.",)
        base = _MODEL_TYPES[kind]
        state = {k if k.startswith(head) else f"{base}.{k}": v for k, v in state.items()}
    return state, config


_MODEL_TYPES = {
    "ViT": "vit",
    "Dinov2": "dinov2",
    "Dinov2WithRegisters": "dinov2_with_registers",
}


def _mlp_ratio(c: dict[str, Any]) -> int:
    """Dinov2Config's integer ratio; a SwiGLU has 2/3 of dim * ratio, rounded up to 8s."""
    dim, hidden, packed = c["dim"], c["mlp_dim"], c["mlp"] == "swiglu_packed"
    for ratio in (4, *range(1, 65)):
        made = (int(dim * ratio * 2 / 3) + 7) // 8 * 8 if packed else dim * ratio
        if made == hidden:
            return ratio
    return refuse("Dinov2", f"mlp_dim {hidden} with dim {dim}; its mlp_ratio is an int")


def _positions_for_hf(model: ViT, state: State) -> State:
    """Give the position table a row for <cls> and none for registers, as in transformers."""
    c, dim = model.config, model.embed_dim
    pos = state["pos_embed"]
    if c["no_embed_class"]:
        return {**state, "pos_embed": torch.cat([pos.new_zeros(1, 1, dim), pos], dim=1)}
    if not c["registers"]:
        return state
    own, rest = pos[:, 1 : 1 + c["registers"]], pos[:, 1 + c["registers"] :]
    pos = torch.cat([pos[:, :1], rest], dim=1)
    return {**state, "pos_embed": pos, "reg_token": state["reg_token"] + own}


def _to_dinov3(model: ViT, state: State, config: dict[str, Any]) -> tuple[State, dict[str, Any]]:
    c = model.config
    if c["mlp"] == "swiglu_packed" or not c["class_token"] or c["layer_scale"] is None:
        refuse("DINOv3ViT", "a packed SwiGLU, or a model without <cls> or LayerScale")
    if model.num_classes or "norm.weight" not in state:
        refuse("DINOv3ViT", "a classifier, or a norm after the pooling")
    layer, gated = r"layer.\1.", c["mlp"] == "swiglu"
    for i in range(c["depth"]):
        for n in "qv":
            bias = state.pop(f"blocks.{i}.attn.{n}_bias", None)
            if bias is not None:
                state[f"blocks.{i}.attn.{n}.bias"] = bias
    rules = [
        (r"cls_token", "embeddings.cls_token"),
        (r"reg_token", "embeddings.register_tokens"),
        (rf"patch_embed\.proj\.{_P}", r"embeddings.patch_embeddings.\1"),
        (rf"{_B}(norm[12])\.{_P}", rf"{layer}\2.\3"),
        (rf"{_B}attn\.([qkv])\.{_P}", rf"{layer}attention.\2_proj.\3"),
        (rf"{_B}attn\.proj\.{_P}", rf"{layer}attention.o_proj.\2"),
        (rf"{_B}mlp\.fc1_g\.{_P}", rf"{layer}mlp.gate_proj.\2"),
        (rf"{_B}mlp\.fc1(?:_x)?\.{_P}", rf"{layer}mlp.up_proj.\2"),
        (rf"{_B}mlp\.fc2\.{_P}", rf"{layer}mlp.down_proj.\2"),
        (rf"{_B}ls([12])\.gamma", rf"{layer}layer_scale\2.lambda1"),
        (rf"norm\.{_P}", r"norm.\1"),
    ]
    state = _rename(state, rules, "transformers' DINOv3ViT")
    state["embeddings.mask_token"] = torch.zeros(1, 1, c["dim"])
    if not c["registers"]:
        state["embeddings.register_tokens"] = torch.zeros(1, 0, c["dim"])
    config.update(
        model_type="dinov3_vit",
        architectures=["DINOv3ViTModel"],
        num_register_tokens=c["registers"],
        use_gated_mlp=gated,
        query_bias=bool(c["qkv_bias"]),
        key_bias=c["qkv_bias"] is True,
        value_bias=bool(c["qkv_bias"]),
        proj_bias=c["proj_bias"],
        mlp_bias=c["mlp_bias"],
        rope_theta=c["rope_theta"] or 100.0,
        hidden_act="silu" if gated else config["hidden_act"],
    )
    return state, config


def _to_siglip(model: ViT, state: State, config: dict[str, Any]) -> tuple[State, dict[str, Any]]:
    if model.config["class_token"] or model.config["registers"] or model.num_classes:
        refuse("SiglipVisionModel", "<cls>, registers or a classifier on attention pooling")
    _check_tower("SiglipVisionModel", model, state)
    for kind in ("weight", "bias"):
        q, kv = state.pop(f"attn_pool.q.{kind}"), state.pop(f"attn_pool.kv.{kind}")
        state[f"head.attention.in_proj_{kind}"] = torch.cat([q, kv])
    rules = [
        *_VISION_TOWER_RULES,
        (r"attn_pool\.latent", "head.probe"),
        (r"(head\.attention\.in_proj_(?:weight|bias))", r"\1"),
        (rf"attn_pool\.proj\.{_P}", r"head.attention.out_proj.\1"),
        (rf"attn_pool\.norm\.{_P}", r"head.layernorm.\1"),
        (rf"attn_pool\.mlp\.(fc[12])\.{_P}", r"head.mlp.\1.\2"),
    ]
    state = _rename(state, rules, "SiglipVisionModel")
    state["embeddings.position_embedding.weight"] = state["embeddings.position_embedding.weight"][0]
    config.update(model_type="siglip_vision_model", architectures=["SiglipVisionModel"])
    note_resample(model, HUGGING_FACE, "Siglip")
    return {f"vision_model.{k}": v for k, v in state.items()}, config


def _to_clip(model: ViT, state: State, config: dict[str, Any]) -> tuple[State, dict[str, Any]]:
    c = model.config
    if c["registers"] or not c["class_token"] or c["layer_scale"] is not None:
        refuse("CLIPVisionModel", "registers, LayerScale, or no <cls>")
    if c["pool"] != "cls":
        refuse("CLIPVisionModel", f"pool {c['pool']!r}")
    _check_tower("CLIPVisionModel", model, state)
    bias = state.pop("head.bias", None)
    if bias is not None and bias.any():
        refuse("CLIPVisionModelWithProjection", "a head with a bias that is not zero")
    state = _positions_for_hf(model, state)
    rules = [
        *_VISION_TOWER_RULES,
        (r"cls_token", "embeddings.class_embedding"),
        (rf"norm_pre\.{_P}", r"pre_layrnorm.\1"),
        (r"head\.weight", "visual_projection.weight"),
    ]
    state = _rename(state, rules, "CLIPVisionModel")
    for name in ("position_embedding.weight", "class_embedding"):
        tensor = state[f"embeddings.{name}"]
        state[f"embeddings.{name}"] = tensor[0] if name != "class_embedding" else tensor.flatten()
    kind = "WithProjection" if model.num_classes else ""
    for name in ("id2label", "label2id"):
        config.pop(name, None)
    config.update(model_type="clip_vision_model", architectures=[f"CLIPVisionModel{kind}"])
    if model.num_classes:
        config["projection_dim"] = model.num_classes
    note_resample(model, HUGGING_FACE, "CLIPVisionModel")
    own = "visual_projection.weight"
    return {k if k == own else f"vision_model.{k}": v for k, v in state.items()}, config


def _check_tower(kind: str, model: ViT, state: State) -> None:
    stem = model.patch_embed
    if "norm.weight" not in state:
        refuse(kind, "a model without a final norm before the pooling")
    if model.config["mlp"] != "mlp":
        refuse(kind, f"mlp {model.config['mlp']!r}")
    if len({*stem.img_size}) > 1 or len({*stem.patch_size}) > 1:
        refuse(kind, f"images of {stem.img_size} or patches of {stem.patch_size}, only squares")
    _fill_biases(state, ("attn.q", "attn.k", "attn.v"))


_VISION_TOWER_RULES = [
    (r"pos_embed", "embeddings.position_embedding.weight"),
    (rf"patch_embed\.proj\.{_P}", r"embeddings.patch_embedding.\1"),
    (rf"{_B}norm([12])\.{_P}", r"encoder.layers.\1.layer_norm\2.\3"),
    (rf"{_B}attn\.([qkv])\.{_P}", r"encoder.layers.\1.self_attn.\2_proj.\3"),
    (rf"{_B}attn\.proj\.{_P}", r"encoder.layers.\1.self_attn.out_proj.\2"),
    (rf"{_B}mlp\.(fc[12])\.{_P}", r"encoder.layers.\1.mlp.\2.\3"),
    (rf"norm\.{_P}", r"post_layernorm.\1"),
]
