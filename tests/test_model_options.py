"""Every option of fastvit.ViT against timm's model with the same option, random draws included."""

import functools
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from peers import check, close, randomize_weights, timm_truth, timm_twins
from torch import nn

import fastvit
from fastvit.errors import UsageError
from fastvit.layers import RMSNorm

timm: Any = pytest.importorskip("timm")
NARROW: dict[str, Any] = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2)
NARROW.update(num_classes=5, mlp_ratio=2)
SIZES: dict[str, Any] = dict(image_size=16, patch_size=4, dim=32, depth=2, heads=2, mlp_dim=48)
EPS = functools.partial(nn.LayerNorm, eps=1e-3)

OPTIONS: dict[str, dict[str, Any]] = {
    "qk_norm": {"qk_norm": True},
    "rmsnorm": {"norm_layer": "rmsnorm"},
    "rmsnorm and qk_norm": {"norm_layer": "rmsnorm", "qk_norm": True},
    "norm_eps": {"norm_layer": EPS},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "pre_norm": {"pre_norm": True},
    "no final norm": {"final_norm": False},
    "no final norm, mean": {"final_norm": False, "global_pool": "avg"},
    "mean": {"global_pool": "avg"},
    "mean, norm first": {"global_pool": "avg", "fc_norm": False},
    "cls, norm after": {"fc_norm": True},
    "max": {"global_pool": "max"},
    "avgmax": {"global_pool": "avgmax"},
    "map": {"global_pool": "map"},
    "all tokens": {"global_pool": ""},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "no positions": {"pos_embed": "none"},
    "registers": {"reg_tokens": 3},
    "registers, no_embed_class": {"reg_tokens": 3, "no_embed_class": True},
    "registers alone": {"reg_tokens": 2, "class_token": False, "global_pool": "avg"},
    "layer scale": {"init_values": 0.1},
    "gelu_tanh": {"act_layer": "gelu_tanh"},
    "quick_gelu": {"act_layer": "quick_gelu"},
    "SwiGLU": {"mlp_layer": timm.layers.SwiGLU, "act_layer": nn.SiLU},
    "packed SwiGLU": {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 4},
    "one channel": {"in_chans": 1},
    "seven channels": {"in_chans": 7},
    "oblong": {"img_size": (16, 48), "patch_size": (4, 12)},
    "no head": {"num_classes": 0},
}


def twins(**options: Any) -> tuple[Any, Any]:
    return timm_twins("vit_tiny_patch16_224", **{**NARROW, **options})


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_features_logits_and_gradients(options: dict[str, Any]) -> None:
    theirs, ours = twins(**options)
    size = theirs.patch_embed.img_size
    check(ours, timm_truth(theirs, torch.randn(2, options.get("in_chans", 3), *size)))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_another_size(options: dict[str, Any]) -> None:
    """The gradient of the position table flows back through the resampling."""
    theirs, ours = twins(**options, dynamic_img_size=True)
    p_h, p_w = theirs.patch_embed.patch_size
    check(ours, timm_truth(theirs, torch.randn(2, options.get("in_chans", 3), 5 * p_h, 3 * p_w)))


