"""The one tolerance rule: a kernel may err twice as much as eager PyTorch in the same dtype."""

import math

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
    """Pass if err(got) <= 2 * err(eager) + rounding, in the worst element and, with at least 1024
    elements, where luck averages out, in L2; elementwise=False: in L2 alone, whatever the size.

    got: the kernel's result; eager: the eager reference in the same dtype and on the same inputs;
    truth: the eager reference in float64. NaN and infinities must be in the same places.
    rounding: two units in the last place of the largest element (in L2 one of every element), in
    `dtype`: the dtype of the products under autocast, by default the tensor's own.
    """
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)} != {tuple(truth.shape)}"
    assert got.dtype == eager.dtype, f"{name}: dtype {got.dtype} != eager's {eager.dtype}"
    if truth.numel() == 0:
        return
    got64, eager64, truth = (t.detach().double().cpu() for t in (got, eager, truth))
    finite = truth.isfinite()
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        wrong = kind(got64) != kind(truth)
        assert not wrong.any(), (
            f"{name}: {kind.__name__} differs from float64 at {_index(wrong.double())}, "
            f"{int(wrong.sum())} places"
        )
    got64, eager64, truth = (t[finite] for t in (got64, eager64, truth))
    if truth.numel() == 0:
        return
    ulp = torch.finfo(dtype or eager.dtype).eps
    errors, scale = (got64 - truth).abs(), truth.abs()
    bound = 2 * float((eager64 - truth).abs().max()) + 2 * ulp * float(scale.max())
    worst = float(errors.max())
    assert worst <= bound or not elementwise, (
        f"{name}: worst element {_index(_scatter(errors, finite))} is off by {worst:.3e}, "
        f"allowed {bound:.3e} (2 x eager {dtype_name(eager)} + rounding)"
    )
    if truth.numel() < 1024 and elementwise:
        return
    l2, l2_eager = float(errors.norm()), float((eager64 - truth).norm())
    bound = 2 * l2_eager + ulp * float(truth.norm()) + 1e-300
    assert l2 <= bound, f"{name}: L2 error {l2:.3e}, allowed {bound:.3e} (2 x eager + rounding)"


def dtype_name(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def _index(t: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(t.argmax(), t.shape))


def _scatter(values: Tensor, mask: Tensor) -> Tensor:
    return torch.full(mask.shape, -math.inf, dtype=values.dtype).masked_scatter(mask, values)
