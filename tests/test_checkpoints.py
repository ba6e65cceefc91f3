"""torchvision and vit-pytorch checkpoints, adaptation by timm's rules, and damaged checkpoints."""

import json
import os
import pickle
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peers import check, close, randomize_weights, truth
from processes import env_here, run_python
from safetensors.torch import save_file
from torch import Tensor

import fastvit
from fastvit.errors import UsageError
from fastvit.saving import save_checkpoint

NARROW: dict[str, Any] = dict(embed_dim=32, depth=2, num_heads=2, img_size=32, patch_size=8)
OURS: dict[str, Any] = dict(dim=32, depth=2, heads=2, mlp_dim=128, image_size=32, patch_size=8)


# --- peers


@pytest.mark.parametrize("hidden", [None, 24], ids=["head", "pre_logits"])
def test_torchvision(hidden: int | None, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    from torchvision.models import vision_transformer as tv

    common: dict[str, Any] = dict(patch_size=8, num_layers=2, num_heads=2, hidden_dim=32)
    common.update(mlp_dim=64, num_classes=5, representation_size=hidden)
    theirs = randomize_weights(tv.VisionTransformer(image_size=32, **common))
    torch.save(theirs.state_dict(), tmp_path / "tv.pth")
    ours: Any = fastvit.load_checkpoint(tmp_path / "tv.pth", heads=2, dynamic_img_size=True)
    assert ours.load_report.dialect == "torchvision"
    for size in (32, 48, 24):
        stretched = tv.interpolate_embeddings(size, 8, OrderedDict(theirs.state_dict()))
        larger: Any = tv.VisionTransformer(image_size=size, **common).eval()
        larger.load_state_dict(stretched)
        images = torch.randn(2, 3, size, size)
        expected = truth(larger, images, lambda x, m=larger: (None, m(x)))
        # After resampling, torchvision's gradient is of the resampled table, not of the saved one.
        check(ours, expected, parameters=size == 32)
    # torchvision takes no oblong images, but its resampling rule is defined for any grid.
    oblong = fastvit.load_checkpoint(tmp_path / "tv.pth", heads=2, image_size=(24, 48))
    assert oblong(torch.randn(1, 3, 24, 48)).shape == (1, 5)


def test_vit_pytorch_where_a_standard_vit_can_hold_it(tmp_path: Path) -> None:
    pytest.importorskip("vit_pytorch")
    from vit_pytorch.vit_with_patch_dropout import ViT

    common: dict[str, Any] = dict(image_size=32, patch_size=8, num_classes=5, dim=32, depth=2)
    theirs = randomize_weights(ViT(**common, heads=2, dim_head=24, mlp_dim=48, channels=4))
    torch.save(theirs.state_dict(), tmp_path / "vp.pth")
    ours: Any = fastvit.load_checkpoint(tmp_path / "vp.pth", heads=2, channels=4)
    assert ours.load_report.dialect == "vit-pytorch" and ours.config["dim_head"] == 24
    assert "averages <cls> too" in str(ours.load_report)
    images = torch.randn(2, 4, 32, 32)
    check(ours, truth(theirs, images, lambda x: (None, theirs(x)), {"channels": 4}))


def test_vit_pytorch_where_it_cannot(tmp_path: Path) -> None:
    pytest.importorskip("vit_pytorch")
    from vit_pytorch import ViT
    from vit_pytorch.parallel_vit import ViT as ParallelViT

    common: dict[str, Any] = dict(image_size=32, patch_size=8, num_classes=5, dim=32, depth=2)
    for model, message in (
        (ViT(**common, heads=2, mlp_dim=48), "a LayerNorm before and one after its patch proj"),
        (ParallelViT(**common, heads=2, mlp_dim=48), r"the unexpected .*layers\.0\.0\.fns\.0"),
    ):
        torch.save(model.state_dict(), tmp_path / "vp.pth")
        with pytest.raises(UsageError, match=message):
            fastvit.load_checkpoint(tmp_path / "vp.pth")


# --- adaptation


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A narrow ViT saved by timm's hub export: 9 classes, 3 channels, 32 x 32 pixels."""
    timm: Any = pytest.importorskip("timm")
    model = randomize_weights(timm.create_model("vit_tiny_patch16_224", **NARROW, num_classes=9))
    args = {**NARROW, "num_classes": 9}
    timm.models.save_for_hf(model, tmp_path / "saved", model_args=args, safe_serialization="both")
    return tmp_path / "saved"


ADAPTATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "one channel": (dict(in_chans=1), r"channels: 3 to 1"),
    "two channels": (dict(in_chans=2), r"channels: 3 to 2"),
    "eight channels": (dict(in_chans=8), r"channels: 3 to 8"),
    "larger": (dict(img_size=48), r"positions: grid \(4, 4\) to \(6, 6\)"),
    "oblong": (dict(img_size=(24, 64)), r"positions: grid \(4, 4\) to \(3, 8\)"),
    "patches": (dict(patch_size=4, img_size=16), r"patch_size: \(8, 8\) to \(4, 4\)"),
    "other classes": (dict(num_classes=4), r"head: fresh, for 4 classes"),
    "no classes": (dict(num_classes=0), r"head: the checkpoint's, for 9 classes, left out"),
}


