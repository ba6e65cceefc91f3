"""Replaced layers, hooks and pruning take effect: modules then run themselves, not the fused op."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peers import randomize_weights
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils._pytree import tree_map_only

import fastvit

TINY: dict[str, Any] = dict(image_size=16, patch_size=4, dim=32, depth=2, heads=2, num_classes=5)
LINEARS = {
    "mlp": ("patch_embed.proj", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "norm1", "norm2"),
    "swiglu": ("mlp.fc1_g", "mlp.fc1_x", "mlp.fc2"),
    "swiglu_packed": ("mlp.fc1", "mlp.fc2"),
}
PARTS = [(mlp, name) for mlp, names in LINEARS.items() for name in names]


def make(mlp: str, **options: Any) -> fastvit.ViT:
    torch.manual_seed(0)
    model = fastvit.ViT(**TINY, mlp=mlp, mlp_dim=64, layer_scale=0.5, **options)
    return randomize_weights(model).train().double()


def part(model: fastvit.ViT, name: str) -> tuple[nn.Module, str]:
    """The parent module of the part, and the part's attribute name in it."""
    path = name if name.startswith("patch_embed") else f"blocks.0.{name}"
    parent, _, child = path.rpartition(".")
    return model.get_submodule(parent), child


class Half(nn.Module):
    """A wrapper around another module, as in LoRA. At scale 1 it changes nothing."""

    def __init__(self, inner: nn.Module, scale: float) -> None:
        super().__init__()
        self.inner, self.scale = inner, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.inner(x)


@pytest.mark.parametrize(("mlp", "name"), PARTS)
def test_a_module_in_place_of_ours_runs(mlp: str, name: str) -> None:
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    model = make(mlp)
    before = model(images)
    parent, child = part(model, name)
    inner = parent.get_submodule(child)
    setattr(parent, child, Half(inner, 1.0))
    torch.testing.assert_close(model(images), before, rtol=1e-11, atol=1e-12)
    setattr(parent, child, Half(inner, 0.5))
    assert not torch.allclose(model(images), before, rtol=1e-3)
    model.float()
    reasons = {c.reason for c in fastvit.backend_report(model, images.float()).choices}
    assert any(r.endswith("is Half") for r in reasons), reasons
    with fastvit.use_backend("triton"), pytest.raises(RuntimeError, match="is Half"):
        model(images.float())


def hooked(module: nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize(("mlp", "name"), PARTS)
def test_hooks_fire_and_change_nothing(mlp: str, name: str) -> None:
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    model = make(mlp, qkv_bias="qv" if mlp == "swiglu" else True)
    before = model(images)
    parent, child = part(model, name)
    calls = hooked(parent.get_submodule(child))
    torch.testing.assert_close(model(images), before, rtol=1e-11, atol=1e-12)
    assert calls == [1]


def test_global_hooks_see_every_layer() -> None:
    model, seen = make("mlp"), set()
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.add(m))
    try:
        model(torch.randn(2, 3, 16, 16, dtype=torch.float64))
    finally:
        handle.remove()
    layers = {m for m in model.modules() if isinstance(m, nn.Linear | nn.LayerNorm | nn.Conv2d)}
    assert layers <= seen


def pruned(linear: nn.Linear) -> Callable[[], Tensor]:
    prune.random_unstructured(linear, "weight", amount=0.9)
    return lambda: linear.get_parameter("weight_orig")


