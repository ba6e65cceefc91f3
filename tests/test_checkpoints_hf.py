"""Checkpoints written by transformers' save_pretrained, and exports for its from_pretrained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peers import check, close, randomize_weights, truth
from torch import Tensor

import fastvit
from fastvit.errors import UsageError
from fastvit.saving import save_checkpoint

hf: Any = pytest.importorskip("transformers")
hf.utils.logging.set_verbosity_error()
hf.utils.logging.disable_progress_bar()

SIZE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=8)
VIT: dict[str, Any] = dict(**SIZE, intermediate_size=64, image_size=32)
DINO: dict[str, Any] = dict(**SIZE, mlp_ratio=2, image_size=32)
ANY_SIZE = {"interpolate_pos_encoding": True}


class Case(NamedTuple):
    """model: builds the model. at_any_size: forward arguments for images of other sizes.
    take: (features, output) from what forward returns."""

    model: Callable[[], Any]
    at_any_size: dict[str, Any]
    take: Callable[[Any], tuple[Tensor | None, Tensor]]


def case(name: str, at_any_size: dict[str, Any], output: str, **config: Any) -> Case:
    base = name.removesuffix("ForImageClassification").removesuffix("WithProjection")
    config_class = getattr(hf, f"{base.removesuffix('Model')}Config")
    return Case(lambda: getattr(hf, name)(config_class(**config)), at_any_size, TAKES[output])


TAKES: dict[str, Callable[[Any], tuple[Tensor | None, Tensor]]] = {
    "pooled": lambda out: (out.last_hidden_state, out.pooler_output),
    "pooled alone": lambda out: (None, out.pooler_output),  # CLIP's other tokens are not normed
    "first": lambda out: (out.last_hidden_state, out.last_hidden_state[:, 0]),
    "tokens": lambda out: (out.last_hidden_state, out.last_hidden_state.mean(1)),
    "logits": lambda out: (None, out.logits),
    "embeds": lambda out: (None, out.image_embeds),
}
ODD = dict(layer_norm_eps=1e-3, hidden_act="gelu_pytorch_tanh", qkv_bias=False, num_channels=4)
GATED = dict(use_gated_mlp=True, hidden_act="silu", rope_theta=50.0)
CASES: dict[str, Case] = {
    "vit classifier": case("ViTForImageClassification", ANY_SIZE, "logits", **VIT, num_labels=5),
    "vit classifier, eps, tanh and four channels": case(
        "ViTForImageClassification", ANY_SIZE, "logits", **VIT, **ODD, num_labels=5
    ),
    "vit": case("ViTModel", ANY_SIZE, "first", **VIT),
    "dinov2": case("Dinov2Model", {}, "pooled", **DINO),
    "dinov2, SwiGLU": case("Dinov2Model", {}, "pooled", **DINO, use_swiglu_ffn=True),
    "dinov2 classifier": case("Dinov2ForImageClassification", {}, "logits", **DINO, num_labels=5),
    "dinov2 with registers": case("Dinov2WithRegistersModel", {}, "pooled", **DINO),
    "dinov2 with registers, SwiGLU": case(
        "Dinov2WithRegistersModel", {}, "pooled", **DINO, use_swiglu_ffn=True
    ),
    "dinov2 with registers, classifier": case(
        "Dinov2WithRegistersForImageClassification", {}, "logits", **DINO, num_labels=5
    ),
    "dinov3": case("DINOv3ViTModel", {}, "pooled", **VIT, num_register_tokens=4),
    "dinov3, no registers": case("DINOv3ViTModel", {}, "pooled", **VIT),
    "dinov3, SwiGLU": case(
        "DINOv3ViTModel", {}, "pooled", **VIT, **GATED, query_bias=False, value_bias=False
    ),
    "ijepa": case("IJepaModel", ANY_SIZE, "tokens", **VIT),
    "siglip": case("SiglipVisionModel", ANY_SIZE, "pooled", **VIT),
    "siglip, pixels left over": case(
        "SiglipVisionModel", ANY_SIZE, "pooled", **{**VIT, "image_size": 36}
    ),
    "clip": case("CLIPVisionModel", ANY_SIZE, "pooled alone", **VIT),
    "clip with projection": case(
        "CLIPVisionModelWithProjection", ANY_SIZE, "embeds", **VIT, projection_dim=7
    ),
}


def run(case: Case, model: Any, images: Tensor, any_size: bool = True) -> Any:
    kwargs = case.at_any_size if any_size else {}
    config = model.config.to_dict()
    return truth(model, images, lambda x: case.take(model(x, **kwargs)), config)


@pytest.mark.parametrize("old_names", [True, False], ids=["hub keys", "live keys"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_loads_what_save_pretrained_wrote(case: Case, old_names: bool, tmp_path: Path) -> None:
    theirs = randomize_weights(case.model())
    theirs.save_pretrained(tmp_path, save_original_format=old_names)
    ours = fastvit.load_checkpoint(tmp_path, dynamic_img_size=True)
    channels, size = getattr(theirs.config, "num_channels", 3), theirs.config.image_size
    check(ours, run(case, theirs, torch.randn(2, channels, size, size), any_size=False))
    if old_names:
        for height, width in ((48, 48), (24, 56)):
            check(ours, run(case, theirs, torch.randn(2, channels, height, width)))


def _same_pixels(folder: Path, model: fastvit.ViT) -> None:
    """The image processor of an exported folder normalizes as the model's data config says."""
    channels, height, width = model.default_cfg["input_size"]
    image = torch.randint(0, 256, (channels, height, width), dtype=torch.uint8)
    processor = hf.ViTImageProcessorPil.from_pretrained(folder)
    got = processor(image.numpy(), input_data_format="channels_first", return_tensors="pt")
    mean, std = (torch.tensor(model.default_cfg[k])[:, None, None] for k in ("mean", "std"))
    close("pixels", got["pixel_values"][0], (image / 255 - mean) / std)


