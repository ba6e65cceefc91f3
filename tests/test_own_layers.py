"""Hooks, user-defined layers and pruning have the same effect on fastvit.ViT as on timm's ViT."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peers import assert_same, timm_twins
from torch import Tensor, nn
from torch.nn.utils import prune

import fastvit
from fastvit.errors import UsageError
from fastvit.layers import Activation, RMSNorm

timm = pytest.importorskip("timm")
SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3}
SMALL |= {"depth": 3, "num_classes": 5, "init_values": 0.5, "qk_norm": True}
NAME = "vit_tiny_patch16_224"
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def built() -> tuple[nn.Module, fastvit.ViT]:
    torch.manual_seed(0)
    return timm_twins(NAME, **SMALL)


@pytest.fixture
def models(built: tuple[nn.Module, fastvit.ViT]) -> tuple[nn.Module, fastvit.ViT]:
    return copy.deepcopy(built[0]), copy.deepcopy(built[1])


HOOKED = ("attn", "attn.q_norm", "attn.proj", "ls1", "norm2", "mlp", "mlp.fc1", "mlp.act", "ls2")


@pytest.mark.parametrize("path", ["patch_embed", *(f"blocks.2.{name}" for name in HOOKED)])
def test_a_hook_sees_and_changes_what_it_does_in_timm(models: Any, path: str) -> None:
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        seen.append(out.detach())
        return out * torch.linspace(0.5, 1.5, out.shape[-1])

    for model in models:
        model.get_submodule(path).register_forward_hook(hook)
    logits = [model(IMAGES) for model in models]
    assert len(seen) == 2 and seen[0].shape == seen[1].shape
    assert_same(*seen)
    assert_same(*logits)


@pytest.mark.parametrize("path", ["blocks.1.attn", "blocks.1.mlp"])
def test_a_backward_hook_sees_the_branch_s_gradient(models: Any, path: str) -> None:
    seen: list[Tensor] = []
    for model in models:
        model.get_submodule(path).register_full_backward_hook(lambda m, gi, go: seen.append(go[0]))
        model(IMAGES).square().sum().backward()
    assert_same(*seen)


class Mix(nn.Module):
    """A layer that mixes tokens: it adds the mean of all."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y + y.mean(dim=1, keepdim=True)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(48, 48)

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return self.linear(x)


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 48, 8, 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).flatten(2).mT


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 48))


OWN: dict[str, Callable[[nn.Module], nn.Module]] = {
    "blocks.2.attn.proj": Mix,
    "blocks.2.norm2": Mix,
    "blocks.2.mlp.fc1": Mix,
    "blocks.2.mlp.act": lambda _: nn.ReLU(),
    "blocks.2.ls2": Mix,
    "blocks.1.attn": lambda _: Own(),
    "blocks.1.attn.q_norm": lambda _: nn.Identity(),
    "blocks.1.norm1": lambda _: nn.Linear(48, 48),
    "blocks.1.norm2": lambda _: nn.Linear(48, 48),
    "blocks.2.attn.k_norm": lambda _: nn.Linear(16, 16),
    "blocks.1.ls1": lambda _: nn.Identity(),
    "blocks.1.mlp": lambda _: mlp(),
    "blocks.1": lambda _: nn.Identity(),
    "patch_embed": lambda _: Stem(),
}


@pytest.mark.parametrize("path", OWN)
def test_a_layer_of_one_s_own_runs(models: Any, path: str) -> None:
    for model in models:
        parent, _, name = path.rpartition(".")
        torch.manual_seed(1)
        setattr(model.get_submodule(parent), name, OWN[path](model.get_submodule(path)))
    assert_same(*(model(IMAGES) for model in models))
    report = str(fastvit.backend_report(models[1], IMAGES))
    assert path in ("blocks.1", "patch_embed") or path.split(".")[-1].rstrip("12") in report


def test_another_activation_takes_part(models: Any) -> None:
    """In the fused op too, where it is one that the op has."""
    for model, act in zip(models, (nn.GELU("tanh"), Activation("gelu_tanh")), strict=True):
        for block in model.blocks:
            block.mlp.act = act
    assert_same(*(model(IMAGES) for model in models))
    with pytest.raises(
        UsageError, match=r"blocks\.0\.mlp\.act is Activation\(gelu_tanh\), expected"
    ):
        fastvit.export_checkpoint(models[1], "timm")
    for model in models:
        for block in model.blocks:
            block.mlp.act = nn.Identity()
    assert_same(*(model(IMAGES) for model in models))


