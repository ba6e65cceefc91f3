"""Launchers as torch.library ops, so that torch.compile and torch.export see through them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

_library = torch.library.Library("fastvit", "FRAGMENT")
launchers: dict[str, Callable[..., Any]] = {}  # what `torch.ops.fastvit.<name>` runs on a GPU


def register(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Make a launcher the op `torch.ops.fastvit.<name>`; `fake` gives shapes and dtypes alone."""

    def wrap(launch: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(launch, mutates_args=())
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))

        @functools.wraps(launch)
        def on_its_device(first: torch.Tensor, *args: Any) -> Any:
            # Triton launches on the current GPU, which need not be the one that holds the tensors.
            with torch.cuda.device_of(first):
                return launch(first, *args)

        _library.impl(name, on_its_device, "CompositeExplicitAutograd")
        launchers[name] = launch
        torch.library.register_fake(f"fastvit::{name}", fake, lib=_library)
        return getattr(torch.ops.fastvit, name).default

    return wrap


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse create_graph=True in a Function's backward: it would give wrong second derivatives."""

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: torch.Tensor) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "fastvit: the Triton kernels have no second derivative (create_graph=True); "
                "run the forward under fastvit.use_backend('reference')"
            )
        return backward(ctx, *grads)

    return wrapper


def zeros(x: torch.Tensor, params: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """Gradients of an empty batch: of x, then of each parameter there is."""
    return [torch.zeros_like(t) for t in (x, *params) if t is not None]


def spread(
    grads: Sequence[torch.Tensor], params: Sequence[torch.Tensor | None], needed: bool
) -> list[torch.Tensor | None]:
    """grads at the places of the parameters there are; nothing anywhere where none was needed."""
    left = iter(grads)
    return [next(left) if needed and p is not None else None for p in params]
