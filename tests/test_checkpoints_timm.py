"""timm checkpoints of a narrow model of each preset family, loaded and exported back to timm."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peers import check, close, randomize_weights, timm_truth
from safetensors.torch import save_file

import fastvit
from fastvit.errors import UsageError
from fastvit.presets import PRESETS

timm: Any = pytest.importorskip("timm")

FAMILIES = {
    "tiny": "vit_tiny_patch16_224",
    "patch 32": "vit_base_patch32_224",
    "gap": "vit_medium_patch16_gap_256",
    "registers": "vit_betwixt_patch16_reg4_gap_256",
    "so150m": "vit_so150m_patch16_reg4_gap_256",
    "so150m2": "vit_so150m2_patch16_reg1_gap_256",
    "huge": "vit_huge_patch14_224",
    "giant": "vit_giant_patch14_224",
    "deit": "deit_small_patch16_224",
    "deit3": "deit3_small_patch16_224",
    "dinov2": "vit_small_patch14_dinov2",
    "dinov2 registers": "vit_base_patch14_reg4_dinov2",
    "dinov2 giant": "vit_giant_patch14_reg4_dinov2",
    "dinov3": "vit_base_patch16_dinov3",
    "dinov3 qv bias": "vit_large_patch16_dinov3_qkvb",
    "dinov3 swiglu": "vit_small_plus_patch16_dinov3_qkvb",
    "siglip": "vit_base_patch16_siglip_224",
    "so400m": "vit_so400m_patch16_siglip_256",
    "siglip mean": "vit_base_patch16_siglip_gap_224",
    "clip": "vit_base_patch16_clip_224",
    "openai": "vit_large_patch14_clip_quickgelu_336",
    "eva02": "eva02_small_patch14_224",
}


def narrow(name: str, **more: Any) -> dict[str, Any]:
    """timm's arguments for a small copy: two blocks, few channels, a 4 x 4 grid."""
    patch = PRESETS[name]["patch_size"]
    args = dict(embed_dim=64, num_heads=2, depth=2, num_classes=5, img_size=4 * patch)
    if "giant_patch14_reg4" in name:
        args["mlp_ratio"] = 4
    return {**args, **more}


@pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)
def test_loads_what_timm_saved(name: str, tmp_path: Path) -> None:
    """The folder that timm pushes to the hub, at its native size, a larger and an oblong one."""
    args = narrow(name, dynamic_img_size=True)
    theirs = randomize_weights(timm.create_model(name, **args), std=0.1)
    timm.models.save_for_hf(theirs, tmp_path, model_args=args)
    ours = fastvit.load_checkpoint(tmp_path)
    assert ours.load_report.dialect == "timm" and not ours.load_report.adapted
    patch = PRESETS[name]["patch_size"]
    for rows, columns in ((4, 4), (5, 5), (3, 6)):
        check(ours, timm_truth(theirs, torch.randn(2, 3, rows * patch, columns * patch)))
    config, theirs_config = ours.default_cfg, theirs.pretrained_cfg
    for key in ("mean", "std", "interpolation", "crop_pct"):
        assert config[key] == theirs_config[key], key


@pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)
def test_timm_reads_our_export(name: str, tmp_path: Path) -> None:
    ours = randomize_weights(
        fastvit.create_model(name, **narrow(name, dynamic_img_size=True)), std=0.1
    )
    state = fastvit.export_checkpoint(ours, "timm", tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert theirs.state_dict().keys() == state.keys()
    patch = PRESETS[name]["patch_size"]
    for rows, columns in ((4, 4), (3, 6)):
        check(ours, timm_truth(theirs, torch.randn(2, 3, rows * patch, columns * patch)))
    again = fastvit.load_checkpoint(tmp_path)
    for key, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


@pytest.mark.parametrize(
    "options",
    [
        dict(patch_bias=False),
        dict(norm="rmsnorm"),
        dict(rope="eva", qkv_bias="qv", rope_theta=50.0),
        dict(dim=56, mlp_dim=61),  # int(56 * (61 / 56)) is 60
        dict(pre_norm=True, norm_eps=1e-5),
    ],
    ids=str,
)
def test_arguments_without_a_preset_go_to_timm_and_back(
    options: dict[str, Any], tmp_path: Path
) -> None:
    sizes: dict[str, Any] = dict(dim=32, depth=2, heads=2, mlp_dim=64, image_size=32, patch_size=8)
    ours = randomize_weights(fastvit.ViT(**{**sizes, **options}, num_classes=5))
    fastvit.export_checkpoint(ours, "timm", tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    close("timm", theirs(images), ours(images))
    close("back", fastvit.load_checkpoint(tmp_path)(images), ours(images))


def test_pool_and_image_size_of_the_saved_model_stand_beside_its_arguments(tmp_path: Path) -> None:
    sizes: dict[str, Any] = dict(dim=32, depth=1, heads=2, mlp_dim=64, patch_size=8)
    ours = fastvit.ViT(**sizes, image_size=(16, 32), pool="mean", fc_norm=False)
    fastvit.export_checkpoint(ours, "timm", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("global_pool", "img_size"):
        del config["model_args"][name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = fastvit.load_checkpoint(tmp_path)
    assert (loaded.pool, loaded.patch_embed.img_size) == ("mean", (16, 32))


def test_the_eps_that_timm_gives_to_an_rmsnorm_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes: dict[str, Any] = dict(dim=32, depth=1, heads=2, mlp_dim=64, image_size=32, patch_size=8)
    fastvit.export_checkpoint(fastvit.ViT(**sizes, norm="rmsnorm", norm_eps=1e-5), "timm", tmp_path)
    assert "cannot say norm_eps 1e-05; timm will take 1e-06" in caplog.text


def test_another_resampling_than_that_of_timm_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes: dict[str, Any] = dict(dim=32, depth=1, heads=2, mlp_dim=64, image_size=32, patch_size=8)
    fastvit.export_checkpoint(fastvit.ViT(**sizes), "timm", tmp_path / "same")
    without = fastvit.ViT(**sizes, pos_embed="none", resample={"antialias": False})
    fastvit.export_checkpoint(without, "timm", tmp_path / "without")
    assert not caplog.text
    other = fastvit.ViT(**sizes, resample={"antialias": False})
    fastvit.export_checkpoint(other, "timm", tmp_path / "other")
    assert "another image size than (32, 32), timm resamples positions by Resample(" in caplog.text


def test_the_architecture_comes_from_the_shapes(tmp_path: Path) -> None:
    """From a state dict alone, as .pth, .safetensors or inside a training script's checkpoint."""
    for name in ("vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_small_patch16_dinov3"):
        args = narrow(name)
        theirs = randomize_weights(timm.create_model(name, **args), std=0.1)
        state = theirs.state_dict()
        images = torch.randn(2, 3, args["img_size"], args["img_size"])
        torch.save(state, tmp_path / "bare.pth")
        save_file(state, tmp_path / "bare.safetensors")
        theirs.eval()
        trained = {
            "epoch": 3,
            "arch": name,
            "state_dict": {f"module.{k}": torch.zeros_like(v) for k, v in state.items()},
            "state_dict_ema": {f"module.{k}": v for k, v in state.items()},
            "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
            "args": argparse.Namespace(lr=0.1),
            "best": {"accuracy": np.float64(0.8), "epoch": np.int64(3)},
        }
        torch.save(trained, tmp_path / "trained.pth.tar")
        for file in ("bare.pth", "bare.safetensors", "trained.pth.tar"):
            ours = fastvit.load_checkpoint(tmp_path / file, heads=2, image_size=args["img_size"])
            check(ours, timm_truth(theirs, images))
            assert ("'state_dict_ema'" in str(ours.load_report)) == (file == "trained.pth.tar")


def test_real_size_and_heads_from_the_shapes(tmp_path: Path) -> None:
    """ViT-Ti/16 from its tensors alone: 3 heads of 64 and the 7 classes are inferred."""
    theirs = randomize_weights(timm.create_model("vit_tiny_patch16_224", num_classes=7), std=0.05)
    torch.save(theirs.state_dict(), tmp_path / "tiny.pth")
    ours = fastvit.load_checkpoint(tmp_path / "tiny.pth")
    assert ours.config["heads"] == 3 and ours.num_classes == 7
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=1e-5)


def unknown_to_us() -> list[str]:
    modules = ("vision_transformer", "eva", "deit", "beit", "vision_transformer_relpos")
    return [n for m in modules for n in timm.list_models(module=m) if n not in PRESETS]


@pytest.mark.slow
def test_no_model_of_timm_loads_as_something_else(tmp_path: Path) -> None:
    """Every ViT-like timm model that is no preset here gives the same output or an error."""
    loaded = 0
    for name in unknown_to_us():
        args: dict[str, Any] = dict(embed_dim=64, depth=2, num_heads=2, num_classes=5)
        try:
            theirs = randomize_weights(timm.create_model(name, **args), std=0.1)
        except AssertionError:  # grouped-query attention, which depth=2 does not fit
            continue
        theirs.head.weight.data.normal_()
        timm.models.save_for_hf(theirs, tmp_path, model_args=args)
        try:
            ours = fastvit.load_checkpoint(tmp_path)
        except UsageError as error:
            assert (
                "not among the models" in str(error)
                or "unexpected" in str(error)
                or ("a norm inside its MLP" in str(error) or "distilled" in str(error))
            ), (name, error)
            continue
        loaded += 1
        images = torch.randn(1, *theirs.pretrained_cfg["input_size"])
        with torch.no_grad():
            expected = theirs(images)
            error = float((ours(images) - expected).abs().max())
        assert error <= 1e-5 * max(1.0, float(expected.abs().max())), (name, error)
    assert loaded > 30


def test_models_that_only_look_alike_are_refused(tmp_path: Path) -> None:
    """Same tensor names but another computation, such as post-norm or another RoPE."""
    for name, message in (
        ("vit_base_patch16_rpn_224", "'vit_base_patch16_rpn_224' is not among the models"),
        ("vit_small_patch16_rope_ape_224", "is not among the models"),
        ("vit_medium_patch16_rope_reg1_gap_256", "is not among the models"),
        ("vit_pe_core_small_patch16_384", "is not among the models"),
    ):
        args: dict[str, Any] = dict(embed_dim=64, depth=1, num_heads=2, num_classes=5)
        theirs = timm.create_model(name, **args)
        timm.models.save_for_hf(theirs, tmp_path, model_args=args)
        with pytest.raises(UsageError, match=message):
            fastvit.load_checkpoint(tmp_path)
    theirs = timm.create_model("vit_small_patch16_rope_224", embed_dim=64, depth=1, num_heads=2)
    with pytest.raises(UsageError, match="has no position table"):
        fastvit.load_checkpoint(theirs.state_dict())


def test_radio_has_no_final_norm(tmp_path: Path) -> None:
    args: dict[str, Any] = dict(embed_dim=64, depth=1, num_heads=2, img_size=64)
    theirs = randomize_weights(timm.create_model("vit_base_patch16_radio_v3", **args), std=0.1)
    timm.models.save_for_hf(theirs, tmp_path, model_args=args)
    ours = fastvit.load_checkpoint(tmp_path)
    images = torch.randn(1, 3, 64, 64)
    close("features", ours.forward_features(images), theirs.forward_features(images))


def test_a_preset_settles_what_keys_alone_would_leave_to_guess(tmp_path: Path) -> None:
    """norm_pre alone suggests CLIP, with norm_eps 1e-5; the preset in the config says 1e-6."""
    args = narrow("vit_tiny_patch16_224", pre_norm=True)
    theirs = randomize_weights(timm.create_model("vit_tiny_patch16_224", **args))
    timm.models.save_for_hf(theirs, tmp_path, model_args=args)
    ours = fastvit.load_checkpoint(tmp_path)
    assert ours.config["norm_eps"] == 1e-6
    images = torch.randn(2, 3, 64, 64)
    check(ours, timm_truth(theirs, images))
