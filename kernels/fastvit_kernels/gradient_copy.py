"""A float32 gradient's 16-bit copy, handed from one op's backward to the next.

Under autocast the residual stream and its gradient are float32, and every product of the backward
that comes next reads that gradient in 16 bits. The kernel that writes it has it in registers: it
writes the copy beside it, which spares the next kernels a pass over float32 and a cast, and lets
TMA feed them. The copy travels on the gradient itself: whatever replaces that tensor (a hook that
returns another, a sum of two gradients) leaves the copy behind, and a change in place shows in the
tensor's version. Compilers see no copies.
"""

import torch
from torch import Tensor


def is_wanted(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the backward that x's gradient goes to takes a copy of it in `dtype`: its context
    says so by `reads_copy_in`.
    """
    if torch.compiler.is_compiling() or x.dtype == dtype:
        return False
    return getattr(x.grad_fn, "reads_copy_in", None) == dtype


def carry(grad: Tensor, copy: Tensor) -> None:
    """Let grad carry its copy, of the same elements in the same order."""
    grad._fastvit_copy = copy, grad._version  # type: ignore[attr-defined]


def carried(grad: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """grad's copy in `dtype`, in grad's shape; None where there is none of what grad holds now."""
    if dtype is None or torch.compiler.is_compiling():
        return None
    copy, version = getattr(grad, "_fastvit_copy", (None, 0))
    if copy is None or copy.dtype != dtype or version != grad._version:
        return None
    return copy.view(grad.shape)
