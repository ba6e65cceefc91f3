"""timm's model API on fastvit.ViT, each call against timm's own model."""

from functools import partial
from typing import Any

import pytest
import torch
from peers import close, timm_twins
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import fastvit
from fastvit.errors import UsageError

timm: Any = pytest.importorskip("timm")
from timm.models._manipulate import group_parameters  # noqa: E402
from timm.optim._param_groups import (  # noqa: E402
    param_groups_layer_decay,
    param_groups_weight_decay,
)

MODELS = {
    "cls": "vit_tiny_patch16_224",
    "registers": "vit_betwixt_patch16_reg4_gap_256",
    "norm after pooling": "vit_so150m2_patch16_reg1_gap_256",
    "map": "vit_base_patch16_siglip_224",
    "clip": "vit_base_patch16_clip_224",
    "dinov2": "vit_base_patch14_reg4_dinov2",
    "dinov3": "vit_large_patch16_dinov3_qkvb",
}
NARROW: dict[str, Any] = dict(embed_dim=32, num_heads=2, depth=3, num_classes=5)
RENAMED = {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}


def twins(name: str, **more: Any) -> tuple[Any, Any]:
    """timm's model and ours, narrow, on a grid of 4 x 4, with the same weights."""
    patch = 14 if "patch14" in name else 16
    return timm_twins(name, **{**NARROW, "img_size": 4 * patch, **more})


def as_timm(name: str, theirs: Any) -> str:
    """timm's name of our parameter `name`; Eva names LayerScale differently."""
    names = dict(theirs.named_parameters())
    for ours, eva in RENAMED.items():
        if name.endswith(ours) and name not in names:
            return name.removesuffix(ours) + eva
    return name


def same(got: Any, expected: Any) -> None:
    """Assert equal nesting of tuples, lists and dicts, with close tensors."""
    if isinstance(expected, torch.Tensor):
        close("a tensor", got, expected)
    elif isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key in expected:
            same(got[key], expected[key])
    else:
        assert type(got) is type(expected) and len(got) == len(expected)
        for pair in zip(got, expected, strict=True):
            same(*pair)


@pytest.mark.parametrize("name", MODELS.values(), ids=MODELS)
def test_features_and_head(name: str) -> None:
    theirs, ours = twins(name)
    images = torch.randn(2, 3, *theirs.patch_embed.img_size)
    tokens = theirs.forward_features(images)
    close("features", ours.forward_features(images), tokens)
    for pre_logits in (False, True):
        same(ours.forward_head(tokens, pre_logits), theirs.forward_head(tokens, pre_logits))
    for attribute in ("num_features", "embed_dim", "head_hidden_size", "num_classes"):
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    for attribute in ("num_prefix_tokens", "num_reg_tokens", "grad_checkpointing"):
        if hasattr(theirs, attribute):  # Eva has no num_reg_tokens
            assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    assert ours.patch_embed.grid_size == tuple(theirs.patch_embed.grid_size)
    assert ours.patch_embed.num_patches == theirs.patch_embed.num_patches
    assert type(ours.get_classifier()) is type(theirs.get_classifier())


@pytest.mark.parametrize("name", MODELS.values(), ids=MODELS)
def test_intermediates(name: str) -> None:
    theirs, ours = twins(name)
    images = torch.randn(2, 3, *theirs.patch_embed.img_size)
    for kwargs in (
        {},
        {"indices": 2},
        {"indices": [0, -1], "norm": True},
        {"indices": [0], "stop_early": True, "output_fmt": "NLC"},
        {"return_prefix_tokens": True, "output_fmt": "NLC"},
        {"indices": [1], "intermediates_only": True},
        {"indices": 1, "return_prefix_tokens": True, "intermediates_only": True, "norm": True},
        {"output_dict": True, "return_prefix_tokens": True},
        {"output_dict": True, "intermediates_only": True, "indices": 2},
    ):
        if "output_dict" in kwargs and not hasattr(theirs, "get_intermediate_layers"):
            continue  # Eva has neither
        expected = theirs.forward_intermediates(images, **kwargs)
        same(ours.forward_intermediates(images, **kwargs), expected)
    if not hasattr(theirs, "get_intermediate_layers"):
        return
    for kwargs in (
        {},
        {"n": 2, "reshape": True},
        {"n": [0, 2], "return_prefix_tokens": True, "norm": True},
    ):
        expected = theirs.get_intermediate_layers(images, **kwargs)
        same(ours.get_intermediate_layers(images, **kwargs), expected)


