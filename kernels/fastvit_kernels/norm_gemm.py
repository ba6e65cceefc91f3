"""norm(x) W^T with any epilogue of `gemm`, and the cast of W that it needs.

`tuned.norm_placement` chooses where the norm is applied.
"""

from typing import Any

import torch
from torch import Tensor

from fastvit_kernels import gemm, layernorm, layernorm_fold, tuned


def norm_is_folded(x: Tensor, param: Tensor, dtype: torch.dtype) -> bool:
    """Whether norm_gemm folds the norm into param itself, and does not read the cast weight."""
    return len(x) > 0 and tuned.norm_placement(len(x), len(param), dtype) == "fold"


def plan_cast(
    param: Tensor, dtype: torch.dtype, needed: bool = True
) -> tuple[Tensor | None, list[tuple[Tensor, Tensor]]]:
    """param in `dtype` (None if not needed), and the (source, target) pairs still to be cast."""
    if param.dtype == dtype:
        return param, []
    if not needed:
        return None, []
    weight = torch.empty(param.shape, dtype=dtype, device=param.device)
    return weight, [(param, weight)]


def returnable(weight: Tensor | None, param: Tensor) -> Tensor:
    """weight for an op to return: empty if it is None or param, an argument of the op."""
    return param.new_empty(0) if weight is None or weight is param else weight


def norm_gemm(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor | None,
    out: Tensor,
    eps: float,
    rms: bool,
    param: Tensor,
    rows: tuple[Tensor | None, Tensor | None] = (None, None),
    known: tuple[Tensor, Tensor] | None = None,
    casts: layernorm.Casts = (),
    **epilogue: Any,
) -> tuple[Tensor, Tensor]:
    """Write epilogue(norm(x) weight^T) to out; return mean and rstd. param: weight before its cast;
    rows: parts and copy of x; known: mean and rstd, when this is recomputed in backward; casts: of
    weights, in the norm's launch.
    """
    if norm_is_folded(x, param, out.dtype):
        norm, bias = (norm_weight, norm_bias), epilogue.pop("bias", None)
        folded = layernorm_fold.layernorm_fold(
            x, *norm, param, bias, eps, rms, out.dtype, *rows, known, casts
        )
        fold = (folded.shift, folded.scale, folded.sums)
        gemm.gemm(folded.z, folded.weight.t(), out, fold=fold, bias=folded.bias, **epilogue)
        return folded.mean, folded.rstd
    assert weight is not None
    loads = tuned.norm_placement(len(x), len(param), out.dtype) == "load"
    y_dtype = None if loads else out.dtype
    y, mean, rstd = layernorm.layernorm_fwd(x, norm_weight, norm_bias, eps, rms, y_dtype, casts)
    if y is None:
        norm = (norm_weight, norm_bias, mean, rstd)
        gemm.gemm(x, weight.t(), out, norm=norm, **epilogue)
    else:
        gemm.gemm(y, weight.t(), out, **epilogue)
    return mean, rstd
