"""Every preset against timm's model of that name: shapes, options, data configuration."""

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastvit
from fastvit.checkpoint_files import Source
from fastvit.checkpoints import interpret
from fastvit.errors import UsageError
from fastvit.presets import DATA, PRESETS, TAGS

timm: Any = pytest.importorskip("timm")
POOLS = {"cls": "token", "mean": "avg", "map": "map"}


def ours_from_timm(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    return {
        functools.reduce(lambda k, n: k.replace(n, names[n]), names, key): value
        for key, value in state.items()
    }


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_timms(name: str) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(name)
        ours: Any = fastvit.create_model(name)
    shapes = {k: v.shape for k, v in ours_from_timm(theirs.state_dict()).items()}
    assert {k: v.shape for k, v in ours.state_dict().items()} == shapes
    assert POOLS[ours.pool] == theirs.global_pool
    assert ours.patch_embed.img_size == tuple(theirs.patch_embed.img_size)
    assert ours.blocks[0].attn.heads == theirs.blocks[0].attn.num_heads
    assert ours.blocks[0].norm1.eps == theirs.blocks[0].norm1.eps
    assert ours.num_prefix_tokens == theirs.num_prefix_tokens
    if ours.config["mlp"] == "mlp":
        act, ours_act = theirs.blocks[0].mlp.act, ours.blocks[0].mlp.act.kind
        x = torch.linspace(-3, 3, 50)
        expected = x * torch.sigmoid(1.702 * x)
        if ours_act != "quick_gelu":
            tanh = "tanh" if ours_act == "gelu_tanh" else "none"
            expected = nn.functional.gelu(x, approximate=tanh)
        torch.testing.assert_close(act(x), expected, atol=1e-6, rtol=1e-6)
    mine = timm.data.resolve_model_data_config(ours)
    assert mine == timm.data.resolve_model_data_config(theirs)
    assert TAGS.get(name) == (
        None
        if theirs.pretrained_cfg["tag"] == "untrained"
        else (theirs.pretrained_cfg["tag"] or None)
    )


def test_list_models() -> None:
    assert len(PRESETS) == len(fastvit.list_models()) == len(DATA)
    for family in (
        "*dinov2*",
        "*dinov3*",
        "deit3*",
        "*siglip*",
        "*clip*",
        "vit_gigantic*",
        "*so400m*",
    ):
        assert fastvit.list_models(family), family
    assert fastvit.list_models(filter=["deit_*", "*7b*"]) == [
        n for n in PRESETS if n.startswith("deit_") or "7b" in n
    ]


def test_timm_keyword_arguments() -> None:
    partial = functools.partial(nn.LayerNorm, eps=1e-3)
    model = fastvit.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        in_chans=4,
        embed_dim=64,
        num_heads=4,
        depth=3,
        mlp_ratio=2.5,
        global_pool="avg",
        reg_tokens=2,
        init_values=0.1,
        drop_rate=0.1,
        pos_drop_rate=0.2,
        patch_drop_rate=0.3,
        proj_drop_rate=0.4,
        attn_drop_rate=0.5,
        drop_path_rate=0.6,
        act_layer=nn.GELU,
        norm_layer=partial,
        qk_norm=True,
        class_token=False,
        weight_init="",
        num_classes=7,
    )
    block: Any = model.blocks[2]
    assert block.mlp.fc1.out_features == 160
    assert (block.attn.dropout, block.attn.proj_dropout, block.mlp.dropout) == (0.5, 0.4, 0.4)
    assert math.isclose(block.drop_path, 0.6)
    assert (model.head_drop.p, model.pos_drop.p, model.patch_dropout) == (0.1, 0.2, 0.3)
    assert block.norm1.eps == block.attn.q_norm.eps == 1e-3
    assert model(torch.randn(2, 4, 32, 32)).shape == (2, 7)
    assert model.default_cfg["input_size"] == (4, 32, 32)
    assert len(model.default_cfg["mean"]) == len(model.default_cfg["std"]) == 4


TRAIN_SCRIPT: dict[str, Any] = dict(  # what timm's train.py and validate.py pass
    drop_rate=0.0,
    drop_path_rate=None,
    drop_block_rate=None,
    bn_momentum=None,
    bn_eps=None,
    scriptable=False,
    exportable=True,
    no_jit=True,
    checkpoint_path="",
    cache_dir=None,
    features_only=False,
    pretrained_cfg=None,
    pretrained_cfg_overlay={},
    strict_img_size=True,
)