@pytest.mark.parametrize("name", MODELS.values(), ids=MODELS)
def test_reset_classifier(name: str) -> None:
    for pool in (None, "avg", "token", "max", "avgmax", "map", ""):
        theirs, ours = twins(name)
        images = torch.randn(2, 3, *theirs.patch_embed.img_size)
        try:
            theirs.reset_classifier(7, pool)
        except AssertionError:
            with pytest.raises(ValueError, match="global_pool"):
                ours.reset_classifier(7, pool)
            continue
        ours.reset_classifier(7, pool)
        assert 0.01 < float(ours.head.weight.detach().std()) < 0.03 and not ours.head.bias.any()
        ours.head.load_state_dict(theirs.head.state_dict())
        close(f"{pool}", ours(images), theirs(images))
        again = fastvit.ViT(**ours.config)
        assert again.state_dict().keys() == ours.state_dict().keys()
        for model in (theirs, ours):
            model.reset_classifier(0)
        close(f"{pool}, no head", ours(images), theirs(images))
        assert ours.default_cfg["num_classes"] == 0 == ours.num_classes


@pytest.mark.parametrize("name", MODELS.values(), ids=MODELS)
def test_set_input_size(name: str) -> None:
    patch = 14 if "patch14" in name else 16
    for img_size, patch_size in (
        ((3 * patch, 6 * patch), None),
        (6 * patch, None),
        (64, 8),
        (None, 28 if patch == 14 else 32),
    ):
        theirs, ours = twins(name)
        if isinstance(img_size, int) and hasattr(theirs, "rope"):
            img_size = (img_size, img_size)
        for model in (theirs, ours):
            model.set_input_size(img_size=img_size, patch_size=patch_size)
        images = torch.randn(2, 3, *theirs.patch_embed.img_size)
        kernel = theirs.patch_embed.proj.weight
        close("kernel", ours.patch_embed.proj.weight, kernel)
        close("logits", ours(images), theirs(images))
        assert ours.default_cfg["input_size"] == (3, *theirs.patch_embed.img_size)
        again = fastvit.ViT(**ours.config)
        again.load_state_dict(ours.state_dict())


def test_dynamic_img_size() -> None:
    for name in MODELS.values():
        theirs, ours = twins(name, dynamic_img_size=True)
        patch = 14 if "patch14" in name else 16
        for rows, columns in ((4, 4), (7, 7), (2, 5)):
            images = torch.randn(1, 3, rows * patch, columns * patch)
            close("logits", ours(images), theirs(images))
            same(ours.forward_intermediates(images), theirs.forward_intermediates(images))


def test_grad_checkpointing_in_training() -> None:
    for name in (MODELS["cls"], MODELS["dinov3"]):
        theirs, ours = twins(name)
        images = torch.randn(2, 3, *theirs.patch_embed.img_size)
        for model in (theirs.train(), ours.train()):
            model.set_grad_checkpointing()
            model(images).square().mean().backward()
        grads = dict(theirs.named_parameters())
        for key, p in ours.named_parameters():
            close(key, p.grad, grads[as_timm(key, theirs)].grad)
        ours.set_grad_checkpointing(False)
        assert not ours.grad_checkpointing


@pytest.mark.parametrize("name", MODELS.values(), ids=MODELS)
def test_no_weight_decay_and_layers(name: str) -> None:
    theirs, ours = twins(name)
    theirs_names = {key for key, _ in theirs.named_parameters()}
    assert ours.no_weight_decay() & theirs_names == theirs.no_weight_decay() & theirs_names
    layers = group_parameters(theirs, theirs.group_matcher(), reverse=True)
    for matcher in (ours.group_matcher(), ours.group_matcher(coarse=True)):
        mine = group_parameters(ours, matcher, reverse=True)
        assert {as_timm(key, theirs): layer for key, layer in mine.items()} == layers


