"""Checks of the ops' arguments. Every error names the op, the argument, what came and what was
expected."""

from itertools import pairwise

import torch
from torch import Tensor

from fastvit.errors import UsageError

NORMS = ("layernorm", "rmsnorm")


def check_norm_kind(op: str, kind: str) -> None:
    if kind not in NORMS:
        raise ValueError(f"{op}: norm {kind!r} is unknown; expected {NORMS}")


def check_rate(op: str, dropout: float) -> None:
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"{op}: dropout must be in [0, 1), got {dropout}")


def check_qk(
    op: str,
    qkv: Tensor,
    device: torch.device,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm_kind: str | None,
) -> None:
    """Check the arguments of QK-norm and RoPE for qkv, (B, N, 3, H, D)."""
    B, N, _, _, D = qkv.shape
    if norm_kind not in (None, *NORMS):
        raise ValueError(f"{op}: norm_kind {norm_kind!r} is unknown; expected {NORMS}")
    params = {"q_weight": q_weight, "q_bias": q_bias, "k_weight": k_weight, "k_bias": k_bias}
    for name, param in params.items():
        check_norm(op, name, param, D, qkv, norm_kind, device)
        if param is not None and norm_kind is None:
            raise ValueError(f"{op}: {name} was given without norm_kind")
    if (cos is None) != (sin is None):
        raise ValueError(f"{op}: cos and sin go together")
    if cos is not None:
        check_device(op, "cos", cos, device)
        m = cos.shape[-2] if cos.ndim >= 2 else 0
        # Size by size: a compiler with dynamic shapes does not find tuples of sizes equal.
        batched = cos.ndim == 3 and cos.shape[0] == B
        if D % 2 or not (cos.ndim == 2 or batched) or cos.shape[-1] != D // 2 or m > N:
            expected = f"(m, {D // 2}) or ({B}, m, {D // 2}) with m <= {N}"
            raise ValueError(f"{op}: cos must be {expected}, got {shape_of(cos)}")
        check_optional(op, "sin", sin, shape_of(cos), device)


def check_norm(
    op: str,
    name: str,
    t: Tensor | None,
    dim: int,
    x: Tensor,
    kind: str | None,
    device: torch.device,
) -> None:
    """Check a norm's parameter: (dim,), in x's dtype, or in float32 for a 16-bit x."""
    if t is None:
        return
    if getattr(t, "device", None) != device:
        raise _misplaced(op, name, t, device)
    if t.shape != (dim,):
        raise ValueError(f"{op}: {name} must be {(dim,)}, got {shape_of(t)}")
    if kind == "rmsnorm" and name.endswith("_bias"):
        raise UsageError(f"{op}: {name} must be None: RMSNorm has no bias")
    if t.dtype != x.dtype and kind == "layernorm":
        check_norm_dtype(op, name, t.dtype, x)


def check_norm_dtype(op: str, name: str, dtype: torch.dtype, x: Tensor) -> None:
    """Check the dtype of a LayerNorm parameter, which is not x's."""
    wide = x.dtype in (torch.float32, torch.float64)
    # Under autocast on a GPU, eager casts both.
    if (wide or dtype != torch.float32) and not (x.is_cuda and torch.is_autocast_enabled("cuda")):
        also = "" if wide else " or torch.float32"
        raise UsageError(f"{op}: {name} is {dtype}; expected x's {x.dtype}{also}")