@pytest.mark.parametrize("change", ["padding", "stride", "groups", "dilation"])
def test_a_convolution_that_overlaps_or_pads_runs_itself(change: str) -> None:
    arguments: dict[str, Any] = {"padding": {"padding": 1}, "stride": {"stride": 4}}.get(change, {})
    arguments |= {"groups": {"groups": 3}, "dilation": {"dilation": 2}}.get(change, {})
    images = torch.randn(2, 3, 32, 32)
    conv = nn.Conv2d(3, 48, 8, **{"stride": 8, **arguments})
    model = fastvit.create_model(NAME, **SMALL)
    model.patch_embed.proj = conv
    assert_same(conv(images).flatten(2).mT, model.patch_embed(images))
    peer = timm.create_model(NAME, **SMALL).eval()
    fastvit.accelerate(peer)
    for name, value in arguments.items():  # changed after it was found fit
        if name != "groups":
            setattr(peer.patch_embed.proj, name, (value, value))
    convolved = peer.patch_embed.proj(images)
    fastvit.restore(peer)
    assert_same(peer.patch_embed.proj(images), convolved)


def test_attention_pooling_takes_another_mlp() -> None:
    arguments = {**SMALL, "global_pool": "map", "class_token": False, "init_values": None}
    models = [m.create_model(NAME, **arguments).eval() for m in (timm, fastvit)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        model.attn_pool.mlp.register_forward_hook(lambda m, args, out: out * 0)
    assert_same(*(model(IMAGES) for model in models))
    for model in models:
        model.attn_pool.mlp = nn.Tanh()
    assert_same(*(model(IMAGES) for model in models))


def test_swiglu_with_one_bias() -> None:
    model = fastvit.ViT(image_size=8, patch_size=4, dim=16, depth=1, heads=1, mlp="swiglu").eval()
    gate: Any = model.blocks[0].get_submodule("mlp.fc1_g")
    gate.bias.data.zero_()
    images = torch.randn(2, 3, 8, 8)
    expected = model(images)
    gate.bias = None
    assert_same(expected, model(images))


def test_a_layer_that_no_forward_uses(models: Any) -> None:
    models[1].blocks[-1].mlp.extra = nn.Dropout(0.1)
    assert_same(*(model(IMAGES) for model in models))


@pytest.mark.parametrize("change", ["eps", "kind"])
def test_norms_of_q_and_k_may_differ(models: Any, change: str) -> None:
    for model in models:
        for block in model.blocks:
            if change == "eps":
                block.attn.k_norm.eps = 1.0
            else:
                block.attn.k_norm = (nn.RMSNorm if model is models[0] else RMSNorm)(16, eps=1e-6)
    assert_same(*(model(IMAGES) for model in models))


@pytest.mark.parametrize(
    ("path", "name"),
    [("blocks.1.ls1", "gamma"), ("blocks.1.attn.q_norm", "weight"), ("blocks.2.mlp.fc1", "weight")],
)
def test_pruned_weights_train(models: Any, path: str, name: str) -> None:
    for model in models:
        prune.l1_unstructured(model.get_submodule(path), name, 0.5)
        for _ in range(2):
            model(IMAGES).sum().backward()
    grads = [model.get_submodule(path).get_parameter(f"{name}_orig").grad for model in models]
    assert_same(*grads)


def test_rope_needs_a_stem_that_tells_its_grid() -> None:
    model = fastvit.ViT(
        image_size=16, patch_size=8, dim=16, depth=1, heads=1, rope="dinov3", pos_embed="none"
    )
    model.patch_embed = nn.Conv2d(3, 16, 8, 8)  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"patch_embed: Conv2d has no grid"):
        model(torch.randn(1, 3, 16, 16))


def test_a_stem_of_one_s_own_takes_another_head(models: Any) -> None:
    for model in models:
        torch.manual_seed(1)
        model.patch_embed = Stem()
        model.double()
        model.reset_classifier(7)
    assert models[1].head.weight.dtype == torch.float64
    models[1].load_state_dict(models[0].state_dict(), strict=True)
    assert_same(*(model(IMAGES.double()) for model in models))
    with pytest.raises(UsageError, match=r"set_input_size: patch_embed is a Stem; expected"):
        models[1].set_input_size(64)


def test_a_projection_of_one_s_own_takes_another_size(models: Any) -> None:
    own = models[1]
    own.patch_embed.proj = nn.Sequential(own.patch_embed.proj)
    own.set_input_size(48)
    models[0].set_input_size((48, 48))
    images = torch.randn(2, 3, 48, 48)
    assert_same(models[0](images), own(images))
    assert own.default_cfg["input_size"] == (3, 48, 48)
    with pytest.raises(TypeError, match=r"patch_embed\.proj is a Sequential, not a Conv2d"):
        own.set_input_size(96, patch_size=16)
    assert_same(models[0](images), own(images))