@pytest.mark.parametrize(("layer_decay", "headless"), [(None, False), (0.75, False), (0.75, True)])
@pytest.mark.parametrize("name", MODELS.values(), ids=MODELS)
def test_param_groups(name: str, layer_decay: float | None, headless: bool) -> None:
    """Each parameter gets timm's learning rate scale and weight decay; frozen ones are left out."""
    theirs, ours = twins(name)
    for model in (theirs, ours):
        model.blocks[1].norm1.weight.requires_grad_(False)
        if headless:
            model.reset_classifier(0)
    kept = theirs.no_weight_decay()
    if layer_decay is None:
        expected = param_groups_weight_decay(theirs, 0.05, no_weight_decay_list=kept)
    else:
        expected = param_groups_layer_decay(theirs, 0.05, kept, layer_decay=layer_decay)
    names = {p: key for key, p in theirs.named_parameters()}
    rule = {
        names[p]: (group.get("lr_scale", 1.0), group["weight_decay"])
        for group in expected
        for p in group["params"]
    }
    for model in (ours, theirs):
        groups = fastvit.param_groups(model, 0.01, 0.05, layer_decay)
        mine = {}
        for group in groups:
            assert group["lr"] == 0.01 * group["lr_scale"]
            for key, p in zip(group["names"], group["params"], strict=True):
                assert dict(model.named_parameters())[key] is p
                mine[as_timm(key, theirs)] = (group["lr_scale"], group["weight_decay"])
        assert mine == rule
        torch.optim.AdamW(groups)
        timm.optim.create_optimizer_v2(groups, opt="adamw", lr=0.01)


class Mine(torch.nn.Module):
    def __init__(self, vit: torch.nn.Module) -> None:
        super().__init__()
        self.vit, self.mine = vit, torch.nn.Linear(5, 2)


class AsDdp(torch.nn.Module):
    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


def _compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def _compiled_block(model: Any) -> Any:
    model.blocks[1] = _compiled(model.blocks[1])
    return model


def _checkpointed_blocks(model: Any) -> Any:
    model.blocks = checkpoint_wrapper(model.blocks)
    return model


def _compiled_blocks(model: Any) -> Any:
    model.blocks = _compiled(model.blocks)
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        _compiled,
        lambda model: AsDdp(_compiled(model)),
        lambda model: torch.nn.Sequential(AsDdp(model)),
        Mine,
        _compiled_block,
        _compiled_blocks,
        _checkpointed_blocks,
    ],
    ids=["compile", "ddp", "sequential", "inside", "block", "blocks", "checkpointed"],
)
@pytest.mark.parametrize("layer_decay", [None, 0.75])
def test_param_groups_of_a_wrapped_model(wrap: Any, layer_decay: float | None) -> None:
    model: Any = fastvit.create_model(MODELS["registers"], **NARROW, img_size=64)

    def rule(model: torch.nn.Module) -> dict[torch.Tensor, tuple[float, float]]:
        groups = fastvit.param_groups(model, 0.01, 0.05, layer_decay)
        return {p: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}

    expected = rule(model)
    wrapped = wrap(model)
    mine = [p for p in wrapped.parameters() if p not in expected]
    assert rule(wrapped) == {**expected, **{p: (0.01, 0.05 * (p.ndim > 1)) for p in mine}}


