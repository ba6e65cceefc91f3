"""A peer's own output and gradients as the truth for a `fastvit.ViT` that loaded its checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastvit.dialects import read

TOLERANCE = 1e-5
# In float32 the features, the output, and the gradients may differ by 1e-5 of the largest of them,
# or by 1e-5 where all are smaller than 1.


@dataclass
class Truth:
    """What a peer gives for `images`. features: all tokens after its final norm, or None where it
    has no such; out: what `forward` gives; grads: of (out * weights(out)).sum(), in our names."""

    images: Tensor
    features: Tensor | None
    out: Tensor
    dimages: Tensor
    grads: Mapping[str, Tensor]


def liven(model: Any, std: float = 0.2) -> Any:
    """Random weights large enough that every part matters to the output; in eval mode."""
    for p in model.parameters():
        nn.init.normal_(p, std=std)
    return model.eval()


def weights(out: Tensor) -> Tensor:
    """What the output is multiplied with to get a scalar: no symmetry hides a permutation."""
    return torch.linspace(-1, 1, out[0].numel()).view(out.shape[1:])


def truth(
    model: Any,
    images: Tensor,
    run: Callable[[Tensor], tuple[Tensor | None, Tensor]],
    config: Mapping[str, Any] | None = None,
) -> Truth:
    """run(images) gives the peer's features and output. Its gradients are renamed by the same
    dialect that reads its weights: they are as linear in the weights as the output is."""
    model.zero_grad()
    x = images.clone().requires_grad_()
    features, out = run(x)
    (out * weights(out)).sum().backward()
    assert x.grad is not None
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    features = None if features is None else features.detach()
    return Truth(images, features, out.detach(), x.grad, renamed(grads, config))


def renamed(grads: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> dict:
    """Gradients of a peer in our names. Where <cls> and its position are added to one parameter of
    ours, each of the two has its whole gradient: one of them counts."""
    keys = " ".join(grads)
    folded = "register_tokens" in keys and "pos" in keys
    grads = {
        k: torch.zeros_like(v) if folded and k.endswith("cls_token") else v
        for k, v in grads.items()
    }
    return read(grads, config or {}).state


def check(ours: Any, expected: Truth, parameters: bool = True) -> None:
    """Features, output, and the gradients in the images and, if asked, in every parameter."""
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
            continue  # a projection without a bias gets one of zeros, as in timm
        # A part that the output does not reach has no gradient in either.
        got = torch.zeros_like(p) if p.grad is None else p.grad
        close(f"gradient of {name}", got, expected.grads.get(name, torch.zeros_like(p)))


def close(name: str, got: Tensor | None, expected: Tensor) -> None:
    assert got is not None and got.shape == expected.shape, name
    error = float((got.detach() - expected.detach()).abs().max())
    bound = TOLERANCE * max(1.0, float(expected.detach().abs().max()))
    assert error <= bound, f"{name}: {error:.2e}, allowed {bound:.2e}"
