"""What the op that writes rows knows of them, handed to the LayerNorm that reads them next.

The epilogue of the product that makes x has its rows in registers: the mean and the squared
deviations of each by pieces of columns, 1.5 % of x's bytes, and, of a float32 x, the 16-bit copy
that the next product reads. With these `layernorm_fold` needs no pass over x of its own.
They wait in one place, for the next reader, and only for the very tensor that was written: another
one, a view or a change in place finds nothing. Compilers see none of it.
"""

import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit_kernels import gemm, library, tuned


class _Slot(threading.local):
    kept: tuple[weakref.ref, int, Tensor, Tensor | None] | None = None


_slot = _Slot()


def are_wanted(rows: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether to make them of rows weight^T, multiplied in `dtype`."""
    if torch.compiler.is_compiling() or not library.are_plain(rows, weight):
        return False
    return tuned.keeps_rows(len(rows), len(weight), dtype)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device, keeps: bool) -> Tensor:
    """Memory for rows; with `keeps` it tells of changes, as tensors of inference mode do not."""
    if not keeps or not torch.is_inference_mode_enabled():
        return torch.empty(shape, dtype=dtype, device=device)
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype, device=device)


def room(a: Tensor, weight: Tensor, out: Tensor) -> tuple[Tensor, Tensor | None]:
    """What epilogue "residual" of gemm(a, weight^T) fills: `gemm.parts_of` and out's copy."""
    copy = None if out.dtype == weight.dtype else weight.new_empty(out.shape)
    return gemm.parts_of(a, weight.t()), copy


def keep(x: Tensor, parts: Tensor, copy: Tensor | None = None) -> None:
    """Until x is read or ends, or the next rows come."""

    def end(ref: weakref.ref) -> None:
        if _slot.kept is not None and _slot.kept[0] is ref:
            _slot.kept = None

    _slot.kept = weakref.ref(x, end), x._version, parts, copy


def take(x: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """parts of x and, where x is not of `dtype`, its copy in `dtype`; None where there are none."""
    kept, _slot.kept = _slot.kept, None
    if kept is None or kept[0]() is not x or kept[1] != x._version:
        return None, None
    copy = kept[3]
    known = x.dtype == dtype if copy is None else copy.dtype == dtype
    return (kept[2], copy) if known else (None, None)


def forget() -> None:
    _slot.kept = None
