"""Export a `fastvit.ViT` under the tensor names, and as the files, of timm and transformers."""

import json
import logging
import re
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save
from torch import Tensor, nn

from fastvit.checkpoint_files import CONFIGS, PREPROCESSOR, SUFFIXES, WEIGHTS
from fastvit.errors import UsageError
from fastvit.model import TIMM_POOLS, ViT
from fastvit.pos_embed import HUGGING_FACE, Resample
from fastvit.saving import current_architecture, json_value, replacing, replacing_folder, weights_of

State = dict[str, Tensor]
log = logging.getLogger("fastvit")
DIALECTS = ("timm", "hf")
# Files of a checkpoint or a run.
_TAKEN = (*WEIGHTS, *CONFIGS, PREPROCESSOR, "model.json", "state.pt")
_TIMM_POOLS = {ours: theirs for theirs, ours in TIMM_POOLS.items()}
_TIMM_WORDS = {
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


def export_checkpoint(model: ViT, dialect: str, path: str | Path | None = None) -> State:
    """Return the model's tensors under the keys of `dialect`, "timm" or "hf"; save them to `path`.

    A path that ends in .safetensors gets the tensors alone; any other becomes a folder with
    config.json and model.safetensors, for `timm.create_model("local-dir:PATH")` or transformers'
    `from_pretrained(PATH)`, with a preprocessor_config.json. "hf" is ViT, Dinov2,
    Dinov2WithRegisters, DINOv3ViT, SiglipVision or CLIPVision, whichever can represent this model.
    Raises UsageError if the dialect cannot, or if `path` already holds a checkpoint; only a
    .safetensors file without a config is replaced.
    """
    if not isinstance(model, ViT):
        raise TypeError(f"model must be a fastvit.ViT, got {type(model).__name__}")
    if dialect not in DIALECTS:
        raise UsageError(f"dialect must be one of {DIALECTS}, got {dialect!r}")
    state = weights_of(model)
    model = current_architecture(model, state)
    path = None if path is None else Path(path)
    bare = path is None or path.suffix.lower() == ".safetensors"
    if path is not None and not bare and path.suffix.lower() in SUFFIXES and not path.is_dir():
        raise UsageError(f"export_checkpoint: expected a folder or .safetensors, got {path}")
    if dialect == "timm":
        state, config = _to_timm(model, state), {} if bare else _timm_config(model)
    else:
        state, config = _to_hf(model, state)
    state = {k: v.contiguous().clone() for k, v in state.items()}
    if path is None:
        return state
    data = save(state, metadata={"format": "pt"})
    if bare:
        if path.exists() and path.with_suffix(".json").exists():
            raise UsageError(
                f"export_checkpoint: {path} already holds a checkpoint, with its config beside it; "
                "choose another name"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, data)
        return state
    if path.is_file():
        raise UsageError(f"export_checkpoint: {path} is a file; expected a folder or .safetensors")
    there = sorted(f.name for f in path.iterdir() if f.name in _TAKEN) if path.is_dir() else []
    if there:
        raise UsageError(
            f"export_checkpoint: {path} already holds a checkpoint ({', '.join(there)}); choose "
            "another folder"
        )
    files = {"model.safetensors": data, "config.json": _json(config)}
    if dialect == "hf":
        files[PREPROCESSOR] = _json(_preprocessor(model))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        for name, content in files.items():
            _write(path / name, content)
        return state
    with replacing_folder(path) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
    return state


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, default=json_value) + "\n").encode()


def _preprocessor(model: ViT) -> dict[str, Any]:
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


