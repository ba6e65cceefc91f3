"""Launchers as torch.library ops, so that torch.compile and torch.export see through them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import register_flop_formula

from fastvit_kernels import flops, replay

_library = torch.library.Library("fastvit", "FRAGMENT")
launchers: dict[str, Callable[..., Any]] = {}  # what `torch.ops.fastvit.<name>` runs on a GPU


def register(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Make a launcher the op `torch.ops.fastvit.<name>`; `fake` gives shapes and dtypes alone.

    What it does must follow from its tensors' shapes, strides and dtypes and its other arguments:
    no values are read, and no state but `tuned`'s, whose changes it forgets (`replay`).
    What comes back calls the launcher itself where nobody watches: the dispatcher takes longer than
    most launches.
    """

    def wrap(launch: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(launch, mutates_args=())
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))

        @functools.wraps(launch)
        def on_its_device(first: torch.Tensor, *args: Any) -> Any:
            # Triton launches on the current GPU, which need not be the one that holds the tensors.
            if first.is_cuda and first.device.index != torch.cuda.current_device():
                with torch.cuda.device_of(first):
                    return replay.run(launch, (first, *args))
            return replay.run(launch, (first, *args))

        _library.impl(name, on_its_device, "CompositeExplicitAutograd")
        launchers[name] = launch
        torch.library.register_fake(f"fastvit::{name}", fake, lib=_library)
        packet = getattr(torch.ops.fastvit, name)
        formula = register_flop_formula(packet, get_raw=True)(flops.counts(name, launch))
        for mode in _get_current_dispatch_mode_stack():  # a count that began before this import
            getattr(getattr(mode, "counter", None), "flop_registry", {})[packet] = formula
        op = packet.default

        def call(first: torch.Tensor, *args: Any) -> Any:
            return op(first, *args) if is_watched(first) else on_its_device(first, *args)

        return call

    return wrap


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_watched(*tensors: torch.Tensor) -> bool:
    """Whether something other than the GPU is to see an op on tensors: a compiler, a dispatch mode,
    a transform, a subclass.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or not are_plain(*tensors)
    )


def are_plain(*tensors: torch.Tensor) -> bool:
    """Whether none is of a subclass."""
    return all(type(t) in _PLAIN for t in tensors)


class _NoContext:
    """What a forward without a backward is given: keeps nothing."""

    def save_for_backward(self, *_: Any) -> None:
        pass

    def set_materialize_grads(self, _: bool) -> None:
        pass


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """function.apply(*args); where no gradient is wanted its forward alone, which costs less."""
    tensors = [t for t in args if isinstance(t, torch.Tensor)]
    if is_watched(*tensors) or wants_gradient(*tensors):
        return function.apply(*args)
    return function.forward(_NoContext(), *args)


def shaped(rows: torch.Tensor, *shape: int) -> torch.Tensor:
    """An op's result in its shape, and no view of anything: autograd would let nobody change it."""
    # A compiler looks for itself; in inference mode only a view keeps its count of changes.
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return rows.view(shape)
    return torch.ops.aten._unsafe_view.default(rows, shape)


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether a backward through any of the tensors is to come."""
    if not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in tensors)


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


def zeros(
    x: torch.Tensor,
    params: Sequence[torch.Tensor | None],
    copy_dtype: torch.dtype | None = None,
) -> list[torch.Tensor]:
    """Gradients of an empty batch: of x, in copy_dtype too if given, then of the parameters."""
    copies = [] if copy_dtype is None else [torch.zeros_like(x, dtype=copy_dtype)]
    return [torch.zeros_like(x), *copies, *(torch.zeros_like(p) for p in params if p is not None)]


def spread(
    grads: Sequence[torch.Tensor], params: Sequence[torch.Tensor | None], needed: bool
) -> list[torch.Tensor | None]:
    """grads at the places of the parameters there are; nothing anywhere where none was needed."""
    left = iter(grads)
    return [next(left) if needed and p is not None else None for p in params]
