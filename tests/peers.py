"""Compare a `fastvit.ViT` that loaded a peer's checkpoint with the peer's output and gradients."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastvit
from fastvit.dialects import read

TOLERANCE = 1e-5
# Features, output and gradients, in float32, may differ by 1e-5 of the largest element of each
# tensor, or by 1e-5 if that is smaller than 1.


@dataclass
class Truth:
    """A peer's results for `images`. features: all tokens after its final norm, or None if it has
    none; out: its output; dimages, grads: gradients of (out * weights(out)).sum(), in our names."""

    images: Tensor
    features: Tensor | None
    out: Tensor
    dimages: Tensor
    grads: Mapping[str, Tensor]


def randomize_weights(model: Any, std: float = 0.2) -> Any:
    """Random weights large enough that every part matters to the output; in eval mode."""
    for p in model.parameters():
        nn.init.normal_(p, std=std)
    return model.eval()


def timm_twins(name: str, std: float = 0.2, **arguments: Any) -> tuple[Any, Any]:
    """timm's model and ours, in eval mode, with the same random weights."""
    timm: Any = pytest.importorskip("timm")
    theirs = randomize_weights(timm.create_model(name, **arguments), std)
    ours: Any = fastvit.create_model(name, **arguments).eval()
    ours.load_weights(theirs.state_dict())
    assert not ours.load_report.adapted
    if not isinstance(theirs, timm.models.Eva):  # whose parameters have other names
        ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def weights(out: Tensor) -> Tensor:
    """Weights of the sum that makes out a scalar: all different within an image, so that a
    permutation changes it, and the same for every image."""
    line = torch.linspace(-1, 1, out[0].numel(), dtype=out.dtype, device=out.device)
    return line.view(out.shape[1:])


def truth(
    model: Any,
    images: Tensor,
    run: Callable[[Tensor], tuple[Tensor | None, Tensor]],
    config: Mapping[str, Any] | None = None,
) -> Truth:
    """Run a peer forward and backward; run(images) returns its features and output. Gradients are
    translated by the dialect that reads the weights: it renames, joins, permutes and adds them."""
    model.zero_grad()
    x = images.clone().requires_grad_()
    features, out = run(x)
    (out * weights(out)).sum().backward()
    assert x.grad is not None
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    features = None if features is None else features.detach()
    return Truth(images, features, out.detach(), x.grad, renamed(grads, config))


def timm_truth(model: Any, images: Tensor) -> Truth:
    return truth(model, images, lambda x: (model.forward_features(x), model(x)))


def renamed(grads: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> dict:
    """A peer's gradients in our names. Where one parameter of ours is the sum of <cls> and its
    position, each of the two has the gradient of the sum: that of <cls> is zeroed before adding."""
    keys = " ".join(grads)
    folded = "register_tokens" in keys and "pos" in keys
    grads = {
        k: torch.zeros_like(v) if folded and k.endswith("cls_token") else v
        for k, v in grads.items()
    }
    return read(grads, config or {}).state


def check(ours: Any, expected: Truth, parameters: bool = True) -> None:
    """Compare features, output, the gradient of the images and, if asked, of every parameter."""
    ours.zero_grad()
    if expected.features is not None:
        close("features", ours.forward_features(expected.images), expected.features)
    x = expected.images.clone().requires_grad_()
    out = ours(x)
    (out * weights(out)).sum().backward()
    close("output", out, expected.out)
    close("images' gradient", x.grad, expected.dimages)
    for name, p in ours.named_parameters() if parameters else ():
        if name == "head.bias" and name not in expected.grads:
            continue  # as in timm, a bias of zeros where the peer has none
        # A parameter that the output does not depend on has no gradient in either.
        got = torch.zeros_like(p) if p.grad is None else p.grad
        close(f"gradient of {name}", got, expected.grads.get(name, torch.zeros_like(p)))


def close(name: str, got: Tensor | None, expected: Tensor) -> None:
    assert got is not None and got.shape == expected.shape, name
    error = float((got.detach() - expected.detach()).abs().max())
    bound = TOLERANCE * max(1.0, float(expected.detach().abs().max()))
    assert error <= bound, f"{name}: {error:.2e}, allowed {bound:.2e}"


def assert_same(expected: Any, got: Any) -> None:
    """Element by element: tighter than `close` for the small elements of a tensor with large ones,
    so for models that have no more than a layer or a hook apart from timm's."""
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