EXPORTED = {name: case for name, case in CASES.items() if name != "ijepa"}


@pytest.mark.parametrize("case", EXPORTED.values(), ids=EXPORTED)
def test_exports_to_what_from_pretrained_reads(case: Case, tmp_path: Path) -> None:
    """from_pretrained gives the peer's outputs again; load_checkpoint gives bitwise our weights."""
    theirs = randomize_weights(case.model())
    theirs.save_pretrained(tmp_path / "a")
    ours = fastvit.load_checkpoint(tmp_path / "a")
    fastvit.export_checkpoint(ours, "hf", tmp_path / "b")
    again, info = type(theirs).from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    lost = {k for k in info["missing_keys"] if "pooler" not in k and "mask_token" not in k}
    assert not lost
    channels, size = getattr(theirs.config, "num_channels", 3), theirs.config.image_size
    images = torch.randn(2, channels, size, size)
    with torch.no_grad():
        for got, expected in zip(
            case.take(again.eval()(images)), case.take(theirs(images)), strict=True
        ):
            if expected is not None:
                close("output", got, expected)
    _same_pixels(tmp_path / "b", ours)
    twice = fastvit.load_checkpoint(tmp_path / "b")
    assert all(twice.default_cfg[k] == ours.default_cfg[k] for k in ("mean", "std"))
    for name, tensor in ours.state_dict().items():
        assert torch.equal(twice.state_dict()[name], tensor), name


def test_exports_after_another_size(tmp_path: Path) -> None:
    """And what the preprocessor says of the images comes back, for its own model alone."""
    sizes: dict[str, Any] = dict(dim=32, depth=1, heads=2, mlp_dim=64, image_size=16, patch_size=8)
    model = fastvit.ViT(**sizes, num_classes=0, pool="map", class_token=False)
    model.set_input_size(32)
    model.default_cfg.update(interpolation="bilinear", mean=(0.1,) * 3)
    fastvit.export_checkpoint(model, "hf", tmp_path / "hf")
    images = torch.randn(2, 3, 32, 32)
    theirs = hf.SiglipVisionModel.from_pretrained(tmp_path / "hf").eval()
    close("pooled", model(images), theirs(images).pooler_output)
    data = fastvit.load_checkpoint(tmp_path / "hf").default_cfg
    assert data["interpolation"] == "bilinear" and data["mean"] == (0.1,) * 3
    save_checkpoint(tmp_path / "hf" / "mine.safetensors", model, mean=[0.2] * 3)
    assert (
        fastvit.load_checkpoint(tmp_path / "hf" / "mine.safetensors").default_cfg["mean"][0] == 0.2
    )