@pytest.mark.parametrize("case", ADAPTATIONS.values(), ids=ADAPTATIONS)
def test_adapts_as_timm_does_and_says_so(
    case: tuple[dict[str, Any], str], saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    timm: Any = pytest.importorskip("timm")
    kwargs, said = case
    args = {**NARROW, "num_classes": 9, **kwargs}
    file = str(saved / "model.safetensors")
    theirs = timm.create_model(
        "vit_tiny_patch16_224",
        pretrained=True,
        pretrained_cfg_overlay=dict(file=file, num_classes=9),
        **args,
    ).eval()
    loaded = fastvit.load_checkpoint(saved, **kwargs)
    assert loaded.num_classes == args["num_classes"]
    assert any(said.replace("\\", "") in line for line in loaded.load_report.adapted)
    assert any(said.replace("\\", "") in record.getMessage() for record in caplog.records)
    put: Any = randomize_weights(fastvit.create_model("vit_tiny_patch16_224", **args))
    before = {k: v.clone() for k, v in put.state_dict().items()}
    report = put.load_weights(saved)
    assert report is put.load_report and report.adapted
    assert ("head: left as it was, for 4 classes" in report.adapted) == ("fresh" in said)
    for name, tensor in theirs.state_dict().items():
        if kwargs.get("num_classes") is not None and name.startswith("head."):
            assert torch.equal(put.state_dict()[name], before[name])
            continue
        for ours in (loaded, put):
            close(name, ours.state_dict()[name], tensor)


@pytest.mark.parametrize("dialect", ["ours", "vit_jax"])
def test_a_head_of_two_layers_for_other_classes(dialect: str) -> None:
    """A two-layer head (head_hidden_dim, pre_logits) is fresh as a whole, or stays as a whole."""
    npz = Path(__file__).parent / "originals/vit_jax_pre_logits.npz"
    source = npz if dialect == "vit_jax" else plain_with_hidden_head()
    whole = fastvit.load_checkpoint(source, heads=2)
    hidden = whole.config["head_hidden_dim"]
    other = fastvit.load_checkpoint(source, heads=2, num_classes=9)
    assert "head: fresh, for 9 classes" in other.load_report.adapted
    assert other.num_classes == 9 and other.config["head_hidden_dim"] == hidden
    size = whole.default_cfg["input_size"]
    assert other(torch.randn(1, *size)).shape == (1, 9)
    put = randomize_weights(fastvit.ViT(**other.config))
    before = {k: v.clone() for k, v in put.head.state_dict().items()}
    assert "head: left as it was, for 9 classes" in put.load_weights(source).adapted
    assert all(torch.equal(v, before[k]) for k, v in put.head.state_dict().items())
    assert fastvit.load_checkpoint(source, heads=2, num_classes=0).num_classes == 0


def test_another_pooling_leaves_the_norm_where_it_was_trained(saved: Path) -> None:
    """As in timm's reset_classifier; fc_norm=True moves the norm behind the pooling."""
    timm: Any = pytest.importorskip("timm")
    state, images = torch.load(saved / "pytorch_model.bin"), torch.randn(2, 3, 32, 32)
    theirs: Any = timm.models.VisionTransformer(**NARROW, num_classes=9).eval()
    theirs.load_state_dict(state)
    theirs.reset_classifier(9, "avg")
    theirs.head.load_state_dict({k: state[f"head.{k}"] for k in ("weight", "bias")})
    ours = fastvit.load_checkpoint(saved, global_pool="avg")
    close("logits", ours(images), theirs(images))
    theirs = timm.models.VisionTransformer(**NARROW, num_classes=9, global_pool="avg").eval()
    theirs.load_state_dict({f"fc_{k}" if k.startswith("norm.") else k: state[k] for k in state})
    ours = fastvit.load_checkpoint(saved, global_pool="avg", fc_norm=True)
    assert "norm taken for fc_norm" in ours.load_report.adapted
    close("logits", ours(images), theirs(images))


def test_what_the_model_computes_otherwise_is_said(tmp_path: Path) -> None:
    """load_weights does not change the architecture: eps stays 1e-6, not transformers' 1e-12."""
    hf: Any = pytest.importorskip("transformers")
    config = hf.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    config.intermediate_size, config.image_size, config.patch_size = 128, 32, 8
    hf.ViTModel(config).save_pretrained(tmp_path)
    model = fastvit.ViT(**OURS, num_classes=0)
    notes = model.load_weights(tmp_path).notes
    assert "norm_eps is 1e-12 there and stays 1e-06 here" in notes
    assert "heads is 4 there and stays 2 here" in notes
    same = fastvit.ViT(**{**OURS, "heads": 4}, num_classes=0, norm_eps=1e-12)
    assert not [note for note in same.load_weights(tmp_path).notes if "there" in note]
    path = save_checkpoint(tmp_path / "cls.safetensors", model)
    mean = fastvit.ViT(**OURS, num_classes=0, pool="mean", fc_norm=False)
    assert "pool is 'cls' there and stays 'mean' here" in mean.load_weights(path).notes


def test_half_precision_and_double(saved: Path, tmp_path: Path) -> None:
    state = fastvit.load_checkpoint(saved).state_dict()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        save_file({k: v.to(dtype) for k, v in state.items()}, tmp_path / "half.safetensors")
        model = fastvit.load_checkpoint(tmp_path / "half.safetensors", heads=2)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name].to(dtype).float())