def _write(path: Path, data: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def _refuse(dialect: str, what: str) -> NoReturn:
    raise UsageError(f"export_checkpoint: {dialect} has no place for {what}")


def _to_timm(model: ViT, state: State) -> State:
    c = model.config
    if c["head_hidden_dim"]:
        _refuse("timm", "a head of two layers (head_hidden_dim)")
    if c["pool"] == "cls_mean":
        _refuse("timm", "pool 'cls_mean'")
    if c["dim_head"] not in (None, c["dim"] // c["heads"]):
        _refuse("timm", f"dim_head {c['dim_head']} other than dim / heads")
    if c["mlp_bias"] != c["proj_bias"]:
        _refuse("timm", f"mlp_bias={c['mlp_bias']} with proj_bias={c['proj_bias']}")
    if c["pool"] == "map" and (_is_eva(c) or c["mlp"] == "swiglu_packed"):
        _refuse("timm", "this pool 'map', with RoPE or beside a packed SwiGLU")
    _fit_patch_bias("timm", state, c["pre_norm"])
    if model.pos_embed is not None:
        _note_resample(model, Resample(), "timm")
    if _is_eva(c):
        rename = {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}
        pattern = re.compile("|".join(rename))
        state = {pattern.sub(lambda m: rename[m[0]], k): v for k, v in state.items()}
    return state


def _fit_patch_bias(dialect: str, state: State, pre_norm: bool) -> None:
    """Add a zero patch bias, or with pre_norm drop a zero one, as timm and CLIP expect."""
    weight, bias = (state.get(f"patch_embed.proj.{kind}") for kind in ("weight", "bias"))
    assert weight is not None
    if not pre_norm:
        state.setdefault("patch_embed.proj.bias", weight.new_zeros(len(weight)))
    elif bias is not None:
        if bias.any():
            _refuse(dialect, "a patch bias (patch_bias) with pre_norm")
        del state["patch_embed.proj.bias"]


def _is_eva(config: dict[str, Any]) -> bool:
    """True if this is an Eva in timm: only Eva has RoPE, or q and v biases without one for k."""
    return config["rope"] is not None or config["qkv_bias"] == "qv"


def _timm_config(model: ViT) -> dict[str, Any]:
    """timm's config.json: a base architecture and model_args that override all its arguments."""
    c, eva = model.config, _is_eva(model.config)
    packed = c["mlp"] == "swiglu_packed"
    args = {theirs: c[ours] for ours, theirs in _TIMM_WORDS.items()}
    args["img_size"], args["patch_size"] = model.patch_embed.img_size, model.patch_embed.patch_size
    args["global_pool"] = _TIMM_POOLS.get(c["pool"], c["pool"])
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
    left = {"architecture", "tag"} | (set() if class_names(model) else {"label_names"})
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
        _refuse("timm's VisionTransformer", "a SwiGLU of two projections without RoPE")
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
            _refuse("timm's Eva", f"{name}={c[name]!r}")
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
        _refuse("timm's Eva", "a bias on the keys")
    if c["mlp"] == "mlp" and c["activation"] != "gelu":
        _refuse("timm's Eva", f"activation {c['activation']!r}")
    if model.rope is not None:
        dinov3 = c["rope"] == "dinov3"
        args.update(rope_type="dinov3" if dinov3 else "cat", rope_rotate_half=dinov3)
        args["rope_temperature"] = model.rope.theta
        args["ref_feat_shape"] = model.rope.reference_grid
    if c["norm_eps"] == 1e-5:
        return "vit_small_patch16_dinov3", 1e-5
    return "eva02_small_patch14_224", 1e-6


def _to_hf(model: ViT, state: State) -> tuple[State, dict[str, Any]]:
    c = model.config
    for name, plain in (("qk_norm", False), ("norm", "layernorm"), ("head_hidden_dim", None)):
        if c[name] != plain:
            _refuse("transformers", f"{name}={c[name]!r}")
    if c["dim_head"] not in (None, c["dim"] // c["heads"]):
        _refuse("transformers", f"dim_head {c['dim_head']} other than dim / heads")
    _fit_patch_bias("transformers", state, c["pre_norm"])
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
        names = class_names(model) or [f"LABEL_{i}" for i in range(model.num_classes)]
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        config["label2id"] = {name: i for i, name in enumerate(names)}
    if c["rope"] == "dinov3":
        return _to_hf_dinov3(model, state, config)
    if c["rope"] is not None or c["pos_embed"] != "learned":
        _refuse("transformers", "this RoPE, or a ViT without positions")
    _fill_biases(state, ("attn.proj", "mlp.fc1", "mlp.fc2"))
    if c["pool"] == "map":
        return _to_hf_siglip(model, state, config)
    if c["pre_norm"]:
        return _to_hf_clip(model, state, config)
    return _to_hf_vit(model, state, config)


def class_names(model: ViT) -> list[str]:
    """The class names of the model's checkpoint, or [] if the model has another number."""
    names = model.default_cfg.get("label_names") or ()
    return [str(name) for name in names] if len(names) == model.num_classes else []


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
            _refuse(dialect, key)
        else:
            out[match[0].expand(match[1])] = value
    return out


_P = r"(weight|bias)"
_B = r"blocks\.(\d+)\."


def _to_hf_vit(model: ViT, state: State, config: dict[str, Any]) -> tuple[State, dict[str, Any]]:
    c = model.config
    dinov2 = c["layer_scale"] is not None
    kind = "Dinov2WithRegisters" if c["registers"] else "Dinov2" if dinov2 else "ViT"
    if c["registers"] and not dinov2:
        _refuse("transformers", "registers without LayerScale")
    if not c["class_token"] or "norm.weight" not in state:
        _refuse("transformers' ViT", f"pool {c['pool']!r} or class_token={c['class_token']}")
    pool = "cls_mean" if dinov2 else "cls"
    if model.num_classes and c["pool"] != pool:
        _refuse(f"{kind}ForImageClassification", f"a head on pool {c['pool']!r}, only on {pool!r}")
    if c["mlp"] == "swiglu" or (c["mlp"] == "swiglu_packed" and not dinov2):
        _refuse(kind, f"mlp {c['mlp']!r}")
    grid = model.patch_embed.grid_size
    if dinov2 and grid[0] != grid[1]:  # Dinov2 assumes a square
        _refuse(kind, f"an oblong table of {grid} positions; set_input_size resamples it")
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
    _note_resample(model, native, kind)
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
    return _refuse("Dinov2", f"mlp_dim {hidden} with dim {dim}; its mlp_ratio is an int")


def _note_resample(model: ViT, native: Resample, kind: str) -> None:
    if model.resample != native:
        log.warning(
            "export: at another image size than %s, %s resamples positions by %s, this model by %s",
            model.patch_embed.img_size,
            kind,
            native,
            model.resample,
        )


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


def _to_hf_dinov3(model: ViT, state: State, config: dict[str, Any]) -> tuple[State, dict[str, Any]]:
    c = model.config
    if c["mlp"] == "swiglu_packed" or not c["class_token"] or c["layer_scale"] is None:
        _refuse("DINOv3ViT", "a packed SwiGLU, or a model without <cls> or LayerScale")
    if model.num_classes or "norm.weight" not in state:
        _refuse("DINOv3ViT", "a classifier, or a norm after the pooling")
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


def _to_hf_siglip(model: ViT, state: State, config: dict[str, Any]) -> tuple[State, dict[str, Any]]:
    if model.config["class_token"] or model.config["registers"] or model.num_classes:
        _refuse("SiglipVisionModel", "<cls>, registers or a classifier on attention pooling")
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
    _note_resample(model, HUGGING_FACE, "Siglip")
    return {f"vision_model.{k}": v for k, v in state.items()}, config


def _to_hf_clip(model: ViT, state: State, config: dict[str, Any]) -> tuple[State, dict[str, Any]]:
    c = model.config
    if c["registers"] or not c["class_token"] or c["layer_scale"] is not None:
        _refuse("CLIPVisionModel", "registers, LayerScale, or no <cls>")
    if c["pool"] != "cls":
        _refuse("CLIPVisionModel", f"pool {c['pool']!r}")
    _check_tower("CLIPVisionModel", model, state)
    bias = state.pop("head.bias", None)
    if bias is not None and bias.any():
        _refuse("CLIPVisionModelWithProjection", "a head with a bias that is not zero")
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
    _note_resample(model, HUGGING_FACE, "CLIPVisionModel")
    own = "visual_projection.weight"
    return {k if k == own else f"vision_model.{k}": v for k, v in state.items()}, config


def _check_tower(kind: str, model: ViT, state: State) -> None:
    stem = model.patch_embed
    if "norm.weight" not in state:
        _refuse(kind, "a model without a final norm before the pooling")
    if model.config["mlp"] != "mlp":
        _refuse(kind, f"mlp {model.config['mlp']!r}")
    if len({*stem.img_size}) > 1 or len({*stem.patch_size}) > 1:
        _refuse(kind, f"images of {stem.img_size} or patches of {stem.patch_size}, only squares")
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
