"""Saved checkpoints load again, and damaged ones raise a clear error."""

import json
import os

import numpy as np
import pytest
import torch

import fastvit
from fastvit import load_checkpoint
from fastvit.errors import UsageError
from fastvit.pos_embed import Resample
from fastvit.saving import replacing, save_checkpoint


def tiny(**kwargs):
    sizes = dict(image_size=(8, 12), patch_size=4, dim=16, depth=1, heads=2, mlp_dim=16)
    return fastvit.ViT(**{**sizes, "num_classes": 3, "channels": 1, **kwargs})


def test_round_trip(tmp_path):
    model = tiny(pool="mean", registers=2, layer_scale=0.1).eval()
    path = save_checkpoint(tmp_path / "new" / "m.safetensors", model, classes=["a", "b", "c"])
    assert sorted(os.listdir(path.parent)) == ["m.json", "m.safetensors"]
    loaded = load_checkpoint(path)
    assert loaded.default_cfg["label_names"] == ["a", "b", "c"]
    assert loaded.config == {**model.config, "patch_bias": True, "fc_norm": True}
    assert not loaded.training
    images = torch.randn(2, 1, 8, 12)
    assert torch.equal(loaded(images), model(images))


def test_modules_changed_since(tmp_path):
    """A replaced head and removed blocks are saved as they are, in our format and in timm's."""
    model = tiny(depth=3).eval()
    del model.blocks[2]
    model.head = torch.nn.Linear(16, 9)
    images = torch.randn(2, 1, 8, 12)
    path = save_checkpoint(tmp_path / "m.safetensors", model)
    fastvit.export_checkpoint(model, "timm", tmp_path / "timm")
    for source in (path, tmp_path / "timm"):
        again = load_checkpoint(source)
        assert len(again.blocks) == 2 and again.num_classes == 9
        torch.testing.assert_close(again(images), model(images))
    model.head = torch.nn.Identity()
    assert load_checkpoint(save_checkpoint(path, model)).num_classes == 0


def test_wrapped_modules(tmp_path):
    """A compiled block is saved under the names that the plain one has."""
    model = tiny(depth=2).eval()
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    model.blocks[1] = torch.nn.ModuleDict({"_orig_mod": model.blocks[1]})
    loaded = load_checkpoint(save_checkpoint(tmp_path / "m.safetensors", model))
    exported = fastvit.export_checkpoint(model, "timm")
    assert loaded.state_dict().keys() == exported.keys() == expected.keys()
    other = dict(tiny(depth=2).state_dict())
    assert not model.load_weights(other).adapted
    key = "attn.qkv.weight"
    assert torch.equal(model.state_dict()[f"blocks.1._orig_mod.{key}"], other[f"blocks.1.{key}"])


def test_modules_that_no_arguments_make(tmp_path):
    model = tiny()
    model.get_submodule("blocks.0.mlp").fc1 = torch.nn.Linear(16, 20)
    for write in (
        lambda: save_checkpoint(tmp_path / "m.safetensors", model),
        lambda: fastvit.export_checkpoint(model, "timm"),
    ):
        with pytest.raises(UsageError, match=r"fc1\.bias is \(20,\), expected \(16,\)"):
            write()
    assert not os.listdir(tmp_path)


def test_norms_that_no_arguments_make(tmp_path):
    model = tiny()
    model.blocks[0].norm2.eps = 0.5  # type: ignore[union-attr]
    with pytest.raises(UsageError, match=r"blocks\.0\.norm2 is LayerNorm\(.*eps=0\.5"):
        save_checkpoint(tmp_path / "m.safetensors", model)


def test_a_run_folder_is_a_checkpoint(tmp_path):
    save_checkpoint(tmp_path / "model.safetensors", tiny())
    assert load_checkpoint(tmp_path).num_classes == 3


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_truncated_weights(tmp_path, keep):
    path = save_checkpoint(tmp_path / "m.safetensors", tiny())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UsageError, match=r"m\.safetensors is truncated or not a \.safetensors"):
        load_checkpoint(path)


def test_missing_file(tmp_path):
    with pytest.raises(UsageError, match=r"m\.safetensors is neither a file, nor a folder"):
        load_checkpoint(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 9}, "of version 9, expected 1"),
        ({"model": {"wide": 1}}, "wide"),
        ({"model": {"dim": -1}}, "says dim -1, its tensors 16"),
        ({"model": {"depth": 2}}, "says depth 2, its tensors 1"),
        ({"model": {"image_size": "big"}}, "malformed"),
        ({"mean": ["a"]}, "config's mean must be numbers"),
        ({"std": [0.0]}, "config's std must be positive numbers"),
    ],
    ids=str,
)
def test_bad_config(tmp_path, change, message):
    path = save_checkpoint(tmp_path / "m.safetensors", tiny())
    config = json.loads((tmp_path / "m.json").read_text())
    model = {**config["model"], **change.get("model", {})}
    (tmp_path / "m.json").write_text(json.dumps({**config, **change, "model": model}))
    with pytest.raises(UsageError, match=message):
        load_checkpoint(path)


def test_truncated_config(tmp_path):
    path = save_checkpoint(tmp_path / "m.safetensors", tiny())
    (tmp_path / "m.json").write_text((tmp_path / "m.json").read_text()[:30])
    with pytest.raises(UsageError, match="truncated or not JSON"):
        load_checkpoint(path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x"]
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["x"]


def test_name_without_the_ending(tmp_path):
    with pytest.raises(UsageError, match=r"must end in \.safetensors"):
        save_checkpoint(tmp_path / "m.pt", tiny())


def test_shared_parameters(tmp_path):
    model = fastvit.ViT(image_size=8, patch_size=4, dim=16, depth=2, heads=2, mlp_dim=16)
    model.blocks[1] = model.blocks[0]
    path = save_checkpoint(tmp_path / "m.safetensors", model.eval())
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(load_checkpoint(path)(images), model(images))


@pytest.mark.parametrize(
    "options",
    [
        dict(drop_path=np.float32(0.1), norm_eps=np.float32(1e-5)),
        dict(resample=Resample(mode="bilinear"), dynamic_img_size=True),
    ],
    ids=["numpy", "resample"],
)
def test_arguments_that_json_has_no_word_for(tmp_path, options):
    model = tiny(**options).eval()
    images = torch.randn(2, *model.default_cfg["input_size"])
    assert type(model.norm.eps) is float
    loaded = load_checkpoint(save_checkpoint(tmp_path / "m.safetensors", model))
    assert torch.equal(loaded(images), model(images))


def test_details_that_json_has_no_word_for(tmp_path):
    model = tiny()
    details = dict(where=tmp_path / "x", at=np.float32(0.5), mean=torch.ones(2), n=np.arange(2))
    save_checkpoint(tmp_path / "m.safetensors", model, **details)
    config = json.loads((tmp_path / "m.json").read_text())
    assert config["where"] == str(tmp_path / "x") and config["at"] == 0.5
    assert config["mean"] == [1.0, 1.0] and config["n"] == [0, 1]
    with pytest.raises(UsageError, match=r"a config in JSON cannot hold \{1\}, of type set"):
        save_checkpoint(tmp_path / "other.safetensors", model, classes={1})
    assert sorted(os.listdir(tmp_path)) == ["m.json", "m.safetensors"]