@pytest.mark.parametrize(
    "options", [dict(image_size=48), dict(patch_size=4, image_size=16), dict(channels=2)], ids=str
)
def test_half_precision_is_adapted_in_float32(options: dict[str, Any]) -> None:
    half = {k: v.bfloat16() for k, v in plain().items()}
    expected = fastvit.load_checkpoint({k: v.float() for k, v in half.items()}, heads=2, **options)
    got = fastvit.load_checkpoint(half, heads=2, **options)
    assert got.load_report.adapted
    for name, tensor in expected.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor), name


def test_a_fresh_head_has_small_weights_and_the_model_is_in_eval_mode() -> None:
    model: Any = fastvit.load_checkpoint(plain(), heads=2, num_classes=4)
    assert not model.training and not model.head.bias.any()
    assert 0.01 < model.head.weight.std() < 0.03


def test_mean_and_std_are_of_the_channels_that_there_are(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["pretrained_cfg"].update(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    (saved / "config.json").write_text(json.dumps(config))
    assert fastvit.load_checkpoint(saved).default_cfg["std"] == (0.4, 0.5, 0.6)
    four = fastvit.load_checkpoint(saved, in_chans=4)
    assert four.default_cfg["mean"] == four.default_cfg["std"] == (0.5,) * 4
    assert any("mean (0.1, 0.2, 0.3) is not of 4 channels" in n for n in four.load_report.notes)


def test_positions_with_and_without_cls() -> None:
    """Tables with and without rows for prefix tokens convert either way, to the same output."""
    images = torch.randn(2, 3, 32, 32)
    for alone in (False, True):
        theirs: Any = randomize_weights(fastvit.ViT(**OURS, registers=2, no_embed_class=alone))
        ours = fastvit.ViT(**OURS, registers=2, no_embed_class=not alone).eval()
        ours.load_weights(fastvit.export_checkpoint(theirs, "timm"))
        close("output", ours(images), theirs(images))


# --- invalid state dicts


def plain(**changes: Tensor | None) -> dict[str, Tensor]:
    """A complete fastvit state dict with tensors replaced, added or removed (None); `__` is `.`."""
    state = dict(fastvit.ViT(**OURS, num_classes=3).state_dict())
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor
    return state


def plain_with_hidden_head() -> dict[str, Tensor]:
    return dict(fastvit.ViT(**OURS, num_classes=3, head_hidden_dim=16).state_dict())


def test_missing_unexpected_and_misshapen_keys_are_one_error() -> None:
    state = plain(norm__bias=None, blocks__1__norm2__weight=None, head__bias=torch.zeros(4))
    with pytest.raises(UsageError) as error:
        fastvit.load_checkpoint(state, heads=2)
    for part in ("lacks blocks.1.norm2.weight, norm.bias", "head.bias is (4,), expected (3,)"):
        assert part in str(error.value), error.value
    state = plain(blocks__0__attn__rel_pos=torch.zeros(3), extra=torch.zeros(3))
    with pytest.raises(UsageError, match=r"unexpected blocks\.0\.attn\.rel_pos, extra"):
        fastvit.load_checkpoint(state, heads=2)
    model = fastvit.ViT(**{**OURS, "depth": 1}, num_classes=3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UsageError, match=r"unexpected blocks\.1\.attn\.proj\.bias, blocks\.1\."):
        model.load_weights(plain())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), "nothing may be written when something is wrong"
    report = model.load_weights(plain(), strict=False)
    assert not any("guessed" in note for note in report.notes), "the model's own heads stand"
    assert any(key.startswith("blocks.1.") for key in report.dropped)
    wider = fastvit.ViT(**{**OURS, "mlp_dim": 64}, num_classes=3)
    with pytest.raises(UsageError, match=r"fc1\.bias is \(128,\), expected \(64,\)"):
        wider.load_weights(plain(), strict=False)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "its keys begin: no tensors at all"),
        ({"conv1.weight": torch.zeros(3)}, "unknown dialect; expected a ViT of .* conv1.weight"),
        (plain(blocks__0__attn__qkv__weight=None), r"it lacks blocks\.0\.attn\.qkv\.weight"),
        (plain(pos_embed=torch.zeros(1, 11, 32)), r"positions make no square grid; pass image_s"),
        (plain(dist_token=torch.zeros(1, 1, 32)), "a distilled DeiT .* has two heads"),
        (plain(blocks__0__mlp__norm__weight=torch.zeros(8)), "a norm inside its MLP"),
        ({"embedding/kernel": np.zeros((4, 4, 3, 8), np.float32)}, "lacks .*embedding/bias"),
        ({"vit": plain(), "epoch": 3}, "no tensors at all, only entries such as 'vit', 'epoch'"),
        (plain(pos_embed=torch.zeros(())), r"pos_embed is \(\), expected 3 dimensions"),
        (plain(pos_embed=torch.zeros(1, 0, 32)), "0 positions make no square grid"),
        (plain(patch_embed__proj__weight=torch.zeros(32, 192)), "weight is .*, expected 4 dimen"),
        (plain(norm__bias=torch.zeros(32, dtype=torch.int8)), "norm.bias is torch.int8, not flo"),
        (plain(norm__bias=torch.zeros(32, device="meta")), "norm.bias is without data"),
        (plain(norm__bias=torch.zeros(32).to_sparse()), "norm.bias is torch.sparse_coo, not a p"),
        (
            plain(norm__bias=None, norm__weight=None),
            "lacks norm.bias, norm.weight; .* final_norm=False",
        ),
        (
            {k.replace("blocks.1.", "blocks.2."): v for k, v in plain().items()},
            r"it lacks blocks\.1\.attn\.proj\.bias, blocks\.1\.",
        ),
        ({"cls_token": np.array(["a"])}, "cls_token has dtype <U1, expected numbers"),
    ],
    ids=[
        *("empty", "resnet", "no qkv", "11 positions", "distilled", "sub-norm", "half an npz"),
        *("nested", "no positions", "0 positions", "flat kernel", "int8", "meta", "sparse"),
        *("no norm", "a gap", "words"),
    ],
)
def test_state_dicts_that_no_vit_holds(state: dict, message: str) -> None:
    with pytest.raises(UsageError, match=f"(?i){message}"):
        fastvit.load_checkpoint(state)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}], ids=["flat", "inner"])