def check_bounds(op: str, cu_seqlens: Tensor, total: int, max_seqlen: int) -> None:
    """Check that cu_seqlens rises from 0 to total in steps of at most max_seqlen."""
    if len(cu_seqlens) == 1 and total:
        raise UsageError(f"{op}: cu_seqlens holds no sequence, but qkv has {total} rows")
    if not cu_seqlens.is_cpu or torch.compiler.is_compiling():
        return  # reading from a GPU would synchronize; a compiler has no values
    bounds = cu_seqlens.tolist()
    lengths = [b - a for a, b in pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != total or min(lengths, default=0) < 0:
        raise UsageError(f"{op}: cu_seqlens must rise from 0 to {total}, got {_brief(bounds)}")
    if max(lengths, default=0) > max_seqlen:
        raise UsageError(
            f"{op}: max_seqlen is {max_seqlen}, but a sequence has {max(lengths)} rows"
        )


def _brief(numbers: list[int]) -> str:
    """All of a short list, the two ends of a long one."""
    if len(numbers) <= 8:
        return str(numbers)
    return f"[{str(numbers[:4])[1:-1]}, ..., {str(numbers[-3:])[1:-1]}]"


def check_operand(op: str, name: str, x: Tensor) -> torch.device:
    """Check that x is a floating-point tensor, and return its device."""
    if not isinstance(x, Tensor):
        raise UsageError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if not x.dtype.is_floating_point:
        raise UsageError(
            f"{op}: {name} is {x.dtype}; expected floating point: convert it by {name}.float()"
        )
    return x.device


def compute_dtype(op: str, name: str, x: Tensor, **others: Tensor | None) -> torch.dtype:
    """The dtype the op multiplies in: autocast's, else the one that all operands must share."""
    dtype = x.dtype
    # Autocast does not know the meta device, where only shapes matter.
    if dtype != torch.float64 and not x.is_meta and torch.is_autocast_enabled(x.device.type):
        for other, tensor in others.items():
            if tensor is not None:
                check_operand(op, other, tensor)
        return torch.get_autocast_dtype(x.device.type)
    for other, tensor in others.items():
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(
                f"{op}: {name} is {dtype} but {other} is {tensor.dtype}; "
                "expected one dtype, or torch.autocast"
            )
    return dtype


def no_gradient(names: str, *tensors: Tensor | None) -> str | None:
    """The reason against a kernel that takes `tensors` as constants: one needs a gradient."""
    for t in tensors:
        if t is not None and t.requires_grad and torch.is_grad_enabled():
            return f"the kernel has no gradient of {names}"
    return None


def batch_of(t: Tensor) -> int:
    """t's batch size; 1 under a compiler, where checking it would add a guard."""
    return 1 if torch.compiler.is_compiling() else len(t)


def shape_of(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)


def _misplaced(op: str, name: str, t: Tensor, device: torch.device) -> UsageError:
    """The error for t, which is not a tensor or is on another device."""
    if not isinstance(t, Tensor):
        return UsageError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
    return UsageError(f"{op}: {name} is on {t.device}, expected {device}")


# These run for every argument of every call; one comparison also catches what is not a tensor.
def check_device(op: str, name: str, t: Tensor, device: torch.device) -> None:
    if getattr(t, "device", None) != device:
        raise _misplaced(op, name, t, device)


def check_rank(op: str, name: str, t: Tensor, rank: int, device: torch.device) -> None:
    if getattr(t, "device", None) != device:
        raise _misplaced(op, name, t, device)
    if t.ndim != rank:
        raise ValueError(f"{op}: {name} must have {rank} dimensions, got {shape_of(t)}")


def check_last(op: str, name: str, t: Tensor, size: int) -> None:
    if t.ndim < 1 or t.shape[-1] != size:
        raise ValueError(f"{op}: {name} must end in {size}, got {shape_of(t)}")


def check_integers(op: str, name: str, t: Tensor | None, size: int, device: torch.device) -> None:
    if t is None:
        return
    check_shape(op, name, t, (size,), device)
    if t.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} must be int32 or int64, got {t.dtype}")


def check_optional(
    op: str, name: str, t: Tensor | None, shape: tuple[int, ...], device: torch.device
) -> None:
    if t is not None:
        check_shape(op, name, t, shape, device)


def check_shape(
    op: str, name: str, t: Tensor, shape: tuple[int, ...], device: torch.device
) -> None:
    if getattr(t, "device", None) != device:
        raise _misplaced(op, name, t, device)
    if t.shape != shape:
        raise ValueError(f"{op}: {name} must be {shape}, got {shape_of(t)}")
