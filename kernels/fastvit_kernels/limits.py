"""Limits of the kernels: each function returns None or why a case is unsupported. No Triton."""

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIM_MIN, HEAD_DIM_MAX = 16, 128
BATCH_MAX = 65535  # CUDA's limit on a grid's z dimension


def dtype(dtype: torch.dtype) -> str | None:
    return None if dtype in DTYPES else f"dtype {dtype} is not float32, float16 or bfloat16"


def attention(head_dim: int, scale: float | None = None, batch: int = 1) -> str | None:
    if batch > BATCH_MAX:
        return f"batch {batch} is over {BATCH_MAX}"
    if scale is not None and not 0 < scale < float("inf"):
        return f"scale {scale} is not positive and finite"
    if head_dim % 8 or not HEAD_DIM_MIN <= head_dim <= HEAD_DIM_MAX:
        return f"head dim {head_dim} is not a multiple of 8 in {HEAD_DIM_MIN}..{HEAD_DIM_MAX}"
    return None


def linear(in_features: int, out_features: int) -> str | None:
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if size % 8:
            return f"{name} {size} is not a multiple of 8"
    return None


def patch_embed(dim: int) -> str | None:
    return f"dim {dim} is not a multiple of 8" if dim % 8 else None
