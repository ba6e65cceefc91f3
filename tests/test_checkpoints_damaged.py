"""Every dialect reports a checkpoint that lacks a tensor or holds one of a wrong shape."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fastvit
from fastvit import checkpoints
from fastvit.checkpoint_files import Source, read_source
from fastvit.errors import UsageError
from fastvit.jax_npz import is_jax

FOLDER = Path(__file__).parent / "originals"
SIZES: dict[str, Any] = dict(dim=16, depth=1, heads=2, mlp_dim=32, image_size=8, patch_size=2)
DINO: dict[str, Any] = dict(layer_scale=1.0, num_classes=0, registers=2)
DINO3: dict[str, Any] = dict(**DINO, rope="dinov3", pos_embed="none", qkv_bias="qv")
MAP: dict[str, Any] = dict(class_token=False, pool="map", num_classes=0)


def exported(to: str, folder: Path, **options: Any) -> Source:
    model = fastvit.ViT(**{**SIZES, "num_classes": 3, **options})
    fastvit.export_checkpoint(model, to, folder)
    return read_source(folder)


def bare(source: Source) -> Source:
    return Source("without a config", source.state)


def original(file: str) -> Source:
    source = read_source(FOLDER / file)
    return Source(file, source.state.get("model", source.state))


def ijepa(folder: Path) -> Source:
    """A checkpoint of transformers' I-JEPA, a ViT without <cls>."""
    source = exported("hf", folder, num_classes=0)
    state = {k: v for k, v in source.state.items() if "cls_token" not in k}
    state["embeddings.position_embeddings"] = state["embeddings.position_embeddings"][:, 1:]
    return Source("ijepa", state, {**source.config, "model_type": "ijepa"})


def own(folder: Path) -> Source:
    options: dict[str, Any] = dict(num_classes=3, head_hidden_dim=6, qk_norm=True, layer_scale=1.0)
    model = fastvit.ViT(**SIZES, **options, registers=2, pre_norm=True, patch_bias=True)
    config = {"format": "fastvit", "version": 1, "model": model.config}
    return Source("fastvit", model.state_dict(), config)


def torchvision(folder: Path) -> Source:
    pytest.importorskip("torchvision")
    from torchvision.models.vision_transformer import VisionTransformer

    sizes: dict[str, Any] = dict(num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32)
    model = VisionTransformer(image_size=8, patch_size=2, num_classes=3, **sizes)
    return Source("torchvision", model.state_dict())


# name: (checkpoint, regex of tensors that may be missing: no other key implies them)
DIALECTS: dict[str, tuple[Callable[[Path], Source], str]] = {
    "fastvit": (own, ""),
    "timm": (lambda f: exported("timm", f), ""),
    "timm, registers": (lambda f: exported("timm", f, **{**DINO, "num_classes": 3}), ""),
    "timm, dinov3": (lambda f: exported("timm", f, **DINO3), ""),
    "timm without a config": (
        lambda f: bare(exported("timm", f, depth=2)),
        r"patch_embed\.proj\.bias",
    ),
    "hf vit": (lambda f: exported("hf", f), ""),
    "hf vit without a config": (lambda f: bare(exported("hf", f)), ""),
    "hf ijepa": (ijepa, ""),
    "hf dinov2": (lambda f: exported("hf", f, **{**DINO, "registers": 0}), "embeddings.mask_token"),
    "hf dinov2 with registers": (lambda f: exported("hf", f, **DINO), "embeddings.mask_token"),
    "hf dinov3": (lambda f: exported("hf", f, **DINO3), "embeddings.mask_token"),
    "hf siglip": (lambda f: exported("hf", f, **MAP), ""),
    "hf clip": (lambda f: exported("hf", f, pre_norm=True), ""),
    "torchvision": (torchvision, ""),
    "dinov2": (lambda f: original("dinov2.pth"), "mask_token"),
    "dinov3": (lambda f: original("dinov3.pth"), r"mask_token|storage_tokens|rope_embed\.periods"),
    "deit3": (lambda f: original("deit3.pth"), r"cls_token|patch_embed\.proj\.bias"),
    "openai": (lambda f: original("openai_clip.pth"), r"(?!visual\.).*|visual\.proj"),
    "vit-pytorch": (lambda f: original("vit_pytorch_old.pth"), ""),
    "vit_jax": (lambda f: original("vit_jax_pre_logits.npz"), "opt/state/step"),
    "big_vision": (lambda f: original("big_vision_map.npz"), "params/t"),
}
CONFIGURED = [
    n for n in DIALECTS if n == "fastvit" or (n.startswith(("timm", "hf")) and "without" not in n)
]
SAYS = "a LayerNorm before|lacks|expected|unexpected|holds nothing|no square grid|no position table"
DAMAGE: dict[str, Callable[[Any], Any]] = {
    "lacks": lambda t: None,
    "one dimension more": lambda t: t[None],
    "one dimension less": lambda t: (
        t.reshape(t.shape[0] * t.shape[1], *t.shape[2:]) if t.ndim > 1 else t.sum()
    ),
    "empty": lambda t: t[:0] if t.ndim else t,
}