def test_of_two_vits_the_averaged_one_is_taken(wrap: Any) -> None:
    mine = plain()
    for plainer, averaged in (("student", "teacher"), ("model", "model_ema"), ("net", "ema.net")):
        both = {f"{plainer}.{k}": torch.zeros_like(v) for k, v in mine.items()}
        both |= {f"{averaged}.{k}": v for k, v in mine.items()}
        loaded = fastvit.load_checkpoint(wrap(both), heads=2)
        assert torch.equal(loaded.state_dict()["norm.weight"], mine["norm.weight"])
        note = f"its weights under '{averaged}.' were taken, not those of '{plainer}.'"
        assert note in loaded.load_report.notes
        assert f"{plainer}.norm.weight" in loaded.load_report.dropped


@pytest.mark.parametrize("within", ["model_state_dict", "net", "model", "state_dict"])
def test_the_state_dict_of_a_training_script_is_unwrapped(within: str) -> None:
    state = plain()
    for inner in (state, {f"module.{k}": v for k, v in state.items()}):
        loaded = fastvit.load_checkpoint({"epoch": 3, within: inner}, heads=2)
        assert torch.equal(loaded.state_dict()["norm.weight"], state["norm.weight"])
        assert not any("were taken" in note for note in loaded.load_report.notes)


def test_arrays_of_numpy_are_tensors_too(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {k: v.numpy() for k, v in plain().items()}
    np.savez(tmp_path / "vit.npz", **arrays)
    for source in (arrays, tmp_path / "vit.npz"):
        loaded = fastvit.load_checkpoint(source, heads=2).state_dict()
        assert all(torch.equal(loaded[k], torch.from_numpy(v)) for k, v in arrays.items())


def test_a_model_without_a_final_norm() -> None:
    model = fastvit.ViT(**OURS, final_norm=False)
    loaded = fastvit.load_checkpoint(model.state_dict(), heads=2, final_norm=False)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert not loaded.load_weights(model.state_dict()).adapted


def test_arguments_at_fault() -> None:
    for kwargs, message in (
        ({"heads": "2"}, "heads must be an int >= 1, got '2'"),
        ({"num_heads": 0}, "heads must be an int >= 1, got 0"),
        ({"img_size": "32"}, "image_size must be a positive int or a pair of them, got '32'"),
    ):
        with pytest.raises(UsageError, match=message):
            fastvit.load_checkpoint(plain(), **kwargs)


def test_names_that_wrappers_put_between() -> None:
    """Key prefixes of torch.compile, FSDP and activation checkpointing, in a DeepSpeed file."""
    state = plain()
    expected = fastvit.load_checkpoint(state, heads=2).state_dict()
    for wrapper in ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"):
        wrapped = {k.replace("blocks.1.", f"blocks.1.{wrapper}."): v for k, v in state.items()}
        wrapped = {f"module.{wrapper}.{k}": v for k, v in wrapped.items()}
        loaded = fastvit.load_checkpoint({"module": wrapped, "ds_version": "1"}, heads=2)
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, expected[name]), (wrapper, name)