@pytest.mark.parametrize("name", OPTIONS)
def test_goes_to_timm_and_comes_back(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """config.json gives timm and fastvit every option but norm_eps, which a warning names."""
    _, ours = twins(**OPTIONS[name])
    state = fastvit.export_checkpoint(ours, "timm")
    assert all(torch.equal(state[key], value) for key, value in ours.state_dict().items())
    if name == "SwiGLU":  # config.json cannot name timm's class
        with pytest.raises(UsageError, match="a SwiGLU of two projections without RoPE"):
            fastvit.export_checkpoint(ours, "timm", tmp_path)
        return
    fastvit.export_checkpoint(ours, "timm", tmp_path)
    assert ("cannot say norm_eps 0.001" in caplog.text) == (name == "norm_eps")
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    again = fastvit.load_checkpoint(tmp_path)
    images = torch.randn(2, OPTIONS[name].get("in_chans", 3), *ours.patch_embed.img_size)
    for model in (theirs, again):
        if name == "norm_eps":
            for module in model.modules():
                if isinstance(module, nn.LayerNorm):
                    module.eps = 1e-3
        close("features", model.forward_features(images), ours.forward_features(images))
        close("output", model(images), ours(images))


RATES: dict[str, dict[str, Any]] = {
    "drop path": {"drop_path_rate": 0.6},
    "drop path with layer scale": {"drop_path_rate": 0.6, "init_values": 0.5},
    "patch dropout": {"patch_drop_rate": 0.4},
    "patch dropout, registers": {"patch_drop_rate": 0.4, "reg_tokens": 2},
    "position dropout": {"pos_drop_rate": 0.3},
    "projection and MLP dropout": {"proj_drop_rate": 0.3},
    "attention dropout": {"attn_drop_rate": 0.3},
    "head dropout": {"drop_rate": 0.3},
    "all but drop path": {
        "patch_drop_rate": 0.2,
        "pos_drop_rate": 0.1,
        "proj_drop_rate": 0.1,
        "attn_drop_rate": 0.1,
        "drop_rate": 0.1,
    },
}


@pytest.mark.parametrize("options", RATES.values(), ids=RATES)
def test_training_draws_what_timm_draws(options: dict[str, Any]) -> None:
    """From one seed: the same paths, patches and channels are dropped, and scaled the same."""
    theirs, ours = twins(**options)
    for block in theirs.blocks:
        block.attn.fused_attn = False  # fused attention draws in another order
    images = torch.randn(4, 3, 32, 32)
    outs, grads = [], []
    for model in (theirs.train(), ours.train()):
        torch.manual_seed(3)
        outs.append(model(images))
        outs[-1].square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    close("logits", outs[1], outs[0])
    for name, grad in grads[0].items():
        close(name, grads[1][name], grad)
    assert not torch.equal(ours(images), ours(images)), "nothing was drawn"
    for model in (theirs.eval(), ours.eval()):
        outs.append(model(images))
    close("in eval", outs[3], outs[2])


def test_both_forms_of_rope_against_timms_eva() -> None:
    """Features and gradients on square and oblong images; prefix tokens are not rotated."""
    eva = timm.models.eva.Eva
    for name, options in (
        ("eva", {"ref_feat_shape": (2, 4)}),
        ("eva", {"use_abs_pos_emb": False, "rope_temperature": 100.0}),
        ("dinov3", {"rope_type": "dinov3", "rope_rotate_half": True, "num_reg_tokens": 2}),
        ("dinov3", {"rope_type": "dinov3", "rope_rotate_half": True, "swiglu_mlp": True}),
    ):
        args = {**NARROW, "dynamic_img_size": True, "use_rot_pos_emb": True, **options}
        if name == "dinov3":
            args = {"rope_temperature": 50.0, "init_values": 1.0, **args}
        theirs: Any = randomize_weights(eva(**args))
        base = "vit_small_patch16_dinov3_qkvb" if name == "dinov3" else "eva02_small_patch14_224"
        # The arguments in which the preset differs from the defaults of Eva's constructor.
        said: dict[str, Any] = {"use_abs_pos_emb": True, "num_reg_tokens": 0, "qkv_bias": True}
        said.update(swiglu_mlp=False, use_fc_norm=True)
        said["norm_layer"] = functools.partial(nn.LayerNorm, eps=theirs.blocks[0].norm1.eps)
        for word, mine in (("init_values", "layer_scale"), ("ref_feat_shape", "rope_grid")):
            said.update({} if word in args else {mine: None})  # None for timm's name is ignored
        ours: Any = fastvit.create_model(base, **{**said, **args}).eval()
        names = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
        state = theirs.state_dict()
        for old, new in names.items():
            state = {k.replace(old, new): v for k, v in state.items()}
        ours.load_state_dict(state, strict=True)
        for height, width in ((32, 32), (24, 56)):
            check(ours, timm_truth(theirs, torch.randn(2, 3, height, width)))


def test_arguments_of_other_types() -> None:
    """Integers and numpy's scalars mean what they mean in timm."""
    model = fastvit.ViT(**{**SIZES, "layer_scale": 1, "qkv_bias": 1})
    assert model.config["qkv_bias"] is True
    assert "blocks.0.attn.qkv.bias" in dict(model.named_parameters())
    images = torch.randn(2, *model.default_cfg["input_size"])
    assert torch.equal(
        model.attention_maps(images, layers=-1), model.attention_maps(images, layers=[-1])
    )
    assert len(model.forward_intermediates(images, cast(Any, np.int64(1)))[1]) == 1
    with pytest.raises(ValueError, match="indices must name at least one block"):
        model.prune_intermediate_layers([])
    with pytest.raises(ValueError, match="pool 'map' needs dim"):
        fastvit.ViT(**{**SIZES, "heads": 3}, dim_head=16, pool="map")


def test_a_failed_resize_changes_nothing() -> None:
    with pytest.raises(ValueError, match="mode 'nearest' takes neither antialias"):
        fastvit.ViT(**SIZES, resample={"mode": "nearest", "antialias": True})
    model = fastvit.ViT(**SIZES, resample={"mode": "nearest"})
    before = {**model.config}
    model.patch_embed.proj = nn.Sequential(model.patch_embed.proj)  # type: ignore[assignment]
    images = torch.randn(2, *model.default_cfg["input_size"])
    expected = model(images)
    for size, patch in ((SIZES["image_size"], 2), (SIZES["image_size"] + 1, None)):
        with pytest.raises((TypeError, ValueError), match=r"not a Conv2d|not a multiple"):
            model.set_input_size(size, patch)
        assert model.config == before and torch.equal(model(images), expected)


def test_rms_norm_without_eps() -> None:
    """It takes the smallest float of its dtype in PyTorch, and no kernel."""
    model = fastvit.ViT(**SIZES, norm="rmsnorm")
    model.blocks[0].norm1 = RMSNorm(SIZES["dim"])
    assert "norm has no eps" in str(
        fastvit.backend_report(model, torch.randn(1, *model.default_cfg["input_size"]))
    )