@pytest.mark.parametrize("name", DIALECTS)
def test_every_tensor_is_missed_and_of_a_wrong_shape_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, optional = DIALECTS[name]
    source = make(tmp_path / "checkpoint")
    monkeypatch.setattr(checkpoints, "read_source", lambda source: source)
    more = {} if source.config or is_jax(source.state) else {"heads": 2}
    whole: Any = source
    fastvit.load_checkpoint(whole, **more)
    for key, tensor in source.state.items():
        if re.fullmatch(optional, key):
            continue
        # The second block is like the first: only removal is tried there.
        only_one = re.search(r"(blocks|layers|resblocks|encoderblock_)[._]?1[./]", key)
        for what, damage in list(DAMAGE.items())[: 1 if only_one else None]:
            state = {k: v for k, v in source.state.items() if k != key}
            if (damaged := damage(tensor)) is not None:
                state[key] = damaged
            broken: Any = Source("broken", state, source.config)
            try:
                fastvit.load_checkpoint(broken, **more)
            except UsageError as error:
                assert re.search(SAYS, str(error))
                continue
            # Versions of vit-pytorch have these tensors with and without a leading dimension of 1.
            same = what == "one dimension less" and key in ("cls_token", "pos_embedding")
            assert same and name == "vit-pytorch", f"{key}, {what}, was loaded in silence"


def damaged(source: Source, **changes: Tensor | None) -> Any:
    state = {**source.state, **{k: v for k, v in changes.items() if v is not None}}
    for name in (k for k, v in changes.items() if v is None):
        del state[name]
    return Source("damaged", state, source.config)