def test_oblong_positions_that_could_be_square_ones() -> None:
    """2 x 4 patches with <cls> are 9 positions, as are 3 x 3 patches: `image_size` decides."""
    model = fastvit.ViT(**{**OURS, "image_size": (16, 32)}, num_classes=3).eval()
    images = torch.randn(2, 3, 16, 32)
    loaded = fastvit.load_checkpoint(model.state_dict(), heads=2, image_size=(16, 32))
    assert not loaded.load_report.adapted
    assert torch.equal(loaded(images), model(images))


def test_as_many_positions_as_the_named_grid_has_are_copied() -> None:
    """As in timm: 2 x 8 patches could be 4 x 4, and 2 x 2 with five prefix tokens 3 x 3."""
    for size, registers, alone in (((16, 64), 0, False), ((16, 64), 0, True), (16, 4, False)):
        options: dict[str, Any] = dict(registers=registers, no_embed_class=alone)
        model = fastvit.ViT(**{**OURS, "image_size": size}, **options).eval()
        loaded = fastvit.load_checkpoint(model.state_dict(), heads=2, img_size=size)
        assert not loaded.load_report.adapted
        assert torch.equal(loaded.state_dict()["pos_embed"], model.state_dict()["pos_embed"])


def test_positions_of_a_square_and_cls_are_resampled_to_a_grid_of_as_many() -> None:
    """17 positions are 4 x 4 and <cls>, though 1 x 17 patches would take them as they are."""
    loaded: Any = fastvit.load_checkpoint(plain(), heads=2, image_size=(8, 136))
    assert any("grid (4, 4) to (1, 17)" in line for line in loaded.load_report.adapted)
    assert not loaded.no_embed_class and loaded.pos_embed.shape[1] == 18


@pytest.mark.parametrize(
    "options",
    [
        dict(image_size=(32, 64)),
        dict(image_size=(16, 64)),
        dict(image_size=16, registers=4),
        dict(image_size=(24, 16), registers=2),
        dict(image_size=(24, 16), registers=2, no_embed_class=True),
        dict(rope="dinov3", pos_embed="none", registers=4),
        dict(pos_embed="none", pool="mean"),
        dict(image_size=64, patch_size=8, channels=4, dim_head=24),
    ],
    ids=str,
)
def test_a_state_dict_of_the_same_model_is_copied(options: dict[str, Any]) -> None:
    """The model's arguments decide the grid and RoPE where keys and shapes leave them open."""
    first, second = (fastvit.ViT(**{**OURS, **options}).double() for _ in range(2))
    report = randomize_weights(second).load_weights(randomize_weights(first).state_dict())
    assert not report.adapted
    for name, tensor in second.state_dict().items():
        assert torch.equal(tensor, first.state_dict()[name]), name


def test_oblong_patches_without_a_position_table() -> None:
    options: dict[str, Any] = dict(rope="dinov3", pos_embed="none", patch_size=(12, 16))
    model = fastvit.ViT(**{**OURS, "image_size": (24, 32), **options})
    loaded = fastvit.load_checkpoint(model.state_dict(), rope="dinov3", heads=OURS["heads"])
    assert loaded.patch_embed.img_size == (216, 224)


def test_the_model_says_what_another_size_leaves_open() -> None:
    """2 x 2 positions with <cls> and 4 registers could also be 3 x 3."""
    model = fastvit.ViT(**{**OURS, "image_size": 32}, registers=4)
    small = fastvit.ViT(**{**OURS, "image_size": 16}, registers=4)
    assert "grid (2, 2) to (4, 4)" in str(model.load_weights(small.state_dict()))
    with pytest.raises(
        UsageError, match=r"11 positions make no .* nor are they those of \(32, 32\)"
    ):
        model.load_weights(plain(pos_embed=torch.zeros(1, 11, 32)))


def test_a_norm_behind_the_pooling_says_that_it_averages() -> None:
    """Even beside a <cls> token."""
    model = fastvit.ViT(**OURS, num_classes=3, pool="mean").eval()
    assert model.config["class_token"]
    loaded = fastvit.load_checkpoint(model.state_dict(), heads=2)
    images = torch.randn(2, 3, 32, 32)
    assert loaded.pool == "mean" and torch.equal(loaded(images), model(images))