def test_param_groups_at_fault() -> None:
    model = fastvit.create_model("vit_tiny_patch16_224", depth=1)
    for kwargs, message in (
        ({"lr": 0}, "lr must be positive, got 0"),
        ({"lr": 1, "weight_decay": -1}, "weight_decay must not be negative, got -1"),
        ({"lr": 1, "layer_decay": 1.5}, r"layer_decay must be in \(0, 1\], got 1\.5"),
    ):
        with pytest.raises(ValueError, match=message):
            fastvit.param_groups(model, **kwargs)
    with pytest.raises(ValueError, match=r"layer_decay needs a model with group_matcher.*Linear"):
        fastvit.param_groups(torch.nn.Linear(2, 2), 0.1, layer_decay=0.5)
    assert len(fastvit.param_groups(torch.nn.Linear(2, 2), 0.1)) == 2
    both = torch.nn.ModuleList([model, fastvit.create_model("vit_tiny_patch16_224", depth=1)])
    with pytest.raises(UsageError, match="or one such inside; got ModuleList with 2 to train"):
        fastvit.param_groups(both, 0.1, layer_decay=0.5)
    both[1].requires_grad_(False)
    assert len(fastvit.param_groups(both, 0.1, layer_decay=0.5)) == 6
    flat = torch.nn.ParameterDict({"_flat_param": torch.zeros(9)})
    with pytest.raises(UsageError, match="many parameters in one; expected FSDP with use_orig"):
        fastvit.param_groups(flat, 0.1)


EVA02, DINOV3 = "eva02_tiny_patch14_224", "vit_small_patch16_dinov3"
PLUS = "vit_small_plus_patch16_dinov3"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"norm_layer": torch.nn.LayerNorm}),
        ("vit_tiny_patch16_224", {"norm_layer": torch.nn.RMSNorm}),
        ("vit_tiny_patch16_224", {"norm_layer": partial(torch.nn.LayerNorm, eps=1e-3)}),
        ("vit_base_patch16_clip_224", {"norm_layer": "layernorm"}),
        ("vit_base_patch16_clip_224", {"norm_layer": timm.layers.LayerNorm}),
        (EVA02, {"norm_layer": torch.nn.LayerNorm}),
        (EVA02, {"global_pool": "max"}),
        (EVA02, {"global_pool": "avgmax"}),
        (EVA02, {"global_pool": "avgmax", "use_fc_norm": True}),
        (EVA02, {"rope_type": "dinov3", "rope_rotate_half": True}),
        (DINOV3, {"rope_type": "cat", "rope_rotate_half": False}),
        (DINOV3, {"global_pool": "max"}),
        (DINOV3, {"swiglu_mlp": True}),
        (DINOV3, {"swiglu_mlp": True, "swiglu_align_to": 64}),
        (DINOV3, {"swiglu_align_to": 8}),
        (PLUS, {"swiglu_mlp": True}),
        (PLUS, {"swiglu_align_to": 0, "mlp_ratio": 3.3}),
        (PLUS, {"swiglu_mlp": False}),
        (PLUS, {"mlp_ratio": 3.3}),
    ],
    ids=str,
)
def test_arguments_mean_what_they_mean_to_timm(name: str, options: dict[str, Any]) -> None:
    theirs, ours = twins(name, **options)
    eps = theirs.blocks[0].norm1.eps
    assert ours.blocks[0].norm1.eps == (torch.finfo(torch.float32).eps if eps is None else eps)
    images = torch.randn(2, 3, *theirs.patch_embed.img_size)
    same(ours.forward_features(images), theirs.forward_features(images))
    close("logits", ours(images), theirs(images))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (EVA02, {"global_pool": "map"}, "global_pool='map' of timm's Eva reads <cls>"),
        (DINOV3, {"global_pool": "map"}, "global_pool='map' of timm's Eva reads <cls>"),
        (EVA02, {"rope_rotate_half": True}, "rope_rotate_half=True is timm's alone"),
        (EVA02, {"rope_type": "dinov3"}, "rope_rotate_half=False is timm's alone"),
        (DINOV3, {"rope_rotate_half": False}, "rope_rotate_half=False is timm's alone"),
        (
            "vit_tiny_patch16_224",
            {"norm_layer": partial(torch.nn.LayerNorm, bias=False)},
            "norm_layer: bias=False is not among fastvit's",
        ),
    ],
    ids=str,
)
def test_arguments_of_timm_alone(name: str, options: dict[str, Any], message: str) -> None:
    timm.create_model(name, depth=1, **options)
    with pytest.raises(UsageError, match=message):
        fastvit.create_model(name, depth=1, **options)


