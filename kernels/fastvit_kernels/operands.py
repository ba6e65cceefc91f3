"""Operands as the kernels read them: dtypes, layouts and TMA descriptors."""

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

TL_DTYPE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def precision(dtype: torch.dtype) -> str:
    """Input precision of products: "tf32" for float32 if PyTorch's switch is on, else "ieee"."""
    if dtype != torch.float32:
        return "ieee"
    # fp32_precision reflects allow_tf32, which raises when read after fp32_precision was set.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def as_rows(x: Tensor) -> Tensor:
    """x as a matrix of rows; copied unless rows have one stride and columns stride 1."""
    return (x if x.stride(-1) == 1 else x.contiguous()).reshape(-1, x.shape[-1])


def contiguous(*vectors: Tensor | None) -> list[Tensor | None]:
    """The vectors made contiguous, as the kernels read them; copied only if they are not.
    Call it before an autograd Function, so that gradients flow back to the originals.
    """
    return [t if t is None or t.is_contiguous() else t.contiguous() for t in vectors]


def tma_compatible(*tensors: Tensor) -> bool:
    """Whether TMA can address the matrices: 16-bit, unit column stride, base and row stride aligned
    to 16 bytes.
    """
    return all(
        t.element_size() == 2
        and t.stride(1) == 1
        and t.stride(0) % 8 == 0
        and t.stride(0) >= t.shape[1]
        and t.data_ptr() % 16 == 0
        for t in tensors
    )


def descriptor(t: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(t, list(t.shape), list(t.stride()), block)


def tokens_per_sample(rows: int, path_scale: Tensor | None) -> int:
    """How many of the rows share one number of path_scale (B,); 1 without path_scale or rows."""
    return 1 if path_scale is None or rows == 0 else rows // len(path_scale)