def test_what_a_state_dict_cannot_say_is_said() -> None:
    notes = fastvit.load_checkpoint(plain(), heads=2, activation="gelu_tanh").load_report.notes
    assert notes == ["no config: norm_eps 1e-06, pool 'cls' assumed; pass what is otherwise"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 9}, "its config is of version 9, expected 1"),
        ({"depth": 3}, "its config says depth 3, its tensors 2"),
        ({"dim": 64}, "its config says dim 64, its tensors 32"),
        ({"mean": 3}, None),
    ],
    ids=str,
)
def test_our_own_config_at_fault(change: dict, message: str | None, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "m.safetensors", fastvit.ViT(**OURS, num_classes=3))
    config = json.loads((tmp_path / "m.json").read_text())
    (config["model"] if set(change) & {"depth", "dim"} else config).update(change)
    (tmp_path / "m.json").write_text(json.dumps(config))
    if message is None:
        assert fastvit.load_checkpoint(path).default_cfg["mean"] == (0.5,) * 3
        return
    with pytest.raises(UsageError, match=message):
        fastvit.load_checkpoint(path)


def test_models_that_are_not_ours() -> None:
    with torch.device("meta"):
        empty = fastvit.ViT(**OURS, num_classes=3)
    with pytest.raises(ValueError, match=r"on the meta device; call model\.to_empty"):
        empty.load_weights(plain())
    other: Any = torch.nn.Linear(2, 2)
    for call in (fastvit.load_weights, fastvit.export_checkpoint):
        with pytest.raises(TypeError, match=r"model must be a fastvit\.ViT, got Linear"):
            call(other, "hf")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "state.pt"])
def test_an_export_writes_over_no_checkpoint(name: str, tmp_path: Path) -> None:
    model = fastvit.ViT(**OURS)
    (tmp_path / name).write_text("mine")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=rf"already holds a checkpoint \({name}\); choose another"):
        fastvit.export_checkpoint(model, "timm", tmp_path)
    assert (tmp_path / name).read_text() == "mine" and len(list(tmp_path.iterdir())) == 2
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "run.safetensors").write_text("mine")
    with pytest.raises(UsageError, match="already holds a checkpoint, with its config beside it"):
        fastvit.export_checkpoint(model, "timm", tmp_path / "run.safetensors")
    (tmp_path / name).unlink()
    fastvit.export_checkpoint(model, "timm", tmp_path)
    assert fastvit.load_checkpoint(tmp_path).num_classes == 1000


# --- invalid files


class Evil:
    """Runs code when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch owned",))


class EvilScalar:
    """A numpy scalar of dtype object, whose value is a pickle itself."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (np.float64(0).__reduce__()[0], (np.dtype(object), pickle.dumps(Evil())))