def test_what_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vit, dinov2 = exported("hf", tmp_path / "vit"), exported("hf", tmp_path / "dinov2", **DINO)
    clip = exported("hf", tmp_path / "clip", pre_norm=True)
    timm = exported("timm", tmp_path / "timm", layer_scale=1.0)
    layer = "vit.encoder.layer.0.attention.attention."
    monkeypatch.setattr(checkpoints, "read_source", lambda source: source)
    for source, changes, message in (
        (vit, ["vit.embeddings.position_embeddings"], "hf vit, but it lacks pos_embed"),
        (vit, ["vit.embeddings.cls_token"], "hf vit, but it lacks cls_token"),
        (vit, ["classifier.bias"], "it lacks head.bias"),
        (vit, ["classifier.bias", "classifier.weight"], "lacks head.weight, but .* num_classes=3"),
        (vit, [f"{layer}key.bias"], r"it lacks blocks\.0\.attn\.k\.bias"),
        (vit, [f"{layer}{n}.bias" for n in ("query", "key", "value")], "lacks .* qkv_bias=True"),
        (dinov2, ["embeddings.register_tokens"], "lacks reg_token, but .* registers=2"),
        (clip, ["visual_projection.weight"], "lacks head.weight, but .* num_classes=2"),
        (timm, ["patch_embed.proj.bias"], "lacks patch_embed.proj.bias, but .* patch_bias=True"),
        (timm, ["blocks.0.mlp.fc1.weight"], r"it lacks blocks\.0\.mlp\.fc1\.weight"),
        (timm, ["head.weight", "head.bias"], "it lacks head.weight, but .* num_classes=3"),
        (timm, ["blocks.0.ls1.gamma", "blocks.0.ls2.gamma"], "lacks blocks.0.ls1.gamma, but its"),
    ):
        with pytest.raises(UsageError, match=message):
            fastvit.load_checkpoint(damaged(source, **dict.fromkeys(changes)))
    # The head may be missing where the caller replaces or drops it.
    headless = damaged(timm, **{"head.weight": None, "head.bias": None})
    assert fastvit.load_checkpoint(headless, num_classes=0).num_classes == 0
    assert fastvit.load_checkpoint(headless, num_classes=7).num_classes == 7
    whole = fastvit.ViT(**SIZES, num_classes=3, layer_scale=1.0)
    assert "head: left as it was" in str(whole.load_weights(headless, strict=False))
    hidden = own(tmp_path)
    with pytest.raises(UsageError, match=r"lacks head\.2\.bias, head\.2\.weight"):
        fastvit.load_checkpoint(damaged(hidden, **{"head.2.weight": None, "head.2.bias": None}))
    with pytest.raises(UsageError, match=r"it has the unexpected head\.weight"):
        fastvit.load_checkpoint(damaged(hidden, **{"head.weight": torch.zeros(3, 16)}))
    short = damaged(vit, **{f"{layer}key.weight": vit.state[f"{layer}key.weight"][:-1]})
    with pytest.raises(UsageError, match=r"are q \(16, 16\), k \(15, 16\), v \(16, 16\); expected"):
        fastvit.load_checkpoint(short)
    wide = damaged(vit, **{"vit.embeddings.position_embeddings": torch.zeros(1, 16, 16)})
    with pytest.raises(UsageError, match="16 positions make no square grid"):
        fastvit.load_checkpoint(wide)


def with_one_value_changed(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for value in (None, "x", [], {"a": 1}, -1):
        for key, old in config.items():
            yield {**config, key: value}
            for inner in old if isinstance(old, dict) else ():
                yield {**config, key: {**old, inner: value}}


@pytest.mark.parametrize("name", CONFIGURED)
def test_a_config_of_any_values_loads_or_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a UsageError: nothing else may come out of a malformed config."""
    source = DIALECTS[name][0](tmp_path / "whole")
    refused = 0
    for config in with_one_value_changed(source.config):
        changed = Source(name, source.state, config)
        monkeypatch.setattr(checkpoints, "read_source", lambda _, changed=changed: changed)
        try:
            fastvit.load_checkpoint("any")
        except UsageError:
            refused += 1
    assert source.config and refused


def test_jax_without_its_attention_and_with_patches_of_no_square() -> None:
    arrays = dict(np.load(FOLDER / "vit_jax.npz"))
    block = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/"
    lacking = {k: v for k, v in arrays.items() if not k.startswith(block)}
    with pytest.raises(UsageError, match="lacks 'Transformer/encoderblock_0/MultiHeadDotProductA"):
        fastvit.load_checkpoint(lacking)
    flat: Any = {**arrays, "embedding/kernel": np.zeros((50, 16), np.float32)}
    with pytest.raises(UsageError, match=r"kernel is \(50, 16\), expected rows for square patches"):
        fastvit.load_checkpoint(flat)
    flat["embedding/kernel"] = np.zeros((4, 4, 3), np.float32)
    with pytest.raises(UsageError, match=r"kernel is \(4, 4, 3\), expected 2 or 4 dimensions"):
        fastvit.load_checkpoint(flat)


def test_an_index_that_names_a_tensor_which_its_shard_lacks(tmp_path: Path) -> None:
    state = dict(fastvit.ViT(**SIZES, num_classes=3, patch_bias=False).state_dict())
    file = "model-00001-of-00001.safetensors"
    save_file(state, tmp_path / file)
    names = dict.fromkeys([*state, "patch_embed.proj.bias"], file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(UsageError, match=r"its shards do not hold: patch_embed\.proj\.bias"):
        fastvit.load_checkpoint(tmp_path, heads=2)