def test_config_files_are_utf8(tmp_path: Path) -> None:
    model = fastvit.ViT(image_size=16, patch_size=8, dim=32, depth=1, heads=2, num_classes=1)
    model.default_cfg["label_names"] = ["K\u00e4se"]
    fastvit.export_checkpoint(model, "hf", tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    text = json.dumps(json.loads(path.read_text()), ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert fastvit.load_checkpoint(tmp_path / "hf").default_cfg["label_names"] == ["K\u00e4se"]
    model.reset_classifier(1)
    assert "label_names" not in model.default_cfg


def test_class_names_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """Of numbers, not of words, where 10 comes before 2."""
    names = [f"class {i}" for i in range(11)]
    hf.ViTForImageClassification(hf.ViTConfig(**VIT, num_labels=11)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"] = {str(i): names[i] for i in reversed(range(11))}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert fastvit.load_checkpoint(tmp_path).default_cfg["label_names"] == names


def test_a_preprocessor_that_divides_by_zero(tmp_path: Path) -> None:
    hf.ViTModel(hf.ViTConfig(**VIT)).save_pretrained(tmp_path)
    text = json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5, 0.0, 0.5]})
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(UsageError, match="std must be positive numbers"):
        fastvit.load_checkpoint(tmp_path)


def test_tensors_alone_of_a_vit_have_the_eps_of_transformers() -> None:
    theirs = hf.ViTModel(hf.ViTConfig(**VIT))
    loaded = fastvit.load_checkpoint(theirs.state_dict(), heads=2)
    assert loaded.config["norm_eps"] == theirs.config.layer_norm_eps == 1e-12


