"""Checkpoints of the papers' own code, with its outputs and gradients; see originals/make.py."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from originals.make import pixels
from peers import Truth, check, close, renamed

import fastvit
from fastvit.checkpoint_files import read_source
from fastvit.dialects import read
from fastvit.jax_npz import is_jax, read_jax
from fastvit.pos_embed import Resample

FOLDER = Path(__file__).parent / "originals"
# name: (file, arguments that neither file nor config gives, expected dialect)
ORIGINALS: dict[str, tuple[str, dict[str, Any], str]] = {
    "dinov2": ("dinov2.pth", {"heads": 2}, "dinov2"),
    "dinov2_teacher": ("dinov2_teacher.pth", {"heads": 2}, "dinov2"),
    "dinov3": ("dinov3.pth", {"heads": 2}, "dinov3"),
    "dinov3_swiglu": ("dinov3_swiglu.pth", {"heads": 2}, "dinov3"),
    "deit3": ("deit3.pth", {"heads": 2}, "timm"),
    "openai_clip": ("openai_clip.pth", {}, "openai"),
    "open_clip": ("open_clip", {}, "open_clip"),
    "vit_jax": ("vit_jax.npz", {}, "vit_jax"),
    "vit_jax_pre_logits": ("vit_jax_pre_logits.npz", {}, "vit_jax"),
    "big_vision_cls": ("big_vision_cls.npz", {}, "big_vision"),
    "big_vision_gap": ("big_vision_gap.npz", {}, "big_vision"),
    "big_vision_map": ("big_vision_map.npz", {}, "big_vision"),
    "vit_pytorch_old": ("vit_pytorch_old.pth", {"heads": 2}, "vit-pytorch"),
}


def truths(name: str) -> list[tuple[Truth, bool]]:
    """The original's results for each image size, and whether they have parameter gradients."""
    with np.load(FOLDER / f"{name}.truth.npz") as file:
        arrays = {k: torch.from_numpy(file[k]) for k in file.files}
    found = []
    for size in sorted({k.split("/")[0] for k in arrays}):
        mine = {k.removeprefix(f"{size}/"): v for k, v in arrays.items() if k.startswith(size)}
        grads = {k.removeprefix("grads/"): v for k, v in mine.items() if k.startswith("grads/")}
        if is_jax(grads):
            named = read_jax({k: v.numpy() for k, v in grads.items()}).state
        elif grads:
            # DINOv3 masks the key biases: reading their gradient needs the mask as well.
            weights = torch.load(FOLDER / ORIGINALS[name][0]) if "dinov3" in name else {}
            named = renamed({**grads, **{k: v for k, v in weights.items() if "bias_mask" in k}})
        else:
            named = {}
        images = torch.from_numpy(pixels(*(int(n) for n in size.split("x"))))
        one = Truth(images, mine.get("features"), mine["out"], mine["dimages"], named)
        found.append((one, bool(grads)))
    return found


@pytest.mark.parametrize("name", ORIGINALS)
def test_gives_what_the_original_gave(name: str) -> None:
    file, more, dialect = ORIGINALS[name]
    ours: Any = fastvit.load_checkpoint(FOLDER / file, dynamic_img_size=True, **more)
    assert ours.load_report.dialect == dialect
    checked = 0
    for truth, with_grads in truths(name):
        check(ours, truth, with_grads)
        checked += with_grads
    assert checked == (name != "openai_clip")


def test_another_resampling_would_not_do() -> None:
    """Results differ without DINOv2's resampling rule, or with exact GELU for flax's tanh GELU."""
    truth = truths("dinov2")[-1][0]
    ours: Any = fastvit.load_checkpoint(
        FOLDER / "dinov2.pth", heads=2, dynamic_img_size=True, resample={"antialias": False}
    )
    assert truth.images.shape[-2:] == (28, 28)
    with pytest.raises(AssertionError, match="features"):
        check(ours, truth, False)
    truth = truths("vit_jax")[0][0]
    ours = fastvit.load_checkpoint(FOLDER / "vit_jax.npz", activation="gelu")
    assert any("gelu_tanh" in note for note in ours.load_report.notes)
    with pytest.raises(AssertionError, match="output"):
        check(ours, truth, False)


def test_open_clip_says_quick_gelu_in_its_config() -> None:
    source = read_source(FOLDER / "open_clip")
    assert read(source.state, source.config).known["activation"] == "gelu"
    source.config["model_cfg"]["quick_gelu"] = True
    assert read(source.state, source.config).known["activation"] == "quick_gelu"


def test_resampled_once_is_resampled_at_run_time() -> None:
    """image_size= at loading gives the table that dynamic_img_size makes at each call."""
    truth = next(t for t, _ in truths("dinov2") if t.images.shape[-2:] == (12, 28))
    ours = fastvit.load_checkpoint(FOLDER / "dinov2.pth", heads=2, image_size=(12, 28))
    assert ours.resample == Resample(antialias=False, offset=0.1)
    assert any("grid (5, 5) to (3, 7)" in line for line in ours.load_report.adapted)
    assert truth.features is not None
    close("features", ours.forward_features(truth.images), truth.features)


def test_timm_agrees_with_what_we_read_of_jax() -> None:
    """Features agree with those of timm's npz loader, an independent reader of the four styles."""
    timm = pytest.importorskip("timm")
    common: dict[str, Any] = dict(img_size=20, patch_size=4, embed_dim=16, depth=2, num_heads=2)
    for name, more in (
        ("vit_jax", {"num_classes": 5}),
        ("big_vision_cls", {"num_classes": 5, "no_embed_class": True}),
        ("big_vision_gap", {"class_token": False, "global_pool": "avg", "fc_norm": False}),
        ("big_vision_map", {"class_token": False, "global_pool": "map"}),
    ):
        prefix = "params/img/" if "map" in name else "params/" if "big" in name else ""
        theirs: Any = timm.models.VisionTransformer(
            **{**common, "num_classes": 0, "mlp_ratio": 2, **more}
        ).eval()
        theirs.load_pretrained(FOLDER / f"{name}.npz", prefix)
        ours = fastvit.load_checkpoint(FOLDER / f"{name}.npz", activation="gelu")
        images = torch.from_numpy(pixels(20, 20))
        with torch.no_grad():
            close(name, ours.forward_features(images), theirs.forward_features(images))
