"""A residual branch's gradient, passed from one op's backward to the next along with dx.

A branch y added to the residual stream as x + path_scale * y has the upstream gradient g =
path_scale * dx in the compute dtype, which both products of its backward read through TMA. Where dx
is not g itself, under autocast (dx is float32) or with drop path, the kernel that writes dx has its
rows in registers and writes g too, which saves a pass over dx. One slot per thread holds the copy
for the very tensor dx: whatever replaces that (a hook that returns another, a sum of two gradients)
finds no copy, and in-place changes show in the tensor's version. A hook on x, which may change dx
in ways that do not show there (a collective, `.data`), and torch.compile get none.
"""

import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor


class CopyRequest(NamedTuple):
    """Request for a copy, kept as ctx.copy_request by the Function that reads it.

    path_scale: (B,).
    """

    dtype: torch.dtype
    path_scale: Tensor | None


class Upstream(NamedTuple):
    """The request of the Function that made x, kept by the Function that reads x."""

    request: CopyRequest
    x: weakref.ref[Tensor]


class _Slot(threading.local):
    kept: tuple[weakref.ref, int, CopyRequest, Tensor, Any] | None = None


_slot = _Slot()


def make_request(x: Tensor, dtype: torch.dtype, path_scale: Tensor | None) -> CopyRequest | None:
    """The request of the branch that was added into x; None if x's gradient itself is g."""
    return None if x.dtype == dtype and path_scale is None else CopyRequest(dtype, path_scale)


def find_request(x: Tensor, dtype: torch.dtype) -> Upstream | None:
    """The request of the Function that made x, if it is for `dtype`; None under torch.compile."""
    if torch.compiler.is_compiling():
        return None
    found = getattr(x.grad_fn, "copy_request", None)
    return Upstream(found, weakref.ref(x)) if found is not None and found.dtype == dtype else None


def current_request(upstream: Upstream | None) -> CopyRequest | None:
    """The request, unless a hook on x will see the gradient first."""
    if upstream is None:
        return None
    x = upstream.x()
    return None if x is not None and x._backward_hooks else upstream.request


def attach(grad: Tensor, copy: Tensor, request: CopyRequest) -> None:
    """Hold the requested copy of grad, the same elements in the same order, while grad lives."""

    def end(ref: weakref.ref) -> None:
        if _slot.kept is not None and _slot.kept[0] is ref:
            _slot.kept = None

    _slot.kept = weakref.ref(grad, end), grad._version, request, copy, _stream(grad)


def attached(grad: Tensor, request: CopyRequest | None) -> Tensor | None:
    """Take the copy of grad for this very request; None if absent or if grad has changed."""
    kept = _slot.kept
    if request is None or kept is None or torch.compiler.is_compiling():
        return None
    ref, version, granted, copy, stream = kept
    if ref() is not grad or version != grad._version or granted is not request:
        return None
    _slot.kept = None
    # Nobody else keeps the copy alive for a reader on another stream.
    return copy.view(grad.shape) if stream == _stream(grad) else None


def _stream(t: Tensor) -> Any:
    return torch._C._cuda_getCurrentRawStream(t.device.index) if t.is_cuda else None


def branch_gradient(
    grad: Tensor, request: CopyRequest | None, dtype: torch.dtype, path_scale: Tensor | None
) -> Tensor:
    """g for grad (B, N, C): the attached copy, or else computed here."""
    g = attached(grad, request)
    if g is None:
        g = grad if path_scale is None else grad * path_scale[:, None, None]
    return g.to(dtype)
