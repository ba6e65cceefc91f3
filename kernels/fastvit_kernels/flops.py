"""FLOP formulas of the ops for `torch.utils.flop_counter`: like PyTorch's, of products alone.

Each formula takes a launcher's arguments by name. Attention's backward recomputes the scores.
"""

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def _product(x: Tensor, weight: Tensor, times: int = 1) -> int:
    """FLOPs of `times` products of x's rows and a weight."""
    return 2 * times * x.shape[:-1].numel() * weight.numel()


def _attention(q: Tensor, a: Any, times: int) -> int:
    """FLOPs of `times` products of the size of q k^T. q: (B, N, H, D), or packed sequences, each of
    max_seqlen if cu_seqlens is a FakeTensor, which has no values.
    """
    B, N, H, D = q.shape
    lengths = [N] * B
    if isinstance(a.cu_seqlens, FakeTensor):
        lengths = [a.max_seqlen] * (len(a.cu_seqlens) - 1)
    elif a.cu_seqlens is not None:
        lengths = a.cu_seqlens.diff().tolist()
    return 2 * times * H * D * sum(n * n for n in lengths)


def _maps(a: Any) -> int:
    B, N, H, D = a.q.shape
    return 2 * B * H * len(a.rows) * N * D * (2 if a.lse is None else 1)


def _patches(a: Any) -> int:
    """FLOPs of the patch embedding's forward, one product."""
    B, _, height, width = a.images.shape
    p_h, p_w = a.weight.shape[2:]
    return 2 * B * (height // p_h) * (width // p_w) * a.weight.numel()


def _branch(a: Any, qkv: int, proj: int, scores: int) -> int:
    """FLOPs of the attention branch: so many products of each weight, and of the size of q k^T."""
    (B, N, _), inner = a.x.shape, len(a.qkv_param) // 3
    linear = _product(a.x, a.qkv_param, qkv) + _product(a.x, a.proj_param, proj)
    return linear + 2 * scores * B * N * N * inner


FORMULAS: dict[str, Callable[[Any], int]] = {
    "patch_embed_fwd": _patches,
    "patch_embed_bwd": lambda a: _patches(a) * sum(a.needs[:2]),
    "layernorm_linear_fwd": lambda a: _product(a.x, a.param),
    "layernorm_linear_bwd": lambda a: _product(a.x, a.param, 1 + any(a.needs[2:])),
    "linear_residual_fwd": lambda a: _product(a.x, a.weight),
    "linear_residual_bwd": lambda a: _product(a.x, a.weight, 1 + any(a.needs)),
    "layernorm_attention_fwd": lambda a: _branch(a, 1, 1, 2),
    "layernorm_attention_bwd": lambda a: _branch(a, 1 + any(a.needs[2:4]), 1 + any(a.needs[4:]), 5),
    "layernorm_mlp_fwd": lambda a: _product(a.x, a.fc1_param, 2),
    "layernorm_mlp_bwd": lambda a: _product(
        a.x, a.fc1_param, 2 + 2 * any(a.needs[2:]) + (a.u.numel() == 0)
    ),
    "attention_fwd": lambda a: _attention(a.q, a, 2),
    "attention_bwd": lambda a: _attention(a.q, a, 5),
    "attention_qkv_bwd": lambda a: _attention(a.qkv.select(2, 0), a, 5),
    "attention_qk_bwd": lambda a: _attention(a.qkv.select(2, 0), a, 5),
    "attention_maps": _maps,
}


def counts(name: str, launcher: Callable[..., Any]) -> Callable[..., int]:
    """A function that counts `launcher`'s FLOPs, for `register_flop_formula(get_raw=True)`."""
    signature = inspect.signature(launcher)

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return FORMULAS.get(name, lambda _: 0)(SimpleNamespace(**bound.arguments))

    return count
