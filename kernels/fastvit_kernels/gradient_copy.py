"""The gradient of a residual branch, handed from one op's backward to the next.

A branch that was added to x as path_scale * y gets g = path_scale * dx in the compute dtype: what
both products of its backward take, through TMA. Under autocast dx is float32, and with drop path it
is not g: the kernel that writes dx has its rows in registers, and writes g beside them. That spares
a pass over dx. The copy travels on the gradient itself: whatever replaces that tensor (a hook that
returns another, a sum of two gradients) leaves the copy behind, and a change in place shows in the
tensor's version. Compilers see no copies.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Wanted(NamedTuple):
    """A backward's wish, which it keeps as `wants` in its context; path_scale: (B,)."""

    dtype: torch.dtype
    path_scale: Tensor | None


def want(x: Tensor, dtype: torch.dtype, path_scale: Tensor | None) -> Wanted | None:
    """What the branch that ends in x wants beside x's gradient; None where that itself is g."""
    return None if x.dtype == dtype and path_scale is None else Wanted(dtype, path_scale)


def wanted(x: Tensor, dtype: torch.dtype) -> Wanted | None:
    """What the backward that x's gradient goes to wants, if it is of `dtype`."""
    if torch.compiler.is_compiling():
        return None
    found = getattr(x.grad_fn, "wants", None)
    return found if found is not None and found.dtype == dtype else None


def carry(grad: Tensor, copy: Tensor, wish: Any) -> None:
    """Let grad carry the copy that was wished for, of the same elements in the same order."""
    grad._fastvit_copy = copy, wish, grad._version  # type: ignore[attr-defined]


def carried(grad: Tensor, wish: Wanted | None) -> Tensor | None:
    """What grad carries of this very wish; None where there is none of what grad holds now."""
    if wish is None or torch.compiler.is_compiling():
        return None
    copy, granted, version = getattr(grad, "_fastvit_copy", (None, None, 0))
    if copy is None or granted is not wish or version != grad._version:
        return None
    return copy.view(grad.shape)


def branch(
    grad: Tensor, wish: Wanted | None, dtype: torch.dtype, path_scale: Tensor | None
) -> Tensor:
    """g of grad (B, N, C): carried by it, or else made here."""
    g = carried(grad, wish)
    if g is None:
        g = grad if path_scale is None else grad * path_scale[:, None, None]
    return g.to(dtype)
