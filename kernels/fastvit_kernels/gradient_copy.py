"""A residual branch's gradient, passed from one op's backward to the next along with dx.

A branch y added to the residual stream as x + path_scale * y has the upstream gradient g =
path_scale * dx in the compute dtype, which both products of its backward read through TMA. Where dx
is not g itself, under autocast (dx is float32) or with drop path, the kernel that writes dx has its
rows in registers and writes g too, which saves a pass over dx. The copy is an attribute of the
gradient tensor: whatever replaces that tensor (a hook that returns another, a sum of two gradients)
drops the copy, and in-place changes show in the tensor's version. Under torch.compile there are no
copies.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class CopyRequest(NamedTuple):
    """Request for a copy, kept as ctx.copy_request by the Function that reads it.

    path_scale: (B,).
    """

    dtype: torch.dtype
    path_scale: Tensor | None


def make_request(x: Tensor, dtype: torch.dtype, path_scale: Tensor | None) -> CopyRequest | None:
    """The request of the branch that was added into x; None if x's gradient itself is g."""
    return None if x.dtype == dtype and path_scale is None else CopyRequest(dtype, path_scale)


def find_request(x: Tensor, dtype: torch.dtype) -> CopyRequest | None:
    """The request of the Function that made x, if it is for `dtype`; None under torch.compile."""
    if torch.compiler.is_compiling():
        return None
    found = getattr(x.grad_fn, "copy_request", None)
    return found if found is not None and found.dtype == dtype else None


def attach(grad: Tensor, copy: Tensor, request: Any) -> None:
    """Attach the requested copy to grad: the same elements in the same order."""
    grad._fastvit_copy = copy, request, grad._version  # type: ignore[attr-defined]


def attached(grad: Tensor, request: CopyRequest | None) -> Tensor | None:
    """The copy attached to grad for this very request; None if absent or if grad has changed."""
    if request is None or torch.compiler.is_compiling():
        return None
    copy, granted, version = getattr(grad, "_fastvit_copy", (None, None, 0))
    if copy is None or granted is not request or version != grad._version:
        return None
    return copy.view(grad.shape)


def branch_gradient(
    grad: Tensor, request: CopyRequest | None, dtype: torch.dtype, path_scale: Tensor | None
) -> Tensor:
    """g for grad (B, N, C): the attached copy, or else computed here."""
    g = attached(grad, request)
    if g is None:
        g = grad if path_scale is None else grad * path_scale[:, None, None]
    return g.to(dtype)
