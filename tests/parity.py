"""Run an op on the Triton backend, in eager and in float64, and compare the three."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import pytest
import torch
from checks import check, dtype_name
from torch import Tensor

import fastvit
from fastvit import ops, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
half = pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_name)


def leaf(*shape: int, scale: float = 1.0, mean: float = 0.0, grad: bool = True) -> Tensor:
    """A random tensor that gets a gradient."""
    return (torch.randn(shape) * scale + mean).requires_grad_(grad)


def fold_every_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fold the norms of 16-bit products into them, whatever their sizes."""

    def placement(M: int, N: int, compute: torch.dtype) -> str:
        return "load" if compute == torch.float32 else "fold"

    monkeypatch.setattr("fastvit_kernels.tuned.norm_placement", placement)


def record_launches(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[str]:
    """The names of the kernels that a module of fastvit_kernels launches from now on."""
    made: list[str] = []
    launch = module.launch

    def record(kernel: Any, *args: Any, **constants: Any) -> Any:
        made.append(kernel.__name__)
        return launch(kernel, *args, **constants)

    monkeypatch.setattr(module, "launch", record)
    return made


@contextmanager
def saved_bytes() -> Iterator[dict[int, int]]:
    """By their addresses, the sizes of the storages that autograd saves in the body."""
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield saved


def check_parity(
    op: str,
    args: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    autocast: bool = False,
    together: bool = False,
    views: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({}),
) -> None:
    """Check output and every gradient of `ops.<op>(**args)` with float64, by the rule of checks.py.

    Tensors of args are float32 and are cast to dtype first; with autocast they stay float32 and
    torch.autocast(dtype) casts as it does for eager. together: check all results in L2 as one
    vector, each divided by its largest element: among hundreds of random shapes eager's worst
    element is sometimes exact by luck. views: functions of tensors of args, whose results the op
    gets instead; gradients are those of the tensors in args.
    """

    def viewed(function: Any) -> Any:
        return lambda **given: function(**given | {k: view(given[k]) for k, view in views.items()})

    inputs = args
    if not autocast:
        inputs = {k: _cast(v, dtype) for k, v in args.items()}
    context = torch.autocast(torch.device(device).type, dtype, enabled=autocast)
    with context:
        eager = results(viewed(getattr(reference, op)), inputs, device)
    with fastvit.use_backend("triton"), context:
        got = results(viewed(getattr(ops, op)), inputs, device)
    wide = {k: _cast(v, torch.float64) for k, v in inputs.items()}
    truth = results(viewed(getattr(reference, op)), wide, dout_dtype=eager["out"].dtype)
    if together:
        scales = {name: t.detach().abs().max().item() or 1.0 for name, t in truth.items()}
        got, eager, truth = (
            torch.cat([r[name].detach().double().cpu().flatten() / scales[name] for name in truth])
            for r in (got, eager, truth)
        )
        check(
            f"{op} {', '.join(scales)} {dtype_name(dtype)}",
            got,
            eager,
            truth,
            dtype,
            elementwise=False,
        )
        return
    for name in truth:
        label = f"{op} {name} {dtype_name(dtype)}"
        check(label, got[name], eager[name], truth[name], dtype if autocast else None)


def results(
    function: Any,
    args: dict[str, Any],
    device: torch.device | str = "cpu",
    dout_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The output and the gradient of each argument that requires one, for a fixed random dout.

    dout_dtype: the dtype that dout is first rounded to, so that float64 gets the same numbers.
    """
    args = {k: _fresh(v, device) for k, v in args.items()}
    out = function(**args)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    out.backward(dout.to(dout_dtype or out.dtype).to(out))
    leaves = {k: v for k, v in args.items() if isinstance(v, Tensor) and v.requires_grad}
    grads = {f"d{k}": v.grad for k, v in leaves.items() if v.grad is not None}
    assert len(grads) == len(leaves), f"of {set(leaves)} only {set(grads)} got a gradient"
    return {"out": out, **grads}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().to(dtype).requires_grad_(value.requires_grad)


def _fresh(value: Any, device: torch.device | str) -> Any:
    """A copy on the device with the same strides, as a leaf."""
    if not isinstance(value, Tensor):
        return value
    copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    copy.copy_(value.detach())
    return copy.to(device).requires_grad_(value.requires_grad)


def check_repeatable(op: str, args: dict[str, Any], dtype: torch.dtype, device: Any) -> None:
    """Two runs are bitwise equal, forward and backward."""
    inputs = {k: _cast(v, dtype) for k, v in args.items()}
    with fastvit.use_backend("triton"):
        first, second = (results(getattr(ops, op), inputs, device) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), f"{op} {name} differs between two runs"


def check_plain_backward(op: str, args: dict[str, Any], device: Any) -> None:
    inputs = {k: _fresh(v, device) for k, v in args.items()}
    leaves = [v for v in inputs.values() if isinstance(v, Tensor) and v.requires_grad]
    with fastvit.use_backend("triton"):
        out = getattr(ops, op)(**inputs)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out.sum(), leaves, create_graph=True, retain_graph=True)
    with pytest.raises(RuntimeError, match="no batch of gradients"):
        torch.autograd.grad(out, leaves, torch.stack([out, out]), is_grads_batched=True)


def check_compiles(op: str, args: dict[str, Any], device: Any, dynamic: bool | None = None) -> None:
    """torch.compile(fullgraph=True) gives the same bits as the op itself, forward and backward."""
    compiled = torch.compile(getattr(ops, op), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with fastvit.use_backend("triton"):
        got, plain = (results(f, args, device) for f in (compiled, getattr(ops, op)))
    for name in plain:
        assert torch.equal(got[name], plain[name]), f"{op} {name} differs under torch.compile"