def test_arguments_of_timms_scripts(tmp_path: Path) -> None:
    small: dict[str, Any] = dict(img_size=32, embed_dim=32, num_heads=2, depth=1, num_classes=5)
    name, images = "vit_tiny_patch16_224", torch.randn(2, 3, 32, 32)
    model = fastvit.create_model(name, **TRAIN_SCRIPT, **small)
    assert model.config == fastvit.create_model(name, **small).config
    path = tmp_path / "timm.pth"
    theirs = timm.create_model(name, **small).eval()
    torch.save(theirs.state_dict(), path)
    ours = fastvit.create_model(name, checkpoint_path=path, dtype=torch.float64, **small).eval()
    torch.testing.assert_close(ours(images.double()).float(), theirs(images))
    meta = fastvit.create_model(name, device="meta", dtype=torch.bfloat16, **small)
    assert {(p.device.type, p.dtype) for p in meta.parameters()} == {("meta", torch.bfloat16)}
    assert fastvit.create_model(name, strict_img_size=False).config["dynamic_img_size"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"drop_block_rate": 0.1}, "drop_block_rate=0.1 is timm's alone"),
        ({"features_only": True}, "features_only=True .* model.forward_intermediates"),
        ({"scriptable": True}, "scriptable=True is timm's alone"),
        ({"cache_dir": "x", "pretrained": True}, "cache_dir='x' .* HF_HUB_CACHE"),
        ({"drop_paht_rate": 0.1}, r"'drop_paht_rate' is unknown; expected .*\bdrop_path_rate\b"),
        ({"attn_layer": "diff"}, "attn_layer='diff' is timm's alone"),
        ({"img_size": 32, "image_size": 32}, "img_size and image_size are the same"),
        ({"act_layer": "relu"}, "activation must be one of .* got 'relu'"),
        ({"global_pool": "prr"}, "pool must be one of .* got 'prr'"),
    ],
)
def test_bad_timm_arguments(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastvit.create_model("vit_tiny_patch16_224", **kwargs)
    with pytest.raises(ValueError, match=r"has no usual weights; name some as vit_giant.*\.TAG"):
        fastvit.create_model("vit_giant_patch14_224", pretrained=True)


def test_a_tag_whose_data_is_unknown_is_not_claimed(caplog: pytest.LogCaptureFixture) -> None:
    usual = TAGS["vit_small_patch16_224"]
    model = fastvit.create_model(f"vit_small_patch16_224.{usual}", depth=1)
    assert model.default_cfg["tag"] == usual and not caplog.records
    other = fastvit.create_model("vit_small_patch16_224.dino", depth=1)
    assert other.default_cfg["tag"] is None and "not those of the tag 'dino'" in caplog.text


def test_partials_of_timms_classes() -> None:
    name, tanh = "vit_tiny_patch16_224", functools.partial(nn.GELU, approximate="tanh")
    model = fastvit.create_model(name, depth=1, act_layer=tanh)
    assert model.config["activation"] == "gelu_tanh"
    embed = functools.partial(timm.layers.PatchEmbed, norm_layer=nn.LayerNorm)
    softplus: Any = functools.partial(nn.Softplus, beta=2.0)
    cases: list[dict[str, Any]] = [{"embed_layer": embed}, {"act_layer": softplus}]
    for kwargs in cases:
        with pytest.raises(UsageError, match="is timm's alone"):
            fastvit.create_model(name, depth=1, **kwargs)
    with pytest.raises(UsageError, match="this model has no RoPE"):
        fastvit.create_model(name, use_rot_pos_emb=True)


@pytest.mark.parametrize("name", ["vit_giant_patch16_radio_v3", "test_vit2"])
def test_heads_that_no_size_tells(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    state = {k: torch.empty_strided(v.shape, [0] * v.ndim) for k, v in model.state_dict().items()}
    size = (3, *model.patch_embed.img_size)
    config = {"architecture": name, "num_classes": 0, "pretrained_cfg": {"input_size": size}}
    _, arguments = interpret(Source(name, state, config), {})
    assert arguments["heads"] == model.blocks[0].attn.num_heads
