"""Register launchers as torch.library ops, which torch.compile and torch.export can trace."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import register_flop_formula

from fastvit_kernels import flops, replay

_library = torch.library.Library("fastvit", "FRAGMENT")
launchers: dict[str, Callable[..., Any]] = {}  # what `torch.ops.fastvit.<name>` runs


def register(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Register a launcher as `torch.ops.fastvit.<name>`; `fake` returns shapes and dtypes alone.

    What the launcher does must depend only on its tensors' shapes, strides and dtypes, its other
    arguments, the TF32 switch and `tuned`, not on tensors' values: `replay` repeats it. The
    decorated function calls the launcher directly unless the dispatcher must see the op
    (`needs_dispatcher`): the dispatcher takes longer than most launches.
    """

    def wrap(launch: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(launch, mutates_args=())
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))

        @functools.wraps(launch)
        def on_its_device(first: torch.Tensor, *args: Any) -> Any:
            # Triton launches on the current GPU, which need not be that of the tensors.
            if first.is_cuda and first.device.index != torch.cuda.current_device():
                with torch.cuda.device_of(first):
                    return replay.run(launch, (first, *args))
            return replay.run(launch, (first, *args))

        _library.impl(name, on_its_device, "CompositeExplicitAutograd")
        launchers[name] = launch
        torch.library.register_fake(f"fastvit::{name}", fake, lib=_library)
        packet = getattr(torch.ops.fastvit, name)
        formula = register_flop_formula(packet, get_raw=True)(flops.counts(name, launch))
        for mode in _get_current_dispatch_mode_stack():  # counters older than this import
            getattr(getattr(mode, "counter", None), "flop_registry", {})[packet] = formula
        op = packet.default

        def call(first: torch.Tensor, *args: Any) -> Any:
            return op(first, *args) if needs_dispatcher(first) else on_its_device(first, *args)

        return call

    return wrap


_TENSORS = (torch.Tensor, torch.nn.Parameter)


def needs_dispatcher(*tensors: torch.Tensor) -> bool:
    """True if an op on tensors must go through the dispatcher: for a compiler, a dispatch mode, a
    torch.func transform or a tensor subclass.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or has_subclass(*tensors)
    )


def has_subclass(*tensors: torch.Tensor) -> bool:
    """True if a tensor is of a subclass other than nn.Parameter."""
    return any(type(t) not in _TENSORS for t in tensors)


class _NoContext:
    """The ctx of a forward without a backward: saves nothing."""

    def save_for_backward(self, *_: Any) -> None:
        pass

    def set_materialize_grads(self, _: bool) -> None:
        pass


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """function.apply(*args), or only its forward, which is cheaper, if no gradient is needed."""
    tensors = [t for t in args if isinstance(t, torch.Tensor)]
    if needs_dispatcher(*tensors) or wants_gradient(*tensors):
        return function.apply(*args)
    return function.forward(_NoContext(), *args)


def reshaped(rows: torch.Tensor, *shape: int) -> torch.Tensor:
    """rows in an op's result shape, not as a view: autograd would forbid to change it in place."""
    # A compiler handles views itself; in inference mode only a view keeps rows' version counter.
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return rows.view(shape)
    return torch.ops.aten._unsafe_view.default(rows, shape)


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    """True if autograd records an op on the tensors."""
    if not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in tensors)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a Function's backward refuse create_graph=True, whose second derivatives would be wrong,
    and is_grads_batched=True, whose batches no kernel can read.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: torch.Tensor) -> Any:
        if not torch.compiler.is_compiling():
            _check_once(grads)
        return backward(ctx, *grads)

    return wrapper


def _check_once(grads: Sequence[torch.Tensor | None]) -> None:
    what = "have no second derivative (create_graph=True)" if torch.is_grad_enabled() else None
    if any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in grads):
        what = "take no batch of gradients (is_grads_batched=True, vectorize=True)"
    if what is not None:
        raise RuntimeError(
            f"fastvit: the Triton kernels {what}; run the forward under "
            "fastvit.use_backend('reference')"
        )


def marked(tensors: Sequence[torch.Tensor | None], needs: Sequence[bool]) -> list[torch.Tensor]:
    """The tensors that `needs` marks, without the absent ones."""
    pairs = zip(tensors, needs, strict=True)
    return [t for t, needed in pairs if needed and t is not None]


def zeros(
    x: torch.Tensor,
    params: Sequence[torch.Tensor],
    copy_dtype: torch.dtype | None = None,
) -> list[torch.Tensor]:
    """Gradients of an empty batch: of x, in copy_dtype too if given, then of the parameters."""
    copies = [] if copy_dtype is None else [torch.zeros_like(x, dtype=copy_dtype)]
    return [torch.zeros_like(x), *copies, *map(torch.zeros_like, params)]


def spread(grads: Sequence[torch.Tensor], needs: Sequence[bool]) -> list[torch.Tensor | None]:
    """grads at the places that `needs` marks, None at the others."""
    left = iter(grads)
    return [next(left) if needed else None for needed in needs]
