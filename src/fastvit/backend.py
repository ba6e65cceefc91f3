"""Backend selection: the setting, the choice from static facts, and the record of choices."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from fastvit_kernels import handoff, limits
from torch import Tensor, nn
from torch.autograd import forward_ad

BACKENDS = ("auto", "triton", "reference")
HAS_TRITON = find_spec("triton") is not None
INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: backend {name!r} is unknown; expected one of {BACKENDS}")
    return name


_backend = _checked(os.environ.get("FASTVIT_BACKEND", "auto"), "FASTVIT_BACKEND")
_record: "list[Choice] | None" = None
# The main thread sets these two, and they hold in every thread that sets none itself: autograd's
# threads, which recompute checkpoints, and DataParallel's must run with their caller's settings.
_own = threading.local()
_threaded = False  # whether any thread ever set its own, and `_own` must be read


@dataclass(frozen=True)
class Choice:
    """One op call and the backend that served it; `reason` says why it was not Triton."""

    op: str
    backend: str
    reason: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the body on 'auto', 'triton' or 'reference', overriding FASTVIT_BACKEND.

    'auto' takes Triton where it can run and the reference elsewhere; 'triton' raises where it
    cannot run, naming the reason. The backward of an op always runs on the backend of its forward;
    what torch.utils.checkpoint recomputes takes the setting at the time of recomputation.

    Set in the main thread, it also holds in threads that set nothing; in another, only there.
    """
    global _backend
    _checked(name, "use_backend")
    if _shares():
        before, _backend = _backend, name
        try:
            yield
        finally:
            _backend = before
    else:
        before, _own.backend = _mine("backend"), name
        try:
            yield
        finally:
            _own.backend = before


def _shares() -> bool:
    """True if the settings of this thread hold for others too."""
    global _threaded
    # Dynamo cannot trace current_thread(); what is set while it traces is restored by the end.
    if torch.compiler.is_compiling() or threading.current_thread() is threading.main_thread():
        return True
    _threaded = True
    return False


def _mine(name: str) -> Any:
    return getattr(_own, name, None) if _threaded else None


def both_contexts() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """Contexts for a checkpointed forward and its recomputation: both on the same backend, and
    both from the input alone, without the row statistics that the previous op left.
    """
    name = _mine("backend") or _backend
    return _from_input_alone(name), _from_input_alone(name)


@contextlib.contextmanager
def _from_input_alone(name: str) -> Iterator[None]:
    handoff.forget()
    with use_backend(name):
        yield


def choose_triton(op: str, x: Tensor, dtype: torch.dtype, unsupported: str | None) -> bool:
    """True if `op` is to run its Triton kernel; decided here only, from static facts alone.

    dtype: what the kernel computes in; unsupported: a reason of the op against its kernel.
    """
    asked, record = _backend, _record
    if _threaded:
        asked = _mine("backend") or asked
        mine = _mine("record")
        record = record if mine is None else mine
    if record is None and (asked == "reference" or (asked == "auto" and not x.is_cuda)):
        return False  # the rest would only find the reason
    reason = _why_not_triton(x, dtype) or unsupported
    if asked == "triton" and reason:
        raise RuntimeError(
            f"{op}: backend 'triton' was asked for, but {reason}. "
            f"Input: {tuple(x.shape)} {x.dtype} on {x.device.type}"
        )
    if asked == "reference":
        reason = "backend 'reference' was asked for"
    elif asked == "auto" and not reason and not x.is_cuda:
        reason = "the interpreter runs only where backend 'triton' is asked for"
    if record is not None:
        backend = "reference" if reason else "triton"
        record.append(Choice(op, backend, reason or "", tuple(x.shape), dtype))
    return not reason


def _why_not_triton(x: Tensor, dtype: torch.dtype) -> str | None:
    if not HAS_TRITON:
        return "triton is not installed"
    if x.is_cuda:
        if torch.version.hip is not None:
            return "the GPU is not NVIDIA's"
        capability = _capability(x.device.index)
        if capability < (8, 0):
            return "the GPU has compute capability {}.{}, under 8.0".format(*capability)
    elif x.device.type != "cpu" or not INTERPRET:
        return f"the input is on {x.device.type}, not on an NVIDIA GPU"
    return _why_untraceable() or limits.dtype(dtype)


def _why_untraceable() -> str | None:
    """The reason if a tracer or transform is active that cannot handle the kernels; torch.compile
    and torch.export can, as ops.
    """
    if torch.compiler.is_compiling():
        return None
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace records PyTorch's own ops alone"
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is active, and the kernels have no rules for those"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is on, and the kernels carry no tangents"
    return None


_capabilities: dict[int, tuple[int, int]] = {}


def _capability(index: int) -> tuple[int, int]:
    if index not in _capabilities:
        _capabilities[index] = torch.cuda.get_device_capability(index)
    return _capabilities[index]


# As torch.compiler.assume_constant_result does, which imports Dynamo first: 2 s at import.
_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


@dataclass
class BackendReport:
    """The choices of one forward pass; `print` shows each distinct one with its count."""

    choices: list[Choice] = field(default_factory=list)

    def __str__(self) -> str:
        counts = {c: self.choices.count(c) for c in dict.fromkeys(self.choices)}
        rows = [("op", "calls", "backend", "input", "dtype", "reason")]
        rows += [
            (c.op, str(n), c.backend, str(c.shape), str(c.dtype).removeprefix("torch."), c.reason)
            for c, n in counts.items()
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows)
        return "\n".join(line.rstrip() for line in lines)


@torch.no_grad()
def backend_report(model: nn.Module, *inputs: Any) -> BackendReport:
    """Run `model(*inputs)` once without gradients and report which backend served each op call.

    Called in the main thread, it includes ops of other threads, except those with a report of
    their own.
    """
    global _record
    choices: list[Choice] = []
    if _shares():
        before, _record = _record, choices
        try:
            model(*inputs)
        finally:
            _record = before
    else:
        before, _own.record = _mine("record"), choices
        try:
            model(*inputs)
        finally:
            _own.record = before
    return BackendReport(choices)


def versions() -> str:
    """One line with the versions of python, torch and triton, and the device."""
    triton = "none"
    if HAS_TRITON:
        from importlib.metadata import version

        triton = version("triton")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    python = ".".join(map(str, sys.version_info[:3]))
    return f"python {python}, torch {torch.__version__}, triton {triton}, {device}"