def test_attention_pooling_of_eva_is_not_read_as_ours() -> None:
    for name, message in ((EVA02, None), (DINOV3, "attention pooling of timm's Eva")):
        args = {**NARROW, "img_size": 56 if name == EVA02 else 64}
        theirs = timm.create_model(name, **args, global_pool="map")
        ours = fastvit.create_model(name, **args, pool="map")
        if message is None:
            assert "taken for fastvit's own" in str(ours.load_weights(theirs.state_dict()))
            continue
        with pytest.raises(UsageError, match=message):
            ours.load_weights(theirs.state_dict())


def test_bad_indices() -> None:
    model = fastvit.create_model("vit_tiny_patch16_224", **NARROW, img_size=32)
    images = torch.randn(1, 3, 32, 32)
    for indices, message in (
        (4, "the last 4 of 3 blocks"),
        (0, "the last 0 of 3 blocks"),
        ([3], "indices: 3 is out of range for depth 3"),
        ([-4], "indices: -4 is out of range for depth 3"),
    ):
        with pytest.raises(ValueError, match=message):
            model.forward_intermediates(images, indices)
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NLC', got 'NHWC'"):
        model.forward_intermediates(images, output_fmt="NHWC")


def test_none_asks_for_nothing() -> None:
    """timm's training scripts pass every option, None where it was not given."""
    options: dict[str, Any] = dict(
        drop_path_rate=None, img_size=None, init_values=None, global_pool=None
    )
    theirs = timm.create_model("deit3_small_patch16_224", depth=1, **options)
    ours = fastvit.create_model("deit3_small_patch16_224", depth=1, **options)
    ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (None, {}, TypeError, "name must be a string, got None"),
        ("timm/vit_tiny_patch16_224", {}, ValueError, "vit_tiny_patch16_224.* hub id goes to"),
        (
            "vit_tiny_patch16_224",
            {"mlp_layer": timm.layers.SwiGLUPacked},
            ValueError,
            "mlp_layer: timm gates with act_layer, here 'gelu'; fastvit with 'silu'",
        ),
        ("vit_tiny_patch16_224", {"mlp_ratio": "4"}, ValueError, "mlp_ratio must be a positive"),
        (
            "vit_tiny_patch16_224",
            {"resample": "bilinear"},
            ValueError,
            "resample must be a mapping",
        ),
    ],
)
def test_bad_names_and_words(name: Any, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        fastvit.create_model(name, depth=1, **options)


@pytest.mark.parametrize("name", MODELS.values(), ids=MODELS)
def test_prune_intermediate_layers(name: str) -> None:
    for args in ((1,), ([1, 0],), (2, True), ([-2], False, False), ([0], True, False)):
        theirs, ours = twins(name, drop_path_rate=0.2)
        assert ours.feature_info == theirs.feature_info
        images = torch.randn(2, 3, *theirs.patch_embed.img_size)
        taken = theirs.prune_intermediate_layers(*args)
        assert ours.prune_intermediate_layers(*args) == taken
        same(ours.forward_intermediates(images, taken), theirs.forward_intermediates(images, taken))
        close(f"{args}", ours(images), theirs(images))
        again = fastvit.ViT(**ours.config).eval()
        again.load_state_dict(ours.state_dict(), strict=True)
        close(f"{args}, of its config", again(images), ours(images))
        assert [b.drop_path for b in again.blocks] == pytest.approx(
            [b.drop_path for b in ours.blocks]
        )
    with pytest.raises(ValueError, match="indices: 3 is out of range for depth 3"):
        twins(name)[1].prune_intermediate_layers([3])


def test_masks_are_none() -> None:
    _, ours = twins(MODELS["cls"])
    images = torch.randn(1, 3, *ours.patch_embed.img_size)
    calls = (ours, ours.forward_features, ours.forward_intermediates, ours.get_intermediate_layers)
    for call in calls:
        same(call(images, attn_mask=None), call(images))
        with pytest.raises(UsageError, match="attn_mask must be None, got Tensor"):
            call(images, attn_mask=torch.zeros(17, 17))
    for call in calls[:3]:
        same(call(images, is_causal=False), call(images))
        with pytest.raises(UsageError, match="is_causal must be False, got True"):
            call(images, is_causal=True)