def test_export_refuses_what_transformers_has_no_place_for(tmp_path: Path) -> None:
    narrow: dict[str, Any] = dict(dim=32, depth=1, heads=2, mlp_dim=64, image_size=32, patch_size=8)
    for options, message in (
        ({"qk_norm": True}, "qk_norm=True"),
        ({"norm": "rmsnorm"}, "norm='rmsnorm'"),
        ({"head_hidden_dim": 8}, "head_hidden_dim=8"),
        ({"dim_head": 24}, "dim_head 24 other than dim / heads"),
        ({"rope": "eva"}, "this RoPE, or a ViT without positions"),
        ({"registers": 2}, "registers without LayerScale"),
        ({"class_token": False, "pool": "mean"}, "pool 'mean' or class_token=False"),
        ({"layer_scale": 1.0}, "a head on pool 'cls', only on 'cls_mean'"),
        ({"layer_scale": 1.0, "num_classes": 0, "mlp_dim": 40}, "mlp_dim 40 with dim 32"),
        ({"pre_norm": True, "layer_scale": 1.0}, "registers, LayerScale, or no <cls>"),
        ({"class_token": False, "pool": "map"}, "a classifier on attention pooling"),
        ({"pre_norm": True, "patch_bias": True}, r"a patch bias \(patch_bias\) with pre_norm"),
        ({"pre_norm": True, "pool": "max", "fc_norm": False}, "CLIPVisionModel .* pool 'max'"),
        ({"pre_norm": True}, "Projection .* a head with a bias that is not zero"),
        ({"pre_norm": True, "final_norm": False}, "CLIPVisionModel .* without a final norm"),
        ({"pre_norm": True, "image_size": (16, 32)}, r"images of \(16, 32\) or patches of"),
        ({"pre_norm": True, "mlp": "swiglu_packed"}, "CLIPVisionModel .* mlp 'swiglu_packed'"),
    ):
        model = randomize_weights(fastvit.ViT(**{**narrow, **options}))
        with pytest.raises(UsageError, match=message):
            fastvit.export_checkpoint(model, "hf", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    for options, message in (
        ({"head_hidden_dim": 8}, "a head of two layers"),
        ({"pool": "cls_mean"}, "pool 'cls_mean'"),
        ({"mlp_bias": False}, "mlp_bias=False with proj_bias=True"),
        ({"rope": "eva", "qkv_bias": True}, "a bias on the keys"),
        ({"mlp": "swiglu"}, "a SwiGLU of two projections without RoPE"),
        ({"pre_norm": True, "patch_bias": True}, r"a patch bias \(patch_bias\) with pre_norm"),
        ({"mlp": "swiglu_packed", "pool": "map"}, "this pool 'map', .* a packed SwiGLU"),
        ({"rope": "eva", "qkv_bias": "qv", "pool": "map"}, "this pool 'map', with RoPE"),
    ):
        model = randomize_weights(fastvit.ViT(**{**narrow, **options}))
        with pytest.raises(UsageError, match=message):
            fastvit.export_checkpoint(model, "timm", tmp_path / "out")
    with pytest.raises(UsageError, match=r"dialect must be one of .*, got 'onnx'"):
        fastvit.export_checkpoint(fastvit.ViT(**narrow), "onnx")


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_takes_no_oblong_positions(registers: int, tmp_path: Path) -> None:
    """transformers assumes a square position table in Dinov2, whatever its config says."""
    narrow: dict[str, Any] = dict(dim=32, depth=1, heads=2, mlp_dim=64, patch_size=8)
    narrow.update(layer_scale=1.0, num_classes=0, registers=registers)
    for sizes in ({"image_size": (16, 64)}, {"image_size": 32, "patch_size": (4, 16)}):
        model = randomize_weights(fastvit.ViT(**{**narrow, **sizes}))
        with pytest.raises(UsageError, match=r"an oblong table of \(\d, \d\) positions"):
            fastvit.export_checkpoint(model, "hf", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    ours = randomize_weights(fastvit.ViT(**narrow, image_size=(16, 32)))
    ours.set_input_size((32, 32))
    fastvit.export_checkpoint(ours, "hf", tmp_path / "out")
    name = "Dinov2WithRegistersModel" if registers else "Dinov2Model"
    theirs = getattr(hf, name).from_pretrained(tmp_path / "out").eval()
    images = torch.randn(2, 3, 32, 32)
    close("features", theirs(images).last_hidden_state, ours.forward_features(images))


def test_export_writes_the_biases_that_transformers_has_in_any_case(tmp_path: Path) -> None:
    bare: dict[str, Any] = dict(proj_bias=False, mlp_bias=False, patch_bias=False, qkv_bias=False)
    sizes: dict[str, Any] = dict(dim=32, depth=1, heads=2, mlp_dim=64, image_size=32, patch_size=8)
    for name, options in (("ViTModel", {}), ("CLIPVisionModel", {"pre_norm": True})):
        ours = randomize_weights(fastvit.ViT(**{**sizes, **bare, **options}, num_classes=0))
        fastvit.export_checkpoint(ours, "hf", tmp_path / name)
        theirs, info = getattr(hf, name).from_pretrained(tmp_path / name, output_loading_info=True)
        assert not [k for k in info["missing_keys"] if "pooler.dense" not in k]
        images = torch.randn(2, 3, 32, 32)
        out = theirs.eval()(images)
        got = out.pooler_output if options else out.last_hidden_state[:, 0]
        close("output", got, ours(images))


def patchified(images: Tensor, patch: int) -> dict[str, Tensor]:
    """Patches, mask and shapes, as the NaFlex image processor gives them for images of one size."""
    B, C, H, W = images.shape
    x = images.reshape(B, C, H // patch, patch, W // patch, patch).permute(0, 2, 4, 3, 5, 1)
    patches = x.reshape(B, -1, patch * patch * C)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.long),
        "spatial_shapes": torch.tensor([[H // patch, W // patch]] * B),
    }


def test_siglip2(tmp_path: Path) -> None:
    """The NaFlex tower: patches projected by a Linear, one position table for all grids."""
    size = {k: v for k, v in VIT.items() if k != "image_size"}
    theirs = randomize_weights(
        hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**size, num_patches=16))
    )
    theirs.save_pretrained(tmp_path)
    ours = fastvit.load_checkpoint(tmp_path)
    assert ours.load_report.dialect == "hf siglip2"
    case = Case(lambda: theirs, {}, TAKES["pooled"])
    for height, width in ((32, 32), (48, 40), (24, 56)):
        images = torch.randn(2, 3, height, width)
        expected = truth(
            theirs,
            images,
            lambda x: case.take(theirs(**patchified(x, 8))),
            theirs.config.to_dict(),
        )
        check(ours, expected)


def test_siglip2_classifier_and_whole_clip(tmp_path: Path) -> None:
    """The vision tower is found inside a two-tower model; the dropped keys are reported."""
    tower = {k: v for k, v in VIT.items() if k != "image_size"}
    text = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    config = hf.Siglip2Config(
        vision_config=dict(tower, num_patches=16), text_config=text, num_labels=5
    )
    theirs = randomize_weights(hf.Siglip2ForImageClassification(config))
    theirs.save_pretrained(tmp_path / "siglip2")
    ours = fastvit.load_checkpoint(tmp_path / "siglip2")
    images = torch.randn(2, 3, 40, 24)
    close("logits", ours(images), theirs(**patchified(images, 8)).logits)
    config = hf.CLIPConfig(vision_config=VIT, text_config=text, projection_dim=7)
    theirs = randomize_weights(hf.CLIPModel(config))
    theirs.save_pretrained(tmp_path / "clip")
    ours = fastvit.load_checkpoint(tmp_path / "clip")
    assert any("text_model" in key for key in ours.load_report.dropped)
    images = torch.randn(2, 3, 32, 32)
    vision = theirs.vision_model(images).pooler_output
    close("embedding", ours(images), theirs.visual_projection(vision))
    config = hf.CLIPConfig(vision_config=VIT, text_config=text, num_labels=5)
    theirs = randomize_weights(hf.CLIPForImageClassification(config))
    theirs.save_pretrained(tmp_path / "clip classifier")
    ours = fastvit.load_checkpoint(tmp_path / "clip classifier")
    close("logits", ours(images), theirs(images).logits)
    config = hf.SiglipConfig(vision_config=VIT, text_config=text, num_labels=5)
    theirs = randomize_weights(hf.SiglipForImageClassification(config))
    theirs.save_pretrained(tmp_path / "siglip classifier")
    ours = fastvit.load_checkpoint(tmp_path / "siglip classifier")
    close("logits", ours(images), theirs(images).logits)
    theirs = randomize_weights(hf.SiglipModel(config))
    theirs.save_pretrained(tmp_path / "siglip")
    ours = fastvit.load_checkpoint(tmp_path / "siglip")
    close("embedding", ours(images), theirs.vision_model(images).pooler_output)


def test_timm_ours_hf_ours_timm_is_bit_exact(tmp_path: Path) -> None:
    timm: Any = pytest.importorskip("timm")
    narrow: dict[str, Any] = dict(embed_dim=32, depth=2, num_heads=2)
    for name, size, options in (
        ("vit_tiny_patch16_224", 32, {}),
        ("vit_small_patch14_dinov2", 28, {}),
        ("vit_small_patch14_reg4_dinov2", 28, {}),
        ("vit_giant_patch14_reg4_dinov2", 28, {"mlp_ratio": 4}),
        ("vit_base_patch16_siglip_224", 32, {"act_layer": "gelu_tanh"}),
        ("vit_base_patch16_clip_quickgelu_224", 32, {"num_classes": 7}),
        ("vit_base_patch16_dinov3_qkvb", 32, {}),
    ):
        theirs = randomize_weights(timm.create_model(name, img_size=size, **narrow, **options))
        if name.endswith("clip_quickgelu_224"):  # CLIP's projection has no bias
            torch.nn.init.zeros_(theirs.head.bias)
        torch.save(theirs.state_dict(), tmp_path / "timm.pth")
        ours = fastvit.load_checkpoint(tmp_path / "timm.pth", heads=2)
        fastvit.export_checkpoint(ours, "hf", tmp_path / name)
        back = fastvit.export_checkpoint(fastvit.load_checkpoint(tmp_path / name), "timm")
        assert back.keys() == theirs.state_dict().keys()
        for key, tensor in theirs.state_dict().items():
            assert torch.equal(back[key], tensor), (name, key)


def test_the_config_of_one_of_two_models(tmp_path: Path) -> None:
    """The encoder's sizes are in a config nested inside the config."""
    text = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    decoder = hf.BertConfig(**text, vocab_size=9, is_decoder=True, add_cross_attention=True)
    encoder = hf.ViTModel(hf.ViTConfig(**VIT, layer_norm_eps=1e-3))
    theirs = randomize_weights(
        hf.VisionEncoderDecoderModel(encoder=encoder, decoder=hf.BertLMHeadModel(decoder))
    )
    theirs.save_pretrained(tmp_path)
    ours = fastvit.load_checkpoint(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    close("features", ours.forward_features(images), theirs.encoder(images).last_hidden_state)
    assert not any("guessed" in note for note in ours.load_report.notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, "its config says depth 3, its tensors 2"),
        ({"num_attention_heads": "2"}, "its config says num_attention_heads '2'"),
        ({"layer_norm_eps": "x"}, "its config says layer_norm_eps 'x'"),
        ({"image_size": [32, 32, 3]}, r"its config says image_size \[32, 32, 3\]"),
    ],
    ids=str,
)
def test_a_config_at_fault(change: dict, message: str, tmp_path: Path) -> None:
    hf.ViTModel(hf.ViTConfig(**VIT)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UsageError, match=message):
        fastvit.load_checkpoint(tmp_path)


def test_distilled_deit_is_refused(tmp_path: Path) -> None:
    hf.DeiTModel(hf.DeiTConfig(**VIT)).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"a distilled DeiT .*distillation_token.* has two heads"):
        fastvit.load_checkpoint(tmp_path)