def halved(linear: nn.Linear) -> Callable[[], Tensor]:
    class Halve(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    parametrize.register_parametrization(linear, "weight", Halve())
    return lambda: linear.get_parameter("parametrizations.weight.original")


@pytest.mark.parametrize("name", ["attn.qkv", "attn.proj", "mlp.fc1"])
@pytest.mark.parametrize("change", [pruned, halved])
def test_pruned_and_parametrized_weights_follow_their_original(change: Callable, name: str) -> None:
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    model = make("mlp")
    before = model(images)
    original = change(model.get_submodule(f"blocks.0.{name}"))
    changed = model(images)
    assert not torch.allclose(changed, before, rtol=1e-3)
    (grad,) = torch.autograd.grad(changed.sum(), original())
    assert grad.abs().sum() > 0
    with torch.no_grad():
        original().mul_(2)
    assert not torch.allclose(model(images), changed, rtol=1e-3)


class Shadowed(nn.Linear):
    """Multiplies by half of its parameter."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return 0.5 * self._parameters["weight"]  # type: ignore[operator]


@pytest.mark.parametrize("name", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
@pytest.mark.parametrize("how", ["property", "attribute"])
def test_a_weight_in_front_of_the_parameter_is_read(how: str, name: str) -> None:
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    model = make("mlp")
    plain = model(images)
    parent, child = part(model, name)
    linear = parent.get_submodule(child)
    if how == "property":
        linear.__class__ = Shadowed
    else:
        linear.__dict__["weight"] = 0.5 * linear.get_parameter("weight").detach()
    got = model(images)
    assert not torch.allclose(got, plain, rtol=1e-3)
    linear.register_forward_hook(lambda *_: None)  # the layer then runs itself
    torch.testing.assert_close(got, model(images), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("how", ["class", "instance"])
def test_an_overridden_projection_is_called(how: str) -> None:
    """Of q, k and v, in blocks whose attention branch could be one op."""
    images = torch.randn(2, 3, 16, 16)
    model = make("mlp").float()
    plain, calls, attn = model(images), [], model.blocks[0].attn
    project = type(attn).project

    def halved(self: Any, *args: Any) -> Any:
        calls.append(1)
        qkv, x = project(self, *args)
        return 0.5 * qkv, x

    if how == "class":
        attn.__class__ = type("Own", (type(attn),), {"project": halved})
    else:
        attn.project = partial(halved, attn)
    assert not torch.allclose(model(images), plain, rtol=1e-3)
    assert calls == [1]


def test_a_part_compiles_beside_a_foreign_module() -> None:
    model = make("mlp")
    parent, child = part(model, "attn.qkv")
    setattr(parent, child, Half(parent.get_submodule(child), 0.5))
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), model(images))


@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm, nn.Conv2d])
def test_a_patch_of_a_whole_class_takes_effect(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.randn(2, 3, 16, 16)
    model = make("mlp").float()
    seen: set[nn.Module] = set()
    original: Any = kind.forward

    def patched(module: nn.Module, x: Tensor) -> Tensor:
        seen.add(module)
        return original(module, x)

    monkeypatch.setattr(kind, "forward", patched)
    model(images)
    assert seen == {m for m in model.modules() if isinstance(m, kind)}
    choices = fastvit.backend_report(model, images).choices
    assert f"nn.{kind.__name__}.forward is patched" in {c.reason for c in choices}


class Wrapped(Tensor):
    """A tensor without storage, as quantized ones are, that computes as its inner tensor."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapped":
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        plain: Any = tree_map_only(Wrapped, lambda t: t.inner, (args, kwargs or {}))
        out = func(*plain[0], **plain[1])
        return Wrapped(out) if func is torch.ops.aten.detach.default else out


@pytest.mark.parametrize(
    "name", ["norm1.bias", "attn.qkv.bias", "attn.proj.bias", "ls1.gamma", "mlp.fc1.bias"]
)
def test_a_parameter_of_another_kind_of_tensor(name: str) -> None:
    """Kernels read a tensor's storage, so a module that holds another kind must run itself."""
    images = torch.randn(2, 3, 16, 16)
    model = make("mlp").float().eval()
    with torch.no_grad():
        before = model(images)
        owner, _, leaf = f"blocks.0.{name}".rpartition(".")
        module = model.get_submodule(owner)
        inner = getattr(module, leaf).detach()
        setattr(module, leaf, nn.Parameter(Wrapped(inner), requires_grad=False))
        torch.testing.assert_close(model(images), before, rtol=1e-5, atol=1e-5)
    reasons = {c.reason for c in fastvit.backend_report(model, images).choices}
    assert any(r and r.endswith("holds a Wrapped") for r in reasons)
