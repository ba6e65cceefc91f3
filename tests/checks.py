"""The one tolerance rule: a kernel may err twice as much as eager PyTorch in the same dtype."""

import torch
from torch import Tensor


def check(
    name: str,
    got: Tensor,
    eager: Tensor,
    truth: Tensor,
    dtype: torch.dtype | None = None,
    elementwise: bool = True,
) -> None:
    """Assert that there is no `disagreement`."""
    reason = disagreement(got, eager, truth, dtype, elementwise)
    assert reason is None, f"{name}: {reason}"


def disagreement(
    got: Tensor,
    eager: Tensor,
    truth: Tensor,
    dtype: torch.dtype | None = None,
    elementwise: bool = True,
    l2_from: int = 1024,
) -> str | None:
    """None if err(got) <= 2 * err(eager) + rounding, in the worst element and, with at least
    l2_from elements, where luck averages out, in L2; else the reason. elementwise=False: in L2
    alone, whatever the size. Computed on the device of `got`, since benchmarks' tensors are large.

    got: the kernel's result; eager: the eager reference in the same dtype and on the same inputs;
    truth: the eager reference in float64. NaN and infinities must be in the same places.
    rounding: two units in the last place of the largest element (in L2 one of every element), in
    `dtype`: the dtype of the products under autocast, by default the tensor's own.
    """
    if got.shape != truth.shape:
        return f"shape {tuple(got.shape)} != {tuple(truth.shape)}"
    if got.dtype != eager.dtype:
        return f"dtype {got.dtype} != eager's {eager.dtype}"
    name, ulp = dtype_name(eager.dtype), torch.finfo(dtype or eager.dtype).eps
    got, eager, truth = (t.detach().to(got.device, torch.float64) for t in (got, eager, truth))
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        wrong = kind(got) != kind(truth)
        if wrong.any():
            place, count = _largest(wrong.int()), int(wrong.sum())
            return f"{kind.__name__} differs from float64 at {place}, {count} places"
    finite = truth.isfinite()
    count = int(finite.sum())
    if count == 0:
        return None
    errors, eager_errors = (torch.where(finite, (t - truth).abs(), 0.0) for t in (got, eager))
    truth = torch.where(finite, truth, 0.0)
    worst = float(errors.max())
    bound = 2 * float(eager_errors.max()) + 2 * ulp * float(truth.abs().max())
    # Negated, so that a NaN in the bound is a disagreement too.
    if elementwise and not worst <= bound:
        return (
            f"worst element {_largest(errors)} is off by {worst:.3e}, "
            f"allowed {bound:.3e} (2 x eager {name} + rounding)"
        )
    if elementwise and count < l2_from:
        return None
    l2 = float(errors.norm())
    bound = 2 * float(eager_errors.norm()) + ulp * float(truth.norm()) + 1e-300
    if not l2 <= bound:
        return f"L2 error {l2:.3e}, allowed {bound:.3e} (2 x eager {name} + rounding)"
    return None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _largest(t: Tensor) -> tuple[int, ...]:
    """The indices of the largest element."""
    return tuple(int(i) for i in torch.unravel_index(t.argmax(), t.shape))