def test_files_at_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = plain()
    torch.save(state, "good.pth")
    save_file(state, "good.safetensors")
    good: dict[str, Any] = {"embedding/kernel": np.zeros((4, 4, 3, 8))}
    np.savez("good.npz", **good)
    for name in ("good.pth", "good.safetensors", "good.npz"):
        for size in (0, 100, Path(name).stat().st_size // 2):
            cut = Path(f"cut{Path(name).suffix}")
            cut.write_bytes(Path(name).read_bytes()[:size])
            with pytest.raises(UsageError, match=rf"{cut} is truncated or not .*; {size:,} bytes"):
                fastvit.load_checkpoint(cut)
    Path("broken.pth").write_bytes(b"\x80\x02}q\x00(Q.")  # a persistent id from an empty stack
    with pytest.raises(UsageError, match=r"broken\.pth is truncated or not a file of torch\.save"):
        fastvit.load_checkpoint("broken.pth")
    wide = bytearray(Path("good.npz").read_bytes())
    wide[wide.index(b"PK\x01\x02") + 6] = 255  # the zip version needed to extract the entry
    Path("wide.npz").write_bytes(wide)
    with pytest.raises(UsageError, match=r"wide\.npz is truncated or not a \.npz file"):
        fastvit.load_checkpoint("wide.npz")
    torch.save({**state, "evil": Evil()}, "evil.pth")
    with pytest.raises(UsageError, match="holds more than tensors"):
        fastvit.load_checkpoint("evil.pth")
    evil: dict[str, Any] = {"embedding/kernel": np.array([Evil()], dtype=object)}
    np.savez("evil.npz", **evil)
    with pytest.raises(UsageError, match=r"evil\.npz is truncated or not a \.npz file"):
        fastvit.load_checkpoint("evil.npz")
    torch.save({**state, "evil": EvilScalar()}, "scalar.pth")
    with pytest.raises(UsageError, match="holds more than tensors"):
        fastvit.load_checkpoint("scalar.pth")
    assert not Path("owned").exists()
    np.save("array.npy", np.zeros(3))
    Path("array.npy").rename("array.npz")
    with pytest.raises(UsageError, match=r"array\.npz is truncated or not a \.npz file"):
        fastvit.load_checkpoint("array.npz")
    torch.save(fastvit.ViT(**OURS), "whole.pth")
    with pytest.raises(
        UsageError, match=r"whole\.pth holds more .* GLOBAL fastvit\.model\.ViT was"
    ):
        fastvit.load_checkpoint("whole.pth")
    for name in ("pointer.pth", "pointer.safetensors"):
        Path(name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        with pytest.raises(UsageError, match=f"{name} is a pointer of Git LFS, .* git lfs pull"):
            fastvit.load_checkpoint(name)
    for name in ("page.pth", "page.safetensors"):
        Path(name).write_text("\n<!DOCTYPE html>\n<html>not found</html>")
        with pytest.raises(UsageError, match=rf"{name} is a web page, no checkpoint; 39 bytes"):
            fastvit.load_checkpoint(name)
    torch.save([1, 2], "list.pth")
    with pytest.raises(UsageError, match=r"list\.pth holds a list, not a state dict"):
        fastvit.load_checkpoint("list.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), "scripted.pt")
    with pytest.raises(UsageError, match=r"a TorchScript archive, .* torch\.jit\.load"):
        fastvit.load_checkpoint("scripted.pt")
    with pytest.raises(UsageError, match=r"absent\.pth is neither a file, nor a folder, nor a hub"):
        fastvit.load_checkpoint("absent.pth")
    Path("weights.txt").write_text("hello")
    with pytest.raises(UsageError, match=r"weights\.txt must end in one of \.safetensors, \.pth"):
        fastvit.load_checkpoint("weights.txt")
    Path("empty").mkdir()
    with pytest.raises(UsageError, match=r"empty holds none of model\.safetensors"):
        fastvit.load_checkpoint("empty")
    for wrong in (7, None, [state]):
        with pytest.raises(UsageError, match="must be a path, a hub id or a state dict, got"):
            fastvit.load_checkpoint(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ['{"loss": 1}\n{"loss": 2}\n', '{"loss": 1}', "[1]", "\xff"])
def test_a_json_beside_the_weights_that_is_no_config(text: str, tmp_path: Path) -> None:
    save_file(plain(), tmp_path / "vit.safetensors")
    (tmp_path / "vit.json").write_text(text, encoding="latin-1")
    (tmp_path / "run").mkdir()
    save_file(plain(), tmp_path / "run" / "model.safetensors")
    (tmp_path / "run" / "model.json").write_text(text, encoding="latin-1")
    for source in ("vit.safetensors", "run", "run/model.safetensors"):
        notes = fastvit.load_checkpoint(tmp_path / source, heads=2).load_report.notes
        assert any("json is no config, and was not read" in note for note in notes)


@pytest.mark.parametrize("keep", [0, 1, 10, 30, -2])
def test_our_own_config_must_be_whole(keep: int, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "m.safetensors", fastvit.ViT(**OURS, num_classes=3))
    text = (tmp_path / "m.json").read_text()
    (tmp_path / "m.json").write_text(text[:keep])
    with pytest.raises(UsageError, match=r"m\.json is truncated or not JSON"):
        fastvit.load_checkpoint(path)


def test_folders_at_fault(saved: Path) -> None:
    config = saved / "config.json"
    text = config.read_text()
    config.write_text(text[: len(text) // 2])
    with pytest.raises(UsageError, match=r"config\.json is truncated or not JSON"):
        fastvit.load_checkpoint(saved)
    config.write_text(json.dumps({**json.loads(text), "model_args": {"attn_layer": "diff"}}))
    with pytest.raises(UsageError, match="attn_layer='diff' is timm's alone"):
        fastvit.load_checkpoint(saved)
    (saved / "model.safetensors").rename(saved / "model-00001-of-00001.safetensors")
    index = saved / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(UsageError, match=r"names model-00002-of-00002\.safetensors, which is not"):
        fastvit.load_checkpoint(saved)
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(UsageError, match="which is not beside it"):
        fastvit.load_checkpoint(saved)
    for weight_map in (["a"], {"a": 3}, None):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(UsageError, match=r"index\.json holds no 'weight_map' of tensors"):
            fastvit.load_checkpoint(saved)


def test_half_a_checkpoint(tmp_path: Path) -> None:
    """One shard is refused by its name; the index, the folder and an upper-case suffix are read."""
    state = plain()
    names = sorted(state)
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for file, part in zip(files, (names[:9], names[9:]), strict=True):
        save_file({k: state[k] for k in part}, tmp_path / file)
    torch.save(state, tmp_path / "pytorch_model-00001-of-00003.bin")
    for file in (*files, "pytorch_model-00001-of-00003.bin"):
        with pytest.raises(UsageError, match=r"is one of [23] shards; pass its folder, or the"):
            fastvit.load_checkpoint(tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {k: files[k in names[9:]] for k in names}}))
    save_file(state, tmp_path / "VIT.SAFETENSORS")
    for source in (index, tmp_path, tmp_path / "VIT.SAFETENSORS"):
        loaded = fastvit.load_checkpoint(source, heads=2).state_dict()
        assert all(torch.equal(loaded[k], state[k]) for k in names)


def test_shards_are_joined(tmp_path: Path) -> None:
    hf: Any = pytest.importorskip("transformers")
    config = hf.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    config.intermediate_size, config.image_size, config.patch_size = 64, 32, 8
    theirs = randomize_weights(hf.ViTModel(config))
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ours: Any = fastvit.load_checkpoint(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    close("features", ours.forward_features(images), theirs(images).last_hidden_state)


class Hub:
    """A fake huggingface_hub: downloads the files in `folder` and raises `error` for all others."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, error: Any) -> None:
        hub: Any = pytest.importorskip("huggingface_hub")
        self.folder, self.error, self.asked = folder, error, []
        monkeypatch.setattr(hub, "hf_hub_download", self.download)
        monkeypatch.setattr(hub, "try_to_load_from_cache", self.look)
        self.cached: dict[str, Any] = {}

    def download(self, repository: str, file: str, revision: str | None = None) -> str:
        self.asked.append(file)
        if (self.folder / file).is_file():
            return str(self.folder / file)
        raise self.error

    def look(self, repository: str, file: str, revision: str | None = None) -> Any:
        return self.cached.get(file)


def test_a_hub_out_of_reach_is_asked_once(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: Any = pytest.importorskip("huggingface_hub.errors")
    monkeypatch.chdir(tmp_path)
    hub = Hub(monkeypatch, tmp_path, errors.LocalEntryNotFoundError("no connection"))
    with pytest.raises(
        UsageError,
        match="no/such is no file or folder here, and as a hub id it is not in the cache, and the",
    ):
        fastvit.load_checkpoint("no/such")
    assert hub.asked == ["config.json"]
    # With only the weights in the cache, a note says that the hub may have a config.
    hub.cached["model.safetensors"] = str(saved / "model.safetensors")
    (saved / "config.json").rename(tmp_path / "kept")
    notes = fastvit.load_checkpoint("no/such", heads=2, image_size=32).load_report.notes
    assert any("config.json is not in the cache, and the hub is out of reach" in n for n in notes)
    hub.cached["config.json"] = object()  # cached: the hub has no such file
    notes = fastvit.load_checkpoint("no/such", heads=2, image_size=32).load_report.notes
    assert not any("in the cache" in n for n in notes)


def test_a_hub_id_without_the_file_and_a_shard_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: Any = pytest.importorskip("huggingface_hub.errors")
    hub = Hub(monkeypatch, tmp_path, errors.EntryNotFoundError("no such entry"))
    with pytest.raises(UsageError, match=r"it holds none of model\.safetensors"):
        fastvit.load_checkpoint("no/such")
    assert len(hub.asked) == 9
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "s.safetensors"}}')
    with pytest.raises(UsageError, match=r"hub id it lacks s\.safetensors, of its index"):
        fastvit.load_checkpoint("no/such")
    hub.error = errors.LocalEntryNotFoundError("no connection")
    index = "model.safetensors.index.json"
    hub.cached[index] = str(tmp_path / index)
    with pytest.raises(UsageError, match=r"lacks s\.safetensors, .*the hub is out of reach"):
        fastvit.load_checkpoint("no/such")
    hub.error = OSError("proxy says no")
    with pytest.raises(UsageError, match="no/such is no file or folder here, and as a hub id: pro"):
        fastvit.load_checkpoint("no/such")


def test_the_hub_cache_serves_offline(saved: Path, tmp_path: Path) -> None:
    """With HF_HUB_OFFLINE=1, huggingface_hub's cache is read; an uncached id is a clear error."""
    snapshot = tmp_path / "hub/models--timm--vit_tiny_patch16_224.mine/snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    saved.rename(snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    for revision in ("main", "v1.0"):
        (refs / revision).write_text("a" * 40)
    script = """
import fastvit, torch
model = fastvit.load_checkpoint("hf-hub:timm/vit_tiny_patch16_224.mine")
same = fastvit.load_checkpoint("timm/vit_tiny_patch16_224.mine@v1.0")
assert torch.equal(model.pos_embed, same.pos_embed)
same = fastvit.create_model("vit_tiny_patch16_224.mine", pretrained=True)
assert torch.equal(model.pos_embed, same.pos_embed) and model.num_classes == 9
try:
    fastvit.load_checkpoint("timm/absent")
except fastvit.load_checkpoint.__globals__["UsageError"] as error:
    print(error)
"""
    done = run_python(script, env=env_here(HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1"))
    assert done.returncode == 0, done.stderr
    assert "timm/absent is no file or folder here, and as a hub id it is not in" in done.stdout
