"""Checkpoints and truths from the code of papers, which no package index carries.

    python make.py torch SOURCES     with torch and timm; SOURCES holds clones of dinov2, dinov3,
                                     deit and CLIP, and the wheels of vit-pytorch 0.20.0 and
                                     open_clip_torch 3.3.0 unpacked
    python make.py jax SOURCES       with jax and flax; SOURCES holds clones of vision_transformer
                                     and big_vision

NAME.pth, NAME.npz or the folder NAME is the checkpoint, as the original's own code saves it, of a
model of two blocks and 16 channels with random weights. NAME.truth.npz is what that model gives for
`pixels` of each size: features after the final norm, output, and the gradients of
sum(out * linspace(-1, 1)) in the images and, for the last size, in every parameter.

Made at facebookresearch/dinov2 b8931f7, facebookresearch/dinov3 6876159, facebookresearch/deit
7e160fe, openai/CLIP d05afc4, google-research/vision_transformer c6de1e5, google-research/big_vision
0127fb6, torch 2.13.0, jax 0.10.2, flax 0.12.8.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportCallIssue=false
import json
import sys
import types
import warnings
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np

HERE = Path(__file__).parent
PATCH = 4


def pixels(height: int, width: int) -> np.ndarray:
    """(1, 3, height, width) float32 in [-2, 2), the same on every machine."""
    index = np.arange(3 * height * width, dtype=np.int64)
    return ((index * 7919 % 1009) / 1009 * 4 - 2).astype(np.float32).reshape(1, 3, height, width)


def make_torch(sources: Path) -> None:
    import torch

    sys.path.insert(0, str(HERE.parent))
    import torchvision_shim

    torchvision_shim.install()
    torch.manual_seed(0)
    for name in ("dinov2", "dinov3", "deit", "CLIP", "vit-pytorch", "open_clip"):
        sys.path.insert(0, str(sources / name))
    warnings.simplefilter("ignore")
    sys.modules.setdefault("regex", MagicMock())
    sys.modules.setdefault("ftfy", MagicMock())

    def write(name, model, run, sizes, wrap=lambda state: state, grads=True):
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(std=0.3)
        model.eval()
        if "/" in name:
            (HERE / name).parent.mkdir(exist_ok=True)
        file = HERE / (name if "." in name else f"{name}.pth")
        torch.save(wrap(model.state_dict()), file)
        truth = {}
        for size in sizes:
            model.zero_grad()
            x = torch.from_numpy(pixels(*size)).requires_grad_()
            features, out = run(x)
            weights = torch.linspace(-1, 1, out[0].numel()).view(out.shape[1:])
            (out * weights).sum().backward()
            key = f"{size[0]}x{size[1]}"
            truth[f"{key}/out"], truth[f"{key}/dimages"] = out.detach(), x.grad
            if features is not None:
                truth[f"{key}/features"] = features.detach()
            if size == sizes[-1] and grads:
                for n, p in model.named_parameters():
                    if p.grad is not None and p.grad.any():
                        truth[f"{key}/grads/{n}"] = p.grad
        stem = name.partition("/")[0].partition(".")[0]
        np.savez_compressed(HERE / f"{stem}.truth.npz", **{k: v.numpy() for k, v in truth.items()})

    def dino(model):
        def run(x):
            out = model.forward_features(x)
            extra = out.get("x_norm_regtokens", out.get("x_storage_tokens"))
            tokens = [out["x_norm_clstoken"][:, None], extra, out["x_norm_patchtokens"]]
            return torch.cat([t for t in tokens if t is not None], dim=1), model(x)

        return run

    sizes = [(20, 20), (28, 28), (12, 28)]
    common = dict(img_size=20, patch_size=PATCH, embed_dim=16, depth=2, num_heads=2)
    from dinov2.models.vision_transformer import DinoVisionTransformer

    model = DinoVisionTransformer(**common, mlp_ratio=2, init_values=1.0, block_chunks=0)
    write("dinov2", model, dino(model), sizes)
    model = DinoVisionTransformer(
        **common,
        mlp_ratio=3,
        init_values=1.0,
        block_chunks=1,
        ffn_layer="swiglu",
        num_register_tokens=3,
        interpolate_antialias=True,
        interpolate_offset=0.0,
    )
    # A teacher as training saves it: blocks in chunks, behind "backbone.", beside its DINO head.
    write(
        "dinov2_teacher",
        model,
        dino(model),
        sizes,
        lambda state: {
            "teacher": {
                **{f"backbone.{k}": v for k, v in state.items()},
                "dino_head.last_layer.weight": torch.zeros(2, 2),
            }
        },
    )

    from dinov3.models.vision_transformer import DinoVisionTransformer as DinoV3

    common_v3 = dict(common, layerscale_init=1.0, norm_layer="layernormbf16", mask_k_bias=True)
    common_v3.update(pos_embed_rope_dtype="fp32", pos_embed_rope_rescale_coords=2)
    variants = {
        "dinov3": dict(ffn_ratio=2, n_storage_tokens=4),
        "dinov3_swiglu": dict(ffn_ratio=3, ffn_layer="swiglu64", qkv_bias=False, n_storage_tokens=2)
        | dict(untie_global_and_local_cls_norm=True),
    }
    for name, options in variants.items():
        model = DinoV3(**{**common_v3, **options})
        model.init_weights()
        masks = {n: b.clone() for n, b in model.named_buffers() if n.endswith("bias_mask")}
        assert all(set(m.tolist()) == {0.0, 1.0} for m in masks.values())
        write(name, model, dino(model), sizes)

    registry = types.ModuleType("timm.models.registry")
    layers = types.ModuleType("timm.models.layers")
    import timm.layers
    import timm.models

    registry.register_model = lambda function: function
    for name in ("DropPath", "to_2tuple", "trunc_normal_"):
        setattr(layers, name, getattr(timm.layers, name))
    sys.modules.update({"timm.models.registry": registry, "timm.models.layers": layers})
    from models_v2 import Layer_scale_init_Block, vit_models

    model = vit_models(
        img_size=20,
        patch_size=PATCH,
        num_classes=5,
        embed_dim=16,
        depth=2,
        num_heads=2,
        mlp_ratio=2,
        qkv_bias=True,
        norm_layer=lambda dim: torch.nn.LayerNorm(dim, eps=1e-6),
        block_layers=Layer_scale_init_Block,
    )
    write("deit3", model, lambda x: (None, model(x)), sizes[:1], lambda state: {"model": state})

    from clip.model import CLIP

    heads = dict(vision_width=64, vision_patch_size=PATCH, context_length=4, vocab_size=8)
    clip = CLIP(6, 12, 1, **heads, transformer_width=8, transformer_heads=1, transformer_layers=1)
    # The released files are TorchScript archives, whose state dict holds these as well.
    sizes_of = dict(input_resolution=12, context_length=4, vocab_size=8)
    write(
        "openai_clip",
        clip,
        lambda x: (None, clip.encode_image(x)),
        [(12, 12)],
        lambda state: {**state, **{k: torch.tensor(v) for k, v in sizes_of.items()}},
        grads=False,  # its heads are 64 wide: too large for a file here
    )

    from open_clip.model import CLIP as OpenCLIP

    config = {
        "embed_dim": 6,
        "vision_cfg": dict(image_size=20, layers=2, width=16, head_width=8, patch_size=PATCH)
        | dict(mlp_ratio=2.0, ls_init_value=1.0),
        "text_cfg": dict(context_length=4, vocab_size=8, width=8, heads=1, layers=1),
    }
    model = OpenCLIP(**config)
    run = lambda x: (None, model.encode_image(x))  # noqa: E731
    write("open_clip/open_clip_pytorch_model.bin", model, run, sizes[:1])
    text = json.dumps({"model_cfg": config, "preprocess_cfg": {}}, indent=2) + "\n"
    (HERE / "open_clip" / "open_clip_config.json").write_text(text)

    from vit_pytorch.vit import ViT

    model = ViT(
        image_size=20,
        patch_size=PATCH,
        num_classes=5,
        dim=16,
        depth=2,
        heads=2,
        dim_head=12,
        mlp_dim=24,
    )
    write("vit_pytorch_old.pth", model, lambda x: (None, model(x)), sizes[:1])


def make_jax(sources: Path) -> None:
    import flax
    import flax.training.checkpoints
    import jax
    import jax.numpy as jnp

    for name in ("tensorflow", "tensorflow.io", "tensorflow.io.gfile", "pandas", "tqdm"):
        sys.modules.setdefault(name, MagicMock())
    for name in ("vision_transformer", "big_vision"):
        sys.path.insert(0, str(sources / name))
    sys.modules.setdefault("big_vision.utils", MagicMock())

    jax.config.update("jax_default_matmul_precision", "highest")

    # The released files of vit_jax have the names of flax before Linen, which count all modules.
    released = {"MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1"}
    released.update({"LayerNorm_1": "LayerNorm_2", "MlpBlock_0": "MlpBlock_3"})

    def as_released(tree):
        return {
            released.get(k, k): as_released(v) if isinstance(v, dict) else v
            for k, v in tree.items()
        }

    def write(name, model, apply, resample, prefix, extra=None):
        """resample(params, grid) -> params: the original's own, for squares alone."""
        x = jnp.asarray(pixels(20, 20).transpose(0, 2, 3, 1))
        shapes = jax.eval_shape(lambda: model.init(jax.random.PRNGKey(0), x, train=False))
        rng = np.random.default_rng(0)
        params = jax.tree_util.tree_map(
            lambda s: jnp.asarray(rng.normal(size=s.shape, scale=0.3), jnp.float32),
            flax.core.unfreeze(shapes)["params"],
        )
        old_names = name == "vit_jax"
        if old_names:
            back = flax.training.checkpoints.convert_pre_linen(as_released(params))
            assert jax.tree_util.tree_structure(dict(back)) == jax.tree_util.tree_structure(params)

        def flat(tree):
            tree = as_released(tree) if old_names else tree
            leaves = flax.traverse_util.flatten_dict(tree, sep="/")
            return {prefix + k: np.asarray(v) for k, v in leaves.items()}

        np.savez(HERE / f"{name}.npz", **flat(params), **(extra or {}))
        truth = {}
        for side in (20, 28):
            x = jnp.asarray(pixels(side, side).transpose(0, 2, 3, 1))
            new = params if side == 20 else resample(params, side // PATCH)

            def scalar(new, x):
                features, out = apply(new, x)
                return (out * jnp.linspace(-1, 1, out.size)).sum(), (features, out)

            (_, (features, out)), (dparams, dx) = jax.value_and_grad(scalar, (0, 1), has_aux=True)(
                new, x
            )
            key = f"{side}x{side}"
            truth[f"{key}/out"] = np.asarray(out)
            truth[f"{key}/dimages"] = np.asarray(dx).transpose(0, 3, 1, 2)
            if features is not None:
                truth[f"{key}/features"] = np.asarray(features)
            if side == 20:
                truth.update({f"{key}/grads/{k}": v for k, v in flat(dparams).items()})
        np.savez_compressed(HERE / f"{name}.truth.npz", **truth)

    from vit_jax.checkpoint import interpolate_posembed
    from vit_jax.models_vit import VisionTransformer

    def stretch(params, side):
        params = jax.tree_util.tree_map(lambda a: a, params)
        inner = params["Transformer"]["posembed_input"]
        inner["pos_embedding"] = interpolate_posembed(inner["pos_embedding"], side**2 + 1, True)
        return params

    for name, prefix, hidden in (
        ("vit_jax", "", None),
        ("vit_jax_pre_logits", "opt/target/", 12),
    ):
        model = VisionTransformer(
            num_classes=5,
            patches=types.SimpleNamespace(size=(PATCH, PATCH)),
            transformer=dict(num_layers=2, mlp_dim=32, num_heads=2),
            hidden_size=16,
            representation_size=hidden,
        )
        run = lambda p, x, m=model: (None, m.apply({"params": p}, x, train=False))  # noqa: E731
        step = {"opt/state/step": np.asarray(7)} if prefix else None
        write(name, model, run, stretch, prefix, step)

    from big_vision.models import vit

    def stretch_bv(params, side):
        new = np.zeros((1, side**2, 16))
        return {
            **params,
            "pos_embedding": jnp.asarray(vit.resample_posemb(params["pos_embedding"], new)),
        }

    common = dict(width=16, depth=2, mlp_dim=32, num_heads=2, patch_size=(PATCH, PATCH))
    for name, prefix, options in (
        ("big_vision_cls", "params/", dict(pool_type="tok", num_classes=5)),
        ("big_vision_gap", "params/", dict(pool_type="gap", num_classes=5, rep_size=True)),
        ("big_vision_map", "params/img/", dict(pool_type="map", scan=True)),
    ):
        model = vit._Model(**{"num_classes": None, **common, **options})

        def run(p, x, m=model):
            out, rest = m.apply({"params": p}, x, train=False)
            return rest["encoded"], out

        text = {"params/t": np.zeros(1, np.float32)} if "img" in prefix else None
        write(name, model, run, stretch_bv, prefix, text)


if __name__ == "__main__":
    {"torch": make_torch, "jax": make_jax}[sys.argv[1]](Path(sys.argv[2]))
