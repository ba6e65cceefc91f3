"""Launch kernels at little cost to the CPU.

A ViT block makes 7 launches forward and 15 backward, of some 25 arguments each; in small batches
and small models the GPU waits for them. Triton binds and classifies every argument of every call;
here what it compiled is kept under the few facts that it compiles for, and is called with the
arguments as they are. `replay` goes on from there, and makes all launches of an op's call at once.
"""

import threading
from collections.abc import Callable
from typing import Any, Protocol

from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

_TRITONS_RUN = JITFunction.run
_general: dict[int, tuple[bool, ...]] = {}

Again = Callable[[Any, Any], Any]  # makes a launch, of (stream, args)


class Watcher(Protocol):
    def launch(self, again: Again, stream: Any, args: tuple, compiled: bool) -> Any:
        """again(stream, args), and keep it. compiled: addresses do for tensors."""
        ...


class _Watching(threading.local):
    by: Watcher | None = None  # who wants to make the launches of a thread again


watching = _Watching()
_compiled: dict[tuple, tuple[Any, tuple]] = {}


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def by_eights(*sizes: int) -> bool:
    """What to tell `common.eights` of sizes and strides: 8 divides them all, 16 not."""
    return all(n % 8 == 0 for n in sizes) and any(n % 16 for n in sizes)


def is_tritons() -> bool:
    """Whether nobody stands in for Triton's launch, or is told of each, as profilers are."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return JITFunction.run is _TRITONS_RUN and not any(getattr(h, "calls", h) for h in hooks)


def current_stream() -> Any:
    return driver.active.get_current_stream(driver.active.get_current_device())


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """kernel[grid](*args, **constants). args: all arguments that are no constexpr, in order;
    constants: the constexprs, num_warps, num_stages and maxnreg.
    """

    def by_triton(_: Any, args: Any) -> Any:
        return kernel[grid](*args, **constants)

    # Interpreted, or the ahead-of-time compiler or the tuner stands in for Triton's launch.
    if type(kernel) is not JITFunction or not is_tritons():
        _make(by_triton, None, args, False)
        return
    # What Triton compiles anew for: the device, constants, and the facts about each argument.
    device = driver.active.get_current_device()
    key: list[Any] = [id(kernel), device, *constants]
    key += constants.values()
    addresses = 0
    for arg, general in zip(args, _is_general(kernel), strict=False):
        kind = type(arg)
        if arg is None:
            key.append(None)
        elif kind is int:
            key.append(arg >> 31 if general else arg)
        elif kind is TensorDescriptor:
            key.append(arg.base.dtype)
        elif kind is not float:
            key.append(arg.dtype)
            addresses |= arg.data_ptr()
    if addresses % 16:
        _make(by_triton, None, args, False)
        return
    found = _compiled.get(tuple(key))
    if found is None:
        compiled = _make(by_triton, None, args, False)
        rest = tuple(constants[p.name] for p in kernel.params[len(args) :])
        _compiled[tuple(key)] = compiled, rest
        return
    _make(_again(*found, grid), driver.active.get_current_stream(device), args, True)


def _again(compiled: Any, rest: tuple, grid: tuple[int, ...]) -> Again:
    """A launch of what Triton compiled; rest: the constexprs."""
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    x, y, z = (*grid, 1, 1)[:3]

    def again(stream: Any, args: Any) -> None:
        run(x, y, z, stream, function, metadata, None, None, None, *args, *rest)

    return again


def _make(again: Again, stream: Any, args: tuple, compiled: bool) -> Any:
    if watching.by is None:
        return again(stream, args)
    return watching.by.launch(again, stream, args, compiled)


def _is_general(kernel: Any) -> tuple[bool, ...]:
    """Of each argument, whether the kernel is compiled for any value of it."""
    if id(kernel) not in _general:
        _general[id(kernel)] = tuple(p.do_not_specialize for p in kernel.params)
    return _general[id(kernel)]
