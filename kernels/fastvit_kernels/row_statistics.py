"""Row statistics that the op writing x passes to the LayerNorm that reads x next.

The epilogue of the product that makes x has its rows in registers. It stores the mean and the
sum of squared deviations of each row by pieces of 32 or 64 columns (12 or 6 % of a 16-bit x) and,
for a float32 x, the 16-bit copy that the next product reads. With these, `layernorm_fold` needs no
pass over x of its own. One slot per thread holds them for the next reader, and only for the very
tensor that was written: another tensor, a view or an in-place change finds nothing. Under
torch.compile nothing is kept.
"""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit_kernels import gemm, handoff, library, tuned


def enabled(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether to record the statistics of x's rows times weight^T, multiplied in `dtype`."""
    if torch.compiler.is_compiling() or not handoff.state.depth:
        return False
    if library.has_subclass(x, weight):
        return False
    return tuned.keeps_row_statistics(x.shape[:-1].numel(), len(weight), dtype)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device, keeps: bool) -> Tensor:
    """torch.empty; with `keeps`, with a version counter even in inference mode."""
    if not keeps or not torch.is_inference_mode_enabled():
        return torch.empty(shape, dtype=dtype, device=device)
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype, device=device)


def allocate(a: Tensor, weight: Tensor, out: Tensor) -> tuple[Tensor, Tensor | None]:
    """Buffers for epilogue "residual" of gemm(a, weight^T): row statistics, and out's copy."""
    copy = None if out.dtype == weight.dtype else weight.new_empty(out.shape)
    return gemm.new_row_statistics(a, weight.t()), copy


def keep(x: Tensor, parts: Tensor, copy: Tensor | None = None) -> None:
    """Hold parts and copy of x until x is read or freed, or the next rows are kept."""

    def end(ref: weakref.ref) -> None:
        if handoff.state.kept is not None and handoff.state.kept[0] is ref:
            handoff.state.kept = None

    handoff.state.kept = weakref.ref(x, end), x._version, parts, copy


def take(x: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Take x's parts and, unless x is of `dtype`, its copy in `dtype`; None if not held."""
    kept, handoff.state.kept = handoff.state.kept, None
    if kept is None or kept[0]() is not x or kept[1] != x._version:
        return None, None
    copy = kept[3]
    known = x.dtype == dtype if copy is None else copy.dtype == dtype
    return (kept[2], copy) if known else (None, None)
